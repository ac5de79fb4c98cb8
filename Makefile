# Every target builds the environment it needs: .venv, from pyproject.toml and constraints.txt. Only those for a machine
# with a GPU take what is there: .venv, or else $(PYTHON) with torch, Triton and transformers.
#
#   make run         convert the built-in tiny Llama: prepare, distill, finetune, evaluate, export
#   make test        the whole test-suite (no GPU, no network)
#   make test-slurm  its tests on a real Slurm and the long ones of them (as root on Debian; skipped elsewhere)
#   make test-slurm-long  fifty random kills over a whole graph there (a quarter of an hour)
#   make lint        ruff and pyright
#   make compiles    compile the Triton kernels for sm_80, sm_86 and sm_90; runs their PTX (no nvcc, no GPU)
#   make cuda        the same, and the CUDA kernels for sm_80, sm_90 and sm_90a (needs nvcc, no GPU)
#   make bench-all   everything for a GPU in under eight minutes: what is right, then how fast
#   make bench-gpu   the CUDA kernels on a GPU: correctness, then times
#   make bench       speed and memory of the kernels on this machine
#   make bench-7b    both training stages and generation at Llama-2 7B's size, on a GPU; 1/64 as wide without

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS)

# a GPU machine may reach no package registry
BENCH_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: install run test test-slurm test-slurm-long lint format compiles cuda bench bench-all bench-gpu bench-7b clean

install: $(VENV)/.installed

# torch first and pinned: with it there, no other package pulls a second build.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info[:2] <= (3, 13) else "Python 3.10 to 3.13 is needed; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch, then the rest (some minutes the first time) ..."
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[dev,eval]'
	@touch $@

run: install
	$(BIN)/hedgehog run configs/tiny.yaml

# Four workers on two cores: two of them mostly wait, for a real Slurm. A thread each: more would wait for each other.
test: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist worksteal -m "not compiles and not long"

test-slurm: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/slurm

test-slurm-long: install
	HF_HUB_OFFLINE=1 HEDGEHOG_SLURM_KILLS=50 HEDGEHOG_KILL_SEED=396223321 $(BIN)/python -m pytest -s tests/slurm/test_random_kills.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compiles: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m compiles tests/kernels

cuda: compiles
	$(BIN)/python -m hedgehog.kernels.cuda.compile_check

bench: install
	$(BIN)/python benchmarks/bench.py

bench-all:
	$(BENCH_PYTHON) benchmarks/all_gpu.py

bench-7b:
	$(BENCH_PYTHON) benchmarks/bench_7b.py

bench-gpu:
	$(BENCH_PYTHON) benchmarks/bench_gpu.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache

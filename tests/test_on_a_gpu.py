"""What the pipeline does on a GPU, on one that is made of this machine's memory (tests/stand_in_gpu/device.cpp).

There tensors are on `cuda:0`, DeepSpeed has its CUDA accelerator, processes meet through `nccl`, and the kernels for
GPUs are chosen: the CUDA kernels as their emulation, the Triton kernel in Triton's interpreter. It computes what a CPU
computes. What is a real GPU's alone is not here: the compiled kernels, streams, NCCL itself, bitsandbytes' CUDA
library, and time.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent / "stand_in_gpu"
CONFIGS = Path(__file__).parents[1] / "configs"

sys.path.append(str(HERE))
import stand_in  # noqa: E402

pytestmark = pytest.mark.skipif(stand_in.why_not() is not None, reason=str(stand_in.why_not()))

OnGpu = Callable[..., str]
KERNEL_SHAPES = {
    "tiny.num_heads": 2,
    "tiny.num_key_value_heads": 1,
    "tiny.num_layers": 2,
    "model.feature_map": "hedgehog_softmax",
    "model.feature_dim": 64,
}
"""Head dim 64 and 128 features: the CUDA kernels have them, the Triton kernel too."""
SAME_STEPS = ("micro_batch_size", "gradient_clip")
"""With these of `one_process_run` steps are the same on one process and on two."""
FEW = {
    "tiny.pretrain_steps": 5,
    "tiny.num_train_dialogues": 40,
    "tiny.num_validation_dialogues": 2,
    "tiny.num_test_dialogues": 2,
    **{f"{stage}.max_steps": 1 for stage in ("distill", "finetune")},
    **{f"{stage}.{size}_batch_size": 1 for stage in ("distill", "finetune") for size in ("global", "micro")},
    "evaluate.max_new_tokens": 3,
    "variants": "{}",
}


@pytest.fixture(scope="session")
def on_gpu(everyones_folder: Path) -> OnGpu:
    """`on_gpu("script.py", …)`: a Python process that sees the stand-in; returns what it printed."""
    library = stand_in.build(everyones_folder)

    def run(*arguments: str, cwd: Path | None = None, capacity: int | None = None, fails: bool = False) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=stand_in.environment(library, capacity),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=900,
        )
        said = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, said[-6000:]
        return said

    return run


@pytest.fixture(scope="session")
def forked_on_gpu(everyones_folder: Path, forking_server: Any) -> Iterator[OnGpu]:
    """The same for a script of the stand-in's in a forked process, which need not import what takes seconds."""
    environment = stand_in.environment(stand_in.build(everyones_folder))
    place = everyones_folder / "forking-on-gpu"
    place.mkdir(exist_ok=True)

    def run(script: str, *arguments: str) -> str:
        status, said = forking_server.run_forked(place, HERE / script, arguments, environment)
        assert status == 0, said[-6000:]
        return said

    with forking_server.connect(place, environment):  # keeps it alive
        yield run


@pytest.fixture(scope="session")
def run_stages(on_gpu: OnGpu, forked_on_gpu: OnGpu) -> Callable[..., str]:
    """`run_stages((run, "distill"), …, ranks=2)`: stages there, one after the other; returns what was printed."""

    def run(*work: tuple[Any, str], ranks: int = 1, **options: Any) -> str:
        from hedgehog.pipeline.distributed import free_port

        argument = json.dumps([(run.values, stage) for run, stage in work])
        if ranks == 1 and not options:
            return forked_on_gpu("run_stages.py", argument)
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
        script = [str(HERE / "run_stages.py"), argument]
        return on_gpu(*(launcher if ranks > 1 else []), *script, **options)

    return run


def test_the_stand_in_is_a_device(on_gpu: OnGpu) -> None:
    assert on_gpu(str(HERE / "look_at_the_device.py")).endswith("a device\n")


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_training_on_a_gpu_is_that_on_a_cpu(zero_stage: int, new_run, run_stages) -> None:
    """And `engine.device: cpu` is a CPU where there is a GPU, to the bit: DeepSpeed would take the GPU.

    On the GPU torch's AdamW takes all weights at once, and spans and blocks are larger: other roundings.
    """
    changes = {"engine__zero_stage": zero_stage, "finetune__gradient_checkpointing": True}
    if zero_stage == 1:
        changes |= {"engine__offload_optimizer": True, "distill__query_fraction": 0.5}
        changes |= {"distill__output_mse_weight": 0.5, "distill__packing": True, "finetune__packing": True}
    expected = new_run(**changes)
    for stage in ("distill", "finetune"):
        expected.stage(stage)
    beside, there = new_run(**changes), new_run(**changes, engine__device="cuda")
    places = [(there, "float32 tiles do not fit")] + ([(beside, "no kernel for cpu")] if zero_stage == 1 else [])
    for run, where in places:
        assert where in run_stages((run, "distill"), (run, "finetune"))
        for stage in ("distill", "finetune"):
            assert run.losses(stage) == pytest.approx(expected.losses(stage), rel=1e-5 if run is there else 0, abs=0)


def test_a_run_that_began_on_a_cpu_goes_on_on_a_gpu(new_run, interrupt, run_stages) -> None:
    expected, run = new_run(), new_run(engine__device="cuda")
    expected.stage("distill")
    interrupt(run.changed(engine__device="cpu"), "distill")
    assert "goes on" in run_stages((run, "distill"))
    assert run.losses("distill") == pytest.approx(expected.losses("distill"), rel=1e-5)


@pytest.mark.slow
def test_two_ranks_meet_through_nccl(new_run, run_stages, one_process_run) -> None:
    expected = one_process_run("zero1")
    single = {f"{stage}__{key}": expected.values[stage][key] for stage in ("distill", "finetune") for key in SAME_STEPS}
    run = new_run(**single, engine__zero_stage=3, engine__device="cuda")
    run_stages((run, "distill"), (run, "finetune"), ranks=2)
    for stage in ("distill", "finetune"):
        expected.stage(stage)
        assert run.losses(stage) == pytest.approx(expected.losses(stage), rel=1e-5)


@pytest.mark.slow
def test_every_stage_with_the_kernels_of_a_gpu(on_gpu: OnGpu, tmp_path: Path) -> None:
    """From nothing to the export, which plain transformers loads on that GPU; what ran is what was to run. Under
    ZeRO-3, which puts other tensors in the places of a batch's, where the Triton kernel looks for those it knows."""
    engine = {"engine.device": "cuda", "engine.precision": "bfloat16", "engine.zero_stage": 3}
    overrides = [f"{key}={value}" for key, value in {**KERNEL_SHAPES, **FEW, **engine}.items()]
    said = on_gpu("-m", "hedgehog.pipeline.cli", "run", str(CONFIGS / "tiny.yaml"), *overrides, cwd=tmp_path)
    assert "distillation loss: triton (sm_90, bfloat16)" in said
    assert said.count("linear attention: cuda (compiled for cuda, bfloat16, F=128, V=64; φ inside the kernel)") == 3
    assert "loads with plain transformers" in said
    for words in ("by PyTorch", "log-sum-exp of torch", "differs", "Error", "UserWarning", "peak memory 0 B"):
        assert words not in said, said
    (command,) = re.findall(r"try it +hedgehog (.*)", said)
    answered = on_gpu("-m", "hedgehog.pipeline.cli", *shlex.split(command), cwd=tmp_path)
    assert "linear attention: cuda (" in answered and "3 made" in answered
    assert "Kept between tokens: 130.0 KiB" in answered  # 2 layers · 2 heads · 128 features · (64 + 1) · 4 bytes


@pytest.mark.slow
def test_memory_on_a_gpu_is_what_was_estimated(forked_on_gpu: OnGpu, tmp_path: Path) -> None:
    """Within 10 %, weights and optimizer included, as the tensors of real steps are counted."""
    forked_on_gpu("measure_memory.py", str(tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    rows = [*report["distill"], *report["finetune"]]
    assert [row.get("attention") for row in rows] == [None, "linear", "softmax"]
    assert "triton" in rows[0]["backend"] and "PyTorch" not in rows[1]["backend"]
    for row in rows:
        assert row["estimate"]["ratio"] == pytest.approx(1, abs=0.1), row


def test_where_memory_ends_a_gpu_says_which_estimate_to_change(new_run, run_stages) -> None:
    run = new_run(engine__device="cuda")
    said = run_stages((run, "distill"), capacity=200_000, fails=True)
    assert "out of GPU memory (CUDA out of memory" in said and "What lowers it" in said
    assert "other processes hold 80.0 GiB" in said


@pytest.mark.slow
def test_the_benchmarks_of_a_gpu_run(forked_on_gpu: OnGpu, tmp_path: Path) -> None:
    """Every line of theirs that a GPU alone would reach, but the sanitizer's: events, graphs, the GPU's sizes."""
    forked_on_gpu("run_benchmarks.py", str(tmp_path))
    kernels, model = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("bench_gpu", "bench_7b"))
    assert {"another stream", "decoding in a CUDA graph"} <= kernels["correctness"]["checks"].keys()
    assert any("seconds" in row for row in kernels["times"]) and any("seconds" in row for row in kernels["decoding"])
    assert [row["backend"].split(" (")[0] for row in model["distill"] if row["loss"] == "tiled"] == [
        "distillation loss: triton"
    ]
    assert all("skipped" not in row and "failed" not in row for key in ("finetune", "generate") for row in model[key])

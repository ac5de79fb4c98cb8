"""Runs whose `prepare` is finished, for the stages that train: a tiny random Llama and a few rows of random tokens."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton decides when first imported, by whatever library, whether this process compiles kernels or interprets them
os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    # as a shell starts what it runs in the background; the tests of Ctrl-C need it back
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)  # what -m leaves out is gone by then
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, or one worker of xdist would be left with it at the end. Those on a real Slurm
    mostly wait: two workers start with half of them each. The other slow ones are dealt to the other workers. Each has
    an equal share of the rest; whoever is done takes over tests from another one's end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items[:] = dealt(items, int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))


def dealt(items: list[pytest.Item], num_workers: int) -> list[pytest.Item]:
    """So ordered that `--dist worksteal`, which cuts it into equal parts, gives each worker what is meant for it."""
    on_slurm = [item for item in items if item.get_closest_marker("slurm")]
    slow = [item for item in items if item.get_closest_marker("slow") and not item.get_closest_marker("slurm")]
    taken = {id(item) for item in (*on_slurm, *slow)}
    rest = [item for item in items if id(item) not in taken]
    patient = min(2, num_workers)
    busy = max(1, num_workers - patient)
    first = [on_slurm[worker::patient] for worker in range(patient)] + [[] for _ in range(num_workers - patient)]
    for worker in range(busy):
        first[-busy + worker] += slow[worker::busy]
    order: list[pytest.Item] = []
    for worker, begins in enumerate(first):
        part = (len(items) - len(order)) // (num_workers - worker)
        share = max(0, part - len(begins))
        order += [*begins, *rest[:share]]
        del rest[:share]
    return order + rest


_modules_when_frozen = 0


@pytest.hookimpl(tryfirst=True)  # before fixtures are made: what they make is collected as ever
def pytest_runtest_setup() -> None:
    """What a worker has imported (torch, DeepSpeed, transformers: over a million objects) is nothing to collect, and
    looking through it took half of the time of tests that train."""
    global _modules_when_frozen
    if len(sys.modules) > _modules_when_frozen + 100:
        _modules_when_frozen = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Training that a test cuts off under ZeRO-3 leaves the process DeepSpeed's own F.linear, which keeps other tensors
    than torch's: tests that count them failed when they came after."""
    if "deepspeed" in sys.modules:
        from hedgehog.pipeline.engine import release_deepspeed

        release_deepspeed()


NUM_LAYERS = 3
NUM_STEPS = 4
"""A checkpoint is saved after every second step; `interrupt` stops in the middle of the fourth."""

# What one of several processes runs: [config, stage, step to die at or null] in turn.
_PROCESS = """
import json, sys
from hedgehog.pipeline import training
from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.runner import run_stage

seed_step = training.seed_step
for values, stage, last_step in json.loads(sys.argv[1]):
    def stop(seed, step, rank):
        if step == last_step:
            raise KeyboardInterrupt
        seed_step(seed, step, rank)
    training.seed_step = stop
    try:
        run_stage(RunConfig.model_validate(values), stage)
    except KeyboardInterrupt:
        assert last_step is not None
"""


@dataclass(frozen=True)
class TrainingRun:
    """A run folder, its config with overrides, and what its stages left behind."""

    root: Path
    values: dict[str, Any]

    @property
    def config(self) -> Any:
        from hedgehog.pipeline.config import RunConfig

        return RunConfig.model_validate(self.values)

    def changed(self, **overrides: Any) -> TrainingRun:
        """The same run folder under another config: `engine__zero_stage=3`."""
        return TrainingRun(self.root, override(self.values, overrides))

    def stage(self, stage: str) -> Any:
        """Run a stage in this process; returns its manifest."""
        from hedgehog.pipeline.runner import run_stage

        return run_stage(self.config, stage)

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """What metrics.jsonl holds, without times and memory."""
        lines = (self.root / stage / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in ("step_s", "memory_bytes")} for line in lines]

    def losses(self, stage: str) -> list[float]:
        return [record["loss_nats"] for record in self.metrics(stage)]

    def tensors(self, path: str) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(self.root / path)

    def assert_same_tensors(self, other: TrainingRun, *paths: str) -> None:
        """To the bit, in files of both folders."""
        import torch

        for path in paths:
            tensors, expected = self.tensors(path), other.tensors(path)
            assert tensors.keys() == expected.keys()
            for name in expected:
                assert torch.equal(tensors[name], expected[name]), name


def override(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    values = json.loads(json.dumps(values))
    for key, value in overrides.items():
        *sections, name = key.split("__")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
    return values


def _base_config(family: str) -> Any:
    """Weights large enough that attention is not flat; GPT-2 with its usual dropout."""
    from transformers import BertConfig, GPT2Config, LlamaConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4}
    shared = {**sizes, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
    if family.startswith("bert"):
        rate = 0 if family == "bert without dropout" else 0.1
        of_bert = {**sizes, "max_position_embeddings": 128, "initializer_range": 0.3, "intermediate_size": 48}
        return BertConfig(**of_bert, hidden_dropout_prob=rate, id2label={0: "no", 1: "yes"})
    if family == "gpt2":
        return GPT2Config(**shared, n_inner=48)
    if family == "gpt2 without dropout":
        return GPT2Config(**shared, n_inner=48, resid_pdrop=0, embd_pdrop=0)
    return LlamaConfig(**shared, intermediate_size=48, num_key_value_heads=2)


def _prepare(folder: Path, family: str) -> None:
    """A finished prepare stage."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForPreTraining, AutoModelForSequenceClassification

    from hedgehog.pipeline.data.tokens import TokenizedSplit
    from hedgehog.pipeline.manifest import Manifest, describe_artifact

    folder.mkdir()
    torch.manual_seed(0)
    is_encoder = family.startswith("bert")
    kind = AutoModelForSequenceClassification if is_encoder else AutoModelForCausalLM
    kind = AutoModelForPreTraining if family == "bert without head" else kind
    kind.from_config(_base_config(family)).save_pretrained(folder / "base_model")
    generator = torch.Generator().manual_seed(1)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 64, (length,), generator=generator).tolist()

    artifacts = {}
    for split, num_rows in (("train", 12), ("validation", 3)):
        rows = [(tokens(3, 16), [*tokens(2, 7), 2]) for _ in range(num_rows)]
        tokenized = TokenizedSplit.from_rows(rows)
        if is_encoder:  # the first token tells the class
            tokenized.labels = torch.tensor([prompt[0] % 2 for prompt, _ in rows], dtype=torch.int32)
        tokenized.write(folder / f"tokens_{split}.safetensors")
        artifacts[f"tokens_{split}"] = f"tokens_{split}.safetensors"
    Manifest(
        stage="prepare",
        status="done",
        fingerprint="",
        config={},
        artifacts={name: describe_artifact(folder, path) for name, path in artifacts.items()},
        summary={
            "base_model": str(folder / "base_model"),
            "tokenizer": str(folder / "base_model"),
            "model_type": family.partition(" ")[0],
            **({"kind": "classification", "label_names": ["no", "yes"]} if is_encoder else {}),
        },
    ).write(folder)


@pytest.fixture(scope="session")
def new_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainingRun]:
    """`new_run(engine__zero_stage=2)`: a fresh run folder after prepare; `family="gpt2"` for another base."""
    prepared: dict[str, Path] = {}

    def make(family: str = "llama", **overrides: Any) -> TrainingRun:
        import shutil

        if family not in prepared:
            prepared[family] = tmp_path_factory.mktemp("prepared") / "prepare"
            _prepare(prepared[family], family)
        root = tmp_path_factory.mktemp("run")
        shutil.copytree(prepared[family], root / "prepare")
        schedule = {
            "max_steps": NUM_STEPS,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "save_every_steps": 2,
        }
        values = {
            "name": root.name,
            "output_dir": str(root.parent),
            "data": {"max_length_tokens": 32, "kind": "classification" if family.startswith("bert") else "dialogues"},
            "model": {"base": "from prepare's summary"},
            "distill": {**schedule, "query_block": 16},
            "finetune": {**schedule, "lora": {"rank": 4, "alpha": 8}},
            "engine": {"zero_stage": 1, "precision": "float32", "device": "cpu", "cpu_threads": 1},
        }
        return TrainingRun(root, override(values, overrides))

    return make


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`interrupt(run, "distill")`: start the stage and die in its last step, two steps after a checkpoint's first."""

    def start(run: TrainingRun, stage: str, step: int = NUM_STEPS - 1) -> None:
        from hedgehog.pipeline import training

        seed_step = training.seed_step

        def die(seed: int, at: int, rank: int) -> None:
            if at == step:
                raise KeyboardInterrupt
            seed_step(seed, at, rank)

        with monkeypatch.context() as patch:
            patch.setattr(training, "seed_step", die)
            with pytest.raises(KeyboardInterrupt):
                run.stage(stage)

    return start


@pytest.fixture(scope="session")
def everyones_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def made_once() -> Callable[[Path, Callable[[], Any]], Any]:
    """`made_once(file, make)`: what `make()` returned to the worker of xdist that came first, the others wait for it.
    Kept in the file, as JSON."""

    def get(file: Path, make: Callable[[], Any]) -> Any:
        with open(file.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                whole = file.with_suffix(".new")
                whole.write_text(json.dumps(make()))
                whole.replace(file)
        return json.loads(file.read_text())

    return get


@pytest.fixture(scope="session")
def forking_server() -> Any:
    """The module of that name."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import forking_server
    finally:
        sys.path.pop(0)
    return forking_server


@pytest.fixture(scope="session")
def run_forked(everyones_folder: Path, forking_server: Any) -> Iterator[Callable[..., tuple[int, str]]]:
    """`run_forked(script, arguments, environment)`: a script in a process whose imports have been made already."""
    with forking_server.connect(everyones_folder):  # keeps it alive
        yield partial(forking_server.run_forked, everyones_folder)


@pytest.fixture(scope="session")
def launch(run_forked: Callable[..., tuple[int, str]]) -> Callable[..., list[str]]:
    """`launch(work, num_processes, code)`: processes joined by gloo, without a launcher.

    They run `work`, (run, stage, step to die at) in turn. Returns what each printed. `code` may do something else at
    the step.
    """
    from hedgehog.pipeline.distributed import free_port

    def start(
        work: list[tuple[TrainingRun, str, int | None]], num_processes: int = 2, code: str = _PROCESS
    ) -> list[str]:
        argument = json.dumps([(run.values, stage, last_step) for run, stage, last_step in work])
        group = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        with tempfile.TemporaryDirectory() as folder:
            script = Path(__file__).with_name("forked_ranks.py")
            status, said = run_forked(script, [str(num_processes), folder, code, argument], {**os.environ, **group})
            logs = [Path(folder, str(rank)) for rank in range(num_processes)]
            outputs = [log.read_text() for log in logs if log.exists()]
        assert status == 0, [said, *outputs]
        return outputs

    return start


@pytest.fixture(scope="session")
def one_process_run(new_run: Callable[..., TrainingRun]) -> Callable[[str], TrainingRun]:
    """`one_process_run("zero2")`: the same training as in `two_process_runs`, by one process under ZeRO-1, in a folder
    of its own that stays for the session. Its stages are run by `stage`."""

    made: dict[str, TrainingRun] = {}

    def run(key: str) -> TrainingRun:
        changed = {name: value for name, value in TWO_PROCESS_RUNS[key].items() if not name.startswith("engine__")}
        changed["engine__precision"] = TWO_PROCESS_RUNS[key].get("engine__precision", "float32")
        return made.setdefault(json.dumps(changed), new_run(**SAME_STEPS, **changed))

    return run


@pytest.fixture(scope="session")
def two_process_runs(
    new_run: Callable[..., TrainingRun],
    launch: Callable[..., list[str]],
    everyones_folder: Path,
    made_once: Callable[[Path, Callable[[], Any]], Any],
) -> dict[Any, TrainingRun]:
    """Both training stages finished on two processes, by the keys of `TWO_PROCESS_RUNS`; `"distill"` and `"finetune"`
    (under ZeRO-1; `"finetune 2"` and `3` under these, `"finetune 8bit"`) interrupted in the last step, to be resumed by
    another number of processes."""

    def make() -> list[tuple[str, str, dict[str, Any]]]:
        runs = _make_two_process_runs(new_run, launch)
        return [(key, str(run.root), run.values) for key, run in runs.items()]

    made = made_once(everyones_folder / "two-process-runs.json", make)
    return {key: TrainingRun(Path(root), values) for key, root, values in made}


SAME_STEPS: dict[str, Any] = {
    "distill__micro_batch_size": 1,
    "finetune__micro_batch_size": 1,
    "distill__gradient_clip": None,
    "finetune__gradient_clip": None,
}
"""With these a step's micro-batches are the same on one process and on two: only the order of sums differs."""
TWO_PROCESS_RUNS: dict[str, dict[str, Any]] = {
    "zero1": {"engine__zero_stage": 1},
    "zero2": {"engine__zero_stage": 2},
    "zero3": {"engine__zero_stage": 3},
    "zero3 offload": {"engine__zero_stage": 3, "engine__offload_optimizer": True},
    # maps with two rotations beside the identity, which the base checkpoint lacks
    "zero3 wide": {
        "engine__zero_stage": 3,
        "model__feature_dim": 24,
        "model__feature_map_options": {"init": "identity+orthogonal"},
        "distill__max_steps": 1,
    },
    "zero2 bfloat16": {"engine__zero_stage": 2, "engine__precision": "bfloat16"},
}


def _make_two_process_runs(
    new_run: Callable[..., TrainingRun], launch: Callable[..., list[str]]
) -> dict[Any, TrainingRun]:
    runs: dict[Any, TrainingRun] = {key: new_run(**SAME_STEPS, **changed) for key, changed in TWO_PROCESS_RUNS.items()}
    work: list[tuple[TrainingRun, str, int | None]] = []
    for key, run in runs.items():
        work.append((run, "distill", None))
        if key != "zero3 wide":
            work.append((run, "finetune", None))
    interrupted = {"finetune": new_run()} | {f"finetune {stage}": new_run(engine__zero_stage=stage) for stage in (2, 3)}
    interrupted["finetune 8bit"] = new_run(
        engine__zero_stage=2, finetune__optimizer="adamw8bit", finetune__lora__rank=64
    )
    for run in interrupted.values():
        work += [(run, "distill", None), (run, "finetune", NUM_STEPS - 1)]
    interrupted["distill"] = new_run()
    work.append((interrupted["distill"], "distill", NUM_STEPS - 1))
    launch(work)
    return runs | interrupted

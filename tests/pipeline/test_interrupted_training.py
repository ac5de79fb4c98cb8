"""A signal at any moment of a training: saved, left, and the same command ends as if there were none, to the bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hedgehog.pipeline import checkpoints, training
from hedgehog.pipeline.errors import Interrupted
from hedgehog.pipeline.manifest import read_manifest
from hedgehog.stages import distill

NUM_STEPS = 4
"""Of the runs that `new_run` makes; a checkpoint after every second."""


def signal_before(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool] = lambda *_: True
) -> None:
    """Send USR2 to this process when `owner.name` is called; once."""
    original = getattr(owner, name)
    sent: list[bool] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not sent and when(*args):
            sent.append(True)
            os.kill(os.getpid(), signal.SIGUSR2)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def left_by(run: Any, stage: str) -> tuple[Any, Any, list[str]]:
    weights = {"distill": "distill/feature_maps.safetensors", "finetune": "finetune/adapter/adapter_model.safetensors"}
    tensors = {name: tensor.tolist() for name, tensor in run.tensors(weights[stage]).items()}
    steps = sorted(path.name for path in (run.root / stage / "checkpoints").iterdir())
    return run.metrics(stage), tensors, steps


OPTIONS = {"distill__eval_every_steps": 3}


@pytest.fixture(scope="module")
def undisturbed(new_run: Callable[..., Any]) -> Any:
    run = new_run(**OPTIONS)
    run.stage("distill")
    return run


@pytest.mark.parametrize("step", range(NUM_STEPS))
def test_a_signal_in_any_step(
    new_run: Callable[..., Any], undisturbed: Any, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = new_run(**OPTIONS)
    with monkeypatch.context() as patch:
        signal_before(patch, training, "seed_step", lambda seed, at, rank: at == step)
        with pytest.raises(
            Interrupted, match=f"distill stopped by SIGUSR2: saved after step {step + 1} of {NUM_STEPS}"
        ):
            run.stage("distill")
    manifest = read_manifest(run.root / "distill")
    assert manifest is not None and manifest.status == "running"
    assert manifest.interrupted is not None and f"SIGUSR2, saved after step {step + 1}" in manifest.interrupted
    done = run.stage("distill")
    assert (done.num_resumes, done.interrupted) == (1, None)
    assert left_by(run, "distill")[:2] == left_by(undisturbed, "distill")[:2]


def test_signals_one_after_another(
    new_run: Callable[..., Any], undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(**OPTIONS)
    for _ in range(NUM_STEPS):
        with monkeypatch.context() as patch:
            signal_before(patch, training, "seed_step")
            with pytest.raises(Interrupted):
                run.stage("distill")
    run.stage("distill")
    assert left_by(run, "distill")[:2] == left_by(undisturbed, "distill")[:2]


def test_a_signal_before_the_first_step_begins_nothing(
    new_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(**OPTIONS)
    with monkeypatch.context() as patch:
        signal_before(patch, distill, "build_engine")
        with pytest.raises(Interrupted, match="it stands where it was, after step 0 of 4"):
            run.stage("distill")
    assert not (run.root / "distill" / "checkpoints").exists()


@pytest.mark.parametrize("where", ["validation", "save"])
def test_a_signal_during_validation_or_save_lets_it_finish(
    new_run: Callable[..., Any], undisturbed: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run = new_run(**OPTIONS)
    with monkeypatch.context() as patch:
        if where == "validation":
            signal_before(patch, distill._Distillation, "validate")
        else:
            signal_before(patch, checkpoints.Checkpoints, "_write")
        # the save is step 2's and the signal is seen in step 3, which is to be validated; the validation is step 3's
        with pytest.raises(Interrupted, match="saved after step 3"):
            run.stage("distill")
    run.stage("distill")
    assert left_by(run, "distill") == left_by(undisturbed, "distill")


def test_finetuning_stops_and_goes_on_likewise(
    new_run: Callable[..., Any], undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = new_run(finetune__lora__dropout=0.2), new_run(finetune__lora__dropout=0.2)
    for run in runs:
        run.stage("distill")
    runs[0].stage("finetune")
    with monkeypatch.context() as patch:
        signal_before(patch, training, "seed_step", lambda seed, at, rank: at == 2)
        with pytest.raises(Interrupted, match="saved after step 3"):
            runs[1].stage("finetune")
    runs[1].stage("finetune")
    assert left_by(runs[1], "finetune")[:2] == left_by(runs[0], "finetune")[:2]


def test_the_second_ctrl_c_leaves_at_once_and_the_lease_is_free(
    new_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(**OPTIONS)

    def twice(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(training, "seed_step", twice)
        with pytest.raises(KeyboardInterrupt):
            run.stage("distill")
    assert not (run.root / "distill" / "checkpoints").exists()
    assert run.stage("distill").status == "done"


# On two ranks: the first run is not disturbed. In the second, rank 1 alone gets the signal, in a step whose validation
# is due; then it goes on. In the third, somebody takes the folder over.
_PROCESS = """
import json, os, signal, sys
from pathlib import Path
from hedgehog.pipeline import lease, training
from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.errors import Interrupted, LeaseError
from hedgehog.pipeline.runner import run_stage

seed_step = training.seed_step
(first, stage, _), (second, *_), (third, *_) = json.loads(sys.argv[1])

def signalled(seed, step, rank):
    if step == 2 and rank == 1:
        os.kill(os.getpid(), signal.SIGUSR2)
    seed_step(seed, step, rank)

def replaced(seed, step, rank):
    if step == 2 and rank == 0:
        leases = Path(third["output_dir"]) / third["name"] / stage / "lease"
        lease._claim(leases, 99, lease._this_process())
    seed_step(seed, step, rank)

def attempt(values, moment=seed_step):
    training.seed_step = moment
    try:
        run_stage(RunConfig.model_validate(values), stage)
        print("ENDED done", flush=True)
    except (Interrupted, LeaseError) as error:
        print("ENDED", type(error).__name__, error, flush=True)

attempt(first)
attempt(second, signalled)
attempt(second)
attempt(third, replaced)
"""


@pytest.mark.slow
def test_two_ranks_stop_together(
    new_run: Callable[..., Any], launch: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in (("JOB_ID", "124"), ("ARRAY_JOB_ID", "120"), ("ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    runs = [new_run(**OPTIONS, distill__micro_batch_size=1) for _ in range(3)]
    outputs = launch([(run, "distill", None) for run in runs], code=_PROCESS)
    for output in outputs:
        first, second, again, third = [line for line in output.splitlines() if line.startswith("ENDED")]
        assert first == again == "ENDED done"
        assert second.startswith("ENDED Interrupted distill stopped by SIGUSR2: saved after step 3 of 4")
        assert third.startswith("ENDED LeaseError")
    assert "job 120_3 is queued again" in outputs[0]
    assert calls.read_text().splitlines() == ["-o show job 120_3", "requeue 120_3"]
    assert left_by(runs[1], "distill")[:2] == left_by(runs[0], "distill")[:2]
    assert len(runs[2].metrics("distill")) == 2, "nothing was recorded after the take-over"

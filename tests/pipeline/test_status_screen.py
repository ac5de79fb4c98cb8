"""What `status` shows on terminals of two sizes: everything fits, what matters is there, and no path is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hedgehog.pipeline.status import RunStatus, StageStatus, State
from hedgehog.pipeline.status_screen import screen_lines

COMMAND = "hedgehog submit configs/llama2-7b-samsum.yaml slurm.partition=gpu slurm.account=project_of_the_group"
FOLDER = "/scratch/project/users/somebody/hedgehog-llama/runs/llama2-7b-samsum-with-a-long-name"
VARIANTS = ("zero-shot", "softmax", "t2r", "elu")


def job(stage: str, state: State, number: str, variant: str | None = None, **facts) -> StageStatus:
    words = {"queued": "PENDING", "failed": "FAILED", "cancelled": "CANCELLED", "running": "RUNNING"}
    details = {
        "queued": "PENDING (Dependency)",
        "failed": "FAILED (exit code 1)",
        "cancelled": "needs distill, which failed",
    }
    return StageStatus(
        stage=stage,
        variant=variant,
        layers=facts.pop("layers", None),
        state=state,
        detail=facts.pop("detail", details.get(state, "")),
        job=number,
        job_state=words.get(state, "COMPLETED"),
        log=f"{FOLDER}/logs/{stage}-{number}.log",
        **facts,
    )


def midway() -> RunStatus:
    """Five stages, an array of four elements with one that failed, and four variants, two of which train."""
    progress = {"step": 1234, "total_steps": 3684, "loss": 2.84512, "minutes": 75.2, "eta_s": 8000.0}
    crash = (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.91 GiB. GPU 0 has a total capacity of 79.1 "
    )
    stages = [
        job("prepare", "done", "900101", minutes=2.2),
        job("distill", "running", "900102_0", layers="0-17", **progress),
        job("distill", "failed", "900102_1", layers="18-25", error=crash + "GiB of which 1.88 GiB is free."),
        job("distill", "queued", "900102_2", layers="26-29", detail="PENDING (Resources)"),
        job("distill", "done", "900102_3", layers="30-31", minutes=171.5),
        job("distill", "cancelled", "900103"),
        job("finetune", "cancelled", "900104"),
        job(
            "distill", "skipped", "900105", "zero-shot", detail="model.attention is softmax: there are no feature maps"
        ),
        job("finetune", "skipped", "900106", "zero-shot", detail="finetune.enabled is false"),
        job("distill", "skipped", "900107", "softmax", detail="model.attention is softmax: there are no feature maps"),
        job("finetune", "running", "900108", "softmax", **progress),
        job("distill", "done", "900109", "t2r", minutes=0.1),
        job("finetune", "running", "900110", "t2r", **progress),
        job("distill", "done", "900111", "elu", minutes=0.1),
        job("finetune", "queued", "900112", "elu", detail="PENDING (Priority)"),
        job("evaluate", "cancelled", "900113_0", shard="0/2"),
        job("evaluate", "cancelled", "900113_1", shard="1/2"),
        job("evaluate", "cancelled", "900114"),
        job("export", "cancelled", "900115"),
    ]
    return RunStatus(FOLDER, tuple(stages), (COMMAND,), ("sacct does not answer: accounting storage is disabled",))


def finished() -> RunStatus:
    made = {"model": f"{FOLDER}/export/model", "drift": f"{FOLDER}/export/drift.json"}
    stages = [
        StageStatus(stage, variant, None, "done", step=120, total_steps=120, loss=0.85, minutes=0.4)
        for variant in (None, *VARIANTS)
        for stage in (("prepare", "distill", "finetune") if variant is None else ("distill", "finetune"))
    ]
    last = StageStatus("export", None, None, "done", minutes=0.1, artifacts=made)
    return RunStatus(FOLDER, (*stages, StageStatus("evaluate", None, None, "done"), last), ())


def num_lines(lines: list[str], width: int) -> int:
    """As the terminal wraps them."""
    return sum(-(-max(1, len(line)) // width) for line in lines)


def test_no_figure_is_cut_where_the_state_can_give_way():
    through = [
        StageStatus("distill", None, None, "done", loss_name="validation_kl_nats", loss=0.1446, minutes=0.0),
        StageStatus("finetune", None, None, "unfinished", detail="wrote just now", minutes=0.0),
    ]
    waiting = [StageStatus("distill", name, None, "not started") for name in (*VARIANTS, "another", "more")]
    status = RunStatus(FOLDER, (*through, *waiting), ())
    for width in range(80, 100):
        text = "\n".join(screen_lines(status, width=width, height=23))
        assert "KL 0.1446" in text and "unfinished: wrote just now" in text and "6 variants" in text


@pytest.mark.parametrize(("width", "height"), [(80, 23), (120, 39)])
@pytest.mark.parametrize("run", [midway, finished])
def test_it_fits_the_screen_and_tells_what_matters(run, width, height):
    status = run()
    lines = screen_lines(status, width=width, height=height)
    assert num_lines(lines, width) <= height, "\n".join(lines)
    text = "\n".join(lines)
    assert lines[0] == FOLDER
    if run is finished:
        assert f"finished. {FOLDER}/export/model" in text
        assert "4 variants  done: zero-shot, softmax, t2r, elu" in text
        return
    assert f"to go on: {COMMAND}" in lines[-1]
    by_name = {line.strip().split("  ")[0]: " ".join(line.split()) for line in lines}
    assert "1 failed, 1 running, 1 queued" in by_name["distill (4)"] and by_name["distill (4)"].endswith("2:13:20")
    wide = width >= 100
    running = ["0-17 running", *["900102_0"] * wide, "1234/3684", "2.845", *["75.2"] * wide, "2:13:20"]
    assert by_name["0-17"] == " ".join(running)
    assert by_name["18-25"].startswith("18-25 failed: exit code 1")
    assert "queued: Resources" in by_name["26-29"]
    assert "running" in by_name["t2r/finetune"] and by_name["softmax/finetune"].endswith("2:13:20")
    assert by_name["evaluate (2)"].startswith("evaluate (2) cancelled: needs distill, which")
    assert by_name["zero-shot"] == "zero-shot done" and by_name["elu"] == "elu queued"
    assert "cancelled: needs distill" in by_name["export"]
    assert "distill/18-25: torch.OutOfMemoryError: CUDA out of memory." in text
    assert f"log: {FOLDER}/logs/distill-900102_1.log" in text, "no path is cut"


def test_a_screen_too_small_for_all_folds_what_is_least_wanted():
    """Thirty variants and forty elements at 80 x 24: the counts, the errors and the command remain."""
    status = midway()
    failed = next(stage for stage in status.stages if stage.error)
    elements = [replace(failed, layers=str(number), job=f"900102_{number}") for number in range(40)]
    variants = [job("finetune", "running", str(number), f"v{number}") for number in range(30)]
    stages = [*status.stages[:1], *elements, *status.stages[5:7], *variants, *status.stages[-2:]]
    lines = screen_lines(replace(status, stages=tuple(stages)), width=80, height=23)
    assert num_lines(lines, 80) <= 23, "\n".join(lines)
    text = "\n".join(lines)
    assert "distill (40)" in text and "40 failed" in text and "30 running" in text and COMMAND in text
    assert text.count("OutOfMemoryError") == 1 and "(and 39 more)" in text
    by_hand = replace(status, commands=tuple(f"hedgehog distill trial.yaml --layers {number}" for number in range(40)))
    lines = screen_lines(by_hand, width=80, height=14)
    assert num_lines(lines, 80) <= 14, "\n".join(lines)
    assert lines[-1] == "  39 more commands: --verbose" and "  … more rows: --verbose" in lines
    assert len(screen_lines(by_hand, width=80, height=14, verbose=True)) > 40


def test_verbose_shows_every_row_and_result():
    text = "\n".join(screen_lines(finished(), width=80, height=23, verbose=True))
    assert "zero-shot/finetune" in text and f"export, drift: {FOLDER}/export/drift.json" in text
    assert all(f"{variant}/distill" in text for variant in VARIANTS)

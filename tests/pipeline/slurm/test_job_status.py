"""`status` and `cancel` of a submitted run, with a pretended Slurm: states, reasons, the log's last error."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from hedgehog.pipeline.slurm.cancelling import cancel
from hedgehog.pipeline.slurm.job_status import last_error
from hedgehog.pipeline.slurm.submission import submit
from hedgehog.pipeline.status import read_status
from hedgehog.pipeline.status_report import print_status, watch_status


@pytest.fixture
def run(slurm, write_config) -> str:
    """A run whose jobs were submitted: prepare 101, distill 102_[0-2], merge 103, finetune 104, evaluate 105, …"""
    submit("trial.yaml", ["variants.soft="])
    return "trial"


def rows(run: str) -> dict:
    return {stage.title: stage for stage in read_status(run).stages}


def elements(run: str) -> list[str]:
    return [title for title in rows(run) if title.startswith("distill/")]


def test_everything_waits(run):
    found = rows(run)
    assert len(elements(run)) == 3
    assert {stage.state for stage in found.values()} == {"queued"}
    assert [stage.job for stage in found.values()] == ["101", "102_0", "102_1", "102_2", "103", "104", "105", "106"]
    assert found["distill"].detail == "PENDING (Dependency)"
    assert read_status(run).commands == ()


def test_a_failed_element_its_reason_and_its_dependents(run, slurm, finish, capsys):
    finish("prepare")
    slurm.set(_101="COMPLETED", _102_0="RUNNING", _102_1="FAILED", _102_2="PENDING")
    slurm.set(_103="CANCELLED", _104="CANCELLED", _105="CANCELLED", _106="CANCELLED")
    slurm.only_in_sacct("FAILED", "CANCELLED", "COMPLETED")
    Path("runs/trial/logs/distill-102_1.log").write_text(
        "=== start 1\nerror: an earlier fault\n=== start 2\ndistill  step 1\nerror: disk: it is full\n"
        "srun: error: n1: task 0: Exited with exit code 2\n"
    )
    found = rows(run)
    first, second, third = elements(run)
    assert (found[first].state, found[third].state) == ("running", "queued")
    assert (found[second].state, found[second].detail) == ("failed", "FAILED (exit code 2)")
    assert found[second].error == "error: disk: it is full"
    assert (found["export"].state, found["export"].detail) == ("cancelled", "needs distill, which failed")
    print_status(run, as_json=False)
    shown = capsys.readouterr().out
    assert f"{second}: error: disk: it is full" in shown and "runs/trial/logs/distill-102_1.log" in shown
    assert "to go on: hedgehog submit trial.yaml variants.soft=" in shown
    print_status(run, as_json=True)
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["finished"] is False and parsed["stages"][2]["error"] == "error: disk: it is full"


def test_a_manifest_has_the_last_word(run, slurm, finish):
    finish("prepare")
    slurm.set(_101="FAILED")
    assert rows(run)["prepare"].state == "done"


def test_where_sacct_refuses_squeue_is_enough(run, slurm):
    slurm.fail("sacct", "Slurm accounting storage is disabled")
    slurm.set(_101="RUNNING")
    assert rows(run)["prepare"].state == "running"
    assert read_status(run).notes == ("sacct does not answer: Slurm accounting storage is disabled",)


def test_where_both_refuse_the_manifests_are_enough(run, slurm, finish):
    finish("prepare")
    for name in ("sacct", "squeue"):
        slurm.fail(name, "no")
    Path("runs/trial/logs/distill-102_0.log").write_text("Traceback\nValueError: so it goes\n")
    found = rows(run)
    assert (found["prepare"].state, found["export"].state) == ("done", "not started")
    assert found[elements(run)[0]].error == "ValueError: so it goes"
    status = read_status(run)
    assert len(status.notes) == 2
    assert status.commands == ("hedgehog submit trial.yaml variants.soft=",)


def test_a_log_that_never_came_points_at_the_file_system(run, slurm):
    slurm.set(_101="FAILED")
    assert "output_dir must be shared by all nodes" in (rows(run)["prepare"].error or "")


def test_the_time_that_is_left(run, slurm, finish):
    slurm.set(_101="COMPLETED", _102_0="RUNNING")
    finish("prepare")
    folder = finish(elements(run)[0].replace("distill/", "distill/layers-"), status="running")
    records = [{"step": step, "loss_nats": 1.0, "step_s": 2.0} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    running = rows(run)[elements(run)[0]]
    assert (running.step, running.total_steps, running.eta_s) == (3, 4, 2.0)


def test_cancel_takes_out_what_lives_children_first(run, slurm, capsys):
    slurm.set(_101="COMPLETED", _102_0="COMPLETED", _102_1="RUNNING")
    cancel(run)
    (cancelled,) = slurm.calls("scancel")
    assert cancelled[:4] == ["106", "105", "104", "103"] and sorted(cancelled[4:]) == ["102_1", "102_2"]
    assert "To go on: hedgehog submit trial.yaml" in capsys.readouterr().out
    cancel(run)
    assert "no job waits or runs" in capsys.readouterr().out
    assert len(slurm.calls("scancel")) == 1


def test_watching_ends_with_the_jobs(run, slurm, capsys):
    cancel(run)
    status = watch_status(run, every_s=0.1, as_json=True)
    assert not status.finished and not status.live


def test_watching_ends_on_a_cluster_without_accounting(run, slurm, capsys, monkeypatch):
    cancel(run)
    slurm.fail("sacct", "Slurm accounting storage is disabled")
    assert watch_status(run, every_s=0.1, as_json=True).notes
    slurm.fail("squeue", "Unable to contact slurm controller")
    # not time.sleep itself: subprocess waits with it too, while sacct and squeue are still to fail
    between_looks = SimpleNamespace(sleep=lambda _: slurm.works_again())
    monkeypatch.setattr("hedgehog.pipeline.status_report.time", between_looks)
    assert not watch_status(run, every_s=0.1, as_json=True).notes, "as long as squeue fails jobs may be running"


def test_the_line_that_says_most(tmp_path):
    log = tmp_path / "log"
    for text, expected in (
        ("fine\n", None),
        ("=== 1\nRuntimeError: x\n=== 2\nfine\n", None),
        ("error (rank 3): y\nsrun: error: z\n", "error (rank 3): y"),
        ("torch.OutOfMemoryError: CUDA out of memory\nsrun: error: z\n", "torch.OutOfMemoryError: CUDA out of memory"),
        (
            "slurmstepd: error: *** JOB 3 ON n1 CANCELLED AT x DUE TO TIME LIMIT ***\n",
            "slurmstepd: error: *** JOB 3 ON",
        ),
        ("/tmp/script: line 30: hedgehog: command not found\n", "/tmp/script: line 30: hedgehog: command not found"),
    ):
        log.write_text(text)
        found = last_error(log)
        assert (found or "").startswith(expected or "") and (found is None) == (expected is None)

"""`status` and `cancel` of a submitted run, with a pretended Slurm: states, reasons, the log's last error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from hedgehog.pipeline.run_folder import RunFolder
from hedgehog.pipeline.slurm import job_status
from hedgehog.pipeline.slurm.cancelling import cancel
from hedgehog.pipeline.slurm.job_records import JobRecord, JobRecords, write_records
from hedgehog.pipeline.slurm.job_status import last_error
from hedgehog.pipeline.slurm.scheduler import JobState, Observation
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


def test_watching_redraws_and_ends_with_the_jobs(run, slurm, capsys, monkeypatch):
    cancel(run)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((80, 24)))
    looks = iter([None])
    between_looks = SimpleNamespace(sleep=lambda _: next(looks), strftime=lambda _: "12:34:56")
    monkeypatch.setattr("hedgehog.pipeline.status_report.time", between_looks)
    slurm.set(_101="RUNNING")
    slurm.after_a_look(_101="CANCELLED")
    capsys.readouterr()
    status = watch_status(run, every_s=0.1, as_json=False)
    assert not status.finished and not status.live
    start, *frames = capsys.readouterr().out.split("\033[H")
    assert start == "\033[2J" and len(frames) == 2, "drawn over in place, never scrolled"
    for frame in frames:
        assert frame.count("\n") < 24 and frame.count("\033[K\n") == frame.count("\n") and frame.endswith("\033[J")
    assert "running" in frames[0] and "to go on" in frames[1] and "12:34:56" in frames[1]


def test_watching_ends_on_a_cluster_without_accounting(run, slurm, capsys, monkeypatch):
    cancel(run)
    slurm.fail("sacct", "Slurm accounting storage is disabled")
    assert watch_status(run, every_s=0.1, as_json=True).notes
    slurm.fail("squeue", "Unable to contact slurm controller")
    # not time.sleep itself: subprocess waits with it too, while sacct and squeue are still to fail
    between_looks = SimpleNamespace(sleep=lambda _: slurm.works_again())
    monkeypatch.setattr("hedgehog.pipeline.status_report.time", between_looks)
    assert not watch_status(run, every_s=0.1, as_json=True).notes, "as long as squeue fails jobs may be running"


OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
EXITED = "srun: error: n1: task 0: Exited with exit code 1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fine\n", None),
        ("=== 1\nRuntimeError: x\n=== 2\nfine\n", None),
        (f"error (rank 3): y\n{EXITED}\n", "error (rank 3): y"),
        (f"{OOM}\n{EXITED}\n", OOM),
        (f"[rank0]: Traceback (most recent call last):\n[rank0]:   File x\n[rank0]: {OOM}\n{EXITED}\n", OOM),
        # the others only notice that one died
        (f"[rank1]: {OOM}\n[rank0]: torch.distributed.DistBackendError: NCCL error in: x\n{EXITED}\n", OOM),
        (f"RuntimeError: [x] Connection closed by peer [10.0.0.1]:3\n{EXITED}\n", "RuntimeError: [x] Connection"),
        (
            f"Exception ignored in: <f>\nsrun: error: n1: task 0: Segmentation fault (core dumped)\n{EXITED}\n",
            "srun: error: n1: task 0: Segmentation fault",
        ),
        (
            "/tmp/script: line 51: 812 Bus error (core dumped)\nsrun: error: n1: task 1: Killed\n",
            "/tmp/script: line 51",
        ),
        (
            'Lmod has detected the following error:  The following module(s) are unknown: "cuda/99"\n\nPlease check\n',
            'Lmod has detected the following error:  The following module(s) are unknown: "cuda/99"',
        ),
        (
            f"terminate called after throwing\n  what():  CUDA error: an illegal memory access\n{EXITED}\n",
            "what():  CUDA",
        ),
        (f"n1:7:9 [0] NCCL WARN Call to connect failed\n{EXITED}\n", "n1:7:9 [0] NCCL WARN"),
        (
            "slurmstepd: error: *** JOB 3 ON n1 CANCELLED AT x DUE TO TIME LIMIT ***\n",
            "slurmstepd: error: *** JOB 3 ON",
        ),
        (
            "srun: error: n1: task 0: Out Of Memory\nslurmstepd: error: Detected 1 oom_kill event\n",
            "slurmstepd: error: Detected",
        ),
        (f"bash: line 1: exec: hedgehog: not found\n{EXITED}\n", "bash: line 1: exec: hedgehog: not found"),
        ("/tmp/script: line 30: hedgehog: command not found\n", "/tmp/script: line 30: hedgehog: command not found"),
        (
            "srun: error: Unable to create step for job 7: More processors requested\n" + EXITED,
            "srun: error: Unable to create",
        ),
        (f"step 3\n{EXITED}\n", EXITED),
    ],
)
def test_the_line_that_says_most(text, expected, tmp_path):
    log = tmp_path / "log"
    log.write_text(text)
    found = last_error(log)
    assert (found is None) == (expected is None) and (found or "").startswith(expected or "")


def test_each_job_blames_those_that_it_waits_for(tmp_path, monkeypatch):
    """Two failures in two branches: what hangs on one of them does not name the other."""
    after = {"prepare": "", "distill": "afterok:1", "merge": "afterok:2", "soft.distill": "afterok:1"}
    after |= {"soft.finetune": "afterok:4", "elu.finetune": "afterok:1", "evaluate": "afterok:3:5:6,afterany:77"}
    records = [
        JobRecord(
            name=name,
            stage=name,
            job_id=str(number),
            elements={0: "0-1", 1: "2"} if name == "distill" else {},
            dependency=dependency,
            script="",
            submitted_at="",
        )
        for number, (name, dependency) in enumerate(after.items(), 1)
    ]
    folder = RunFolder(tmp_path)
    write_records(folder, JobRecords(jobs=records))
    states = dict.fromkeys(((str(number), None) for number in range(1, 8)), JobState("CANCELLED"))
    states |= {("1", None): JobState("COMPLETED"), ("2", 0): JobState("COMPLETED"), ("2", 1): JobState("FAILED")}
    states |= {("4", None): JobState("TIMEOUT")}
    monkeypatch.setattr(job_status, "observe", lambda jobs: Observation(states, []))
    views, _, _ = job_status.view_jobs(folder)
    assert {view.name: view.failed_parents for view in views if view.activity == "cancelled"} == {
        "merge": ("distill",),
        "soft.finetune": ("soft.distill",),
        "elu.finetune": (),
        "evaluate": ("distill", "soft.distill"),
    }

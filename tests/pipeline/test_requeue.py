"""A program called scontrol that writes down what it is asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hedgehog.pipeline.requeue import requeue, requeue_if_preempted, slurm_job


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`scontrol()` puts one on the PATH; returns the file with its command lines."""

    def make(
        state: str = "RUNNING",
        reason: str = "None",
        restarts: int = 0,
        preempted: str = "None",
        refuses: str = "",
    ) -> Path:
        calls = tmp_path / "calls"
        program = tmp_path / "scontrol"
        facts = f"JobId=7 JobState={state} Reason={reason} Restarts={restarts} "
        facts += f"PreemptEligibleTime=2026-11-23T19:15:41 PreemptTime={preempted} SuspendTime=None\\n"
        answer = f"echo '{refuses}' >&2; exit 1\n" if refuses else ""
        program.write_text(
            f"#!/bin/sh\necho \"$@\" >> {calls}\nif [ $2 = show ]; then printf '{facts}'; exit 0; fi\n{answer}"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return calls

    return make


def test_a_running_job_is_queued_again(scontrol: Callable[..., Path]) -> None:
    calls = scontrol()
    assert requeue("7") == (True, "job 7 is queued again and goes on there")
    assert calls.read_text().splitlines() == ["-o show job 7", "requeue 7"]


@pytest.mark.parametrize(
    ("facts", "comes_back", "asks"),
    [
        ({"state": "COMPLETING"}, False, False),  # cancelled, as Slurm 22.05 shows it
        ({"state": "CANCELLED"}, False, False),
        ({"state": "COMPLETING", "restarts": 2}, True, False),  # preempted: it is in the queue
        ({"state": "PENDING", "restarts": 2}, True, False),
        ({"state": "COMPLETING", "reason": "TimeLimit", "restarts": 1}, True, True),
        ({"state": "RUNNING", "restarts": 1}, True, True),
    ],
)
def test_what_slurm_has_decided_stays(
    scontrol: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    facts: dict[str, Any],
    comes_back: bool,
    asks: bool,
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    calls = scontrol(**facts)
    assert requeue("7")[0] is comes_back
    assert ("requeue 7" in calls.read_text()) is asks


PREEMPTED = "2026-11-23T19:15:44"


def test_a_job_that_slurm_preempts_by_term_alone_is_queued_again(scontrol: Callable[..., Path]) -> None:
    calls = scontrol(preempted=PREEMPTED)
    assert requeue_if_preempted("7") == (True, "job 7 is queued again and goes on there")
    assert calls.read_text().splitlines()[-1] == "requeue 7"


@pytest.mark.parametrize(
    "facts",
    [
        {},  # scancel --signal=TERM
        {"state": "COMPLETING"},  # scancel
        {"state": "CANCELLED", "preempted": PREEMPTED},  # in the grace time of a preemption
    ],
)
def test_who_was_sent_term_otherwise_is_not(scontrol: Callable[..., Path], facts: dict[str, Any]) -> None:
    calls = scontrol(**facts)
    assert requeue_if_preempted("7") == (False, "")
    assert "requeue" not in calls.read_text()


def test_a_job_preempted_without_a_grace_time_is_in_the_queue_already(scontrol: Callable[..., Path]) -> None:
    calls = scontrol(state="COMPLETING", restarts=1, preempted=PREEMPTED)
    assert requeue_if_preempted("7") == (True, "Slurm has queued job 7 again")
    assert "requeue" not in calls.read_text()


def test_the_users_variables_do_not_change_what_scontrol_does(
    scontrol: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scontrol()
    program = tmp_path / "scontrol"
    program.write_text(program.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\nenv > {tmp_path}/seen\n"))
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JOB_ID": "7"}
    dropped = ("SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SLURM_JSON", "SCONTROL_ALL", "SCONTROL_FEDERATION")
    for name, value in {**kept, **dict.fromkeys(dropped, "x")}.items():
        monkeypatch.setenv(name, value)
    assert requeue("7")[0]
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    assert seen.items() >= kept.items() and not seen.keys() & set(dropped)


def test_a_refusal_is_told_in_slurms_words(scontrol: Callable[..., Path]) -> None:
    scontrol(refuses="Requested operation is presently disabled for job 7")
    done, message = requeue("7")
    assert not done
    assert message == (
        "job 7 could not be queued again (Requested operation is presently disabled for job 7): submit it again"
    )


def test_no_scontrol_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert requeue("7") == (
        False,
        "job 7 could not be queued again (scontrol is not on the PATH): submit it again",
    )


def test_an_array_element_is_named_as_one() -> None:
    assert slurm_job({}) is None
    assert slurm_job({"SLURM_JOB_ID": "123"}) == "123"
    element = {"SLURM_JOB_ID": "123", "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "3"}
    assert slurm_job(element) == "120_3"


def test_without_scontrol_the_jobs_script_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HEDGEHOG_REQUEUE_FILE", str(tmp_path / "requeue-7"))
    assert requeue("7") == (True, "job 7 is queued again by its script")
    assert (tmp_path / "requeue-7").read_text() == r"JobState=RUNNING \|Reason=TimeLimit "
    monkeypatch.setenv("HEDGEHOG_REQUEUE_FILE", str(tmp_path / "nowhere" / "requeue-7"))
    assert requeue("7")[0] is False


def test_without_scontrol_the_jobs_script_looks_for_the_preemption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert requeue_if_preempted("7") == (False, "")
    monkeypatch.setenv("HEDGEHOG_REQUEUE_FILE", str(tmp_path / "requeue-7"))
    assert requeue_if_preempted("7") == (False, "its script queues job 7 again if Slurm preempts it")
    assert "PreemptTime" in (tmp_path / "requeue-7").read_text()

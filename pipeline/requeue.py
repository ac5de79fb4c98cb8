"""Giving a Slurm job back to its queue after an interruption.

The signal that the job script asked for (`--signal=USR2@…`) always leads here. TERM does so only where Slurm says that
it preempts the job: most sites announce a preemption by TERM alone, and a job that leaves before its grace time is over
has ended for Slurm, which then does not queue it again. Otherwise TERM means that a user cancels the job, who does not
want it back; that Slurm has queued it again already; or its time limit, where the script's own signal has come before.
So a job never comes back that somebody wanted to end.

Signals that come before the program listens end it; its script (slurm/*.sbatch) then asks Slurm the same questions.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .slurm.scheduler import command_environment

REQUEUE_FILE = "HEDGEHOG_REQUEUE_FILE"
"""Names a file that asks the job's script to queue the job again: it runs on the node itself and has Slurm's commands,
while a program in a container often has none. The file says, as a pattern of grep's, what must stand in Slurm's
description of the job first."""
_NOT_ENDED = r"JobState=RUNNING \|Reason=TimeLimit "
"""In `scontrol -o show job`: nobody has ended the job; at its time limit it may come back."""
_PREEMPTED = r"JobState=RUNNING .*PreemptTime=[0-9]"
"""In `scontrol -o show job`: Slurm preempts the job, and nobody has ended it. Its next start has no such time."""
_NOT_FOUND = 127
_TIMEOUT_S = 60
"""A busy controller answers slowly; much longer would use up what is left of the grace period."""


def slurm_job(environment: Mapping[str, str] | None = None) -> str | None:
    """The job as scontrol names it: `123`, or `120_3` for an element of an array; None outside Slurm."""
    environment = os.environ if environment is None else environment
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID") or None


def requeue(job: str) -> tuple[bool, str]:
    """Queue a running job again: (whether it will start again by itself, what to tell the user).

    Slurm ends what is left of the job's processes; so everything must be saved, and nothing is to be expected of the
    lines after this one.
    """
    code, output = _show(job)
    facts = _facts_in(output) if code == 0 else {}
    state = facts.get("JobState", "RUNNING")  # no answer: try it
    if _was_queued_again(facts):
        return True, f"Slurm has queued job {job} again"
    # a job that is being ended is COMPLETING, whoever ends it; at its time limit it may come back
    if state != "RUNNING" and facts.get("Reason") != "TimeLimit":
        return False, f"job {job} was ended meanwhile ({state}) and is not queued again"
    code, output = _scontrol("requeue", job)
    if code == 0:
        return True, f"job {job} is queued again and goes on there"
    if code == _NOT_FOUND and _ask_script(_NOT_ENDED):
        return True, f"job {job} is queued again by its script"
    reason = " ".join(output.split()) or f"exit status {code}"
    return False, f"job {job} could not be queued again ({reason}): submit it again"


def requeue_if_preempted(job: str) -> tuple[bool, str]:
    """After TERM: queue a running job again if Slurm preempts it. Returns what `requeue` does; "": nothing to tell."""
    code, output = _show(job)
    if code == _NOT_FOUND:
        return False, f"its script queues job {job} again if Slurm preempts it" if _ask_script(_PREEMPTED) else ""
    if re.search(_PREEMPTED, output) or _was_queued_again(_facts_in(output)):
        return requeue(job)
    return False, ""


def _ask_script(condition: str) -> bool:
    file = os.environ.get(REQUEUE_FILE)
    if not file:
        return False
    try:
        Path(file).write_text(condition)
    except OSError:
        return False
    return True


def _show(job: str) -> tuple[int, str]:
    return _scontrol("-o", "show", "job", job)


def _facts_in(output: str) -> dict[str, str]:
    return dict(re.findall(r"\b(JobState|Reason|Restarts)=(\S+)", output))


def _was_queued_again(facts: Mapping[str, str]) -> bool:
    return _number(facts.get("Restarts")) > _number(os.environ.get("SLURM_RESTART_COUNT"))


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def _scontrol(*arguments: str) -> tuple[int, str]:
    environment = command_environment(os.environ)
    # a job belongs to the cluster of its node, whichever its submitter has named for other commands
    environment.pop("SLURM_CLUSTERS", None)
    try:
        done = subprocess.run(
            ["scontrol", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            env=environment,
        )
    except FileNotFoundError:
        return _NOT_FOUND, "scontrol is not on the PATH"
    except subprocess.TimeoutExpired:
        return 124, f"scontrol gave no answer in {_TIMEOUT_S} s"
    return done.returncode, done.stdout

"""Giving a Slurm job back to its queue after an interruption.

Only the signal that the job script asked for (`--signal=USR2@…`) leads here. TERM does not: Slurm sends it when a user
cancels the job, who does not want it back; when it preempts or requeues the job itself, which is then in the queue
already; and at a time limit, where the script's own signal has come before. So a job never comes back that somebody
wanted to end.
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
while a program in a container often has none."""
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
    facts = _facts(job)
    state = facts.get("JobState", "RUNNING")  # no answer: try it
    if _number(facts.get("Restarts")) > _number(os.environ.get("SLURM_RESTART_COUNT")):
        return True, f"Slurm has queued job {job} again"
    # a job that is being ended is COMPLETING, whoever ends it; at its time limit it may come back
    if state != "RUNNING" and facts.get("Reason") != "TimeLimit":
        return False, f"job {job} was ended meanwhile ({state}) and is not queued again"
    code, output = _scontrol("requeue", job)
    if code == 0:
        return True, f"job {job} is queued again and goes on there"
    if code == _NOT_FOUND and _ask_script():
        return True, f"job {job} is queued again by its script"
    reason = " ".join(output.split()) or f"exit status {code}"
    return False, f"job {job} could not be queued again ({reason}): submit it again"


def _ask_script() -> bool:
    file = os.environ.get(REQUEUE_FILE)
    if not file:
        return False
    try:
        Path(file).touch()
    except OSError:
        return False
    return True


def _facts(job: str) -> dict[str, str]:
    code, output = _scontrol("show", "job", job)
    return dict(re.findall(r"\b(JobState|Reason|Restarts)=(\S+)", output)) if code == 0 else {}


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

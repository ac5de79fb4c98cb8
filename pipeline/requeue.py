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
    state = _state(job)
    if state == "CANCELLED":
        return False, f"job {job} was cancelled meanwhile and is not queued again"
    if state in ("PENDING", "REQUEUED"):
        return True, f"Slurm has queued job {job} again"
    code, output = _scontrol("requeue", job)
    if code == 0:
        return True, f"job {job} is queued again and goes on there"
    reason = " ".join(output.split()) or f"exit status {code}"
    return False, f"job {job} could not be queued again ({reason}): submit it again"


def _state(job: str) -> str | None:
    code, output = _scontrol("show", "job", job)
    found = re.search(r"\bJobState=(\w+)", output)
    return found[1] if code == 0 and found else None


def _scontrol(*arguments: str) -> tuple[int, str]:
    try:
        done = subprocess.run(
            ["scontrol", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except FileNotFoundError:
        return 127, "scontrol is not on the PATH"
    except subprocess.TimeoutExpired:
        return 124, f"scontrol gave no answer in {_TIMEOUT_S} s"
    return done.returncode, done.stdout

"""Slurm's own commands: submit, look, cancel. Their words are passed on to the user, with the config key to change."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError, HedgehogError

WAITING_STATES = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
RUNNING_STATES = frozenset({"RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"})
LIVE_STATES = WAITING_STATES | RUNNING_STATES
ENDING_STATE = "COMPLETING"
"""The job's processes may still be there, but what they have not finished stays so."""
FAILED_STATES = frozenset(
    {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "REVOKED"}
)
_TIMEOUT_S = 60
_KEYS = (
    (r"account", ("account", "partition")),  # "Invalid account or account/partition combination"
    (r"partition", ("partition",)),
    (r"qos", ("qos",)),
    (r"feature|constraint", ("constraint",)),
    (r"time limit|time specification", ("time",)),
    (r"memory", ("memory",)),
    (r"gres|generic resource|gpu", ("gpus", "gpu_type")),
    (r"cpu count|more processors", ("cpus_per_task", "tasks_per_node")),
    (r"node count", ("nodes",)),
    (r"array", ("layer_groups", "evaluate_shards")),
    (r"option|unrecognized", ("sbatch_lines",)),
    (
        r"node configuration",
        ("gpus", "gpu_type", "constraint", "nodes", "tasks_per_node", "cpus_per_task", "memory"),
    ),
)
"""What Slurm's complaint mentions, and the keys under `slurm` that it may be about."""
_RUN_WIDE_KEYS = ("layer_groups", "evaluate_shards")
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "HEDGEHOG_SUBMITTED_CONFIG")
_SITE_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")


class SchedulerError(HedgehogError):
    """Slurm does not answer, or refuses."""


@dataclass(frozen=True)
class JobState:
    """A job, or one element of an array, as Slurm sees it."""

    state: str
    """`RUNNING`, `FAILED`, … as squeue and sacct write it."""
    reason: str = ""
    """Why it waits, or its exit code."""


@dataclass
class Observation:
    """What Slurm knows about some jobs, by (job id, array index or None)."""

    states: dict[tuple[str, int | None], JobState] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Why a source is missing."""
    num_sources: int = 0


def require_slurm() -> None:
    """Refuse where Slurm's commands are not on the path.

    Raises:
        ConfigError: says what to do instead.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch: not found on the path, so nothing can be submitted from here. Log in to a node that has Slurm's "
            "commands (or `module load slurm`); `hedgehog submit --dry-run` shows the scripts without Slurm, and "
            "`hedgehog run` needs none."
        )


def sbatch(script: Path, options: Sequence[str], *, stage: str, settings: Mapping[str, object]) -> str:
    """Submit a script; returns the job's id.

    Args:
        stage: key under `slurm` whose settings the job has.
        settings: those settings by name, for the message.

    Raises:
        ConfigError: Slurm refuses; its own words, and the keys to change.
    """
    done = _run(["sbatch", "--parsable", *options, str(script)], environment=submission_environment(os.environ))
    if done.returncode == 0:
        return done.stdout.strip().splitlines()[-1].split(";")[0]
    raise ConfigError(refusal(stage, _words(done), settings))


def refusal(stage: str, words: str, settings: Mapping[str, object]) -> str:
    """The message about a refused job, with the keys that Slurm's words point at."""
    keys = next((keys for pattern, keys in _KEYS if re.search(pattern, words, flags=re.IGNORECASE)), ())
    shown = []
    for key in keys:
        value = "" if settings.get(key) is None else f" (now {settings[key]})"
        names = f"slurm.{key}" if key in _RUN_WIDE_KEYS else f"slurm.{key} or slurm.{stage}.{key}"
        shown.append(f"{names}{value}")
    cure = f"Change {'; '.join(shown)}." if shown else "See the keys under `slurm` in the config."
    return f"slurm refused the job of {stage}: {words}\n{cure}"


def submission_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for sbatch, which jobs inherit: without the ranks and the job that this process is part of."""
    kept = {name: value for name, value in environment.items() if name not in _RANK_VARIABLES}
    if "SLURM_JOB_ID" in kept:  # submitted from inside a job
        own = ("SLURM_", "SLURMD_", "SRUN_")
        kept = {name: value for name, value in kept.items() if name in _SITE_VARIABLES or not name.startswith(own)}
    return kept


def queue_states(job_ids: Iterable[str]) -> dict[tuple[str, int | None], JobState]:
    """What squeue shows of these jobs, jobs that ended a few minutes ago included.

    Raises:
        SchedulerError: squeue is missing or fails.
    """
    wanted = list(dict.fromkeys(job_ids))
    if not wanted:
        return {}
    # %F array's id, %K index (or N/A), %T state, %r reason; -r: one line an element
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%F|%K|%T|%r", f"--jobs={','.join(wanted)}"]
    done = _run(command)
    if done.returncode != 0:
        if "invalid job id" in done.stderr.lower():  # the only one asked for is forgotten
            return {}
        raise SchedulerError(f"squeue does not answer: {_words(done)}")
    states = {}
    for line in done.stdout.splitlines():
        job_id, index, state, reason = (*line.strip().split("|", 3), "", "", "")[:4]
        if job_id in wanted:
            states[job_id, int(index) if index.isdigit() else None] = JobState(
                state, "" if reason == "None" else reason
            )
    return states


def accounted_states(job_ids: Iterable[str]) -> dict[tuple[str, int | None], JobState]:
    """What sacct has recorded about these jobs.

    Raises:
        SchedulerError: sacct is missing or refuses, as it does on clusters without accounting.
    """
    wanted = list(dict.fromkeys(job_ids))
    if not wanted:
        return {}
    columns = "--format=JobID,State,ExitCode"
    done = _run(["sacct", "--noheader", "--parsable2", "--allocations", columns, f"--jobs={','.join(wanted)}"])
    if done.returncode != 0 or "disabled" in done.stderr:
        raise SchedulerError(f"sacct does not answer: {_words(done)}")
    states = {}
    for line in done.stdout.splitlines():
        name, state, exit_code = (*line.split("|"), "", "", "")[:3]
        job_id, _, index = name.partition("_")
        if index and not index.isdigit():  # the elements that wait, in one row: squeue has them
            continue
        reason = "" if exit_code in ("0:0", "") else f"exit code {exit_code.removesuffix(':0')}"
        states[job_id, int(index) if index else None] = JobState(state.split(" ")[0], reason)
    return states


def observe(job_ids: Iterable[str]) -> Observation:
    """What both commands know; squeue is the fresher one. Never raises: a missing source is a note."""
    wanted = list(job_ids)
    seen = Observation()
    for source in (accounted_states, queue_states):
        try:
            states = source(wanted)
        except SchedulerError as error:
            seen.notes.append(str(error))
            continue
        seen.num_sources += 1
        for key, state in states.items():
            recorded = seen.states.get(key)
            if recorded is None or recorded.state != state.state or state.state in LIVE_STATES:
                seen.states[key] = state  # of an end that both know, sacct has the exit code
    return seen


def scancel(jobs: Sequence[str]) -> None:
    """Cancel jobs or elements (`12`, `12_3`).

    Raises:
        SchedulerError: scancel is missing or fails.
    """
    done = _run(["scancel", *jobs])
    if done.returncode != 0:
        raise SchedulerError(f"scancel refuses: {_words(done)}")


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env=None if environment is None else dict(environment),
        )
    except FileNotFoundError:
        raise SchedulerError(f"{command[0]}: not found on the path.") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{command[0]}: no answer in {_TIMEOUT_S} s; Slurm's controller may be down.") from None


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """What a command says went wrong, on one line."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return " ".join(lines) or f"exit code {done.returncode} without a word"

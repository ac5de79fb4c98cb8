"""What Slurm and the logs say about a run's jobs: their states, why one failed, what it said last."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..run_folder import RunFolder
from .job_records import JobRecord, JobRecords, read_records
from .scheduler import ENDING_STATE, FAILED_STATES, RUNNING_STATES, JobState, Observation, SchedulerError, observe

Activity = Literal["queued", "running", "failed", "cancelled", "ended", "unknown"]
_TAIL_BYTES = 1 << 16
_START_LINE = "=== "
"""Begins every start of a script in its log; a requeued job appends."""
_RANK_PREFIX = re.compile(r"^(\[(rank|default)\d+\]:|\d+:) ?")
"""What torch's excepthook, torchrun and `srun --label` put before a line."""
_CONSEQUENCES = r"((DistBackend|DistNetwork|ChildFailed|ncclRemote)Error|\b[Cc]onnection (closed|reset) by peer)"
"""What a rank says when another one died first."""
_ERROR_KINDS = (
    re.compile(r"^error( \(rank \d+\))?: "),
    re.compile(r"could not be queued again|is not queued again"),
    re.compile(rf"^(?!Exception ignored|.*{_CONSEQUENCES})[\w.]*(Error|Exception|Interrupt)\b"),
    re.compile(r"\b(Segmentation fault|Bus error|Illegal instruction|Floating point exception)\b|^Fatal Python error"),
    re.compile(r"\bLmod has detected the following error\b|^FATAL: |\bERROR: Unable to locate a modulefile\b"),
    re.compile(r"\b(CUDA (runtime |driver )?error|no CUDA-capable device|CUDA driver version is insufficient)\b"),
    re.compile(r"^slurmstepd[^\s:]*: error: .*(CANCELLED|oom|out.of.memory|exceeded|unable)", re.IGNORECASE),
    re.compile(r"\b(command not found|No such file or directory|Permission denied)\b|^bash: .*: not found$"),
    re.compile(rf"{_CONSEQUENCES}|\bNCCL (WARN|error)\b|collective operation timeout"),
    re.compile(r"^(srun|slurmstepd[^\s:]*): (error|fatal): (?!.*\b(Exited with exit code|Terminated|Killed)\b)"),
    re.compile(r"^(srun|slurmstepd[^\s:]*): (error|fatal): "),
)
"""Lines that say what went wrong, the most telling kind first: the program's own, then those of what ran it."""


@dataclass(frozen=True)
class JobView:
    """The newest job for one stage, group of layers or shard."""

    name: str
    """Name in the graph."""
    stage: str
    """Stage whose manifest says whether the job is done."""
    variant: str | None
    part: str | None
    """Layers or shard of an array's element."""
    job_id: str
    """`12` or `12_3`."""
    activity: Activity
    state: str
    """Slurm's word; empty where Slurm does not know the job any more."""
    reason: str
    error: str | None
    """Last line of the log that says what went wrong."""
    log: str
    failed_parents: tuple[str, ...] = ()
    """Names in the graph of those jobs it waited for, directly or through others, that failed."""


def view_jobs(folder: RunFolder) -> tuple[list[JobView], list[str], JobRecords]:
    """The newest jobs of a run, why a source of states is missing, and the records. Empty where nothing was submitted.

    Raises:
        CheckpointError: the records cannot be read.
    """
    records = read_records(folder)
    with contextlib.suppress(SchedulerError):  # `observe` says so
        records.adopt()
    seen = observe(records.submitted)
    newest = list(records.newest())
    views = [_view(folder, record, index, _state_of(seen, record, index)) for record, index in newest]
    parents = {record.job_id: record.parents for record, _ in newest}
    views = [replace(view, failed_parents=_failed_parents(view, views, parents)) for view in views]
    return views, seen.notes, records


def _state_of(seen: Observation, record: JobRecord, index: int | None) -> JobState | None:
    """An element that was cancelled before it began has no row of its own: the whole array has one."""
    return seen.states.get((record.job_id, index)) or seen.states.get((record.job_id, None))


def _failed_parents(view: JobView, views: Sequence[JobView], parents: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Follows the dependencies as they were given to sbatch; a parent is a job (`12`) or an element (`12_3`)."""
    found: list[str] = []
    seen: set[str] = set()
    waiting = [view.job_id.partition("_")[0]]
    while waiting:
        for parent in parents.get(waiting.pop(), ()):
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent.partition("_")[0])
                found += [
                    job.name
                    for job in views
                    if job.activity == "failed" and parent in (job.job_id, job.job_id.partition("_")[0])
                ]
    return tuple(sorted(set(found)))


def _view(folder: RunFolder, record: JobRecord, index: int | None, state: JobState | None) -> JobView:
    log = record.log_file(folder, index)
    activity = _activity(state)
    error = None
    if activity in ("failed", "ended", "unknown"):
        error = last_error(log)
        if error is None and activity == "failed" and not log.is_file() and (state is None or state.state == "FAILED"):
            error = f"no log at {log}: does the node see this file system? output_dir must be shared by all nodes"
    return JobView(
        name=record.name,
        stage=record.stage,
        variant=record.variant,
        part=record.elements[index] if index is not None else None,
        job_id=record.job_id if index is None else f"{record.job_id}_{index}",
        activity=activity,
        state=state.state if state else "",
        reason=state.reason if state else "",
        error=error,
        log=str(log),
    )


def _activity(state: JobState | None) -> Activity:
    if state is None:
        return "unknown"
    if state.waits:
        return "queued"
    if state.state in RUNNING_STATES:
        return "running"
    if state.state == "CANCELLED":
        return "cancelled"
    if state.state in FAILED_STATES:
        return "failed"
    return "running" if state.state == ENDING_STATE else "ended"


def last_error(log: Path) -> str | None:
    """The line of a log's newest start that says best what went wrong, or None."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    start = max((number for number, line in enumerate(lines) if line.startswith(_START_LINE)), default=0)
    return next(_matching(lines[start:]), None)


def _matching(lines: list[str]) -> Iterator[str]:
    lines = [_RANK_PREFIX.sub("", line).strip() for line in reversed(lines)]
    for kind in _ERROR_KINDS:
        yield from (line for line in lines if kind.search(line))

"""What Slurm and the logs say about a run's jobs: their states, why one failed, what it said last."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..run_folder import RunFolder
from .job_records import JobRecord, JobRecords, read_records
from .scheduler import ENDING_STATE, FAILED_STATES, RUNNING_STATES, WAITING_STATES, JobState, SchedulerError, observe

Activity = Literal["queued", "running", "failed", "cancelled", "ended", "unknown"]
_TAIL_BYTES = 1 << 16
_START_LINE = "=== "
"""Begins every start of a script in its log; a requeued job appends."""
_ERROR_KINDS = (
    re.compile(r"^error( \(rank \d+\))?: "),
    re.compile(r"could not be queued again|is not queued again"),
    re.compile(r"^[\w.]*(Error|Exception|Interrupt)\b.*"),
    re.compile(r"^slurmstepd[^\s:]*: error: .*(CANCELLED|oom|out.of.memory|exceeded|unable)", re.IGNORECASE),
    re.compile(r"^(srun|slurmstepd[^\s:]*): error: "),
    re.compile(r"\b(command not found|No such file or directory|Permission denied)\b"),
)
"""Lines that say what went wrong, the most telling kind first."""


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


def view_jobs(folder: RunFolder) -> tuple[list[JobView], list[str], JobRecords]:
    """The newest jobs of a run, why a source of states is missing, and the records. Empty where nothing was submitted.

    Raises:
        CheckpointError: the records cannot be read.
    """
    records = read_records(folder)
    with contextlib.suppress(SchedulerError):  # `observe` says so
        records.adopt()
    seen = observe(records.submitted)
    views = [
        _view(folder, record, index, seen.states.get((record.job_id, index))) for record, index in records.newest()
    ]
    return views, seen.notes, records


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
    if state.state in WAITING_STATES:
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
    for kind in _ERROR_KINDS:
        for line in reversed(lines):
            if kind.search(line):
                yield line.strip()
                break

"""`slurm/jobs.json` in the run folder: every job that was submitted for the run, and how."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import CheckpointError
from ..run_folder import RunFolder, write_json
from .scheduler import SubmittedJob, jobs_by_token

FORMAT = 1
_INTENT_AGE = timedelta(days=1)


class JobRecord(BaseModel):
    """One call of sbatch."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    """Name in the graph: `soft.merge`."""
    stage: str
    """Stage of the run that it belongs to; a merge belongs to the stage that it ends."""
    variant: str | None = None
    job_id: str
    elements: dict[int, str] = Field(default_factory=dict)
    """Array index to its part (`0-15`); empty for a single job."""
    parts: list[str] = Field(default_factory=list)
    """All parts of the array as it was grouped then, submitted now or not; empty in older records."""
    dependency: str = ""
    script: str
    submitted_at: str
    token: str = ""
    """Last word of the job's comment in Slurm, by which it is found; empty in older records."""
    slurm_name: str = ""
    """The job's name in Slurm; empty in older records."""

    @property
    def parents(self) -> list[str]:
        """Slurm's names (`12`, `12_3`) of the jobs that must succeed before this one."""
        conditions = self.dependency.split(",")
        return [name for part in conditions if part.startswith("afterok:") for name in part.split(":")[1:]]

    @property
    def submitted(self) -> SubmittedJob:
        """By what Slurm's commands know it."""
        return SubmittedJob(self.job_id, self.token, self.slurm_name)

    def log_file(self, folder: RunFolder, index: int | None) -> Path:
        """Where the job, or one element of it, prints."""
        return folder.logs / (
            log_name(self.name, is_array=bool(self.elements))
            .replace("%A", self.job_id)
            .replace("%j", self.job_id)
            .replace("%a", str(index))
        )


class JobRecords(BaseModel):
    """All calls of sbatch for a run, oldest first, and the command that made them."""

    model_config = ConfigDict(extra="forbid")
    format: int = FORMAT
    command: list[str] = Field(default_factory=list)
    """The newest `hedgehog submit …`: the same again submits what is missing."""
    jobs: list[JobRecord] = Field(default_factory=list)
    intents: list[JobRecord] = Field(default_factory=list)
    """Calls of sbatch whose outcome is not known, without a job id: written before the call, removed after it."""

    def newest(self) -> Iterator[tuple[JobRecord, int | None]]:
        """The latest attempt at every job and every part of an array, in order of submission."""
        found: dict[tuple[str, str | None], tuple[JobRecord, int | None]] = {}
        for job in self.jobs:
            if job.elements:
                found.pop((job.name, None), None)
                if job.parts:  # grouped anew: parts of an earlier grouping are nobody's concern any more
                    for key in [key for key in found if key[0] == job.name and key[1] not in job.parts]:
                        del found[key]
                for index, part in job.elements.items():
                    found[job.name, part] = (job, index)
            else:
                for key in [key for key in found if key[0] == job.name]:
                    del found[key]
                found[job.name, None] = (job, None)
        yield from found.values()

    def adopt(self) -> list[JobRecord]:
        """Find out about the intents: what squeue shows becomes a record. Returns the new records; writes nothing.

        An intent that squeue does not show stays for a day, for a busy controller may take a job late.

        Raises:
            SchedulerError: squeue does not answer.
        """
        if not self.intents:
            return []
        found = jobs_by_token({intent.token for intent in self.intents})
        adopted = []
        now = datetime.now(timezone.utc)
        for intent in list(self.intents):
            if intent.token in found:
                record = intent.model_copy(update={"job_id": found[intent.token]})
                # `newest` goes by the order of submission
                later = (n for n, job in enumerate(self.jobs) if job.submitted_at > record.submitted_at)
                self.jobs.insert(next(later, len(self.jobs)), record)
                adopted.append(record)
                self.intents.remove(intent)
            elif now - datetime.fromisoformat(intent.submitted_at) > _INTENT_AGE:
                self.intents.remove(intent)
        return adopted

    @property
    def submitted(self) -> list[SubmittedJob]:
        """The jobs of `newest`."""
        return list(dict.fromkeys(job.submitted for job, _ in self.newest()))


def log_name(name: str, *, is_array: bool) -> str:
    """File name of a job's log with Slurm's placeholders."""
    return f"{name}-%A_%a.log" if is_array else f"{name}-%j.log"


def read_records(folder: RunFolder) -> JobRecords:
    """The run's records; empty where nothing was submitted.

    Raises:
        CheckpointError: the file is not of this format.
    """
    file = folder.slurm / "jobs.json"
    if not file.is_file():
        return JobRecords()
    try:
        return JobRecords.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        raise CheckpointError(
            f"{file}: not a list of jobs of format {FORMAT} ({str(error).splitlines()[0]}). Remove it, after "
            "cancelling the run's jobs by hand."
        ) from error


def write_records(folder: RunFolder, records: JobRecords) -> None:
    """Write the records atomically."""
    write_json(folder.slurm / "jobs.json", records.model_dump())

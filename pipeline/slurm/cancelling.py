"""`hedgehog cancel`: takes a run's jobs out of Slurm. What they saved stays, and submitting again goes on from it."""

from __future__ import annotations

import shlex
from contextlib import ExitStack

from ..errors import ResourceError
from ..run_folder import RunFolder, fenced, storage_errors
from ..status import find_run_folder
from .job_records import JobRecords, read_records, write_records
from .queue_lease import changing_the_queue
from .scheduler import ENDING_STATE, queue_states, scancel


def cancel(run: str) -> None:
    """Cancel every job of a run that waits or runs.

    Raises:
        ConfigError: no such run.
        LeaseError: a `submit` is just creating jobs of the run, or another `cancel` is at work.
        CheckpointError: the records of the run's jobs cannot be read.
        SchedulerError: Slurm does not answer, or refuses.
    """
    folder = RunFolder(find_run_folder(run))
    if not folder.slurm.is_dir():
        print(f"{folder.root}: nothing was submitted to Slurm.")
        return
    with ExitStack() as held:
        may_write = True
        try:
            lease = held.enter_context(changing_the_queue(folder, "cancel"))
            held.enter_context(fenced(lease))
        except ResourceError as error:  # a full disk is a reason to cancel, not one to refuse it
            may_write = False
            print(f"note: {error} Cancels all the same; let no `hedgehog submit` of this run work beside it.")
        records = read_records(folder)
        adopted = records.adopt()
        _cancel_recorded(folder, records)
        if adopted and may_write:
            with storage_errors("cancel"):
                write_records(folder, records)


def _cancel_recorded(folder: RunFolder, records: JobRecords) -> None:
    if records.intents:
        names = ", ".join(intent.name for intent in records.intents)
        print(
            f"note: Slurm gave no answer about the job of {names}, and shows none now. Should the controller still "
            "take it, cancel again."
        )
    if not records.jobs:
        print(f"{folder.root}: nothing was submitted to Slurm.")
        return
    states = queue_states([job.submitted for job in records.jobs])
    live = {
        job_id if index is None else f"{job_id}_{index}": state.state
        for (job_id, index), state in states.items()
        # a job that is being queued again is COMPLETING too, and would start anew; to one that ends it does no harm
        if state.is_live or state.state == ENDING_STATE
    }
    if not live:
        print(f"{folder.root}: no job waits or runs.")
        return
    # children first: a parent's end must not start or kill them before their turn
    names = {job.job_id: job.name for job in records.jobs}
    order = {job.job_id: number for number, job in enumerate(records.jobs)}
    wanted = sorted(live, key=lambda name: -order[name.partition("_")[0]])
    scancel(wanted)
    for name in reversed(wanted):
        print(f"  {names[name.partition('_')[0]]:<20} {name} cancelled ({live[name].lower()})")
    print(f"what was saved stays. To go on: {shlex.join(records.command)}")

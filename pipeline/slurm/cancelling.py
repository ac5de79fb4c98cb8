"""`hedgehog cancel`: takes a run's jobs out of Slurm. What they saved stays, and submitting again goes on from it."""

from __future__ import annotations

import shlex

from ..run_folder import RunFolder
from ..status import find_run_folder
from .job_records import read_records
from .scheduler import ENDING_STATE, LIVE_STATES, queue_states, scancel


def cancel(run: str) -> None:
    """Cancel every job of a run that waits or runs.

    Raises:
        ConfigError: no such run.
        SchedulerError: Slurm does not answer, or refuses.
    """
    folder = RunFolder(find_run_folder(run))
    records = read_records(folder)
    records.adopt()
    if not records.jobs:
        print(f"{folder.root}: nothing was submitted to Slurm.")
        return
    states = queue_states([job.job_id for job in records.jobs])
    live = {
        job_id if index is None else f"{job_id}_{index}": state.state
        for (job_id, index), state in states.items()
        # a job that is being queued again is COMPLETING too, and would start anew; to one that ends it does no harm
        if state.state in LIVE_STATES or state.state == ENDING_STATE
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

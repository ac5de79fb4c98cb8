"""Who may submit or cancel a run's jobs: one command at a time.

Two submits at once would both find the same jobs missing, and a cancel would miss what a submit is just creating.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..lease import Lease, acquire
from ..run_folder import RunFolder, storage_errors


@contextmanager
def changing_the_queue(folder: RunFolder, command: str) -> Iterator[Lease]:
    """Hold the lease of a run's `slurm/` folder, which is made where there is none.

    Args:
        command: what the user typed, for the message of a disk that is full.

    Raises:
        LeaseError: another `submit` or `cancel` is at work on the run.
        ResourceError: the folder cannot be written.
    """
    with storage_errors(command):
        lease = acquire(folder.slurm, print, for_job=False)
    lease.keep_alive()
    try:
        yield lease
    finally:
        lease.release()

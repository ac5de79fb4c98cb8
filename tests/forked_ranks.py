"""Runs the same code as every rank of a group, forked from one process.

    forked_ranks.py NUM_RANKS LOG_FOLDER CODE ARGUMENT        (run by forking_server.py)

A rank finds ARGUMENT in sys.argv[1], RANK and LOCAL_RANK in its environment, and prints to LOG_FOLDER/<rank>. A rank
that died leaves the others waiting in a collective: the first failure ends them all.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def become_rank(rank: int, log: Path, code: str, argument: str) -> None:
    """In a forked child: run the code."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["-c", argument]
    exec(compile(code, f"rank {rank}", "exec"), {"__name__": "__main__"})


def main() -> None:
    num_ranks, folder, code, argument = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    ranks: set[int] = set()
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            become_rank(rank, folder / str(rank), code, argument)
            return
        ranks.add(pid)
    failed = False
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""The `hedgehog` of these tests' jobs: the program itself, which a test can hold after a step, and which keeps times.

    python held_program.py FOLDER ARGUMENTS…

Where FOLDER has a file `hold-<n>`, the job's n-th restart (0: its first start) waits after as many steps as the file
says, before it saves, until a signal comes or the file is gone (of an array: the first element; of several ranks: the
first, and the others wait for it). `3 deaf` in it: a signal does not end the wait. Where there is a file `early-<n>`,
that start waits before it listens to signals. So a test need not hit a moment.

FOLDER/times.jsonl gets a line for the start, for every step, every save and search for a checkpoint; of several ranks,
from the first. FOLDER/rank-<n> has a rank's process id.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv.pop(1))
RESTART = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
PART = os.environ.get("SLURM_ARRAY_TASK_ID")
IS_MAIN = os.environ.get("SLURM_PROCID", "0") == "0"


def note(what: str, **facts: object) -> None:
    if not IS_MAIN:
        return
    record = {"what": what, "job": os.environ.get("SLURM_JOB_ID"), "part": PART, "restart": RESTART, **facts}
    record["at"] = time.time()
    with open(FOLDER / "times.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def timed(owner: type, name: str) -> None:
    function = getattr(owner, name)

    def measured(*arguments: Any, **rest: Any) -> Any:
        started = time.monotonic()
        try:
            return function(*arguments, **rest)
        finally:
            note(name, seconds=time.monotonic() - started)

    setattr(owner, name, measured)


def held_at_steps() -> None:
    from hedgehog.pipeline.checkpoints import Checkpoints
    from hedgehog.pipeline.interrupts import asked_to_stop
    from hedgehog.pipeline.metrics import Reporter

    timed(Checkpoints, "save")
    timed(Checkpoints, "newest")
    record_step, hold = Reporter.step, FOLDER / f"hold-{RESTART}"
    wanted, *deaf = hold.read_text().split() if hold.exists() else ("0",)

    def step(self: Reporter, number: int, *arguments: Any, **rest: Any) -> None:
        record_step(self, number, *arguments, **rest)
        note("step", step=number)
        if IS_MAIN and PART in (None, "0") and int(wanted) == number:
            while hold.exists() and (deaf or not asked_to_stop()):
                time.sleep(0.05)

    Reporter.step = step


class Kept:
    """stderr with a copy: Slurm cuts a process that it thinks dead off its log."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with open(FOLDER / f"stderr-{RESTART}", "a") as copy:
            copy.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


if __name__ == "__main__":
    (FOLDER / f"rank-{os.environ.get('SLURM_PROCID', '0')}").write_text(str(os.getpid()))
    if (FOLDER / f"early-{RESTART}").exists():
        note("early")
        time.sleep(600)
    from hedgehog.pipeline import cli

    sys.stderr = Kept(sys.stderr)
    note("start", pid=os.getpid())
    load = cli._load

    def load_then_wrap(*arguments: Any, **rest: Any) -> Any:
        """Not before: what is wrapped brings torch, and the signals' handlers come first."""
        config = load(*arguments, **rest)
        held_at_steps()
        return config

    cli._load = load_then_wrap
    cli.main()

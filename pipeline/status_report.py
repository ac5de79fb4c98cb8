"""`hedgehog status` on the terminal: one screen, once or again and again, or JSON."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import asdict

from .status import RunStatus, read_status
from .status_screen import screen_lines

_PLAIN_WIDTH = 140
"""Columns where there is no terminal to ask."""


def print_status(run: str, *, as_json: bool, verbose: bool = False) -> RunStatus:
    """Print a run's status, on a terminal so that it fits the screen, and return it.

    Raises:
        ConfigError, CheckpointError: see `read_status`.
    """
    status = read_status(run)
    if as_json:
        print(json.dumps({**asdict(status), "finished": status.finished}, indent=2, ensure_ascii=False), flush=True)
    else:
        print("\n".join(_lines(status, verbose)), flush=True)
    return status


def watch_status(run: str, *, every_s: float, as_json: bool, verbose: bool = False) -> RunStatus:
    """Print the status every so many seconds, until the run is finished or Slurm has no job of it left.

    A run that was not submitted is watched until it is finished. A terminal is drawn over, not scrolled.

    Raises:
        ConfigError, CheckpointError: see `read_status`.
    """
    redraws = sys.stdout.isatty() and not as_json
    if redraws:
        print("\033[2J", end="")
    while True:
        if redraws:
            status = read_status(run)
            lines = _lines(status, verbose, f"{time.strftime('%H:%M:%S')}, every {every_s:g} s")
            # each line is cleared to its end, then what an earlier and longer screen left below
            print("\033[H" + "".join(f"{line}\033[K\n" for line in lines) + "\033[J", end="", flush=True)
        else:
            status = print_status(run, as_json=as_json, verbose=verbose)
        submitted = any(stage.job for stage in status.stages)
        if status.finished or (submitted and not status.live and not status.queue_unknown):
            return status
        time.sleep(every_s)


def _lines(status: RunStatus, verbose: bool, clock: str = "") -> list[str]:
    if not sys.stdout.isatty():
        return screen_lines(status, width=_PLAIN_WIDTH, height=None, verbose=verbose)
    columns, rows = shutil.get_terminal_size()
    styled = "NO_COLOR" not in os.environ
    # the last line is the prompt's
    return screen_lines(status, width=columns, height=rows - 1, verbose=verbose, styled=styled, clock=clock)

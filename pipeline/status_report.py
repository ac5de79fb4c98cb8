"""`hedgehog status` on the terminal: one screen, once or again and again, or JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from .formatting import format_duration
from .status import RunStatus, StageStatus, read_status

_PLAIN_WIDTH = 140


def print_status(run: str, *, as_json: bool) -> RunStatus:
    """Print a run's status, one line a stage, and return it.

    Raises:
        ConfigError, CheckpointError: see `read_status`.
    """
    status = read_status(run)
    if as_json:
        print(json.dumps({**asdict(status), "finished": status.finished}, indent=2, ensure_ascii=False), flush=True)
        return status
    from rich import box
    from rich.console import Console
    from rich.table import Table

    submitted = any(stage.job for stage in status.stages)
    table = Table(title=status.folder, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    columns = ["stage", "state", *(["job"] if submitted else []), "step", "last loss", "minutes", "left", "results"]
    for column in columns:
        justify = "right" if column in ("step", "last loss", "minutes", "left") else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for stage in status.stages:
        table.add_row(*_row(stage, submitted))
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)
    console.print(table)
    for stage in status.stages:
        if stage.error:
            print(f"  {stage.title}: {stage.error}\n      log: {stage.log}")
    for note in status.notes:
        print(f"  note: {note}")
    for command in status.commands:
        print(f"  to go on: {command}")
    if status.finished:
        print("  finished.")
    sys.stdout.flush()
    return status


def watch_status(run: str, *, every_s: float, as_json: bool) -> RunStatus:
    """Print the status every so many seconds, until the run is finished or Slurm has no job of it left.

    A run that was not submitted is watched until it is finished.

    Raises:
        ConfigError, CheckpointError: see `read_status`.
    """
    while True:
        if sys.stdout.isatty() and not as_json:
            print("\033[2J\033[H", end="")
        status = print_status(run, as_json=as_json)
        submitted = any(stage.job for stage in status.stages)
        if status.finished or (submitted and not status.live and not status.queue_unknown):
            return status
        time.sleep(every_s)


def _row(stage: StageStatus, submitted: bool) -> list[str]:
    state = f"{stage.state}: {stage.detail}" if stage.detail else stage.state
    job = f"{stage.job} {stage.job_state or ''}".strip() if stage.job else ""
    return [
        stage.title,
        state,
        *([job] if submitted else []),
        "" if stage.step is None else f"{stage.step}/{stage.total_steps or '?'}",
        "" if stage.loss is None else f"{stage.loss_name} {stage.loss:.4g}",
        "" if stage.minutes is None else f"{stage.minutes:.1f}",
        "" if stage.eta_s is None else format_duration(stage.eta_s),
        _results(stage),
    ]


def _results(stage: StageStatus) -> str:
    """The path of a single artifact, else the folder that holds them all."""
    paths = [Path(path) for path in stage.artifacts.values()]
    if len(paths) > 1:
        return f"{os.path.commonpath(paths)} ({len(paths)} artifacts)"
    return "".join(str(path) for path in paths)

"""How `hedgehog validate` shows its reports: tables with rich, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .config_loading import listed
from .formatting import for_stream, wrapped
from .memory_estimate import GIB, StageEstimate, TermKind
from .validation import ValidationReport, describe_model, report_as_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PLAIN_WIDTH = 120
"""Columns where there is no terminal to ask."""
_WIDE = 115
"""Columns of a terminal that has room for all that is said of memory in one row."""
_KINDS: tuple[TermKind, ...] = ("weights", "training", "activations", "overhead")


def print_reports(reports: Sequence[ValidationReport], *, as_json: bool) -> None:
    """Print every report: to stdout what is fine, to stderr what is wrong. With `as_json` one list, all on stdout."""
    if as_json:
        print(json.dumps([report_as_json(report) for report in reports], indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False, soft_wrap=True)
    for report in reports:
        if report.errors:
            _print_errors(report)
        else:
            _print_valid(report, console)


def _print_errors(report: ValidationReport) -> None:
    # what could not be read names its file
    message = report.unreadable or listed(report.file, report.placed_errors)
    print(for_stream(f"error: {message}", sys.stderr), file=sys.stderr)


def _print_valid(report: ValidationReport, console: Console) -> None:
    from rich.text import Text

    processes = f"{report.world_size} {'process' if report.world_size == 1 else 'processes'}"
    console.print(Text(report.file, style="bold") + Text(f": valid ({processes} on {report.device})"))
    for note in report.notes:
        _print_long(f"  note: {note}", console)
    if report.shape is not None:
        _print_long(f"  {describe_model(report)}", console)
    gap = [""] if console.width < _WIDE else []  # wider tables begin with a blank line themselves
    console.print(*gap, _batch_table(report, console.width), *gap, sep="\n")
    if report.memory:
        console.print(_memory_table(report.memory, console.width))
        _print_long(
            "  An estimate: the large tensors at the peak, in GiB. --json lists every term with its formula.", console
        )
        console.print()


def _print_long(text: str, console: Console) -> None:
    console.print("\n".join(wrapped(text, console.width)) if console.is_terminal else text, markup=False)


def _batch_table(report: ValidationReport, width: int) -> Table:
    table = _table("Steps", width)
    for column in (
        "stage",
        "rows",
        "steps",
        "sequences a step",
        "micro-batch x processes x accumulation",
        "tokens a step",
    ):
        table.add_column(column, justify="left" if column == "stage" else "right", overflow="fold")
    for entry in report.batches:
        table.add_row(
            entry.stage,
            "?" if entry.num_rows is None else f"≤ {entry.num_rows:,}",
            "?" if entry.num_steps is None else f"{entry.num_steps:,}",
            str(entry.global_batch_size),
            f"{entry.micro_batch_size} x {entry.world_size} x {entry.num_accumulation}",
            f"≤ {entry.max_tokens_per_step:,}",
        )
    return table


def _memory_table(memory: Sequence[StageEstimate], width: int) -> Table:
    """In few columns the kind of memory, mostly the same for all, moves to the title. Words are wrapped, never cut."""
    kinds = list(dict.fromkeys(f"{'GPU' if estimate.where == 'cuda' else 'CPU'} memory" for estimate in memory))
    narrow = width < _WIDE
    told_above = narrow and len(kinds) == 1
    table = _table("Peak memory of one process" + (f", GiB of {kinds[0]}" if told_above else ""), width)
    for column in ("stage", *([] if told_above else ["in"]), *_KINDS, "total", "attention by"):
        words = column in ("stage", "in", "attention by")
        table.add_column(column, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for estimate in memory:
        parts = [sum(term.num_bytes for term in estimate.terms if term.kind == kind) for kind in _KINDS]
        where = "GPU" if estimate.where == "cuda" else "CPU"
        figures = [f"{num_bytes / GIB:.2f}" if num_bytes else "-" for num_bytes in (*parts, estimate.num_bytes)]
        place = [] if told_above else [where if narrow else f"{where} memory"]
        table.add_row(estimate.title, *place, *figures, estimate.assumes or "-")
    return table


def _table(title: str, width: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=True)
    if width < _WIDE:
        table.padding, table.pad_edge, table.show_edge = (0, 0, 0, 0), False, False  # the box has a blank between two
    return table

"""How `hedgehog validate` shows its reports: tables with rich, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from .config_loading import listed
from .memory_estimate import GIB, StageEstimate, TermKind
from .validation import ValidationReport, describe_model, report_as_json

_PLAIN_WIDTH = 120
"""Columns where there is no terminal to ask."""
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
    if report.unreadable is not None:  # names the file
        print(f"error: {report.unreadable}", file=sys.stderr)
    else:
        print(f"error: {listed(report.file, report.placed_errors)}", file=sys.stderr)


def _print_valid(report: ValidationReport, console: object) -> None:
    from rich.console import Console

    assert isinstance(console, Console)
    processes = f"{report.world_size} {'process' if report.world_size == 1 else 'processes'}"
    console.print(f"[bold]{report.file}[/bold]: valid ({processes} on {report.device})")
    for note in report.notes:
        console.print(f"  note: {note}", markup=False)
    if report.shape is not None:
        console.print(f"  {describe_model(report)}", markup=False)
    console.print(_batch_table(report))
    if report.memory:
        console.print(_memory_table(report.memory))
        console.print(
            "  An estimate: the large tensors at the peak, in GiB. --json lists every term with its formula.\n"
        )


def _batch_table(report: ValidationReport) -> object:
    table = _table("Steps")
    for column in (
        "stage",
        "rows",
        "steps",
        "sequences a step",
        "micro-batch x processes x accumulation",
        "tokens a step",
    ):
        table.add_column(column, justify="left" if column == "stage" else "right")
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


def _memory_table(memory: Sequence[StageEstimate]) -> object:
    table = _table("Peak memory of one process")
    for column in ("stage", "in", *_KINDS, "total", "attention by"):
        table.add_column(column, justify="left" if column in ("stage", "in", "attention by") else "right")
    for estimate in memory:
        parts = [sum(term.num_bytes for term in estimate.terms if term.kind == kind) for kind in _KINDS]
        where = "GPU memory" if estimate.where == "cuda" else "CPU memory"
        figures = [f"{num_bytes / GIB:.2f}" if num_bytes else "-" for num_bytes in (*parts, estimate.num_bytes)]
        table.add_row(estimate.title, where, *figures, estimate.assumes or "-")
    return table


def _table(title: str):
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=True)

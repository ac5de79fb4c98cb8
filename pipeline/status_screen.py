"""A run's status laid out for a terminal: as much detail as fits the screen, never a path or command cut to fit.

Three layouts, the first that fits is taken: variants that are through (or that all wait) share a row; then every array
and every variant has one row; then all variants have one. What runs and what failed is the last to be folded away.
"""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .formatting import format_duration
from .status import RunStatus, StageStatus, State

_WIDE = 100
"""Columns of a terminal that has room for the jobs' ids, and for minutes beside Slurm's longer states."""
_NAME_WIDTH = 24
_LAYOUTS = ((1, 8), (1, 3), (2, 3), (3, 3), (3, 1))
"""Level of folding, and how many errors and commands are shown; the most telling first."""
_THROUGH: tuple[State, ...] = ("done", "skipped")
_QUIET: tuple[State, ...] = ("queued", "not started", "cancelled")
"""States of which nothing but their name is to be told."""
_BY_URGENCY: tuple[State, ...] = (
    "failed",
    "running",
    "unfinished",
    "queued",
    "not started",
    "cancelled",
    "done",
    "skipped",
)
_RESULTS = {
    "validation_kl_nats": "KL",
    "validation_loss_nats": "valid.",
    "reference_loss_nats": "test",
    "test_loss_nats": "test",
    "validation_loss_mse": "valid.",
    "test_loss_mse": "test",
}
"""Words before the figure that a finished stage is judged by."""
_STYLES: dict[State, str] = {"running": "bold", "failed": "bold red", "cancelled": "yellow", "unfinished": "yellow"}


@dataclass(frozen=True)
class _Row:
    name: str
    state: State
    text: str
    stage: StageStatus | None = None
    """Whose figures stand in the row."""
    left_s: float | None = None


@dataclass(frozen=True)
class _Family:
    """A stage with its parts: subsets of layers, or shards of test rows."""

    whole: StageStatus
    parts: tuple[StageStatus, ...]

    @property
    def through(self) -> bool:
        return self.whole.state in _THROUGH

    @property
    def states(self) -> set[State]:
        """What is the case in it, apart from what is through."""
        if self.through:
            return set()
        return {stage.state for stage in (self.whole, *self.parts) if stage.state not in _THROUGH}


def screen_lines(
    status: RunStatus,
    *,
    width: int,
    height: int | None,
    verbose: bool = False,
    styled: bool = False,
    clock: str = "",
) -> list[str]:
    """The lines to print.

    Args:
        width: columns. Longer lines, such as commands, are left for the terminal to wrap.
        height: lines that there are room for, wrapped ones counted; None: any number.
        verbose: every stage, part and variant, and all results, whatever room there is.
        styled: with colours, as escape sequences.
        clock: what stands behind the run's folder in the first line.
    """
    everything = len(status.stages) + len(status.commands)
    layouts = _LAYOUTS if height is not None else ((1, everything),)
    if verbose:
        layouts, height = ((0, everything),), None
    title = f"{status.folder}  {clock}".rstrip()
    table, below, spare = [], [], 0
    for level, limit in layouts:
        rows = [_row(stage, stage.title) for stage in status.stages] if level == 0 else list(_rows(status, level))
        table = _table(rows, status, width, styled)
        below = [*_errors(status, limit, width), *_ending(status, limit, width, verbose)]
        num_lines = len(table) + sum(-(-max(1, len(line)) // width) for line in (title, *below))
        spare = 0 if height is None else height - num_lines
        if spare >= 0:
            break
    if spare < 0:
        table[max(1, len(table) + spare - 1) :] = ["  … more rows: --verbose"]
    return [title, *table, *below]


def _rows(status: RunStatus, level: int) -> Iterator[_Row]:
    families = _families(status.stages)
    variants = list(dict.fromkeys(family.whole.variant for family in families if family.whole.variant))
    shown = False
    for family in families:
        if family.whole.variant is None:
            yield from _family_rows(family, family.whole.stage, level)
        elif not shown:
            shown = True
            yield from _variant_rows({v: [f for f in families if f.whole.variant == v] for v in variants}, level)


def _families(stages: Sequence[StageStatus]) -> list[_Family]:
    found = []
    for _, members in itertools.groupby(stages, key=lambda stage: (stage.variant, stage.stage)):
        *parts, whole = members
        found.append(_Family(whole, tuple(parts)))
    return found


def _family_rows(family: _Family, name: str, level: int) -> Iterator[_Row]:
    whole, parts = family.whole, family.parts
    if family.through or not parts:
        yield _row(whole, name)
        return
    if all(part.state in _THROUGH for part in parts):
        yield _row(whole, f"{name} ({len(parts)})", "all done; to join: ")
        return
    waiting = [part for part in parts if part.state not in _THROUGH]
    if waiting[0].state in _QUIET and len({_words(part) for part in waiting}) == 1:
        num_done = len(parts) - len(waiting)
        text = f"{num_done} done, others " * bool(num_done) + _words(waiting[0])
        yield _Row(f"{name} ({len(parts)})", waiting[0].state, text)
        return
    counts = [(state, sum(part.state == state for part in parts)) for state in _BY_URGENCY]
    text = ", ".join(f"{number} {state}" for state, number in counts if number)
    times = [part.eta_s for part in parts if part.eta_s is not None]
    yield _Row(f"{name} ({len(parts)})", _worst(parts), text, left_s=max(times, default=None))
    if level > 1:
        return
    for part in parts:
        if part.state not in (*_THROUGH, *_QUIET):
            yield _row(part, f"  {part.layers or part.shard}")
    quiet = [part for part in parts if part.state in _QUIET]
    for words, group in itertools.groupby(sorted(quiet, key=_words), key=_words):
        members = list(group)
        names = [part.layers or part.shard or "" for part in members]
        if len(names) == 1:
            yield _row(members[0], f"  {names[0]}")
        else:
            yield _Row(f"  {len(names)} of them", members[0].state, words)


def _variant_rows(variants: dict[str, list[_Family]], level: int) -> Iterator[_Row]:
    kinds: dict[str, State | None] = {}
    """The one thing to be told of a variant, or None where its stages have rows."""
    for name, families in variants.items():
        states = {state for family in families for state in family.states} or {"done"}
        kinds[name] = next((state for state in (*_QUIET, "done") if states == {state}), None)
    if level == 3:
        every = [
            _worst([stage for family in families for stage in (family.whole, *family.parts)])
            for families in variants.values()
        ]
        counts: list[tuple[State, int]] = [(state, every.count(state)) for state in _BY_URGENCY if state in every]
        text = ", ".join(f"{number} {state}" for state, number in counts)
        yield _Row(f"{len(variants)} variants", counts[0][0], text)
        return
    told: set[State] = set()
    for name, families in variants.items():
        kind = kinds[name]
        alike = [other for other, state in kinds.items() if state == kind]
        if kind is None:
            unfinished = [family for family in families if not family.through]
            for family in unfinished if level == 1 else unfinished[:1]:
                yield from _family_rows(family, f"{name}/{family.whole.stage}", level)
        elif len(alike) == 1:
            yield _Row(name, kind, kind)
        elif kind not in told:
            told.add(kind)
            yield _Row(f"{len(alike)} variants", kind, f"{kind}: {', '.join(alike)}")


def _worst(stages: Sequence[StageStatus]) -> State:
    states = {stage.state for stage in stages}
    return next(state for state in _BY_URGENCY if state in states)


def _row(stage: StageStatus, name: str, before: str = "") -> _Row:
    return _Row(name, stage.state, before + _words(stage), stage, stage.eta_s)


def _words(stage: StageStatus) -> str:
    """State and detail, without Slurm's own word where it says the same: `queued: Priority`, `failed: exit code 2`."""
    detail, word = stage.detail, stage.job_state or ""
    if word in ("PENDING", "FAILED", "CANCELLED"):
        detail = detail.removeprefix(word).strip().removeprefix("(").removesuffix(")")
    return f"{stage.state}: {detail}" if detail else stage.state


def _table(rows: Sequence[_Row], status: RunStatus, width: int, styled: bool) -> list[str]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    submitted = any(stage.job for stage in status.stages)
    columns = {
        "stage": lambda row: row.name,
        "state": lambda row: row.text,
        "job": lambda row: row.stage.job or "" if row.stage and row.state not in _THROUGH else "",
        "progress": lambda row: _progress(row.stage),
        "loss": lambda row: _loss(row.stage),
        "min": lambda row: "" if not row.stage or row.stage.minutes is None else f"{row.stage.minutes:.1f}",
        "left": lambda row: "" if row.left_s is None else format_duration(row.left_s),
    }
    if not submitted or width < _WIDE:
        del columns["job"]
    if submitted and width < _WIDE:
        del columns["min"]
    widths = {name: max(5, len(name), *(len(cell(row)) for row in rows)) for name, cell in columns.items()}
    widths["stage"] = min(widths["stage"], _NAME_WIDTH)
    # the state is cut where it must be: what follows it are figures
    widths["state"] = min(widths["state"], width - 1 - sum(widths.values()) + widths["state"] - 2 * len(columns))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, size in widths.items():
        justify = "left" if name in ("stage", "state", "job") else "right"
        table.add_column(name, no_wrap=True, width=max(5, size), justify=justify)
    for row in rows:
        style = _STYLES.get(row.state, "")
        table.add_row(*[Text(cell(row), style=style if name == "state" else "") for name, cell in columns.items()])
    target = io.StringIO()
    Console(file=target, width=width, force_terminal=styled, highlight=False, no_color=not styled).print(table)
    return [line.rstrip() for line in target.getvalue().splitlines()]


def _progress(stage: StageStatus | None) -> str:
    if stage is None or stage.step is None or stage.state == "skipped":
        return ""
    return f"{stage.step}/{stage.total_steps or '?'}"


def _loss(stage: StageStatus | None) -> str:
    """With the word for which it is: a batch's own changes from step to step, the others are those of the tables."""
    if stage is None or stage.loss is None:
        return ""
    name = stage.loss_name or ""
    number = f"{stage.loss:.4f}" if name in _RESULTS else f"{stage.loss:.4g}"
    return f"{_RESULTS.get(name, 'step' * bool(name))} {number}".strip()


def _errors(status: RunStatus, limit: int, width: int) -> Iterator[str]:
    """Each error once, with its first stage and log."""
    alike: dict[str, list[StageStatus]] = {}
    for stage in status.stages:
        if stage.error:
            alike.setdefault(stage.error, []).append(stage)
    for error, stages in itertools.islice(alike.items(), limit):
        others = f" (and {len(stages) - 1} more)" if len(stages) > 1 else ""
        yield from _wrapped(f"{stages[0].title}{others}: {error}", width, max_lines=3)
        if stages[0].log is not None:
            yield f"    log: {stages[0].log}"
    if len(alike) > limit:
        yield f"  {len(alike) - limit} more errors: --verbose"


def _ending(status: RunStatus, limit: int, width: int, verbose: bool) -> Iterator[str]:
    if verbose:
        for stage in status.stages:
            for name, path in stage.artifacts.items():
                yield f"  {stage.title}, {name}: {path}"
    for note in status.notes:
        yield from _wrapped(f"note: {note}", width, max_lines=2)
    if status.trained_layer_cost is not None:
        cost = f"{status.trained_layer_cost:.2g}"
        text = f"measured: training a layer took {cost} times as long as running it; for a next run's groups:"
        yield from _wrapped(f"{text} slurm.trained_layer_cost={cost}", width, max_lines=3)
    for command in status.commands[:limit]:
        yield f"  to go on: {command}"
    if len(status.commands) > limit:
        yield f"  {len(status.commands) - limit} more commands: --verbose"
    if status.finished:
        made = status.stages[-1].artifacts if status.stages else {}
        yield f"  finished. {made['model']}" if "model" in made else "  finished."


def _wrapped(text: str, width: int, *, max_lines: int) -> list[str]:
    """At spaces only: a path that is longer than the line is left for the terminal to wrap."""
    return textwrap.wrap(
        " ".join(text.split()),
        max(20, width - 2),
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
        max_lines=max_lines,
        placeholder=" …",
    )

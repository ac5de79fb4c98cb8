"""One line of progress on a terminal, fitted to its width:

    distill ━━━━━━━━━━╺━━━━━━━━━━━━━  61/150  loss 1.213  8,642 tok/s  ETA 0:41  mem 905.1 MiB  kl_nats 0.31 …

The bar gives way first, then the title; figures that diagnose come last and only where there is room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

_LONGEST_BAR = 24
_SHORTEST_BAR = 3
_SHORTEST_TITLE = 6


@dataclass(frozen=True)
class ProgressLine:
    """A rich renderable; it asks for the width each time it is drawn, so a resized terminal is no matter."""

    title: str
    step: int
    total: int
    figures: Sequence[str]
    """What is always shown, the most important first."""
    diagnostics: Sequence[str] = ()
    """What is shown where there is room."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        title, bar_width, tail = self.fit(options.max_width)
        line = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
        cells: list[RenderableType] = [Text(title, style="bold", no_wrap=True)]
        if bar_width:
            cells.append(ProgressBar(total=self.total, completed=self.step, width=bar_width))
        cells.append(Text(tail, no_wrap=True, overflow="ellipsis"))
        line.add_row(*cells)
        yield line

    def fit(self, width: int) -> tuple[str, int, str]:
        """(title, columns of the bar, all the rest) for a terminal of so many columns."""
        counter = f"{self.step:>{len(str(self.total))}}/{self.total}"
        for separator in ("  ", " "):
            tail = separator.join([counter, *self.figures])
            room = width - len(self.title) - len(tail) - 2
            if room >= _SHORTEST_BAR:
                break
        else:
            room = max(width - len(tail) - 1, _SHORTEST_TITLE)
            title = self.title if len(self.title) <= room else self.title[: room - 1] + "…"
            return title, 0, tail
        for diagnostic in self.diagnostics:
            if room - len(diagnostic) - 2 < _LONGEST_BAR:
                break
            tail += f"  {diagnostic}"
            room -= len(diagnostic) + 2
        return self.title, min(room, _LONGEST_BAR), tail

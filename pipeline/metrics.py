"""What a stage says while it runs: progress on the terminal, `metrics.jsonl` on disk, TensorBoard on request.

Metric names carry their unit (`loss_nats`, `learning_rate`, `grad_norm`, `tokens_per_s`). Only rank 0 speaks.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .formatting import format_bytes, format_duration, wrapped
from .progress_line import ProgressLine
from .run_folder import atomic_write, write_fault

_PLAIN_INTERVAL_S = 5.0
"""Shortest time between two progress lines where there is no terminal."""
_REFRESHES_PER_S = 4
_SMOOTHING = 0.9
_WIDE = 110
_PLAIN_WIDTH = 160
"""Columns that a table may take in a log file."""


def reset_peak_memory() -> None:
    """Start a new peak: CUDA's allocator counter, and on Linux the resident set's high-water mark."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then the process's since its start
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Peak since `reset_peak_memory`: allocated GPU memory, or resident memory where nothing was allocated on a GPU."""
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
        if peak:
            return peak
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rewind_metrics(file: Path, step: int) -> None:
    """Drop the records after `step`, and a torn last line: the resumed stage writes them again."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record.get("step", 0) > step:
            break
        kept.append(line)
    atomic_write(file, "".join(line + "\n" for line in kept))


class Reporter:
    """Progress of one stage. On ranks other than 0 every call does nothing.

    Args:
        title: shown before every line ("distill", "softmax/finetune").
        folder: the stage's folder; None keeps nothing on disk.
        is_main: whether this rank speaks.
        log_every_steps: steps between progress lines.
        tensorboard: also write event files to `<folder>/tensorboard`.
    """

    def __init__(
        self,
        title: str,
        folder: Path | None,
        *,
        is_main: bool = True,
        log_every_steps: int = 1,
        tensorboard: bool = False,
    ) -> None:
        from rich.console import Console

        self.title = title
        self.is_main = is_main
        self.console = Console(highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = _PLAIN_WIDTH
        self._file = folder / "metrics.jsonl" if folder is not None and is_main else None
        self._log_every_steps = log_every_steps
        self._live: Any = None
        self._tokens_per_s = 0.0
        self._steps_per_s = 0.0
        self._last_time = time.monotonic()
        self._num_steps_seen = 0
        self._last_plain = 0.0
        self._tensorboard_folder = folder / "tensorboard" if tensorboard and is_main and folder is not None else None
        self._tensorboard_writer: Any = None

    def info(self, message: str) -> None:
        """Print a line."""
        self._say(message)

    def warning(self, message: str) -> None:
        """Print a line that should be noticed."""
        self._say(message, ("warning: ", "yellow"))

    def _say(self, message: str, *mark: tuple[str, str]) -> None:
        """In one piece: a progress line may be drawn between two."""
        if self.is_main:
            from rich.text import Text

            text = "".join([f"{self.title}  ", *(word for word, _ in mark), message])
            if self.console.is_terminal:
                text = "\n".join(wrapped(text, self.console.width))
            line = Text(text)
            line.stylize("bold", 0, len(self.title))
            for word, style in mark:
                line.stylize(style, len(self.title) + 2, len(self.title) + 2 + len(word))
            self.console.print(line)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, narrow: Sequence[str] | None = None
    ) -> None:
        """Print a table: numbers right-aligned, the first column left.

        Args:
            narrow: headings for a terminal that has no room for the others.
        """
        if not self.is_main:
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text  # as it stands: a class may be called [/b]

        gap = 0 if self.console.width < _WIDE else 1  # beside the blank that the box puts between two columns
        if narrow is not None and self.console.width < _WIDE:
            columns = narrow
        table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
        table.padding = (0, gap, 0, 0)
        for index, column in enumerate(columns):
            whole = not any(" " in str(cell) for cell in (column, *(row[index] for row in rows)))
            table.add_column(Text(str(column)), justify="left" if index == 0 else "right", no_wrap=whole)
        for row in rows:
            table.add_row(*[Text(str(cell)) for cell in row])
        self.console.print(table)

    def rewind(self, step: int) -> None:
        """Forget what was recorded after `step`, before going on from there."""
        if self._file is not None:
            rewind_metrics(self._file, step)

    def record(self, record: Mapping[str, Any]) -> None:
        """Append one object to metrics.jsonl, unless another attempt writes there now: the stage stops soon then."""
        if self._file is None or write_fault() is not None:
            return
        with open(self._file, "a") as file:
            file.write(json.dumps(dict(record)) + "\n")

    def step(self, step: int, total: int, *, tokens: int = 0, metrics: Mapping[str, Any] | None = None) -> None:
        """Record step number `step` (from 1) of `total` and move the progress display on.

        Args:
            tokens: tokens processed by this step, over all ranks.
            metrics: figures of this step; floats are shown and recorded.
        """
        if not self.is_main:
            return
        metrics = dict(metrics or {})
        now = time.monotonic()
        elapsed = max(now - self._last_time, 1e-9)
        self._last_time = now
        self._num_steps_seen += 1
        if self._num_steps_seen <= 2:  # the first step warms up: it says nothing of the second
            self._tokens_per_s, self._steps_per_s = tokens / elapsed, 1 / elapsed
        else:
            self._tokens_per_s = _SMOOTHING * self._tokens_per_s + (1 - _SMOOTHING) * tokens / elapsed
            self._steps_per_s = _SMOOTHING * self._steps_per_s + (1 - _SMOOTHING) / elapsed
        record = {
            "step": step,
            "tokens": tokens,
            **metrics,
            "step_s": round(elapsed, 4),
            "memory_bytes": peak_memory_bytes(),
        }
        self.record(record)
        self._record_in_tensorboard(step, metrics)
        self._show(step, total, metrics, now)

    def _record_in_tensorboard(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._tensorboard_folder is not None:
            self._tensorboard_writer = _open_tensorboard(self._tensorboard_folder, step, self)
            self._tensorboard_folder = None
        if self._tensorboard_writer is not None:
            for name, value in metrics.items():
                if isinstance(value, (int, float)):
                    self._tensorboard_writer.add_scalar(f"{self.title}/{name}", value, step)

    def _show(self, step: int, total: int, metrics: Mapping[str, Any], now: float) -> None:
        numbers = {name: f"{value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float))}
        losses = [f"loss {numbers.pop(name)}" for name in list(numbers)[:1] if name.endswith(("loss_nats", "loss_mse"))]
        diagnostics = [f"{name} {number}" for name, number in numbers.items()]
        remaining_s = (total - step) / max(self._steps_per_s, 1e-9)
        figures = [
            *losses,
            f"{self._tokens_per_s:,.0f} tok/s",
            f"ETA {format_duration(remaining_s) if self._num_steps_seen > 1 else '–'}",
            f"mem {format_bytes(peak_memory_bytes())}",
        ]
        if self.console.is_terminal:
            from rich.live import Live

            line = ProgressLine(self.title, step, total, figures, diagnostics)
            if self._live is None:
                self._live = Live(line, console=self.console, refresh_per_second=_REFRESHES_PER_S)
                self._live.start()
            self._live.update(line)
            if step >= total:
                self._stop_progress()
        elif step >= total or (step % self._log_every_steps == 0 and now - self._last_plain >= _PLAIN_INTERVAL_S):
            self._last_plain = now
            self.info("  ".join([f"step {step}/{total}", *figures, *diagnostics]))

    def restart_clock(self) -> None:
        """Do not count the time since the last step (a validation, a save) as part of the next one."""
        self._last_time = time.monotonic()

    def _stop_progress(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._num_steps_seen = 0

    def close(self) -> None:
        """End the progress display and flush what is open."""
        self._stop_progress()
        if self._tensorboard_writer is not None:
            self._tensorboard_writer.close()
            self._tensorboard_writer = None


def _open_tensorboard(folder: Path, first_step: int, reporter: Reporter) -> Any:
    """A writer that makes TensorBoard forget what an earlier attempt wrote from `first_step` on."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        reporter.warning(
            f"logging.tensorboard is on, but {error}: install the [eval] extra. metrics.jsonl is written as always."
        )
        return None
    return SummaryWriter(os.fspath(folder), purge_step=first_step)

"""metrics.jsonl: one object a step, and after a resume exactly one object a step still."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from hedgehog.pipeline import metrics
from hedgehog.pipeline.metrics import (
    Reporter,
    format_bytes,
    format_duration,
    peak_memory_bytes,
    reset_peak_memory,
)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_recorded_and_the_last_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter("distill", tmp_path, log_every_steps=1000)
    for step in range(1, 8):
        reporter.step(step, 7, tokens=128, metrics={"loss_nats": 1 / step})
    reporter.close()
    assert [r["step"] for r in records(tmp_path)] == list(range(1, 8))
    assert records(tmp_path)[3]["loss_nats"] == 0.25
    assert "step 7/7" in capsys.readouterr().out


def test_rewinding_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    reporter = Reporter("distill", tmp_path)
    for step in range(1, 6):
        reporter.step(step, 9, metrics={"loss_nats": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    resumed = Reporter("distill", tmp_path)
    resumed.rewind(3)
    for step in range(4, 7):
        resumed.step(step, 9, metrics={"loss_nats": float(step)})
    assert [(r["step"], r["loss_nats"]) for r in records(tmp_path)] == [(s, float(s)) for s in range(1, 7)]


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter("distill", tmp_path, is_main=False)
    reporter.step(1, 1, metrics={"loss_nats": 0.0})
    reporter.info("x")
    reporter.warning("x")
    reporter.table("t", ["a"], [["1"]])
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_square_brackets_in_messages_are_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Reporter("export", None).info("install the [gpu] extra")
    assert "[gpu]" in capsys.readouterr().out


def test_cells_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class, or a variant, may be called anything."""
    Reporter("prepare", None).table("[b]t", ["", "a [i]"], [["[/b]", "[red]r[/red]"], [":smile:", 1]])
    shown = capsys.readouterr().out
    assert all(cell in shown for cell in ("[b]t", "a [i]", "[/b]", "[red]r[/red]", ":smile:"))


def test_tensorboard_writes_the_same_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the [eval] extra is not installed")
    reporter = Reporter("distill", tmp_path, tensorboard=True)
    reporter.step(1, 2, metrics={"loss_nats": 0.5})
    reporter.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("distill/loss_nats")] == [(1, 0.5)]


def test_tensorboard_forgets_the_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the [eval] extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 5), (4, 7)):  # the first attempt was killed after step 5, its checkpoint is of step 3
        reporter = Reporter("distill", tmp_path, tensorboard=True)
        reporter.rewind(first - 1)
        for step in range(first, last + 1):
            reporter.step(step, 9, metrics={"loss_nats": float(first)})
        reporter.close()
        time.sleep(1.1)  # event files are sorted by the second of their names
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = [(event.step, event.value) for event in events.Scalars("distill/loss_nats")]
    assert values == [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4), (7, 4)]


METRICS = {"loss_nats": 3.918, "kl_nats": 0.5825, "layer_grad_norm_max": 1.234, "learning_rate": 0.0123}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`drawn(80)`: what a terminal of so many columns shows of the last step but one, at 4 s a step."""
    seconds = itertools.count(0, 4)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(seconds)))

    def draw(width: int, title: str = "softmax/finetune") -> str:
        reporter = Reporter(title, None)
        reporter.console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
        for step in (1, 2, 599):
            reporter.step(step, 600, tokens=50_000, metrics=METRICS)
        line = reporter._live.get_renderable()
        reporter.close()
        with reporter.console.capture() as capture:
            reporter.console.print(line)
        (text,) = capture.get().splitlines()
        return text

    return draw


@pytest.mark.parametrize("width", [70, 80, 120, 200])
def test_a_terminal_shows_step_loss_speed_eta_and_memory(drawn: Callable[..., str], width: int) -> None:
    line = drawn(width)
    assert len(line.rstrip()) <= width
    order = [line.index(part) for part in ("599/600", "loss 3.918", " tok/s", "ETA 0:0", "mem ")]
    assert order == sorted(order)
    assert ("━━━" in line) == (width >= 80)
    assert ("kl_nats" in line, "learning_rate" in line) == (width >= 120, width == 200)


def test_the_table_of_scores_is_whole_in_80_columns() -> None:
    from hedgehog.pipeline.score_table import table_columns

    columns, _ = table_columns({"main": {"all": {"rouge1": {}}}})

    row = ["Hedgehog + LoRA", "63.22 ± 4.63", "47.53", "60.23", "0.8124", "405.06", "0.2171", "146.7", "905.1 MiB"]
    assert len(row) == len(columns)
    reporter = Reporter("evaluate", None)
    reporter.console = Console(width=80, force_terminal=True, color_system=None, file=io.StringIO())
    with reporter.console.capture() as capture:
        reporter.table("tiny", columns, [row])
    words = capture.get().split()
    assert "…" not in capture.get()
    assert {word for cell in [*columns, *row] for word in cell.split()} <= set(words)


def test_a_row_of_scores_takes_one_line_of_80() -> None:
    from hedgehog.pipeline.score_table import table_columns

    wide, narrow = table_columns({"main": {"all": {"rouge1": {}}}})

    row = ["Hedgehog + LoRA", "63.22 ± 4.63", "47.53", "60.23", "0.8124", "405.06", "0.2171", "146.7", "905.1 MiB"]
    assert len(narrow) == len(wide)
    reporter = Reporter("evaluate", None)
    for width, columns in ((80, narrow), (120, wide)):
        reporter.console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
        with reporter.console.capture() as capture:
            reporter.table("tiny", wide, [row], narrow=narrow)
        title, heads, _, line = capture.get().rstrip().splitlines()
        assert title.strip() == "tiny" and max(len(heads.rstrip()), len(line.rstrip())) <= width
        assert (heads.split(), line.split()) == (" ".join(columns).split(), " ".join(row).split())


def test_a_long_message_is_wrapped_on_a_terminal_only() -> None:
    shown = []
    for terminal in (True, False):
        reporter = Reporter("softmax/finetune", None)
        file = io.StringIO()
        reporter.console = Console(width=80, force_terminal=terminal, color_system=None, file=file, soft_wrap=True)
        reporter.warning("a word " * 20 + "runs/" + "x" * 90)
        shown.append(file.getvalue().splitlines())
    wrapped, (plain,) = shown
    assert plain.startswith("softmax/finetune  warning: a word a word")
    assert wrapped[0].startswith("softmax/finetune  warning: a word") and all(len(line) <= 80 for line in wrapped[:-1])
    assert wrapped[-1] == "    runs/" + "x" * 90, "a path is not broken"
    assert " ".join(" ".join(wrapped).split()) == " ".join(plain.split())


def test_a_message_beside_the_progress_line_stays_in_one_piece() -> None:
    file = io.StringIO()
    reporter = Reporter("evaluate", None)
    reporter.console = Console(width=80, force_terminal=True, color_system=None, file=file)
    reporter.step(1, 3)
    reporter.info("summarizes [40] dialogues")
    reporter.close()
    assert "evaluate  summarizes [40] dialogues\n" in file.getvalue()


def test_a_long_title_gives_way_to_the_figures(drawn: Callable[..., str]) -> None:
    line = drawn(80, "a-variant-with-a-rather-long-name/distill/layers-0-15")
    assert line.startswith("a-variant-with-") and "…" in line
    assert line.rstrip().endswith("iB")


def test_the_peak_falls_back_after_a_reset() -> None:
    if torch.cuda.is_available():
        pytest.skip("counts GPU memory where there is one")
    reset_peak_memory()
    before = peak_memory_bytes()
    block = torch.ones(64 << 20, dtype=torch.uint8)  # beyond what malloc may take from pages that it holds already
    with_block = peak_memory_bytes()
    del block
    reset_peak_memory()
    after = peak_memory_bytes()
    assert with_block - before > 48 << 20
    assert with_block - after > 32 << 20


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61, "1:01"), (3723, "1:02:03"), (-1, "0:00")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (2 << 40, "2.0 TiB")]
)
def test_sizes_carry_their_unit(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text

"""metrics.jsonl: one object a step, and after a resume exactly one object a step still."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

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


def test_tensorboard_writes_the_same_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the [eval] extra is not installed")
    reporter = Reporter("distill", tmp_path, tensorboard=True)
    reporter.step(1, 2, metrics={"loss_nats": 0.5})
    reporter.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("distill/loss_nats")] == [(1, 0.5)]


def test_the_peak_falls_back_after_a_reset() -> None:
    if torch.cuda.is_available():
        pytest.skip("counts GPU memory where there is one")
    reset_peak_memory()
    before = peak_memory_bytes()
    block = torch.ones(32 << 20, dtype=torch.uint8)
    with_block = peak_memory_bytes()
    del block
    reset_peak_memory()
    after = peak_memory_bytes()
    assert with_block - before > 24 << 20
    assert with_block - after > 16 << 20


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61, "1:01"), (3723, "1:02:03"), (-1, "0:00")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (2 << 40, "2.0 TiB")]
)
def test_sizes_carry_their_unit(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text

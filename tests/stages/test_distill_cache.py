"""distill.cache_hidden_states: the same losses, and layers below the first trained one run once per row."""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hedgehog.pipeline import hidden_state_cache, hidden_state_files
from hedgehog.pipeline.errors import ResourceError
from hedgehog.pipeline.modeling import teacher
from hedgehog.pipeline.runner import run_stage
from hedgehog.stages import distill

Run = Any
NUM_ROWS, NUM_VALIDATION_ROWS = 12, 3
NUM_STEPS = 12
"""Two epochs of batches of two rows. In the middle of the second, the tests die before the tenth step."""
SETTINGS = {
    "distill__layers": "2",
    "distill__max_steps": NUM_STEPS,
    "distill__global_batch_size": 2,
    "distill__micro_batch_size": 1,
}
FOLDER = "distill/layers-2"


@pytest.fixture
def rows_through(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How many rows went through each of the teacher's layers since it was last cleared."""
    counts: Counter[int] = Counter()
    attend = teacher._attend

    def counted(family: Any, layer: Any, layer_index: int, hidden_BLE: torch.Tensor, *others: Any) -> Any:
        counts[layer_index] += len(hidden_BLE)
        return attend(family, layer, layer_index, hidden_BLE, *others)

    monkeypatch.setattr(teacher, "_attend", counted)
    return counts


@pytest.fixture(scope="module")
def without(new_run: Callable[..., Run]) -> Run:
    """Trained without the cache."""
    run = new_run(**SETTINGS)
    run.stage("distill")
    return run


def new_cached_run(new_run: Callable[..., Run], **overrides: Any) -> Run:
    return new_run(**{**SETTINGS, "distill__cache_hidden_states": True, **overrides})


def assert_same_training(run: Run, expected: Run, folder: str = FOLDER) -> None:
    """Losses equal but for the last bits of a matrix product, which may depend on the shape of the batch."""
    assert run.losses(folder) == pytest.approx(expected.losses(folder), rel=1e-6)
    assert run.stage("distill").summary["kl_mean"] == pytest.approx(
        expected.stage("distill").summary["kl_mean"], rel=1e-5
    )


def cache_files(run: Run, pattern: str = "*") -> list[Path]:
    return sorted((run.root / FOLDER / "hidden_states").glob(pattern))


def test_equal_losses_and_lower_layers_once_per_row(
    without: Run, new_run: Callable[..., Run], rows_through: Counter[int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_cached_run(new_run)
    run.stage("distill")
    assert_same_training(run, without)
    assert rows_through[0] == rows_through[1] == NUM_ROWS + NUM_VALIDATION_ROWS
    assert rows_through[2] == 2 * NUM_ROWS + NUM_VALIDATION_ROWS
    assert not (run.root / FOLDER / "hidden_states").exists()
    tokens = run.stage("distill").summary["tokens"] // 2
    assert f"{tokens:,} tokens of {NUM_ROWS} rows" in capsys.readouterr().out


@pytest.mark.parametrize("overrides", [{"distill__packing": True}, {"distill__micro_batch_size": 2}], ids=str)
def test_rows_may_stand_anywhere_in_a_batch(overrides: dict[str, Any], new_run: Callable[..., Run]) -> None:
    run, expected = new_cached_run(new_run, **overrides), new_run(**{**SETTINGS, **overrides})
    for one in (run, expected):
        one.stage("distill")
    assert_same_training(run, expected)


def test_bfloat16_states_are_kept_as_they_are(
    new_run: Callable[..., Run], interrupt: Callable[..., None], rows_through: Counter[int]
) -> None:
    run = new_cached_run(new_run, engine__precision="bfloat16")
    interrupt(run, "distill", step=NUM_STEPS - 3)
    (states,) = cache_files(run, "*.states")
    tokens = sum(record["tokens"] for record in run.metrics(FOLDER)[: NUM_ROWS // 2])
    assert states.stat().st_size == pytest.approx(tokens * 32 * 2, rel=0.3)  # a window of batches straddles the epochs
    run.stage("distill")
    expected = new_run(**SETTINGS, engine__precision="bfloat16")
    expected.stage("distill")
    assert run.losses(FOLDER) == pytest.approx(expected.losses(FOLDER), rel=1e-2)


@pytest.mark.parametrize("damage", ["none", "torn index", "flipped byte"])
def test_resumed_in_the_second_epoch(
    damage: str,
    without: Run,
    new_run: Callable[..., Run],
    interrupt: Callable[..., None],
    rows_through: Counter[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = new_cached_run(new_run)
    interrupt(run, "distill", step=NUM_STEPS - 3)
    (index,), (states,) = cache_files(run, "*.index"), cache_files(run, "*.states")
    if damage == "torn index":
        index.write_bytes(index.read_bytes()[: -3 * 28 - 5])
    if damage == "flipped byte":
        states.write_bytes(bytes(byte ^ 1 for byte in states.read_bytes()))  # in every row
    rows_through.clear()
    run.stage("distill")
    assert_same_training(run, without)
    again = rows_through[0] - NUM_VALIDATION_ROWS
    assert again == 0 if damage == "none" else again > 0
    assert capsys.readouterr().out.count("are damaged") == (1 if damage == "flipped byte" else 0)


@pytest.mark.parametrize("step", [5, 9, 11])
@pytest.mark.parametrize("packing", [False, True])
def test_resumed_equals_uninterrupted_to_the_bit(
    step: int, packing: bool, new_run: Callable[..., Run], interrupt: Callable[..., None]
) -> None:
    """Also in batches with some rows kept and some not: every row has the states of its first time."""
    settings = {"distill__micro_batch_size": 2, "distill__packing": packing}
    run, whole = (new_cached_run(new_run, **settings) for _ in range(2))
    whole.stage("distill")
    interrupt(run, "distill", step=step)
    run.stage("distill")
    assert run.metrics(FOLDER) == whole.metrics(FOLDER)


def test_two_processes_and_then_one(
    without: Run, new_run: Callable[..., Run], launch: Callable[..., list[str]], rows_through: Counter[int]
) -> None:
    """They read each other's rows, and under ZeRO-3 agree on which layers run."""
    sharded, stopped = new_cached_run(new_run, engine__zero_stage=3), new_cached_run(new_run)
    launch([(sharded, "distill", None), (stopped, "distill", NUM_STEPS - 3)])
    assert not cache_files(sharded)
    assert sharded.losses(FOLDER) == pytest.approx(without.losses(FOLDER), rel=1e-5)
    assert len(cache_files(stopped, "*.index")) == 2
    stopped.stage("distill")
    assert stopped.losses(FOLDER) == pytest.approx(without.losses(FOLDER), rel=1e-5)
    assert rows_through[0] == NUM_VALIDATION_ROWS


def test_a_disk_that_is_too_small(new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_cached_run(new_run)
    usage = shutil.disk_usage(run.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(
        ResourceError, match=r"distill\.cache_hidden_states: needs [\d.]+ KiB .* where 100 B are free"
    ) as error:
        run.stage("distill")
    assert error.value.exit_code == 2
    assert not (run.root / FOLDER / "metrics.jsonl").exists()


def test_a_disk_that_fills_up_ends_the_writing_only(
    without: Run,
    new_run: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    rows_through: Counter[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write, calls = hidden_state_files._write_all, []

    def fill_up(file: Any, content: memoryview) -> None:
        calls.append(len(content))
        if len(calls) > 1 + 2 * 4:  # the header, and four rows with their records
            file.write(content[:7])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, content)

    monkeypatch.setattr(hidden_state_files, "_write_all", fill_up)
    run = new_cached_run(new_run)
    run.stage("distill")
    assert_same_training(run, without)
    assert len(calls) == 1 + 2 * 4 + 1
    assert rows_through[0] == 2 * NUM_ROWS - 4 + NUM_VALIDATION_ROWS, "the four are read all the same"
    output = capsys.readouterr().out
    assert output.count("writing stopped (No space left on device)") == 1
    assert not (run.root / FOLDER / "hidden_states").exists()


def test_room_is_left_for_checkpoints(
    without: Run,
    new_run: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    rows_through: Counter[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another user fills the disk while the stage runs: the cache stops before a checkpoint could fail."""
    run = new_cached_run(new_run)
    usage, asked = shutil.disk_usage(run.root), []

    def fill_up(path: Any) -> Any:
        asked.append(path)
        # plenty when the stage begins and for four rows, then just what checkpoints may need
        return usage if len(asked) <= 1 + 4 else usage._replace(free=reserve[0])

    open_cache, reserve = distill.open_cache, []

    def opened(*arguments: Any) -> Any:
        monkeypatch.setattr(shutil, "disk_usage", fill_up)
        cache = open_cache(*arguments)
        assert cache is not None
        reserve.append(cache._reserve_bytes)
        return cache

    monkeypatch.setattr(distill, "open_cache", opened)
    run.stage("distill")
    written = sum(file.stat().st_size for file in (run.root / FOLDER / "checkpoints").rglob("*") if file.is_file())
    assert written < reserve[0] + 100_000, "files have headers"
    assert_same_training(run, without)
    assert rows_through[0] == 2 * NUM_ROWS - 4 + NUM_VALIDATION_ROWS, "the four are read all the same"
    output = capsys.readouterr().out
    assert output.count("checkpoints may need") == output.count("writing stopped") == 1


def test_another_configs_states_are_removed(
    new_run: Callable[..., Run], interrupt: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_cached_run(new_run, distill__save_every_steps=50)
    interrupt(run, "distill", step=3)
    (old,) = cache_files(run, "*.index")
    run = run.changed(data__max_length_tokens=48)
    interrupt(run, "distill", step=3)
    (new,) = cache_files(run, "*.index")
    assert new != old
    assert "removed 1 file of hidden states that belong to another config" in capsys.readouterr().out
    run_stage(run.config, "distill", force=True)
    previous = run.root / f"{FOLDER}.previous"
    assert previous.is_dir() and not (previous / "hidden_states").exists()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"distill__layers": "0,2"}, "layer 0 is trained"),
        ({"distill__layers": None}, "layer 0 is trained"),
        ({"distill__max_steps": NUM_ROWS // 2}, "it pays from the second epoch on"),
    ],
)
def test_says_where_it_cannot_help(
    overrides: dict[str, Any],
    reason: str,
    new_run: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(hidden_state_cache, "HiddenStateFiles", None)  # is not made
    new_cached_run(new_run, **overrides).stage("distill")
    output = capsys.readouterr().out
    assert "distill.cache_hidden_states has no effect" in output
    assert reason in output

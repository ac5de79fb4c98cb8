"""Checkpoints are whole or do not count, and saving one never harms another."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hedgehog.pipeline.checkpoints import Checkpoints
from hedgehog.pipeline.distributed import World
from hedgehog.pipeline.errors import CheckpointError, ResourceError

LAYOUT = {"optimizer": "adamw", "zero_stage": 1, "world_size": 1}


class Saver(Checkpoints):
    """Checkpoints of one process that remember their warnings."""

    def __init__(self, folder: Path, fingerprint: str = "a") -> None:
        self.warnings: list[str] = []
        world = World(0, 1, 0, torch.device("cpu"))
        super().__init__(folder, fingerprint, world, best_metric="loss", warn=self.warnings.append)

    def add(self, step: int, loss: float | None = None, num_elements: int = 10) -> Path:
        files = {"weights.safetensors": {"w": torch.full((num_elements,), float(step))}}
        return self.save(step, files, layout=LAYOUT, metrics={} if loss is None else {"loss": loss})

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.folder.iterdir())


@pytest.fixture
def saver(tmp_path: Path) -> Saver:
    return Saver(tmp_path / "checkpoints")


def test_newest_comes_back(saver: Saver) -> None:
    assert saver.newest() is None
    saver.add(2, 0.5)
    saver.add(4, 0.25)
    newest = saver.newest()
    assert newest is not None
    assert (newest.step, newest.metrics, newest.layout) == (4, {"loss": 0.25}, LAYOUT)
    assert not saver.warnings


def test_the_last_two_and_the_best_are_kept(saver: Saver) -> None:
    for step, loss in enumerate([0.9, 0.2, 0.8, 0.7, 0.6]):
        saver.add(step, loss)
    assert saver.names() == ["step-000001", "step-000003", "step-000004"]
    best = saver.best()
    assert best is not None
    assert best.step == 1


@pytest.mark.parametrize("damage", ["no json", "cut json", "cut weights", "other weights", "no weights"])
def test_a_torn_checkpoint_is_skipped_with_a_warning(saver: Saver, damage: str) -> None:
    saver.add(2)
    torn = saver.add(4)
    weights, facts = torn / "weights.safetensors", torn / "checkpoint.json"
    content = weights.read_bytes()
    if damage == "no json":
        facts.unlink()
    elif damage == "cut json":
        facts.write_text(facts.read_text()[:40])
    elif damage == "cut weights":
        weights.write_bytes(content[:-8])
    elif damage == "other weights":
        weights.write_bytes(content[:-4] + b"\x00\x00\x80\x3f")
    else:
        weights.unlink()
    newest = saver.newest()
    assert newest is not None
    assert newest.step == 2
    assert len(saver.warnings) == 1
    assert "step-000004 is torn" in saver.warnings[0]


def test_another_config_is_refused(saver: Saver) -> None:
    saver.add(2)
    with pytest.raises(CheckpointError, match="--force"):
        Saver(saver.folder, fingerprint="b").newest()


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 4 KiB. The kernel's signal is ignored by Python, which raises an OSError instead."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_earlier_checkpoints_alone(saver: Saver, request: pytest.FixtureRequest) -> None:
    saver.add(2)
    request.getfixturevalue("small_disk")
    with pytest.raises(ResourceError, match="step-000004"):
        saver.add(4, num_elements=10_000)
    assert saver.names() == ["step-000002"]
    newest = saver.newest()
    assert newest is not None
    assert newest.step == 2


def test_what_a_kill_left_behind_goes_away(saver: Saver) -> None:
    saver.add(2)
    shutil.copytree(saver.folder / "step-000002", saver.folder / "step-000004.partial")
    newest = saver.newest()
    assert newest is not None
    assert newest.step == 2
    saver.add(6)
    assert saver.names() == ["step-000002", "step-000006"]


def test_what_a_kill_between_two_renames_left_goes_away(saver: Saver) -> None:
    saver.add(2)
    shutil.copytree(saver.folder / "step-000002", saver.folder / "step-000004.replaced")
    saver.add(6)
    assert saver.names() == ["step-000002", "step-000006"]


def test_an_interrupted_step_is_remembered(saver: Saver) -> None:
    unfinished = {"tokens": 7, "metrics": {"loss_nats": 0.1 + 0.2}}
    saver.save(2, {"weights.safetensors": {"w": torch.ones(2)}}, layout=LAYOUT, unfinished_step=unfinished)
    newest = saver.newest()
    assert newest is not None and newest.unfinished_step == unfinished
    saver.add(4)
    newest = saver.newest()
    assert newest is not None and newest.unfinished_step is None


def test_nothing_but_safetensors_and_json_is_written(saver: Saver) -> None:
    folder = saver.add(2)
    assert sorted(file.name for file in folder.iterdir()) == ["checkpoint.json", "weights.safetensors"]
    facts = json.loads((folder / "checkpoint.json").read_text())["files"]["weights.safetensors"]
    assert facts["num_bytes"] == (folder / "weights.safetensors").stat().st_size

"""Manifests: what a stage consumes is checked against what its predecessor said it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from hedgehog.pipeline.errors import CheckpointError
from hedgehog.pipeline.manifest import Manifest, StageInput, describe_artifact, fingerprint, read_manifest


def finished(folder: Path) -> Manifest:
    (folder / "maps.bin").write_bytes(b"weights")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "a.txt").write_text("a")
    manifest = Manifest(stage="distill", fingerprint="f", config={"seed": 0}, status="done")
    manifest.artifacts = {name: describe_artifact(folder, name) for name in ("maps.bin", "adapter")}
    manifest.write(folder)
    return manifest


def test_a_manifest_reads_back_as_written(tmp_path: Path) -> None:
    manifest = finished(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert read_manifest(tmp_path / "adapter") is None


def test_the_fingerprint_ignores_the_order_of_keys_only() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"b": [1, 2]}) != fingerprint({"b": [2, 1]})


def test_outputs_are_equal_when_the_bytes_are_whatever_the_times(tmp_path: Path) -> None:
    first = finished(tmp_path)
    second = first.model_copy(update={"duration_s": 99.0, "summary": {"minutes": 3}})
    assert first.output_fingerprint == second.output_fingerprint
    (tmp_path / "maps.bin").write_bytes(b"Weights")
    changed = first.model_copy(update={"artifacts": {"maps.bin": describe_artifact(tmp_path, "maps.bin")}})
    assert changed.output_fingerprint != first.output_fingerprint


@pytest.mark.parametrize("name", ["maps.bin", "adapter"])
def test_a_changed_artifact_is_noticed(tmp_path: Path, name: str) -> None:
    entry = StageInput(tmp_path, finished(tmp_path))
    assert entry.artifact(name) == tmp_path / name
    (tmp_path / "maps.bin").write_bytes(b"WEIGHTS")
    (tmp_path / "adapter" / "a.txt").write_text("b")
    with pytest.raises(CheckpointError, match="changed since"):
        entry.artifact(name)


def test_a_missing_artifact_names_what_there_is(tmp_path: Path) -> None:
    entry = StageInput(tmp_path, finished(tmp_path))
    with pytest.raises(CheckpointError, match=r"no artifact 'map' .*maps\.bin"):
        entry.artifact("map")
    (tmp_path / "maps.bin").unlink()
    with pytest.raises(CheckpointError, match=r"gone.*hedgehog distill"):
        entry.artifact("maps.bin")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": "distill"}'])
def test_rubbish_is_named_with_its_cure(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a manifest"):
        read_manifest(tmp_path)

"""Atomic writes: a failure at any point leaves the earlier content, and nothing that looks complete."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hedgehog.pipeline import run_folder
from hedgehog.pipeline.errors import ResourceError
from hedgehog.pipeline.run_folder import (
    RunFolder,
    atomic_directory,
    atomic_file,
    atomic_write,
    fenced,
    final_path,
    storage_errors,
    temporary_path,
)


def test_a_variant_keeps_its_training_stages_apart_and_shares_the_rest(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.stage("distill") == tmp_path / "distill"
    assert run.stage("distill", "t2r") == tmp_path / "variants" / "t2r" / "distill"
    assert run.stage("prepare", "t2r") == tmp_path / "prepare"
    assert run.stage("distill", layers="8-15") == tmp_path / "distill" / "layers-8-15"


def test_a_failed_write_keeps_the_earlier_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    atomic_write(file, "old")

    def full_disk(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run_folder, "_fsync_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        atomic_write(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_interrupted_block_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_directory_appears_whole_and_replaces_the_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_directory(target) as temporary:
        (temporary / "old.txt").write_text("old")
        assert not target.exists()
    with atomic_directory(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "new.txt").write_text("new")
        assert (target / "old.txt").exists()
    assert sorted(p.name for p in target.rglob("*")) == ["new.txt", "sub"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_directory_keeps_the_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_directory(target) as temporary:
        (temporary / "old.txt").write_text("old")
    with pytest.raises(ValueError, match="half way"), atomic_directory(target) as temporary:
        (temporary / "new.txt").write_text("new")
        raise ValueError("half way")
    assert os.listdir(target) == ["old.txt"]
    assert os.listdir(tmp_path) == ["model"]


def test_what_a_kill_left_behind_is_cleared_by_the_next_attempt(tmp_path: Path) -> None:
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "torn.safetensors").write_bytes(b"torn")
    with atomic_directory(tmp_path / "model") as temporary:
        (temporary / "whole.txt").write_text("whole")
    assert os.listdir(tmp_path / "model") == ["whole.txt"]


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission"), (errno.EROFS, "read-only")]
)
def test_a_refusing_file_system_becomes_one_clear_message(code: int, words: str) -> None:
    with pytest.raises(ResourceError, match=words) as caught, storage_errors("finetune"):
        raise OSError(code, os.strerror(code), "runs/x/checkpoint")
    assert "runs/x/checkpoint" in str(caught.value)
    assert "finetune" in str(caught.value)


def test_the_message_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    class Full:
        folder, tag = tmp_path, "17"

        def fault(self) -> None:
            return None

    target = tmp_path / "checkpoints" / "step-000002"
    with fenced(Full()):
        temporary = temporary_path(target)
    assert temporary != target and final_path(temporary / "weights.safetensors") == target / "weights.safetensors"
    assert final_path(target.with_name("v1.5")) == target.with_name("v1.5")
    with pytest.raises(ResourceError) as caught, storage_errors("distill"):
        raise OSError(errno.ENOSPC, "No space left on device", str(temporary / "weights.safetensors"))
    assert f"({target}/weights.safetensors)" in str(caught.value)


def test_safetensors_own_error_is_understood(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "w.safetensors").mkdir()
    with pytest.raises(Exception, match="os error") as raised:
        save_file({"a": torch.zeros(2)}, tmp_path / "closed" / "w.safetensors")
    text = str(raised.value).replace("os error 21", "os error 28")
    with pytest.raises(ResourceError, match="disk is full"), storage_errors("distill"):
        raise type(raised.value)(text)


def test_several_writers_of_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    with atomic_file(file, several_writers=True) as mine:
        mine.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        atomic_write(file, "theirs", several_writers=True)
        assert file.read_text() == "theirs"
    assert file.read_text() == "mine"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_other_faults_are_not_dressed_up() -> None:
    with pytest.raises(FileNotFoundError), storage_errors("finetune"):
        raise FileNotFoundError(errno.ENOENT, "gone", "x")

"""Where a run's files lie, and how they are written so that a kill at any moment loses nothing.

A file or folder appears under its final name only when it is complete: written beside it under a temporary name,
flushed to disk, then renamed. Readers therefore never see half of anything.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ResourceError

STAGES = ("prepare", "distill", "finetune", "evaluate", "export")
VARIANT_STAGES = ("distill", "finetune")
"""The stages that every variant runs for itself."""

_TEMPORARY_SUFFIX = ".partial"


class RunFolder:
    """Paths inside `runs/<name>/`.

    The main conversion uses `<stage>/`; a variant keeps its own stages under `variants/<variant>/<stage>/`.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def stage(self, stage: str, variant: str | None = None, layers: str | None = None) -> Path:
        """Folder of a stage; `layers` names a subset of distill's layers (`8-15`), which has a folder of its own."""
        base = self.root if variant is None or stage in ("prepare", "evaluate") else self.root / "variants" / variant
        return base / stage if layers is None else base / stage / f"layers-{layers}"

    @property
    def config_file(self) -> Path:
        """The resolved config of the newest command on this run."""
        return self.root / "config.resolved.yaml"


def fsync_directory(folder: Path) -> None:
    """Make the names in a folder durable. Some file systems refuse to fsync a folder; they need none."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _fsync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def publish(temporary: Path, path: Path) -> None:
    """Give a complete temporary file its final name: fsync, rename, fsync of the folder."""
    _fsync_file(temporary)
    os.replace(temporary, path)
    fsync_directory(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path` when the block ends well and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + _TEMPORARY_SUFFIX)
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace a file's content in one step.

    Raises:
        OSError: the disk is full or refuses; the earlier content is untouched.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends well.

    An existing `path` is moved aside first and removed last, so that one of the two is there at every moment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + _TEMPORARY_SUFFIX)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                _fsync_file(file)
            elif file.is_dir():
                fsync_directory(file)
        fsync_directory(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    replaced = path.with_name(path.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        os.replace(path, replaced)
    os.replace(temporary, path)
    fsync_directory(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


_CURES = {
    errno.ENOSPC: "the disk is full: free some space, then run the same command again",
    errno.EDQUOT: "your disk quota is used up: free some space, then run the same command again",
    errno.EFBIG: "the file-size limit (ulimit -f) is reached: raise it, then run the same command again",
    errno.EACCES: "no permission: choose another output_dir or change the folder's owner",
    errno.EPERM: "no permission: choose another output_dir or change the folder's owner",
    errno.EROFS: "the file system is read-only: choose another output_dir",
}


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn a refusing file system into one clear message.

    Args:
        what: what was being done, for the message ("finetune").

    Raises:
        ResourceError: disk full, quota, file-size limit, no permission, read-only. Everything earlier is kept.
    """
    try:
        yield
    except OSError as error:
        cure = _CURES.get(error.errno or 0)
        if cure is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise ResourceError(f"{what}: {cure}{where}. What was saved before is untouched.") from error

"""Where a run's files lie, and how they are written so that a kill at any moment loses nothing.

A file or folder appears under its final name only when it is complete: written beside it under a temporary name,
flushed to disk, then renamed. Readers therefore never see half of anything.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import ConfigError, HedgehogError, ResourceError

if TYPE_CHECKING:
    from .config import RunConfig

STAGES = ("prepare", "distill", "finetune", "evaluate", "export")
"""All stages in the order in which `run` works through them; `hedgehog.stages.<stage>` is the module of each."""
VARIANT_STAGES = ("distill", "finetune")
"""The stages that every variant runs for itself."""
MAIN = "main"
"""The main conversion's name beside those of variants."""
SHARED_STAGES = ("prepare", "evaluate")
"""Done once for all variants. Neither here nor above: done for the main conversion, for a variant when asked to."""

_TEMPORARY_SUFFIX = ".partial"
_TEMPORARY_NAME = re.compile(r"(\.\d+)?\.partial$")
"""With a fence's tag."""
_SUBSET_PREFIX = "layers-"
_SHARD_PREFIX = "shard-"
_OWN_STAGES = (_SUBSET_PREFIX, _SHARD_PREFIX)
"""Begin the names of folders inside a stage's that are stages of their own, with processes of their own."""
PREVIOUS_SUFFIX = ".previous"
"""Ends the name of a folder that --force set aside."""
LEASE = "lease"
"""Says in a stage's folder which process may write there; see lease.py. It stays whatever becomes of the rest."""

HIDDEN_STATES = "hidden_states"
"""Folder in distill's where hidden states are kept between epochs; nothing in it is worth keeping beyond the stage."""


class RunFolder:
    """Paths inside `runs/<name>/`.

    The main conversion uses `<stage>/`; a variant keeps its own stages under `variants/<variant>/<stage>/`.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        """`<output_dir>/<name>/`."""
        return cls(Path(config.output_dir) / config.name)

    def stage(self, stage: str, variant: str | None = None, layers: str | None = None) -> Path:
        """Folder of a stage; `layers` names a subset of distill's layers (`8-15`), which has a folder of its own."""
        base = self.root if variant is None or stage in SHARED_STAGES else self.root / "variants" / variant
        return base / stage if layers is None else base / stage / f"{_SUBSET_PREFIX}{layers}"

    def subsets(self, variant: str | None = None) -> list[Path]:
        """Folders of distill's subsets of layers, sorted by name; those that --force set aside are not among them."""
        folder = self.stage("distill", variant)
        return sorted(path for path in folder.glob(f"{_SUBSET_PREFIX}*") if path.suffix != PREVIOUS_SUFFIX)

    def shard(self, shard: str) -> Path:
        """Folder of a part of evaluate's test rows, which `0/4` names."""
        index, _, num_shards = shard.partition("/")
        return self.root / "evaluate" / f"{_SHARD_PREFIX}{index}-of-{num_shards}"

    def shards(self) -> list[Path]:
        """Folders of evaluate's shards, sorted by name."""
        folder = self.root / "evaluate"
        return sorted(path for path in folder.glob(f"{_SHARD_PREFIX}*") if path.suffix != PREVIOUS_SUFFIX)

    @property
    def logs(self) -> Path:
        """What jobs print."""
        return self.root / "logs"

    @property
    def slurm(self) -> Path:
        """Scripts, the config as it was submitted, and the jobs."""
        return self.root / "slurm"

    @property
    def config_file(self) -> Path:
        """The resolved config of the newest command on this run."""
        return self.root / "config.resolved.yaml"


def check_shard(shard: str) -> tuple[int, int]:
    """(index, number of shards) that `0/4` names.

    Raises:
        ConfigError: not of this form, or the index is out of range.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if found is None:
        raise ConfigError(f"--shard {shard}: expected index/number, such as 0/4 for the first of four.")
    index, num_shards = int(found[1]), int(found[2])
    if index >= num_shards:
        raise ConfigError(
            f"--shard {shard}: out of range; the shards of {num_shards} are 0/{num_shards} to "
            f"{num_shards - 1}/{num_shards}."
            if num_shards
            else f"--shard {shard}: there are no shards."
        )
    return index, num_shards


class Fence(Protocol):
    """What may forbid writing in a folder."""

    folder: Path
    tag: str
    """Part of temporary names, so that two attempts never write into the same temporary file."""

    def fault(self) -> HedgehogError | None:
        """Why nothing more may be written, or None."""
        ...


_fence: ContextVar[Fence | None] = ContextVar("fence", default=None)


@contextmanager
def fenced(fence: Fence) -> Iterator[None]:
    """Inside, nothing gets its final name in the fence's folder once the fence has a fault: that is raised instead.

    Between the look and the rename lie microseconds. Should a fault begin just there, then what is published is what
    the other attempt will write there too: both make the same bytes from the same config.
    """
    token = _fence.set(fence)
    try:
        yield
    finally:
        _fence.reset(token)


def write_fault() -> HedgehogError | None:
    """Why nothing more may be written inside `fenced`, or None.

    For asking now and then: a file system that gives no answer just now is no fault. Before a rename it is.
    """
    fence = _fence.get()
    if fence is None:
        return None
    try:
        return fence.fault()
    except OSError:
        return None


def check_may_write(path: Path) -> None:
    """Look before writing `path` in place.

    Raises:
        LeaseError: another attempt has taken the folder over.
    """
    fence = _fence.get()
    if fence is not None and path.is_relative_to(fence.folder):
        fault = fence.fault()
        if fault is not None:
            raise fault


def temporary_path(path: Path) -> Path:
    """Where `path` is written before it is complete."""
    fence = _fence.get()
    tag = f".{fence.tag}" if fence is not None and path.is_relative_to(fence.folder) else ""
    return path.with_name(path.name + tag + _TEMPORARY_SUFFIX)


def final_path(temporary: Path) -> Path:
    """The path that `temporary_path` (or a path below it) stands for; any other path is its own."""
    return Path(*(_TEMPORARY_NAME.sub("", part) for part in temporary.parts))


def remove_temporaries(folder: Path) -> None:
    """Remove what killed attempts were writing in a stage's folder; not in subsets and shards, whose it is not."""
    for entry in folder.iterdir():
        if entry.name.endswith(_TEMPORARY_SUFFIX):
            _remove(entry)
        elif entry.is_dir() and not entry.is_symlink() and not entry.name.startswith(_OWN_STAGES):
            remove_temporaries(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _own_entries(folder: Path) -> list[Path]:
    """What belongs to the stage itself, the manifest first; the subsets of layers are stages of their own."""
    entries = sorted(folder.iterdir(), key=lambda path: (path.name != "manifest.json", path.name))
    return [entry for entry in entries if entry.name != LEASE and not entry.name.startswith(_SUBSET_PREFIX)]


def set_aside(folder: Path) -> Path:
    """Move a stage's folder to `<folder>.previous`, all but the subsets of layers and the lease in it.

    Hidden states are not kept: they may be hundreds of GiB, and whoever wants them makes them again. The manifest goes
    first, so that a kill on the way leaves a stage that has not begun, never a finished one without its artifacts. An
    earlier `.previous` is removed. Returns the new place.
    """
    previous = folder.with_name(folder.name + PREVIOUS_SUFFIX)
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    shutil.rmtree(folder / HIDDEN_STATES, ignore_errors=True)
    for entry in _own_entries(folder):
        os.replace(entry, previous / entry.name)
    fsync_directory(previous)
    fsync_directory(folder)
    return previous


def clear_unfinished(folder: Path) -> None:
    """Remove what an unfinished stage left, all but the subsets of layers and the lease in its folder."""
    for entry in _own_entries(folder):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


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
    """Give a complete temporary file its final name: fsync, look whether that is allowed, rename, fsync of the folder.

    Raises:
        LeaseError: another attempt has taken the folder over.
    """
    _fsync_file(temporary)
    check_may_write(path)
    os.replace(temporary, path)
    fsync_directory(path.parent)


@contextmanager
def atomic_file(path: Path, *, several_writers: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path` when the block ends well and vanishes when it does not.

    `several_writers`: other processes may write the same file at the same time, on other machines too; each gets a
    temporary name of its own, and the last to finish wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{socket.gethostname()}.{os.getpid()}" if several_writers else ""
    temporary = temporary_path(path.with_name(path.name + own))
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, content: str | bytes, *, several_writers: bool = False) -> None:
    """Replace a file's content in one step; `several_writers` as in `atomic_file`.

    Raises:
        OSError: the disk is full or refuses; the earlier content is untouched.
    """
    with atomic_file(path, several_writers=several_writers) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends well.

    An existing `path` is moved aside to `<path>.replaced` first and removed last. A kill between the two renames
    leaves only `.replaced`; nothing reads it, for the stage that writes `path` is not done then and writes it again.

    Raises:
        LeaseError: another attempt has taken the folder over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
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
        check_may_write(path)
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
    errno.ENOTDIR: "a file stands where a folder should be: remove it, or choose another output_dir",
    errno.EEXIST: "a file or a link to nothing stands where a folder should be: mend it, or choose another output_dir",
    errno.ELOOP: "a symbolic link leads in a circle: mend it, or choose another output_dir",
    errno.ENAMETOOLONG: "the path is too long for this file system: choose a shorter output_dir or name",
    errno.EIO: "the disk or the network file system reports an error: look after it, then run the same command again",
    errno.ESTALE: "the network file system lost the file: run the same command again",
}


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn a refusing file system into one clear message.

    Args:
        what: what was being done, for the message ("finetune").

    Raises:
        ResourceError: disk full, quota, file-size limit, no permission, read-only, … Everything earlier is kept.
    """
    try:
        yield
    except Exception as error:
        code = _error_number(error)
        if code not in _CURES:
            raise
        name = getattr(error, "filename", None)
        where = f" ({final_path(Path(os.fsdecode(name)))})" if isinstance(name, (str, bytes)) else ""
        raise ResourceError(f"{what}: {_CURES[code]}{where}. What was saved before is untouched.") from error


def _error_number(error: Exception) -> int:
    """The operating system's number; safetensors writes it into the text of an error of its own."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else 0

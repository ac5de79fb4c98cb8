"""Checkpoints for resuming: a folder `step-000123/` that is complete or does not count.

    weights.safetensors      what learns, whole fp32 tensors by name
    optimizer….safetensors   AdamW's moments likewise (the 8-bit optimizer: one file a rank)
    checkpoint.json          step, fingerprint, engine layout, metrics, and every file's size and SHA-256; written last

Batches, learning rate and random numbers are pure functions of the step, so there is nothing else to keep. The
folder is written under another name and renamed when it is whole; nothing earlier is touched before that.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from .errors import CheckpointError, HedgehogError, ResourceError
from .interrupts import stopping_together
from .manifest import hash_file
from .run_folder import atomic_directory, final_path, storage_errors, temporary_path, write_json

if TYPE_CHECKING:
    from .distributed import World

FORMAT = 1
KEPT = 2
"""Newest checkpoints that are kept, beside the best."""
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    step: int
    """Optimizer steps done."""
    fingerprint: str
    layout: dict[str, Any]
    """`TrainingEngine.layout()` of the engine that wrote it."""
    metrics: dict[str, float] = field(default_factory=dict)
    unfinished_step: dict[str, Any] | None = None
    """What a step that was interrupted before its validation has still to record."""


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        folder: usually `<stage>/checkpoints`.
        fingerprint: of the stage's config and inputs.
        best_metric: name in `metrics` of the figure whose smallest value marks the best checkpoint; None: there is
            no best, only newest.
        warn: told about a torn checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        world: World,
        *,
        best_metric: str | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self._world = world
        self._best_metric = best_metric
        self._warn = warn

    def save(
        self,
        step: int,
        files: Mapping[str, Mapping[str, torch.Tensor]],
        *,
        layout: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        unfinished_step: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint and drop the ones that are no longer kept. Collective: every rank gives its own `files`.

        Raises:
            LeaseError: another attempt has taken the folder over, on every rank; nothing was published.
            ResourceError: the file system refuses, on any rank. Earlier checkpoints are untouched, and nothing
                half-written stays.
        """
        target = self.folder / f"step-{step:06d}"
        with (
            storage_errors(f"saving {target}"),
            stopping_together(self._world),  # only rank 0 learns that it may not publish
            self._temporary(target) as temporary,
        ):
            self._world.barrier()
            written, fault = self._write(temporary, files)
            reports = self._world.gather((written, fault))
            faults = [fault for _, fault in reports if fault]
            if faults:
                raise ResourceError(faults[0])
            if self._world.is_main:
                content = {
                    "format": FORMAT,
                    "step": step,
                    "fingerprint": self.fingerprint,
                    "layout": dict(layout),
                    "metrics": dict(metrics or {}),
                    "unfinished_step": dict(unfinished_step) if unfinished_step is not None else None,
                    "files": {name: facts for entry, _ in reports for name, facts in entry.items()},
                }
                write_json(temporary / "checkpoint.json", content)
        if self._world.is_main:
            self._prune()
        return target

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None. Torn ones are skipped with a warning. Collective.

        Raises:
            CheckpointError: it belongs to another config or input.
        """
        found = None
        fault = None
        if self._world.is_main:
            try:
                found = self._find_newest()
            except CheckpointError as error:
                fault = str(error)
        found, fault = self._world.broadcast((found, fault))
        if fault:
            raise CheckpointError(fault)
        return found

    def best(self) -> Checkpoint | None:
        """The complete checkpoint with the smallest `best_metric`, or None."""
        name = self._best_metric
        rated = [c for c in self._complete() if name is not None and name in c.metrics]
        return min(rated, key=lambda c: (self.value(c), c.step), default=None)

    def value(self, checkpoint: Checkpoint) -> float:
        """The figure by which checkpoints are compared."""
        return checkpoint.metrics[self._best_metric or ""]

    def newest_folder(self) -> Path | None:
        """The newest complete checkpoint's folder, without reading its tensors."""
        complete = self._complete()
        return complete[-1].folder if complete else None

    def _temporary(self, target: Path) -> Any:
        # every rank writes into the folder that rank 0 makes; the barrier after it makes it visible
        if self._world.is_main:
            return atomic_directory(target)
        return nullcontext(temporary_path(target))

    def _write(
        self, folder: Path, files: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> tuple[dict[str, dict[str, Any]], str | None]:
        """Write this rank's files: (their facts, fault or None). Not raised here: all ranks must learn of it."""
        written: dict[str, dict[str, Any]] = {}
        try:
            with storage_errors(f"saving {final_path(folder)}"):
                for name, tensors in files.items():
                    # safetensors' own save_file hides the operating system's error number
                    content = save(dict(tensors))
                    (folder / name).write_bytes(content)
                    written[name] = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        except (HedgehogError, OSError) as error:
            return {}, str(error)
        return written, None

    def _find_newest(self) -> Checkpoint | None:
        for folder in sorted(self._folders(), key=_step_of, reverse=True):
            checkpoint, fault = read_checkpoint(folder, verify=True)
            if checkpoint is None:
                self._warn(f"{folder} is torn ({fault}); going on from the one before it")
                continue
            if checkpoint.fingerprint != self.fingerprint:
                raise CheckpointError(
                    f"{folder}: made with another config or other inputs than this run's. Undo the change, or begin "
                    "the stage anew with --force."
                )
            return checkpoint
        return None

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [folder for folder in self.folder.iterdir() if folder.is_dir() and _NAME.fullmatch(folder.name)]

    def _complete(self) -> list[Checkpoint]:
        read = (read_checkpoint(folder, verify=False)[0] for folder in self._folders())
        return sorted((c for c in read if c is not None), key=lambda c: c.step)

    def _prune(self) -> None:
        kept = self._complete()[-KEPT:]
        best = self.best()
        names = {c.folder.name for c in [*kept, *([best] if best else [])]}
        for folder in self._folders():
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)
        for pattern in ("step-*.partial", "step-*.replaced"):  # a kill while saving
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)


def read_checkpoint(folder: Path, *, verify: bool) -> tuple[Checkpoint | None, str | None]:
    """(checkpoint, None), or (None, what is wrong with it). `verify` also reads the files and compares hashes."""
    try:
        content = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return None, f"format {content['format']}, this version reads {FORMAT}"
        for name, facts in content["files"].items():
            file = folder / name
            if file.stat().st_size != facts["num_bytes"]:
                return None, f"{name} has {file.stat().st_size} bytes, not {facts['num_bytes']}"
            if verify and hash_file(file) != facts["sha256"]:
                return None, f"{name} does not have the content that was written"
        return Checkpoint(
            folder,
            content["step"],
            content["fingerprint"],
            content["layout"],
            content["metrics"],
            content.get("unfinished_step"),
        ), None
    except FileNotFoundError as error:
        return None, f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"checkpoint.json cannot be read: {error}"


def _step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])

"""What a stage gets from the runner, and what it hands back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .config import RunConfig
from .distributed import World
from .manifest import StageInput
from .metrics import Reporter
from .run_folder import RunFolder


@dataclass(frozen=True)
class StageResult:
    """What a stage hands back: its artifacts by name, facts for the manifest, or why there was nothing to do."""

    artifacts: Mapping[str, str | Path] = field(default_factory=dict)
    """Name to path inside the stage's folder; a file or a folder."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """JSON facts: `status` and the next stages read them."""
    skipped: str | None = None
    """Reason for having done nothing."""


@dataclass(frozen=True)
class VariantInputs:
    """A conversion that `evaluate` scores: its config and the finished stages that made it."""

    name: str
    label: str
    config: RunConfig
    inputs: dict[str, StageInput]


@dataclass(frozen=True)
class StageContext:
    """Everything a stage may know."""

    config: RunConfig
    """The variant's overrides are applied already."""
    stage: str
    variant: str | None
    run_folder: RunFolder
    folder: Path
    """The stage's own folder; it exists, and this attempt holds its lease."""
    world: World
    fingerprint: str
    """SHA-256 over config sections and consumed artifacts; checkpoints carry it."""
    inputs: dict[str, StageInput]
    variants: dict[str, VariantInputs]
    """`main` and every variant; filled for `evaluate` only."""
    reporter: Reporter
    shard: str | None = None
    """Part of the test rows that `evaluate` is to do, such as `0/4`. None: all."""

    def rng(self, name: str) -> torch.Generator:
        """A CPU generator seeded from the run's seed and a name, so that no two uses share a stream."""
        digest = hashlib.sha256(f"{self.config.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


__all__ = ["StageContext", "StageResult", "VariantInputs"]

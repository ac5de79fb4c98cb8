"""A stage's manifest: what it consumed, what it produced, and whether it is done.

`status` is `running` from the start of a stage and `done` only after every artifact is on disk: the manifest is
written last and atomically, so that a stage is done exactly when its manifest says so.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import CheckpointError
from .run_folder import write_json

FORMAT = 1
_HASH_BLOCK_BYTES = 1 << 20


class Artifact(BaseModel):
    """A file or folder that a stage produced, relative to the stage's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    sha256: str
    num_bytes: int


class Manifest(BaseModel):
    """Contents of `manifest.json`. Times are UTC in ISO 8601, durations in seconds, memory in bytes."""

    model_config = ConfigDict(extra="forbid")
    format: int = FORMAT
    stage: str
    variant: str | None = None
    status: Literal["running", "done"] = "running"
    skipped: str | None = None
    """Why the stage had nothing to do."""
    fingerprint: str
    """SHA-256 over the config sections and the consumed artifacts."""
    config: dict[str, Any]
    """The sections that the result depends on, flattened: dotted key to value."""
    consumed: dict[str, str] = Field(default_factory=dict)
    """Consumed stage to its manifest's `output_fingerprint`."""
    artifacts: dict[str, Artifact] = Field(default_factory=dict)
    summary: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    world_size: int = 1
    started_at: str = ""
    finished_at: str | None = None
    duration_s: float = 0.0
    """Working time over all attempts of this stage."""
    peak_memory_bytes: int = 0
    """Peak of one process: resident set on a CPU, allocated memory on a GPU."""
    num_resumes: int = 0
    interrupted: str | None = None
    """Why and where the newest attempt stopped, where a signal stopped it."""
    error: str | None = None
    """What the newest attempt failed with."""
    command: list[str] = Field(default_factory=list)
    """The command line of the newest attempt; empty where it had none."""
    directory: str = ""
    """Where that command was given: paths in it may be relative."""
    forced: bool = False
    """Begun by --force: the same command after a kill goes on here instead of beginning once more."""

    @property
    def output_fingerprint(self) -> str:
        """SHA-256 over the artifacts' names and hashes, or over the reason why there are none.

        A summary is left out: it holds times, which differ between equal results.
        """
        content = {name: artifact.sha256 for name, artifact in sorted(self.artifacts.items())}
        return fingerprint({"stage": self.stage, "artifacts": content, "skipped": self.skipped})

    def write(self, folder: Path) -> None:
        """Write `manifest.json` atomically."""
        write_json(folder / "manifest.json", self.model_dump())


def read_manifest(folder: Path) -> Manifest | None:
    """Read a stage's manifest, or None where the stage never started.

    Raises:
        CheckpointError: the file is not a manifest of this format.
    """
    file = folder / "manifest.json"
    try:
        return Manifest.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); whose run is it?") from error
    except (ValueError, ValidationError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: not a manifest of format {FORMAT} ({str(error).splitlines()[0]}). "
            "Remove this file: the stage then begins with what else its folder holds, or says that it cannot."
        ) from error


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-serializable value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def describe_artifact(folder: Path, path: Path | str) -> Artifact:
    """Hash a file, or a folder (over its sorted relative names and their hashes), inside a stage's folder."""
    target = folder / path
    relative = str(target.relative_to(folder))
    if target.is_dir():
        files = sorted(file for file in target.rglob("*") if file.is_file())
        digest = fingerprint([[str(file.relative_to(target)), hash_file(file)] for file in files])
        return Artifact(path=relative, sha256=digest, num_bytes=sum(file.stat().st_size for file in files))
    return Artifact(path=relative, sha256=hash_file(target), num_bytes=target.stat().st_size)


class StageInput:
    """A finished stage seen from the stage that consumes it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @property
    def summary(self) -> dict[str, Any]:
        """The facts that the stage reported."""
        return self.manifest.summary

    @property
    def skipped(self) -> bool:
        """True where the stage had nothing to do and left no artifacts."""
        return self.manifest.skipped is not None

    def has(self, name: str) -> bool:
        """Whether the stage produced this artifact."""
        return name in self.manifest.artifacts

    def artifact(self, name: str) -> Path:
        """Path of an artifact, checked against the manifest's hash.

        Raises:
            CheckpointError: the artifact is not in the manifest, is gone, or has changed since it was written.
        """
        entry = self.manifest.artifacts.get(name)
        cure = f"run `hedgehog {self.manifest.stage} CONFIG --force` to make it again"
        if entry is None:
            known = ", ".join(self.manifest.artifacts) or "none"
            raise CheckpointError(f"{self.folder}: no artifact '{name}' in the manifest (it has: {known}); {cure}.")
        path = self.folder / entry.path
        if not path.exists():
            raise CheckpointError(f"{path}: named by the manifest but gone; {cure}.")
        if describe_artifact(self.folder, entry.path).sha256 != entry.sha256:
            raise CheckpointError(
                f"{path}: changed since the stage wrote it (its hash differs from the manifest's); {cure}."
            )
        return path

"""How far a stage is: from what it writes while it runs, how much there will be, and the time left. Imports no torch.

A live stage renames and removes files at any moment, so every file that is looked at may be gone already.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import RunConfig
from .config_checks import schedules
from .config_loading import apply_variant
from .data.packing import num_sequences
from .manifest import Manifest, read_manifest
from .run_folder import RunFolder

_LIVELY_S = 120
"""A stage that wrote metrics this recently is taken to be running."""
JUST_NOW = "wrote just now"
"""What `last_sign` says of it."""
_ETA_STEPS = 50
"""Newest steps whose mean time says how long the rest will take."""


@dataclass(frozen=True)
class Progress:
    """How much of a stage is done. What is not known is None."""

    step: int | None = None
    total: int | None = None
    loss_name: str | None = None
    loss: float | None = None
    recorded_s: float = 0.0
    """Time of the recorded steps."""
    remaining_s: float | None = None


def read_progress(
    folder: RunFolder, config: RunConfig | None, manifest: Manifest, place: Path, shard: str | None = None
) -> Progress:
    """The progress of the stage in `place`: optimizer steps, or test rows where it is evaluate or a shard of it."""
    records = read_metrics(place / "metrics.jsonl")
    name, loss = _result(manifest) or _last_loss(records)
    if name == "loss_nats" and manifest.stage == "evaluate":
        name, loss = None, None  # of some rows of some variant
    recorded_s = sum(_step_times(records))
    if manifest.stage == "evaluate" and config is not None:
        step, total, remaining_s = _test_rows(folder, config, manifest, place, shard, records)
    else:
        steps = (record.get("step", 0) for record in records)
        step = max((step for step in steps if isinstance(step, int)), default=None)
        total = None if config is None else _planned_steps(folder, config, manifest)
        remaining_s = None
        times = _step_times(records)[-_ETA_STEPS:]
        if times and step is not None and total is not None:
            remaining_s = max(0, total - step) * sum(times) / len(times)
    if manifest.status == "done":
        total, remaining_s = step, None
    return Progress(step, total, name, loss, recorded_s, remaining_s)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Every whole record of a metrics.jsonl; a kill may have torn the last line. Nothing where there is no file."""
    records = []
    for line in _read_bytes(file).decode("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def last_sign(place: Path) -> str:
    """When an unfinished stage last wrote anything: a process that was killed leaves no other trace."""
    times = []
    with suppress(OSError):
        for entry in place.iterdir():
            with suppress(OSError):
                times.append(entry.stat().st_mtime)
    if not times:
        return ""
    age_s = time.time() - max(times)
    if age_s < _LIVELY_S:
        return JUST_NOW
    return f"last wrote {age_s / 60:.0f} min ago" if age_s < 7200 else f"last wrote {age_s / 3600:.0f} h ago"


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _step_times(records: Sequence[dict[str, Any]]) -> list[float]:
    return [float(record["step_s"]) for record in records if isinstance(record.get("step_s"), (int, float))]


def _result(manifest: Manifest) -> tuple[str, float] | None:
    """Name and value of what a finished stage is judged by, as the tables show it."""
    summary = manifest.summary if manifest.status == "done" else {}
    main: Any = summary.get("variants")
    main = main.get("main") if isinstance(main, dict) else None
    main = main if isinstance(main, dict) else {}
    found = {
        "distill": ("validation_kl_nats", summary.get("kl_mean")),
        "finetune": (summary.get("validation_figure", "validation_loss_nats"), summary.get("validation_loss")),
        "evaluate": ("reference_loss_nats", main.get("loss_nats_per_token")),
    }
    if manifest.stage == "evaluate" and "loss_nats_per_row" in main:
        found["evaluate"] = ("test_loss_nats", main["loss_nats_per_row"])
    if manifest.stage == "evaluate" and "mean_squared_error" in main:
        found["evaluate"] = ("test_loss_mse", main["mean_squared_error"])
    name, value = found.get(manifest.stage, ("", None))
    return (name, float(value)) if isinstance(value, (int, float)) else None


def _last_loss(records: Sequence[dict[str, Any]]) -> tuple[str | None, float | None]:
    """Name and value of the newest step's loss (`loss_nats`), which is that of its batch alone."""
    for record in reversed(records):
        for name, value in record.items():
            if name.startswith("loss") and isinstance(value, (int, float)):
                return name, float(value)
    return None, None


def _test_rows(
    folder: RunFolder,
    config: RunConfig,
    manifest: Manifest,
    place: Path,
    shard: str | None,
    records: Sequence[dict[str, Any]],
) -> tuple[int, int | None, float | None]:
    """Rows of all variants that are there (summaries; losses of text; predicted classes), how many there will be, and
    the time for the rest.

    Two kinds of batches take their own time each: those that generate, and those that measure a loss. Rows of text and
    rows to classify have the latter alone.
    """
    only_reads = config.data.kind == "text" or config.data.is_labelled
    num_made = _num_lines(place / ("reference_losses" if config.data.kind == "text" else "predictions"))
    num_rows = _num_rows(folder, "test")
    if num_rows is None:
        return num_made, None, None
    batch_size = config.evaluate.batch_size
    index, num_shards = (int(part) for part in shard.split("/")) if shard else (0, 1)
    batches = range(index, math.ceil(num_rows / batch_size), num_shards)
    total = sum(min(batch_size, num_rows - position * batch_size) for position in batches) * (1 + len(config.variants))
    num_made = min(num_made, total)
    generating = _step_times([record for record in records if "loss_nats" not in record])[-_ETA_STEPS:]
    measuring = _step_times([record for record in records if "loss_nats" in record])[-_ETA_STEPS:]
    if only_reads and measuring:
        remaining_s = (total - num_made) / batch_size * sum(measuring) / len(measuring)
        return num_made, total, remaining_s / manifest.world_size
    if not generating:
        return num_made, total, None
    remaining_s = (total - num_made) / batch_size * sum(generating) / len(generating)
    if measuring and config.evaluate.perplexity:
        num_measured = min(_num_lines(place / "reference_losses"), total)
        remaining_s += (total - num_measured) / batch_size * sum(measuring) / len(measuring)
    return num_made, total, remaining_s / manifest.world_size


def _num_lines(place: Path) -> int:
    """Whole lines of the folder's files: those of one variant may be spread over files of several processes."""
    try:
        files = list(place.glob("*.jsonl"))
    except OSError:
        return 0
    return sum(_read_bytes(file).count(b"\n") for file in files)


def _planned_steps(folder: RunFolder, config: RunConfig, manifest: Manifest) -> int | None:
    """Steps of a stage that counts steps; None where that is not known."""
    if manifest.stage == "prepare":
        return config.tiny.pretrain_steps if config.tiny is not None else None
    if manifest.variant is not None:
        if manifest.variant not in config.variants:
            return None
        config = apply_variant(config, manifest.variant)
    schedule = dict(schedules(config)).get(manifest.stage)
    if schedule is None:
        return None
    if schedule.max_steps is not None:
        return schedule.max_steps
    if schedule.packing:
        lengths = _row_lengths(folder, "train")
        # a row that is longer than the capacity is refused by the stage itself
        num = num_sequences(lengths, max(config.data.max_length_tokens, *lengths)) if lengths else None
    else:
        num = _num_rows(folder, "train")
    if num is None:
        return None
    return max(1, math.ceil(schedule.epochs * num / schedule.global_batch_size - 1e-9))


def _num_rows(folder: RunFolder, split: str) -> int | None:
    """Rows of a tokenized split, from the header of its safetensors file."""
    found = _offsets(folder, split)
    return None if found is None else found[1] - 1


def _row_lengths(folder: RunFolder, split: str) -> list[int]:
    """Tokens of each row; empty where they cannot be read."""
    found = _offsets(folder, split)
    if found is None:
        return []
    file, count, start = found
    try:
        with open(file, "rb") as content:
            content.seek(start)
            offsets = struct.unpack(f"<{count}q", content.read(8 * count))
    except (OSError, struct.error):
        return []
    return [end - begin for begin, end in itertools.pairwise(offsets)]


def _offsets(folder: RunFolder, split: str) -> tuple[Path, int, int] | None:
    """File of a split's tokens, how many offsets of rows it holds, and at which byte they begin."""
    manifest = read_manifest(folder.stage("prepare"))
    if manifest is None or f"tokens_{split}" not in manifest.artifacts:
        return None
    file = folder.stage("prepare") / manifest.artifacts[f"tokens_{split}"].path
    try:
        with open(file, "rb") as content:
            size = int.from_bytes(content.read(8), "little")
            entry = json.loads(content.read(size))["offsets"]
        return file, int(entry["shape"][0]), 8 + size + int(entry["data_offsets"][0])
    except (OSError, ValueError, KeyError):
        return None

"""What every stage took: minutes, tokens a second, memory, processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..config import LABELLED_KINDS
from ..formatting import format_bytes
from .blocks import count, notes, section, table
from .markup import Markup
from .run_files import RunFiles, StageFiles
from .scale import is_drawable
from .staleness import Stale

_COLUMNS = ("stage", "of", "state", "minutes", "tokens/s", "peak memory", "processes")


def cost(run: RunFiles, stale: Stale) -> Markup:
    """The section: a row for every stage that did something, and all together."""
    busy = [files for files in run.begun if files.status.state != "skipped"]
    minutes = [files.status.minutes or 0.0 for files in busy]
    # the manifest holds the time of all attempts, but of the newest alone how many processes it had
    counted = " at the last attempt's number of processes" if any(f.manifest.num_resumes for f in busy) else ""
    hours = sum(m * files.manifest.world_size for m, files in zip(minutes, busy, strict=True)) / 60
    return section(
        "cost",
        "Cost",
        table(
            _COLUMNS,
            [_row(run, files, files.status.title in stale.titles) for files in busy],
            caption="Time and memory of every stage",
            num_texts=3,
        ),
        notes(
            [
                f"Together {sum(minutes):,.1f} minutes, {hours:,.2f} process-hours{counted}, all attempts "
                "counted; stages that had nothing to do are left out.",
                "Tokens/s: over all processes, in the recorded steps without validation and saving; of evaluate the "
                f"{'tokens of its rows' if _reads(run) else 'generated tokens'}. Peak memory: of one process, "
                "allocated on its GPU, or resident where it has none.",
                *_resumed(busy),
            ]
        ),
    )


def _row(run: RunFiles, files: StageFiles, is_stale: bool) -> list[str]:
    status, manifest = files.status, files.manifest
    part = status.layers or status.shard
    speed = tokens_per_s(files.records, generating=status.stage == "evaluate" and not _reads(run))
    return [
        status.stage + (f" {part}" if part else ""),
        "all" if status.stage in ("prepare", "evaluate") else run.labels[files.variant],
        status.state + (", out of date" if is_stale else ""),
        f"{status.minutes or 0.0:,.1f}",
        "–" if speed is None else f"{speed:,.0f}",
        format_bytes(manifest.peak_memory_bytes) if manifest.peak_memory_bytes else "–",
        f"{manifest.world_size:,}",
    ]


def _reads(run: RunFiles) -> bool:
    """Whether evaluate only reads its rows."""
    return run.kind in LABELLED_KINDS


def tokens_per_s(records: Iterable[Mapping[str, Any]], *, generating: bool = False) -> float | None:
    """Tokens of all processes over the time of the steps that tell both, or None where none does.

    Args:
        generating: count only batches of generated summaries; evaluate also records those that measure the loss.
    """
    tokens = seconds = 0.0
    for record in records:
        num, step_s = record.get("tokens"), record.get("step_s")
        if generating and "new_tokens_per_summary" not in record:
            continue
        if is_drawable(num) and is_drawable(step_s):
            tokens, seconds = tokens + num, seconds + step_s  # type: ignore[operator]
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def _resumed(busy: Iterable[StageFiles]) -> list[str]:
    again = [
        f"{files.status.title} {count(files.manifest.num_resumes, 'time')}"
        for files in busy
        if files.manifest.num_resumes
    ]
    return [f"Resumed: {', '.join(again)}."] if again else []

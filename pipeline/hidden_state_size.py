"""What `distill.cache_hidden_states` takes on disk and whether it is of use, reckoned without torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .formatting import format_bytes
from .run_folder import RunFolder

if TYPE_CHECKING:
    from .config import RunConfig

KEY = "distill.cache_hidden_states"


@dataclass(frozen=True)
class CacheSize:
    """The hidden states of all rows, as they enter one layer. Each row lies there once, whatever the epochs."""

    num_rows: int
    num_tokens: int
    num_bytes: int
    """Tokens x hidden size x bytes of `engine.precision`."""

    def __str__(self) -> str:
        return f"{format_bytes(self.num_bytes)} for {self.num_tokens:,} tokens of {self.num_rows:,} rows"


def cache_size(config: RunConfig, num_rows: int, num_tokens: int, hidden_size: int) -> CacheSize:
    """The size for rows that have `num_tokens` tokens together."""
    value_bytes = 2 if config.engine.precision == "bfloat16" else 4
    return CacheSize(num_rows, num_tokens, num_tokens * hidden_size * value_bytes)


def without_use(first_layer: int, num_passes: float) -> str | None:
    """Why the cache would be of no use, or None.

    Args:
        first_layer: lowest of the layers that are trained together.
        num_passes: epochs of the whole training.
    """
    if first_layer == 0:
        return "layer 0 is trained, and no layer below it runs. It helps a subset (distill.layers) that begins higher."
    if num_passes <= 1:
        return "no row comes a second time; it pays from the second epoch on."
    return None


def num_passes(config: RunConfig, num_rows: int | None) -> float:
    """Epochs of distillation, also where `max_steps` decides. Packed sequences count as rows, so then it is more."""
    distill = config.distill
    if distill.max_steps is None or not num_rows:
        return distill.epochs
    return distill.max_steps * distill.global_batch_size / num_rows


def lower_layers_share(config: RunConfig, num_rows: int | None) -> float:
    """How often the layers below the first trained one run for a row, over how often the others do."""
    return 1 / max(1.0, num_passes(config, num_rows)) if config.distill.cache_hidden_states else 1.0


def describe_cache(config: RunConfig, hidden_size: int, num_rows: int | None) -> str | None:
    """For `validate`: what the cache will take, or why it has no effect; None where it is off.

    Args:
        num_rows: training rows, where known. `prepare`'s own counts are taken where it is finished.
    """
    if not (config.distill.cache_hidden_states and config.model.attention == "linear" and config.distill.enabled):
        return None
    from .manifest import read_manifest

    folder = RunFolder.of(config)
    manifest = read_manifest(folder.stage("prepare"))
    train = manifest.summary.get("splits", {}).get("train", {}) if manifest and manifest.status == "done" else {}
    num_rows = train.get("used") or num_rows
    layers = config.distill.layers
    first_layer = min(int(span.partition("-")[0]) for span in layers.split(",")) if layers else None
    # without distill.layers, it is the array's elements above the first that have a cache each
    useless = without_use(1 if first_layer is None else first_layer, num_passes(config, num_rows))
    if useless is not None:
        return f"{KEY}: has no effect: {useless}"
    if num_rows is None:
        return f"{KEY}: its size is known after `prepare`."
    tokens = train.get("tokens") or num_rows * config.data.max_length_tokens
    size = cache_size(config, num_rows, tokens, hidden_size)
    if first_layer is None:
        whose = "each element of `submit`'s array above the first takes (a run of all layers at once: none)"
    else:
        whose = f"the hidden states that enter layer {first_layer} take"
    most = "" if train.get("tokens") else "at most "
    return f"{KEY}: {whose} {most}{size}{_free(folder.root)}."


def _free(folder: Path) -> str:
    """Free space where the run folder is or will be."""
    for place in (folder, *folder.absolute().parents):
        if place.is_dir():
            return f"; {format_bytes(shutil.disk_usage(place).free)} are free there"
    return ""

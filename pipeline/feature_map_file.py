"""Feature maps as a safetensors file: what stage one hands on, and `merge` joins.

Keys are `layers.{i}.feature_map_q.weight`, …, buffers included; the header says what model the maps belong to. Reading
and writing need no transformers, whose import takes longer than most files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import ModelError
from .run_folder import atomic_file

FORMAT = "hedgehog-feature-maps-1"
_METADATA_KEY = "hedgehog"

MAP_FIELDS = ("feature_map", "feature_dim", "feature_map_options", "head_dim", "num_attention_heads")
"""What decides a feature map's shape and meaning; a file of maps fits a model only where all of these agree."""


def write_feature_maps(file: str | os.PathLike, maps: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write `maps`; the file appears whole or not at all.

    Args:
        metadata: all of MAP_FIELDS; more (the layers, a base model's fingerprint, …) is kept. JSON values.

    Raises:
        ValueError: `metadata` lacks a field.
    """
    missing = [field for field in MAP_FIELDS if field not in metadata]
    if missing:
        raise ValueError(f"metadata of feature maps lacks {', '.join(missing)}")
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in maps.items()}
    # one key: safetensors writes several in any order, and equal maps should be equal files
    header = json.dumps({"format": FORMAT, **metadata}, sort_keys=True)
    with atomic_file(Path(file)) as unfinished:
        save_file(tensors, unfinished, metadata={_METADATA_KEY: header})


def read_feature_maps(file: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, metadata) of what write_feature_maps wrote. ModelError if it is missing, torn or another kind."""
    file = Path(file)
    if not file.is_file():
        raise ModelError(f"{file}: there is no such file of feature maps; run the distill stage, or correct the path")
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get(_METADATA_KEY, "{}"))
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (a handle, not a dict)
    except SafetensorError as error:
        raise ModelError(f"{file}: truncated or not a safetensors file ({error}); make it again") from error
    found = header.pop("format", None)
    if found != FORMAT:
        raise ModelError(f"{file}: not a file of feature maps (its format is {found!r})")
    return tensors, header

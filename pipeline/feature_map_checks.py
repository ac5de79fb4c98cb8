"""Does the config's feature map exist, does it take the options and the feature_dim given, and how large is it?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import ModelConfig
    from .config_checks import Problem

_ANY_HEAD_DIM = 64
"""Stands in where the base model's head_dim is not known; then a given feature_dim is taken to fit."""


UNTRAINED_MAPS = frozenset({"elu", "exp_t", "cosformer", "taylor", "performer"})
"""Feature maps without weights: there is nothing to train."""


@dataclass(frozen=True)
class FeatureMapSize:
    """Numbers per head and side."""

    num_features: int
    """Width of φ(x)."""
    num_weights: int
    """Learned weights."""


def feature_map_size(model: ModelConfig, head_dim: int) -> FeatureMapSize:
    """Size of the feature map that `model` names. Imports no torch, which login nodes have little use for.

    Raises:
        ValueError: an unknown name.
    """
    projected = model.feature_dim or head_dim
    widths = {
        **dict.fromkeys(("hedgehog_softmax", "hedgehog_exp", "hedgehog_joint"), 2 * projected),
        **dict.fromkeys(("relu", "elu", "exp_t", "performer"), projected),
        "cosformer": 2 * head_dim,
        "taylor": 1 + head_dim + head_dim * (head_dim + 1) // 2,
    }
    if model.feature_map not in widths:
        raise ValueError(f"unknown feature map '{model.feature_map}'; known: {', '.join(widths)}")
    num_weights = 0 if model.feature_map in UNTRAINED_MAPS else head_dim * projected
    return FeatureMapSize(widths[model.feature_map], num_weights)


def _try_to_make(model: ModelConfig, head_dim: int) -> None:
    """
    Raises:
        ValueError: unknown name or option, or a feature_dim that does not fit.
    """
    from ..kernels.feature_maps import make_feature_map

    make_feature_map(
        model.feature_map,
        num_heads=1,
        head_dim=head_dim,
        feature_dim=model.feature_dim,
        side="query",
        options=model.feature_map_options,
    )


def feature_map_errors(model: ModelConfig, head_dim: int | None = None) -> list[Problem]:
    """What the registry refuses about a feature map. Imports torch.

    Args:
        head_dim: the base model's, where known.
    """
    from .config_checks import Problem

    found = name_errors(model)
    if not found and model.attention == "linear":
        try:
            _try_to_make(model, head_dim or model.feature_dim or _ANY_HEAD_DIM)
        except ValueError as error:
            own = [f"model.{name}" for name in ("feature_map", "feature_dim", "feature_map_options", "attention")]
            if any(str(error).startswith(f"{option} must be") for option in model.feature_map_options):
                own.insert(0, own.pop(2))
            found.append(Problem((*own, "model.base", "tiny.hidden_size", "tiny.num_heads"), str(error)))
    return found


def name_errors(model: ModelConfig) -> list[Problem]:
    """A feature map's name that there is not. Imports no torch."""
    from .config_checks import Problem

    if model.attention == "linear":
        try:
            feature_map_size(model, _ANY_HEAD_DIM)
        except ValueError as error:
            return [Problem(("model.feature_map", "model.attention"), str(error))]
    return []

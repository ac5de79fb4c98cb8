"""Does the config's feature map exist, and does it take the options and the feature_dim given? Imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from .config import ModelConfig, RunConfig
from .config_checks import Problem
from .errors import ConfigError

_ANY_HEAD_DIM = 64
"""Stands in where the base model's head_dim is not known; then a given feature_dim is taken to fit."""


@dataclass(frozen=True)
class FeatureMapSize:
    """Numbers per head and side."""

    num_features: int
    """Width of φ(x)."""
    num_weights: int
    """Learned weights."""


def feature_map_size(model: ModelConfig, head_dim: int) -> FeatureMapSize:
    """Size of the feature map that `model` names.

    Raises:
        ValueError: unknown name or option, or a feature_dim that does not fit.
    """
    from ..kernels.feature_maps import make_feature_map

    feature_map = make_feature_map(
        model.feature_map,
        num_heads=1,
        head_dim=head_dim,
        feature_dim=model.feature_dim,
        side="query",
        options=model.feature_map_options,
    )
    num_weights = sum(parameter.numel() for parameter in feature_map.parameters())
    return FeatureMapSize(feature_map.num_features, num_weights)


def feature_map_errors(config: RunConfig, head_dim: int | None = None) -> list[Problem]:
    """What the registry refuses about the main conversion's and the variants' feature maps."""
    from .config_loading import variant_configs

    problems: list[Problem] = []
    for name, variant in {"": config, **variant_configs(config)}.items():
        if variant.model.attention == "softmax":
            continue
        try:
            feature_map_size(variant.model, head_dim or variant.model.feature_dim or _ANY_HEAD_DIM)
        except ValueError as error:
            key = "model.feature_map" if not name else f"variants.{name}.overrides.model.feature_map"
            if all(str(error) != problem.message for problem in problems):
                problems.append(Problem((key,), str(error)))
    return problems


def check_feature_maps(config: RunConfig) -> None:
    """Refuse feature maps that the registry does not know.

    Raises:
        ConfigError: names every one of them.
    """
    problems = feature_map_errors(config)
    if problems:
        raise ConfigError("\n".join(str(problem) for problem in problems))

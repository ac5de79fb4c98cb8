"""What the configuration of every converted model says of its attention, beside its family's own fields.

This file travels with every export, so it imports nothing but the files that travel with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...kernels.feature_maps import FEATURE_MAPS
from ...kernels.linear_attention import DEFAULT_CHUNK_SIZE, DENOMINATOR_EPS

ATTENTION_KINDS = ("linear", "softmax")


@dataclass(init=False, repr=False, eq=False)
class HedgehogFields:
    """Fields of what replaces softmax attention; a base class before the family's own configuration.

    feature_map          name in the registry of feature maps: φ in y_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)
    feature_dim          columns of the map's weight W: head_dim × feature_dim; None means head_dim
    feature_map_options  keyword options of the map (its own names, e.g. a temperature)
    feature_map_seed     seed of maps that draw random numbers (performer's projection)
    attention            "linear": the above. "softmax": the family's own attention and no feature maps
    attention_eps        added to the denominator of linear attention
    chunk_size           tokens that the chunked form handles at once; speed only
    attention_backend    "auto" or the name of an implementation of causal linear attention

    Raises ValueError for an unknown name, a size that cannot be, or an option that linear attention would ignore.
    """

    dropout_field: ClassVar[str]
    """The family's name for the probability with which attention weights are dropped."""

    feature_map: str = "hedgehog_softmax"
    feature_dim: int | None = None
    feature_map_options: dict | None = None
    feature_map_seed: int = 0
    attention: str = "linear"
    attention_eps: float = DENOMINATOR_EPS
    chunk_size: int = DEFAULT_CHUNK_SIZE
    attention_backend: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]  # PreTrainedConfig's
        if self.feature_dim is None:
            self.feature_dim = self.head_dim  # type: ignore[attr-defined]  # every family's configuration has it
        if self.feature_map_options is None:
            self.feature_map_options = {}
        self.check_hedgehog_fields()

    def check_hedgehog_fields(self) -> None:
        """ValueError as above. A model asks again: from_pretrained(field=…) sets fields of a config that is made."""
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map: {self.feature_map!r} is unknown; known: {', '.join(sorted(FEATURE_MAPS))}")
        if self.attention not in ATTENTION_KINDS:
            raise ValueError(f"attention: {self.attention!r} is unknown; known: {', '.join(ATTENTION_KINDS)}")
        if not isinstance(self.feature_map_options, dict):
            raise ValueError(f"feature_map_options: expected a mapping, got {self.feature_map_options!r}")
        for name in ("feature_dim", "chunk_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if not self.attention_eps >= 0:
            raise ValueError(f"attention_eps: expected a number ≥ 0, got {self.attention_eps!r}")
        dropout = getattr(self, self.dropout_field)
        if self.attention == "linear" and dropout:
            raise ValueError(
                f"{self.dropout_field} is {dropout}, but linear attention has no attention weights to "
                "drop: set it to 0, or attention to 'softmax'"
            )


__all__ = ["ATTENTION_KINDS", "HedgehogFields"]

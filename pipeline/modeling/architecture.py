"""What conversion and distillation must know of a family's modules: one subclass in each family's room.

B batch, L length, H query heads, K key/value heads, D head dim, V value dim, E hidden size.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..families import family_of, family_of_config
from .hedgehog_model import HedgehogPreTrainedModel

if TYPE_CHECKING:
    from ..config import TinyConfig
    from ..model_shape import ModelShape

SMALL_MODELS_INITIAL = 0.9
"""Standard deviation of a tiny model's weights, over hidden size ** -0.5: it learns sooner from larger ones than the
usual 0.02, with which its attention stays flat for long."""


class Architecture(ABC):
    """A family's classes, which of its modules a converted model shares, and the steps of its softmax forward pass."""

    base_class: ClassVar[type[PreTrainedModel]]
    base_config_class: ClassVar[type[PreTrainedConfig]]
    hedgehog_class: ClassVar[type[HedgehogPreTrainedModel]]
    config_class: ClassVar[type[PreTrainedConfig]]
    auto_map: ClassVar[dict[str, str]]
    """What a config.json says of the modeling files beside it."""
    modeling_files: ClassVar[tuple[ModuleType, ...]]
    """Modules that travel with an export, with all that they import from this project."""

    of_model: ClassVar[tuple[str, ...]] = ("lm_head",)
    """Modules that a converted model shares with its base, above the decoder."""
    of_decoder: ClassVar[tuple[str, ...]]
    """Modules that a converted decoder shares with its base's, beside the layers."""
    of_layer: ClassVar[tuple[str, ...]]
    """Modules that a converted layer shares with its base's, beside the attention."""
    of_attention: ClassVar[tuple[str, ...]]
    """The attention's projections."""
    layers_name: ClassVar[str]
    attention_name: ClassVar[str]

    @property
    def family(self) -> type[ModelShape]:
        """What is known of the family without torch."""
        return family_of_config(self.base_config_class)

    @property
    def is_causal(self) -> bool:
        """Whether tokens see those before them only."""
        return not self.family.is_encoder

    def decoder(self, model: PreTrainedModel) -> Any:
        """The stack below the head of a base model or a converted one; an encoder's too."""
        return model.base_model

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """The layers."""
        return self.decoder(model).get_submodule(self.layers_name)

    def attention(self, layer: nn.Module) -> nn.Module:
        """A layer's attention."""
        return layer.get_submodule(self.attention_name)

    def config_fields(self) -> dict[str, Any]:
        """Fields of a converted model's config that differ from the base's."""
        return {}

    def loaded(self, base: Any) -> None:
        """What a base model gets in place of modules that transformers gave it; its numbers stay, but for roundings."""
        self.complete(base)

    def complete(self, model: Any) -> None:  # noqa: B027 (most have nothing to do)
        """What is left to do for a model that has another's modules to stand on its own."""

    @abstractmethod
    def tiny_config(self, tiny: TinyConfig) -> PreTrainedConfig:
        """Configuration of the small model that a tiny run pretrains."""

    @abstractmethod
    def embed(
        self,
        decoder: Any,
        input_ids_BL: torch.Tensor,
        position_ids_BL: torch.Tensor,
        token_type_ids_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the first layer reads (B, L, E). Token types are an encoder's alone; None: all 0."""

    def positions(self, decoder: Any, hidden_BLE: torch.Tensor, position_ids_BL: torch.Tensor) -> Any:
        """What `heads` wants of positions, the same for every layer."""
        return None

    @abstractmethod
    def heads(
        self, layer: Any, hidden_BLE: torch.Tensor, positions: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (B, H, L, D), k (B, K, L, D), v (B, K, L, V) as the layer's softmax attention compares them."""

    @abstractmethod
    def scale(self, layer: Any) -> float:
        """What q·k is multiplied with before the softmax."""

    @abstractmethod
    def after_attention(self, layer: Any, hidden_BLE: torch.Tensor, o_BLE: torch.Tensor) -> torch.Tensor:
        """Hidden states that entered the layer, attention's output with heads side by side → what its MLP is given."""

    @abstractmethod
    def after_mlp(self, layer: Any, hidden_BLE: torch.Tensor) -> torch.Tensor:
        """Hidden states after attention → what leaves the layer."""


def architecture_of(model_or_config: Any) -> Architecture:
    """The architecture of a base model, a converted one, or their config.

    Raises:
        ModelError: of a family that cannot be converted.
    """
    return architecture(family_of_config(getattr(model_or_config, "config", model_or_config)).model_type)


def architecture(model_type: str) -> Architecture:
    """The architecture of a family, by transformers' name for it.

    Raises:
        ModelError: of a family that cannot be converted.
    """
    family_of("the model", model_type)
    return importlib.import_module(f"..{model_type}.architecture", __package__).ARCHITECTURE


def share_modules(target: Any, source: Any, names: Iterable[str]) -> None:
    """Make modules of `source` those of `target` too; a name may lead to one inside another: `attention.output`."""
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(target.get_submodule(parent), own, source.get_submodule(name))


__all__ = ["SMALL_MODELS_INITIAL", "Architecture", "architecture", "architecture_of", "share_modules"]

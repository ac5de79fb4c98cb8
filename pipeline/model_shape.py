"""The sizes of a base model that decide memory, and what its family calls its tensors. Imports no torch.

A family of models (Llama, GPT-2, …) is a subclass of ModelShape, in a room of its own; families.py lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import ModelError

if TYPE_CHECKING:
    from .config import TinyConfig


@dataclass(frozen=True)
class ModelShape(ABC):
    """A base model's sizes. Linear layers of a decoder layer are listed by name as (in, out)."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_length_tokens: int | None

    model_type: ClassVar[str]
    """transformers' name of the family, and of its room here."""
    title: ClassVar[str]
    """The family's name in messages."""
    hedgehog_title: ClassVar[str]
    """What a converted model of the family is called."""
    licence: ClassVar[str] = ""
    """What a model card adds, in brackets, of the licence of the family's weights."""
    lora_modules: ClassVar[tuple[str, ...]]
    """Names that `finetune.lora.target_modules` may have."""
    attention_modules: ClassVar[tuple[str, ...]]
    """Those of the attention's projections: what learns unless the config says otherwise."""
    is_encoder: ClassVar[bool] = False
    """Whether every token sees all others: such a model tells classes, and generates nothing."""
    head_modules: ClassVar[tuple[str, ...]] = ()
    """Modules of an encoder's head: they learn whole in stage two; a base that was only pretrained may lack them."""
    linears_are_transposed: ClassVar[bool] = False
    """Whether weights of the layers' linear modules are stored as (in, out)."""
    same_input: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Linear modules that read one and the same tensor."""
    positions_are_a_table: ClassVar[bool] = False
    """Whether a position beyond `max_length_tokens` does not exist."""
    tiny_positions: ClassVar[int | None] = None
    """Positions of the model that the `tiny` section makes, where they are a table."""
    layer_prefix: ClassVar[str]
    """Tensors of decoder layer i are called this, i and a dot."""
    decoder_prefix: ClassVar[str]
    """Tensors below the language-model head are called this and a dot, or lack it where the decoder was saved alone."""

    @classmethod
    @abstractmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ModelShape:
        """The shape that the family's config.json describes.

        Raises:
            ModelError: a size is missing, or two of them exclude each other, or it is a kind that cannot be converted.
        """

    @classmethod
    def of_tiny(cls, tiny: TinyConfig) -> ModelShape:
        """The shape of the model that the `tiny` section makes. It has as many heads for keys and values as for
        queries, unless a family says otherwise."""
        return cls(
            hidden_size=tiny.hidden_size,
            num_layers=tiny.num_layers,
            num_heads=tiny.num_heads,
            num_key_value_heads=tiny.num_heads,
            head_dim=tiny.hidden_size // tiny.num_heads,
            intermediate_size=tiny.intermediate_size,
            vocab_size=tiny.vocab_size,
            max_length_tokens=cls.tiny_positions,
        )

    @classmethod
    @abstractmethod
    def hub_shapes(cls) -> dict[str, ModelShape]:
        """Hub id to shape, for those known without asking the hub."""

    @classmethod
    @abstractmethod
    def attention_dropout(cls, fields: Mapping[str, Any]) -> float:
        """Dropout of attention weights in config.json that a conversion could not leave out by itself; 0 if none."""

    @classmethod
    def tensor_name(cls, name: str) -> str:
        """What transformers calls a tensor that a file of weights calls `name`."""
        return name

    @property
    @abstractmethod
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name to (in, out) of the linear modules of a decoder layer; names as in `lora_modules`."""

    @property
    @abstractmethod
    def num_other_weights(self) -> int:
        """Weights outside the linear modules of the layers: embeddings, output layer, norms, biases."""

    @abstractmethod
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor that a saved model of these sizes has."""

    @property
    def num_token_types(self) -> int:
        """How many texts of a row the model tells apart."""
        return 1

    @property
    def num_layer_weights(self) -> int:
        """Weights in the linear modules of one decoder layer: what quantization makes smaller."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def num_weights(self) -> int:
        """All weights of the base model."""
        return self.num_layers * self.num_layer_weights + self.num_other_weights

    # Bytes a token that the family's own modules take, for the memory estimate: (their names in a formula, bytes).
    # p: bytes of a number in the layers' precision.

    @abstractmethod
    def saved_by_norms(self, p: int) -> tuple[str, float]:
        """What a layer's norms (and dropouts) keep for the backward pass."""

    @abstractmethod
    def saved_by_mlp(self, p: int) -> tuple[str, float]:
        """What a layer's MLP keeps for the backward pass, its adapters aside."""

    @abstractmethod
    def mlp_at_once(self, p: int) -> tuple[str, float]:
        """What the MLP's inner activations take at their peak in a pass without gradients."""

    @abstractmethod
    def positions_at_once(self, p: int) -> tuple[str, float]:
        """What all layers are given of positions."""

    @abstractmethod
    def heads_at_once(self, p: int) -> tuple[str, float]:
        """What making q, k and v takes at its peak."""


def whole_sizes(fields: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """
    Raises:
        ModelError: one of the fields is no whole number above 0.
    """
    missing = [name for name in names if not isinstance(fields.get(name), int) or fields[name] < 1]
    if missing:
        raise ModelError(f"config.json lacks {', '.join(missing)}, or they are no positive numbers")


__all__ = ["ModelShape", "whole_sizes"]

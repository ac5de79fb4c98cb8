"""The sizes of a Llama that decide memory, from its config.json, the `tiny` section, or a table of hub ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base_folder import read_llama_config
from .errors import ModelError

if TYPE_CHECKING:
    from .config import RunConfig


@dataclass(frozen=True)
class ModelShape:
    """A Llama's sizes. Linear layers of a decoder layer are listed by name as (in, out)."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_length_tokens: int | None
    tied_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name to (in, out) of the seven linear modules of a decoder layer."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, mlp),
            "up_proj": (hidden, mlp),
            "down_proj": (mlp, hidden),
        }

    @property
    def num_layer_weights(self) -> int:
        """Weights in the linear modules of one decoder layer: what quantization makes smaller."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def num_other_weights(self) -> int:
        """Embedding, output layer and norms."""
        tables = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return tables + self.hidden_size * (2 * self.num_layers + 1)

    @property
    def num_weights(self) -> int:
        """All weights of the base model."""
        return self.num_layers * self.num_layer_weights + self.num_other_weights


_LLAMA_2_7B = ModelShape(4096, 32, 32, 32, 128, 11008, 32000, 4096)
_LLAMA_2_13B = ModelShape(5120, 40, 40, 40, 128, 13824, 32000, 4096)
_LLAMA_2_70B = ModelShape(8192, 80, 64, 8, 128, 28672, 32000, 4096)

HUB_SHAPES = {
    f"meta-llama/Llama-2-{size}{kind}-hf": shape
    for size, shape in (("7b", _LLAMA_2_7B), ("13b", _LLAMA_2_13B), ("70b", _LLAMA_2_70B))
    for kind in ("", "-chat")
}
"""Shapes known without asking the hub."""

_NEEDED_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def known_shape(config: RunConfig) -> ModelShape | None:
    """The base model's shape, or None where only the hub knows it. Reads config.json at most; never the network.

    Raises:
        ModelError: a local folder that holds no Llama's config.json, or a path that does not exist.
    """
    if config.tiny is not None:
        tiny = config.tiny
        return ModelShape(
            hidden_size=tiny.hidden_size,
            num_layers=tiny.num_layers,
            num_heads=tiny.num_heads,
            num_key_value_heads=tiny.num_key_value_heads,
            head_dim=tiny.hidden_size // tiny.num_heads,
            intermediate_size=tiny.intermediate_size,
            vocab_size=tiny.vocab_size,
            max_length_tokens=None,
        )
    assert config.model.base is not None, "load_config requires a base model or the tiny section"
    base = config.model.base
    if Path(base).exists():
        return shape_from_fields(read_llama_config(Path(base)))
    if base in HUB_SHAPES:
        return HUB_SHAPES[base]
    if base.startswith(("/", ".")) or base.count("/") > 1:
        raise ModelError(f"{base}: no such folder.")
    return None


def shape_from_fields(fields: Mapping[str, Any]) -> ModelShape:
    """The shape that a Llama's config.json describes.

    Raises:
        ModelError: a size is missing, or two of them exclude each other.
    """
    sizes = {name: fields.get(name) for name in _NEEDED_FIELDS}
    missing = [name for name, size in sizes.items() if not isinstance(size, int) or size < 1]
    if missing:
        raise ModelError(f"config.json lacks {', '.join(missing)}, or they are no positive numbers")
    num_heads = fields["num_attention_heads"]
    num_key_value_heads = fields.get("num_key_value_heads") or num_heads
    if num_heads % num_key_value_heads:
        raise ModelError(
            f"config.json has {num_heads} num_attention_heads, no multiple of {num_key_value_heads} num_key_value_heads"
        )
    return ModelShape(
        hidden_size=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // num_heads,
        intermediate_size=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        max_length_tokens=fields.get("max_position_embeddings"),
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
        attention_bias=bool(fields.get("attention_bias", False)),
        mlp_bias=bool(fields.get("mlp_bias", False)),
    )

"""A Llama's sizes and the names of its tensors. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..model_shape import ModelShape, whole_sizes

if TYPE_CHECKING:
    from ..config import TinyConfig

_NEEDED_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class LlamaShape(ModelShape):
    """Llama and Llama-2, grouped-query attention included."""

    tied_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    model_type = "llama"
    title = "Llama"
    hedgehog_title = "Hedgehog-Llama"
    licence = " (for Llama 2 the Llama 2 Community License and its Acceptable Use Policy)"
    attention_modules = ("q_proj", "k_proj", "v_proj", "o_proj")
    lora_modules = (*attention_modules, "gate_proj", "up_proj", "down_proj")
    same_input = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    layer_prefix = "model.layers."
    decoder_prefix = "model"

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> LlamaShape:
        whole_sizes(fields, _NEEDED_FIELDS)
        num_heads = fields["num_attention_heads"]
        num_key_value_heads = fields.get("num_key_value_heads") or num_heads
        if num_heads % num_key_value_heads:
            raise ModelError(
                f"config.json has {num_heads} num_attention_heads, no multiple of {num_key_value_heads} "
                "num_key_value_heads"
            )
        return cls(
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

    @classmethod
    def of_tiny(cls, tiny: TinyConfig) -> ModelShape:
        return replace(super().of_tiny(tiny), num_key_value_heads=tiny.num_key_value_heads)

    @classmethod
    def hub_shapes(cls) -> dict[str, ModelShape]:
        sizes = {
            "7b": cls(4096, 32, 32, 32, 128, 11008, 32000, 4096),
            "13b": cls(5120, 40, 40, 40, 128, 13824, 32000, 4096),
            "70b": cls(8192, 80, 64, 8, 128, 28672, 32000, 4096),
        }
        return {f"meta-llama/Llama-2-{size}{kind}-hf": shape for size, shape in sizes.items() for kind in ("", "-chat")}

    @classmethod
    def attention_dropout(cls, fields: Mapping[str, Any]) -> float:
        return fields.get("attention_dropout") or 0

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
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
    def num_other_weights(self) -> int:
        tables = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return tables + self.hidden_size * (2 * self.num_layers + 1)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
            for name, (inputs, outputs) in self.linears.items():
                block, biased = ("self_attn", self.attention_bias) if name[0] in "qkvo" else ("mlp", self.mlp_bias)
                shapes[f"model.layers.{layer}.{block}.{name}.weight"] = (outputs, inputs)
                if biased:
                    shapes[f"model.layers.{layer}.{block}.{name}.bias"] = (outputs,)
        return shapes

    def saved_by_norms(self, p: int) -> tuple[str, float]:
        return "norms 8E", 8.0 * self.hidden_size

    def saved_by_mlp(self, p: int) -> tuple[str, float]:
        return "MLP 3Ip", 3.0 * self.intermediate_size * p

    def mlp_at_once(self, p: int) -> tuple[str, float]:
        return "3Ip", 3.0 * self.intermediate_size * p

    def positions_at_once(self, p: int) -> tuple[str, float]:
        return "2Dp", 2.0 * self.head_dim * p  # cosine and sine

    def heads_at_once(self, p: int) -> tuple[str, float]:
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        # the rotation of q, and then of k beside the rotated q
        return "max(4HD + 2KD, 2HD + 5KD) p", float(p * max(4 * queries + 2 * keys, 2 * queries + 5 * keys))


__all__ = ["LlamaShape"]

"""A GPT-2's sizes and the names of its tensors. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ModelError
from ..model_shape import ModelShape, whole_sizes

_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
"""What the rest of transformers calls GPT-2's fields; its config.json may have either."""


@dataclass(frozen=True)
class GPT2Shape(ModelShape):
    """GPT-2 with its language-model head. Positions are a learned table, projections Conv1D: (in, out), with biases."""

    tied_embeddings: bool = True

    model_type = "gpt2"
    title = "GPT-2"
    hedgehog_title = "Hedgehog-GPT-2"
    attention_modules = ("c_attn", "attn.c_proj")
    lora_modules = (*attention_modules, "c_fc", "mlp.c_proj")
    linears_are_transposed = True
    positions_are_a_table = True
    tiny_positions: ClassVar[int] = 1024
    layer_prefix = "transformer.h."
    decoder_prefix = "transformer"

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> GPT2Shape:
        sizes: dict[str, Any] = {name: fields.get(own, fields.get(name)) for name, own in _NAMES.items()}
        whole_sizes({own: sizes[name] for name, own in _NAMES.items()}, tuple(_NAMES.values()))
        whole_sizes(fields, ("vocab_size",) if fields.get("n_inner") is None else ("vocab_size", "n_inner"))
        hidden, num_heads = sizes["hidden_size"], sizes["num_attention_heads"]
        if hidden % num_heads:
            raise ModelError(f"config.json has n_embd {hidden}, no multiple of n_head {num_heads}")
        if fields.get("add_cross_attention"):
            raise ModelError("config.json has add_cross_attention: only a GPT-2 by itself can be converted, no decoder")
        return cls(
            hidden_size=hidden,
            num_layers=sizes["num_hidden_layers"],
            num_heads=num_heads,
            num_key_value_heads=num_heads,
            head_dim=hidden // num_heads,
            intermediate_size=4 * hidden if fields.get("n_inner") is None else fields["n_inner"],
            vocab_size=fields["vocab_size"],
            max_length_tokens=sizes["max_position_embeddings"],
            tied_embeddings=bool(fields.get("tie_word_embeddings", True)),
        )

    @classmethod
    def hub_shapes(cls) -> dict[str, ModelShape]:
        def shape(width: int, depth: int, heads: int) -> GPT2Shape:
            return cls(width, depth, heads, heads, width // heads, 4 * width, 50257, 1024)

        sizes = {
            "gpt2": shape(768, 12, 12),
            "gpt2-medium": shape(1024, 24, 16),
            "gpt2-large": shape(1280, 36, 20),
            "gpt2-xl": shape(1600, 48, 25),
        }
        shapes: dict[str, ModelShape] = {}
        for name, its in sizes.items():
            shapes[name] = shapes[f"openai-community/{name}"] = its
        shapes["distilgpt2"] = shapes["distilbert/distilgpt2"] = shape(768, 6, 12)
        return shapes

    @classmethod
    def attention_dropout(cls, fields: Mapping[str, Any]) -> float:
        return 0  # GPT-2 was trained with attn_pdrop 0.1; the converted model's is 0

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        hidden, mlp = self.hidden_size, self.intermediate_size
        return {
            "c_attn": (hidden, 3 * hidden),
            "attn.c_proj": (hidden, hidden),
            "c_fc": (hidden, mlp),
            "mlp.c_proj": (mlp, hidden),
        }

    @property
    def num_other_weights(self) -> int:
        tables = self.vocab_size * (1 if self.tied_embeddings else 2) + (self.max_length_tokens or 0)
        biases = sum(outputs for _, outputs in self.linears.values())
        return (tables + 2) * self.hidden_size + self.num_layers * (4 * self.hidden_size + biases)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "transformer.wte.weight": (self.vocab_size, hidden),
            "transformer.wpe.weight": (self.max_length_tokens or 0, hidden),
        }
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        norms = ["transformer.ln_f"]
        for layer in range(self.num_layers):
            prefix = f"{self.layer_prefix}{layer}"
            norms += [f"{prefix}.ln_1", f"{prefix}.ln_2"]
            for name, (inputs, outputs) in self.linears.items():
                place = {"c_attn": "attn.c_attn", "c_fc": "mlp.c_fc"}.get(name, name)
                shapes[f"{prefix}.{place}.weight"] = (inputs, outputs)
                shapes[f"{prefix}.{place}.bias"] = (outputs,)
        for norm in norms:
            shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (hidden,)
        return shapes

    def saved_by_norms(self, p: int) -> tuple[str, float]:
        return "norms 2Ep, dropout 2E", (2.0 * p + 2) * self.hidden_size

    def saved_by_mlp(self, p: int) -> tuple[str, float]:
        return "MLP Ip", 1.0 * self.intermediate_size * p

    def mlp_at_once(self, p: int) -> tuple[str, float]:
        return "2Ip", 2.0 * self.intermediate_size * p

    def positions_at_once(self, p: int) -> tuple[str, float]:
        return "0", 0.0

    def heads_at_once(self, p: int) -> tuple[str, float]:
        return "4Ep", 4.0 * self.hidden_size * p


__all__ = ["GPT2Shape"]

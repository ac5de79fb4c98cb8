"""A BERT's sizes and the names of its tensors. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ModelError
from ..model_shape import ModelShape, whole_sizes

_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""What the oldest checkpoints call a norm's weights; transformers renames them as it loads."""


@dataclass(frozen=True)
class BertShape(ModelShape):
    """BERT without its head. Positions are a learned table, every linear module has a bias."""

    type_vocab_size: int = 2

    model_type = "bert"
    title = "BERT"
    hedgehog_title = "Hedgehog-BERT"
    is_encoder = True
    head_modules = ("bert.pooler.dense", "classifier")
    attention_modules = ("query", "key", "value", "attention.output.dense")
    lora_modules = (*attention_modules, "intermediate.dense")
    same_input = (("query", "key", "value"),)
    positions_are_a_table = True
    tiny_positions: ClassVar[int] = 512
    layer_prefix = "bert.encoder.layer."
    decoder_prefix = "bert"

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> BertShape:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        whole_sizes(fields, (*names, "max_position_embeddings"))
        hidden, num_heads = fields["hidden_size"], fields["num_attention_heads"]
        if hidden % num_heads:
            raise ModelError(f"config.json has hidden_size {hidden}, no multiple of num_attention_heads {num_heads}")
        positions = fields.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise ModelError(
                f"config.json has position_embedding_type {positions!r}: transformers no longer reads such a BERT; "
                "only one with absolute positions can be converted"
            )
        for name in ("is_decoder", "add_cross_attention"):
            if fields.get(name):
                raise ModelError(f"config.json has {name}: only a BERT that reads whole texts can be converted")
        return cls(
            hidden_size=hidden,
            num_layers=fields["num_hidden_layers"],
            num_heads=num_heads,
            num_key_value_heads=num_heads,
            head_dim=hidden // num_heads,
            intermediate_size=fields["intermediate_size"],
            vocab_size=fields["vocab_size"],
            max_length_tokens=fields["max_position_embeddings"],
            type_vocab_size=fields.get("type_vocab_size", 2),
        )

    @classmethod
    def hub_shapes(cls) -> dict[str, ModelShape]:
        def shape(width: int, depth: int, heads: int, vocab_size: int) -> BertShape:
            return cls(width, depth, heads, heads, width // heads, 4 * width, vocab_size, 512)

        sizes = {
            "bert-base-uncased": shape(768, 12, 12, 30522),
            "bert-base-cased": shape(768, 12, 12, 28996),
            "bert-large-uncased": shape(1024, 24, 16, 30522),
            "bert-large-cased": shape(1024, 24, 16, 28996),
        }
        shapes: dict[str, ModelShape] = {}
        for name, its in sizes.items():
            shapes[name] = shapes[f"google-bert/{name}"] = its
        return shapes

    @classmethod
    def attention_dropout(cls, fields: Mapping[str, Any]) -> float:
        return 0  # BERT was trained with attention_probs_dropout_prob 0.1; the converted model's is 0

    @classmethod
    def tensor_name(cls, name: str) -> str:
        for old, new in _NORMS.items():
            name = name.replace(old, new)
        return name

    @property
    def num_token_types(self) -> int:
        return self.type_vocab_size

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        hidden, mlp = self.hidden_size, self.intermediate_size
        square = {name: (hidden, hidden) for name in self.attention_modules}
        return {**square, "intermediate.dense": (hidden, mlp), "output.dense": (mlp, hidden)}

    @property
    def num_other_weights(self) -> int:
        hidden = self.hidden_size
        tables = (self.vocab_size + (self.max_length_tokens or 0) + self.type_vocab_size + 2) * hidden
        pooler = hidden * hidden + hidden
        biases = sum(outputs for _, outputs in self.linears.values())
        return tables + pooler + self.num_layers * (4 * hidden + biases)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """All but those of the head (pooler and classifier), which a model that was only pretrained may lack."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "bert.embeddings.word_embeddings.weight": (self.vocab_size, hidden),
            "bert.embeddings.position_embeddings.weight": (self.max_length_tokens or 0, hidden),
            "bert.embeddings.token_type_embeddings.weight": (self.type_vocab_size, hidden),
        }
        norms = ["bert.embeddings.LayerNorm"]
        for layer in range(self.num_layers):
            prefix = f"{self.layer_prefix}{layer}"
            norms += [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
            for name, (inputs, outputs) in self.linears.items():
                place = f"attention.self.{name}" if name in ("query", "key", "value") else name
                shapes[f"{prefix}.{place}.weight"] = (outputs, inputs)
                shapes[f"{prefix}.{place}.bias"] = (outputs,)
        for norm in norms:
            shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (hidden,)
        return shapes

    def saved_by_norms(self, p: int) -> tuple[str, float]:
        return "norms and dropout 4Ep", 4.0 * p * self.hidden_size  # a GPU's dropout keeps a byte instead of p

    def saved_by_mlp(self, p: int) -> tuple[str, float]:
        return "MLP Ip", 1.0 * self.intermediate_size * p

    def mlp_at_once(self, p: int) -> tuple[str, float]:
        return "2Ip", 2.0 * self.intermediate_size * p

    def positions_at_once(self, p: int) -> tuple[str, float]:
        return "0", 0.0

    def heads_at_once(self, p: int) -> tuple[str, float]:
        return "4Ep", 4.0 * self.hidden_size * p


__all__ = ["BertShape"]

"""BERT for conversion and distillation: its classes, modules and the steps of its softmax forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import BertConfig, BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertLayer, BertModel

from ..modeling.architecture import SMALL_MODELS_INITIAL, Architecture
from . import configuration_hedgehog_bert, modeling_hedgehog_bert
from .configuration_hedgehog_bert import HedgehogBertConfig
from .modeling_hedgehog_bert import HedgehogBertForSequenceClassification
from .shape import BertShape

if TYPE_CHECKING:
    from ..config import TinyConfig


class BertArchitecture(Architecture):
    base_class = BertForSequenceClassification
    base_config_class = BertConfig
    hedgehog_class = HedgehogBertForSequenceClassification
    config_class = HedgehogBertConfig
    auto_map = {
        "AutoConfig": "configuration_hedgehog_bert.HedgehogBertConfig",
        "AutoModel": "modeling_hedgehog_bert.HedgehogBertModel",
        "AutoModelForSequenceClassification": "modeling_hedgehog_bert.HedgehogBertForSequenceClassification",
    }
    modeling_files = (configuration_hedgehog_bert, modeling_hedgehog_bert)
    of_model = ("classifier",)
    of_decoder = ("embeddings", "pooler")
    of_layer = ("attention.output", "intermediate", "output")
    of_attention = ("query", "key", "value")
    layers_name = "encoder.layer"
    attention_name = "attention.self"

    def config_fields(self) -> dict[str, Any]:
        # Google's checkpoints have 0.1. Linear attention forms no weights that could be dropped, and softmax attention
        # is its baseline.
        return {"attention_probs_dropout_prob": 0.0}

    def tiny_config(self, tiny: TinyConfig) -> BertConfig:
        return BertConfig(
            vocab_size=tiny.vocab_size,
            hidden_size=tiny.hidden_size,
            num_hidden_layers=tiny.num_layers,
            num_attention_heads=tiny.num_heads,
            intermediate_size=tiny.intermediate_size,
            max_position_embeddings=BertShape.tiny_positions,
            initializer_range=SMALL_MODELS_INITIAL * tiny.hidden_size**-0.5,
            hidden_dropout_prob=0.0,  # the corpus never repeats: there is nothing to regularize
            attention_probs_dropout_prob=0.0,
        )

    def embed(
        self,
        decoder: BertModel,
        input_ids_BL: torch.Tensor,
        position_ids_BL: torch.Tensor,
        token_type_ids_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        types = torch.zeros_like(input_ids_BL) if token_type_ids_BL is None else token_type_ids_BL
        return decoder.embeddings(input_ids=input_ids_BL, token_type_ids=types, position_ids=position_ids_BL)

    def heads(
        self, layer: BertLayer, hidden_BLE: torch.Tensor, positions: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention = layer.attention.self
        B, L = hidden_BLE.shape[:2]
        q_BHLD, k_BHLD, v_BHLV = (
            project(hidden_BLE).view(B, L, -1, attention.attention_head_size).transpose(1, 2)
            for project in (attention.query, attention.key, attention.value)
        )
        return q_BHLD, k_BHLD, v_BHLV

    def scale(self, layer: BertLayer) -> float:
        return layer.attention.self.attention_head_size**-0.5

    def after_attention(self, layer: BertLayer, hidden_BLE: torch.Tensor, o_BLE: torch.Tensor) -> torch.Tensor:
        return layer.attention.output(o_BLE, hidden_BLE)

    def after_mlp(self, layer: BertLayer, hidden_BLE: torch.Tensor) -> torch.Tensor:
        return layer.output(layer.intermediate(hidden_BLE), hidden_BLE)


ARCHITECTURE = BertArchitecture()

__all__ = ["ARCHITECTURE", "BertArchitecture"]

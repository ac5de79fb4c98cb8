"""Llama for conversion and distillation: its classes, modules and the steps of its softmax forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel, apply_rotary_pos_emb

from ..modeling.architecture import SMALL_MODELS_INITIAL, Architecture
from . import configuration_hedgehog_llama, modeling_hedgehog_llama
from .configuration_hedgehog_llama import HedgehogLlamaConfig
from .modeling_hedgehog_llama import HedgehogLlamaForCausalLM, HedgehogLlamaRotaryEmbedding

if TYPE_CHECKING:
    from ..config import TinyConfig


class LlamaArchitecture(Architecture):
    base_class = LlamaForCausalLM
    base_config_class = LlamaConfig
    hedgehog_class = HedgehogLlamaForCausalLM
    config_class = HedgehogLlamaConfig
    auto_map = {
        "AutoConfig": "configuration_hedgehog_llama.HedgehogLlamaConfig",
        "AutoModel": "modeling_hedgehog_llama.HedgehogLlamaModel",
        "AutoModelForCausalLM": "modeling_hedgehog_llama.HedgehogLlamaForCausalLM",
    }
    modeling_files = (configuration_hedgehog_llama, modeling_hedgehog_llama)
    of_decoder = ("embed_tokens", "norm")
    of_layer = ("mlp", "input_layernorm", "post_attention_layernorm")
    of_attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    layers_name = "layers"
    attention_name = "self_attn"

    def complete(self, model: Any) -> None:
        decoder = cast(LlamaModel, model.model)
        decoder.rotary_emb = HedgehogLlamaRotaryEmbedding(model.config).to(decoder.norm.weight.device)

    def tiny_config(self, tiny: TinyConfig) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=tiny.vocab_size,
            hidden_size=tiny.hidden_size,
            intermediate_size=tiny.intermediate_size,
            num_hidden_layers=tiny.num_layers,
            num_attention_heads=tiny.num_heads,
            num_key_value_heads=tiny.num_key_value_heads,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=SMALL_MODELS_INITIAL * tiny.hidden_size**-0.5,
            tie_word_embeddings=True,
        )

    def embed(
        self,
        decoder: LlamaModel,
        input_ids_BL: torch.Tensor,
        position_ids_BL: torch.Tensor,
        token_type_ids_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return decoder.embed_tokens(input_ids_BL)

    def positions(self, decoder: LlamaModel, hidden_BLE: torch.Tensor, position_ids_BL: torch.Tensor) -> Any:
        return decoder.rotary_emb(hidden_BLE, position_ids=position_ids_BL)

    def heads(
        self, layer: LlamaDecoderLayer, hidden_BLE: torch.Tensor, positions: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention = layer.self_attn
        B, L = hidden_BLE.shape[:2]
        normed_BLE = layer.input_layernorm(hidden_BLE)
        q_BHLD = attention.q_proj(normed_BLE).view(B, L, -1, attention.head_dim).transpose(1, 2)
        k_BKLD = attention.k_proj(normed_BLE).view(B, L, -1, attention.head_dim).transpose(1, 2)
        v_BKLV = attention.v_proj(normed_BLE).view(B, L, -1, attention.head_dim).transpose(1, 2)
        del normed_BLE
        return *apply_rotary_pos_emb(q_BHLD, k_BKLD, *positions), v_BKLV

    def scale(self, layer: LlamaDecoderLayer) -> float:
        return layer.self_attn.scaling

    def after_attention(self, layer: LlamaDecoderLayer, hidden_BLE: torch.Tensor, o_BLE: torch.Tensor) -> torch.Tensor:
        return hidden_BLE + layer.self_attn.o_proj(o_BLE)

    def after_mlp(self, layer: LlamaDecoderLayer, hidden_BLE: torch.Tensor) -> torch.Tensor:
        return hidden_BLE + layer.mlp(layer.post_attention_layernorm(hidden_BLE))


ARCHITECTURE = LlamaArchitecture()

__all__ = ["ARCHITECTURE", "LlamaArchitecture"]

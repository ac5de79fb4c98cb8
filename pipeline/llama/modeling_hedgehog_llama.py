"""Hedgehog-Llama: Llama with every softmax attention replaced by learned linear attention.

Norms, MLP, RoPE (its scaling included), initialisation and losses are transformers' Llama. q and k reach the feature
maps after RoPE.

B batch, L length, H query heads, K key/value heads, D head dim, V value dim (= D). This file travels with every export.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers.generation.utils import GenerationMixin
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from ...kernels.backends import Backend
from ..modeling.hedgehog_attention import HedgehogAttention, keeping_float32
from ..modeling.hedgehog_cache import HedgehogCache, the_cache_given
from ..modeling.hedgehog_decoder import HedgehogCausalLM, HedgehogDecoder
from ..modeling.hedgehog_model import HedgehogPreTrainedModel
from .configuration_hedgehog_llama import HedgehogLlamaConfig


class HedgehogLlamaRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's RoPE whose frequencies stay fp32: .bfloat16(), which DeepSpeed calls, would spoil far positions."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        return super()._apply(keeping_float32(fn), recurse)

    def forward(self, *args, **kwargs):
        """As Llama's; but "dynamic" frequencies are those of this batch, whatever came before: transformers keeps those
        of the longest row that it has seen, and so a run that went on would differ from one that was never stopped."""
        if "dynamic" in str(self.rope_type):
            self.max_seq_len_cached = 0
        return super().forward(*args, **kwargs)


class HedgehogLlamaAttention(HedgehogAttention, LlamaAttention):
    """Linear attention with Llama's projections and RoPE."""

    config: HedgehogLlamaConfig

    def __init__(self, config: HedgehogLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.add_feature_maps()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: HedgehogCache | None = None,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        attention_backend: Backend | None = None,
        cache: HedgehogCache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states (B, L, hidden) → the same shape. attention_mask (B, L) bool, True for real tokens, or None."""
        B, L = hidden_states.shape[:2]
        q_BHLD = self.q_proj(hidden_states).view(B, L, -1, self.head_dim).transpose(1, 2)
        k_BKLD = self.k_proj(hidden_states).view(B, L, -1, self.head_dim).transpose(1, 2)
        v_BKLV = self.v_proj(hidden_states).view(B, L, -1, self.head_dim).transpose(1, 2)
        q_BHLD, k_BKLD = apply_rotary_pos_emb(q_BHLD, k_BKLD, *position_embeddings)
        o_BHLV = self.attend(
            q_BHLD,
            k_BKLD,
            v_BKLV,
            cache=cast("HedgehogCache | None", the_cache_given(past_key_values, cache)),
            mask_BL=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            backend=attention_backend,
        )
        return self.o_proj(o_BHLV.transpose(1, 2).reshape(B, L, -1)), None


class HedgehogLlamaDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer around the attention that the config asks for."""

    def __init__(self, config: HedgehogLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.attention == "linear":
            self.self_attn = HedgehogLlamaAttention(config, layer_idx)


class HedgehogLlamaPreTrainedModel(HedgehogPreTrainedModel, LlamaPreTrainedModel):
    config_class = HedgehogLlamaConfig
    config: HedgehogLlamaConfig
    _no_split_modules = ["HedgehogLlamaDecoderLayer"]


class HedgehogLlamaModel(HedgehogDecoder, HedgehogLlamaPreTrainedModel):
    """The decoder stack: see HedgehogDecoder for its arguments."""

    def __init__(self, config: HedgehogLlamaConfig) -> None:
        config.check_hedgehog_fields()
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([HedgehogLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = HedgehogLlamaRotaryEmbedding(config=config)
        self.begin()

    def decoder_layers(self) -> nn.ModuleList:
        return self.layers

    def attention_of(self, layer: nn.Module) -> nn.Module:
        return cast(HedgehogLlamaDecoderLayer, layer).self_attn

    def enter(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        return inputs_embeds, {"position_embeddings": self.rotary_emb(inputs_embeds, position_ids=position_ids)}

    def leave(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden_states)


class HedgehogLlamaForCausalLM(HedgehogCausalLM, HedgehogLlamaPreTrainedModel, GenerationMixin):
    """Hedgehog-Llama with its language-model head: see HedgehogCausalLM."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HedgehogLlamaConfig) -> None:
        super().__init__(config)
        self.model = HedgehogLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.begin()


__all__ = ["HedgehogLlamaForCausalLM", "HedgehogLlamaModel", "HedgehogLlamaPreTrainedModel"]

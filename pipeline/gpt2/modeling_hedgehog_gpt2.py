"""Hedgehog-GPT-2: GPT-2 with every softmax attention replaced by learned linear attention.

Norms, MLP, the table of positions, dropout, initialisation and losses are transformers' GPT-2. q and k reach the
feature maps as c_attn gives them: positions are in the hidden states already.

B batch, L length, H heads, D head dim, V value dim (= D). This file travels with every export.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.generation.utils import GenerationMixin
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block, GPT2PreTrainedModel

from ...kernels.backends import Backend
from ..modeling.hedgehog_attention import HedgehogAttention
from ..modeling.hedgehog_cache import HedgehogCache, the_cache_given
from ..modeling.hedgehog_decoder import HedgehogCausalLM, HedgehogDecoder
from ..modeling.hedgehog_model import HedgehogPreTrainedModel
from .configuration_hedgehog_gpt2 import HedgehogGPT2Config


class HedgehogGPT2Attention(HedgehogAttention, GPT2Attention):
    """Linear attention with GPT-2's projections."""

    config: HedgehogGPT2Config

    def __init__(self, config: HedgehogGPT2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.add_feature_maps()

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: HedgehogCache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        attention_backend: Backend | None = None,
        cache: HedgehogCache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states (B, L, hidden) → the same shape. attention_mask (B, L) bool, True for real tokens, or None."""
        B, L = hidden_states.shape[:2]
        q_BHLD, k_BHLD, v_BHLV = (
            x.view(B, L, -1, self.head_dim).transpose(1, 2)
            for x in self.c_attn(hidden_states).split(self.split_size, dim=2)
        )
        o_BHLV = self.attend(
            q_BHLD,
            k_BHLD,
            v_BHLV,
            cache=cast("HedgehogCache | None", the_cache_given(past_key_values, cache)),
            mask_BL=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            backend=attention_backend,
        )
        return self.resid_dropout(self.c_proj(o_BHLV.transpose(1, 2).reshape(B, L, -1))), None


class HedgehogGPT2Block(GPT2Block):
    """GPT-2's block around the attention that the config asks for."""

    def __init__(self, config: HedgehogGPT2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.attention == "linear":
            self.attn = HedgehogGPT2Attention(config, layer_idx)


class HedgehogGPT2PreTrainedModel(HedgehogPreTrainedModel, GPT2PreTrainedModel):
    config_class = HedgehogGPT2Config
    config: HedgehogGPT2Config
    _no_split_modules = ["HedgehogGPT2Block"]


class HedgehogGPT2Model(HedgehogDecoder, HedgehogGPT2PreTrainedModel):
    """The decoder stack: see HedgehogDecoder for its arguments.

    ValueError for more tokens than the `n_positions` that there are; on a CPU also for a position given beyond them.
    """

    unread_arguments = ("token_type_ids", "encoder_hidden_states", "encoder_attention_mask")

    def __init__(self, config: HedgehogGPT2Config) -> None:
        config.check_hedgehog_fields()
        super().__init__(config)
        self.embed_dim = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([HedgehogGPT2Block(config, i) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.begin()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    def decoder_layers(self) -> nn.ModuleList:
        return self.h

    def attention_of(self, layer: nn.Module) -> nn.Module:
        return cast(GPT2Block, layer).attn

    def num_positions(self) -> int:
        return self.config.n_positions

    def enter(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        return self.drop(inputs_embeds + self.wpe(position_ids)), {}

    def leave(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.ln_f(hidden_states)


class HedgehogGPT2LMHeadModel(HedgehogCausalLM, HedgehogGPT2PreTrainedModel, GenerationMixin):
    """Hedgehog-GPT-2 with its language-model head: see HedgehogCausalLM."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: HedgehogGPT2Config) -> None:
        super().__init__(config)
        self.transformer = HedgehogGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.begin()


__all__ = ["HedgehogGPT2LMHeadModel", "HedgehogGPT2Model", "HedgehogGPT2PreTrainedModel"]

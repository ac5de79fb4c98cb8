"""Hedgehog-BERT: BERT with every softmax attention replaced by learned linear attention, each token seeing all others.

    y_i = Σ_j (φ(q_i)·φ(k_j)) v_j / Σ_j φ(q_i)·φ(k_j)        over all real tokens j

Embeddings, norms, MLP, pooler, head, dropout, initialisation and losses are transformers' BERT. With
config.attention = "softmax" the model is that BERT, under the same names.

B batch, L length, H heads, D head dim, V value dim (= D). This file travels with every export.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertEncoder,
    BertForSequenceClassification,
    BertLayer,
    BertModel,
    BertPooler,
    BertPreTrainedModel,
    BertSelfAttention,
)

from ..modeling.hedgehog_attention import HedgehogAttention
from ..modeling.hedgehog_model import HedgehogPreTrainedModel, as_a_dataclass
from .configuration_hedgehog_bert import HedgehogBertConfig

logger = logging.getLogger(__name__)


class HedgehogBertSelfAttention(HedgehogAttention, BertSelfAttention):
    """Linear attention with BERT's projections."""

    config: HedgehogBertConfig

    def __init__(self, config: HedgehogBertConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.head_dim = self.attention_head_size
        self.add_feature_maps()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states (B, L, hidden) → the same shape. attention_mask (B, L) bool, True for real tokens, or None."""
        B, L = hidden_states.shape[:2]
        q_BHLD, k_BHLD, v_BHLV = (
            project(hidden_states).view(B, L, -1, self.head_dim).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        o_BHLV = self.attend_bidirectional(q_BHLD, k_BHLD, v_BHLV, mask_BL=attention_mask, position_ids=position_ids)
        return o_BHLV.transpose(1, 2).reshape(B, L, -1), None


class HedgehogBertPreTrainedModel(HedgehogPreTrainedModel, BertPreTrainedModel):
    config_class = HedgehogBertConfig
    config: HedgehogBertConfig
    _no_split_modules = ["BertEmbeddings", "BertLayer"]


class HedgehogBertModel(HedgehogBertPreTrainedModel, BertModel):
    """The encoder, with its pooler: token ids → hidden states (B, L, hidden) and the pooled first one (B, hidden)."""

    def __init__(self, config: HedgehogBertConfig, add_pooling_layer: bool = True) -> None:
        config.check_hedgehog_fields()
        BertPreTrainedModel.__init__(self, config)
        self.gradient_checkpointing = False
        self.report: Callable[[str], None] = logger.info
        """Told once which implementation of linear attention runs."""
        self._has_reported = False
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        if config.attention == "linear":
            for index, layer in enumerate(self.encoder.layer):
                cast(Any, layer).attention.self = HedgehogBertSelfAttention(config, index)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def attentions(self) -> Iterator[nn.Module]:
        """The attention modules, in the order of the layers."""
        return (cast(BertLayer, layer).attention.self for layer in self.encoder.layer)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (transformers' has a decorator of its own)
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple:
        """`attention_mask` (B, L), 1 for real tokens; padding may stand anywhere. ValueError for what does not fit."""
        for name in ("encoder_hidden_states", "encoder_attention_mask", "past_key_values"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name}: a converted BERT reads whole texts; leave it out")
        wants_attentions = kwargs.pop("output_attentions", None)
        if self.config.output_attentions if wants_attentions is None else wants_attentions:
            raise ValueError("output_attentions: attention weights are never formed here; use hidden states or logits")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        tokens = cast(torch.Tensor, input_ids if inputs_embeds is None else inputs_embeds)
        B, L = tokens.shape[:2]
        if self.config.max_position_embeddings < L and position_ids is None:
            raise ValueError(
                f"{L} tokens, and this model's table of positions ends at {self.config.max_position_embeddings - 1}: "
                "give it shorter rows"
            )
        if attention_mask is not None and attention_mask.shape != (B, L):
            raise ValueError(f"attention_mask {tuple(attention_mask.shape)} must be (B, L) = {(B, L)}")
        hidden_states = self.embeddings(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        mask, of_positions = self._attention_inputs(hidden_states, attention_mask, position_ids)
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        all_hidden_states = [hidden_states]
        for layer in self.encoder.layer:
            hidden_states = layer(hidden_states, mask, **of_positions)
            all_hidden_states.append(hidden_states)
        result = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states,
            pooler_output=None if self.pooler is None else self.pooler(hidden_states),
            hidden_states=tuple(all_hidden_states) if wants_states else None,
        )
        return result if as_a_dataclass(return_dict, self.config) else result.to_tuple()

    def _attention_inputs(
        self, hidden_states: torch.Tensor, mask_BL: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """The mask as this model's attention reads it, and what it is told of positions."""
        if mask_BL is not None:
            mask_BL = mask_BL.to(hidden_states.device, torch.bool)
        if self.config.attention == "softmax":
            mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=mask_BL)
            return mask, {}
        if not self._has_reported and not torch.compiler.is_compiling():
            self._has_reported = True
            self.report("linear attention: torch (an encoder's is two matrix products, linear in length)")
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        return mask_BL, {"position_ids": position_ids.expand(hidden_states.shape[:2])}


class HedgehogBertForSequenceClassification(HedgehogBertPreTrainedModel, BertForSequenceClassification):
    """Hedgehog-BERT that tells the class of a text or of a pair; arguments, logits and losses as BERT's."""

    def __init__(self, config: HedgehogBertConfig) -> None:
        BertPreTrainedModel.__init__(self, config)
        self.num_labels = num_labels = cast(int, config.num_labels)
        self.bert = HedgehogBertModel(config)
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(rate)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        self.post_init()


__all__ = ["HedgehogBertForSequenceClassification", "HedgehogBertModel", "HedgehogBertPreTrainedModel"]

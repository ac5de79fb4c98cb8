"""Configuration of Hedgehog-BERT: a BERT whose attention is learned linear attention.

This file travels with every export, so it imports nothing but transformers and the files that travel with it.
"""

from __future__ import annotations

from transformers import BertConfig

from ..modeling.hedgehog_fields import HedgehogFields


class HedgehogBertConfig(HedgehogFields, BertConfig):
    """BertConfig plus what replaces softmax attention: see HedgehogFields, also for the errors.

    `attention_probs_dropout_prob` is 0 unless it is given.
    """

    model_type = "hedgehog_bert"
    dropout_field = "attention_probs_dropout_prob"

    attention_probs_dropout_prob: float | int = 0.0

    @property
    def head_dim(self) -> int:
        """Numbers in a query or key."""
        return self.hidden_size // self.num_attention_heads

    def check_hedgehog_fields(self) -> None:
        super().check_hedgehog_fields()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        for name in ("is_decoder", "add_cross_attention"):
            if getattr(self, name):
                raise ValueError(f"{name}: a converted BERT reads whole texts; set it to false")


__all__ = ["HedgehogBertConfig"]

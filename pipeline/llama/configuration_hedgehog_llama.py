"""Configuration of Hedgehog-Llama: a Llama whose attention is learned linear attention.

This file travels with every export, so it imports nothing but transformers and the files that travel with it.
"""

from __future__ import annotations

from transformers import LlamaConfig

from ..modeling.hedgehog_fields import HedgehogFields


class HedgehogLlamaConfig(HedgehogFields, LlamaConfig):
    """LlamaConfig plus what replaces softmax attention: see HedgehogFields, also for the errors."""

    model_type = "hedgehog_llama"
    dropout_field = "attention_dropout"

    def check_hedgehog_fields(self) -> None:
        super().check_hedgehog_fields()
        if self.num_key_value_heads is None or self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )


__all__ = ["HedgehogLlamaConfig"]

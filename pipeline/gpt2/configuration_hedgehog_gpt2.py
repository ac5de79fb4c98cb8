"""Configuration of Hedgehog-GPT-2: a GPT-2 whose attention is learned linear attention.

This file travels with every export, so it imports nothing but transformers and the files that travel with it.
"""

from __future__ import annotations

from transformers import GPT2Config

from ..modeling.hedgehog_fields import HedgehogFields


class HedgehogGPT2Config(HedgehogFields, GPT2Config):
    """GPT2Config plus what replaces softmax attention: see HedgehogFields, also for the errors.

    `attn_pdrop` is 0 unless it is given; `scale_attn_weights` and its kin are softmax attention's alone.
    """

    model_type = "hedgehog_gpt2"
    dropout_field = "attn_pdrop"

    attn_pdrop: float | int = 0.0

    @property
    def head_dim(self) -> int:
        """Numbers in a query or key."""
        return self.n_embd // self.n_head

    def check_hedgehog_fields(self) -> None:
        super().check_hedgehog_fields()
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.add_cross_attention:
            raise ValueError("add_cross_attention: a converted GPT-2 attends to its own tokens only; set it to false")


__all__ = ["HedgehogGPT2Config"]

"""GPT-2 for conversion and distillation: its classes, modules and the steps of its softmax forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2Model

from ..modeling.architecture import SMALL_MODELS_INITIAL, Architecture
from . import configuration_hedgehog_gpt2, modeling_hedgehog_gpt2
from .configuration_hedgehog_gpt2 import HedgehogGPT2Config
from .modeling_hedgehog_gpt2 import HedgehogGPT2LMHeadModel
from .shape import GPT2Shape

if TYPE_CHECKING:
    from ..config import TinyConfig


class GPT2Architecture(Architecture):
    base_class = GPT2LMHeadModel
    base_config_class = GPT2Config
    hedgehog_class = HedgehogGPT2LMHeadModel
    config_class = HedgehogGPT2Config
    auto_map = {
        "AutoConfig": "configuration_hedgehog_gpt2.HedgehogGPT2Config",
        "AutoModel": "modeling_hedgehog_gpt2.HedgehogGPT2Model",
        "AutoModelForCausalLM": "modeling_hedgehog_gpt2.HedgehogGPT2LMHeadModel",
    }
    modeling_files = (configuration_hedgehog_gpt2, modeling_hedgehog_gpt2)
    of_decoder = ("wte", "wpe", "ln_f")
    of_layer = ("mlp", "ln_1", "ln_2")
    of_attention = ("c_attn", "c_proj")
    layers_name = "h"
    attention_name = "attn"

    def config_fields(self) -> dict[str, Any]:
        # OpenAI's checkpoints have 0.1. Linear attention forms no weights that could be dropped, and softmax attention
        # is its baseline; with dropout torch's CPU attention would also form T x T weights.
        return {"attn_pdrop": 0.0}

    def loaded(self, base: Any) -> None:
        """GPT-2's activation in one operation: gelu_new is the same function in eight, four results of which training
        keeps, and each of which bfloat16 rounds."""
        if base.config.activation_function == "gelu_new":
            base.config.activation_function = "gelu_pytorch_tanh"
            for block in base.transformer.h:
                block.mlp.act = ACT2FN["gelu_pytorch_tanh"]

    def tiny_config(self, tiny: TinyConfig) -> GPT2Config:
        return GPT2Config(
            vocab_size=tiny.vocab_size,
            n_embd=tiny.hidden_size,
            n_inner=tiny.intermediate_size,
            n_layer=tiny.num_layers,
            n_head=tiny.num_heads,
            n_positions=GPT2Shape.tiny_positions,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=SMALL_MODELS_INITIAL * tiny.hidden_size**-0.5,
            resid_pdrop=0.0,  # the corpus never repeats: there is nothing to regularize
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )

    def embed(
        self,
        decoder: GPT2Model,
        input_ids_BL: torch.Tensor,
        position_ids_BL: torch.Tensor,
        token_type_ids_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return decoder.wte(input_ids_BL) + decoder.wpe(position_ids_BL)

    def heads(
        self, layer: GPT2Block, hidden_BLE: torch.Tensor, positions: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention = layer.attn
        B, L = hidden_BLE.shape[:2]
        q_BHLD, k_BHLD, v_BHLV = (
            x.view(B, L, -1, attention.head_dim).transpose(1, 2)
            for x in attention.c_attn(layer.ln_1(hidden_BLE)).split(attention.split_size, dim=2)
        )
        return q_BHLD, k_BHLD, v_BHLV

    def scale(self, layer: GPT2Block) -> float:
        return layer.attn.scaling

    def after_attention(self, layer: GPT2Block, hidden_BLE: torch.Tensor, o_BLE: torch.Tensor) -> torch.Tensor:
        return hidden_BLE + layer.attn.c_proj(o_BLE)

    def after_mlp(self, layer: GPT2Block, hidden_BLE: torch.Tensor) -> torch.Tensor:
        return hidden_BLE + layer.mlp(layer.ln_2(hidden_BLE))


ARCHITECTURE = GPT2Architecture()

__all__ = ["ARCHITECTURE", "GPT2Architecture"]

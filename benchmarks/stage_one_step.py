"""One optimizer step of stage one on a Llama of dialogue-llama-20m's shape (random weights), for `bench.py`.

The step is the pipeline's own: teacher pass, a loss and a gradient per layer, AdamW. Only the implementation of the
attention loss differs: in tiles, or materialised and differentiated by autograd.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
}
FEATURE_DIM = 64  # F = 128


def stage_one_step(length: int, *, materialised: bool, num_layers: int | None = None) -> Callable[[], torch.Tensor]:
    """A function that does a step on one sequence of `length` tokens, float32, and returns its loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hedgehog.kernels.distill_backends import DistillBackend
    from hedgehog.kernels.distill_loss import materialised_distillation_loss
    from hedgehog.pipeline.config import DistillConfig
    from hedgehog.pipeline.distillation import FeatureMapDistillation, Teacher
    from hedgehog.pipeline.modeling.convert import convert_base

    class Materialised(FeatureMapDistillation):
        def _backend(self, seen: Any) -> DistillBackend:
            def loss(
                *inputs: Any, grad: bool, block_size: int, log_sum_exp_BHL: Any, visibility: Any, **options: Any
            ) -> Any:
                return materialised_distillation_loss(*inputs, **options)

            return DistillBackend("materialised", "for comparison", loss)

    shape: dict[str, Any] = dict(SHAPE)
    shape["num_hidden_layers"] = num_layers or SHAPE["num_hidden_layers"]
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=max(2048, length)))
    hedgehog = convert_base(
        llama, attention="linear", feature_map="hedgehog_softmax", feature_dim=FEATURE_DIM, feature_map_seed=0
    )
    layers = range(shape["num_hidden_layers"])
    kind = Materialised if materialised else FeatureMapDistillation
    module = kind(hedgehog, Teacher(llama, layers), layers, DistillConfig())
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    batch = {
        "input_ids": torch.randint(0, shape["vocab_size"], (1, length)),
        "mask": torch.ones(1, length, dtype=torch.bool),
        "position_ids": torch.arange(length)[None],
        "segment_ids": None,
        "real_tokens_in_global_batch": length,
    }

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss, _ = module(batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step

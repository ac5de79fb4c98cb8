"""The distillation loss of a module, apart from training: its units."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hedgehog.pipeline.config import DistillConfig
from hedgehog.pipeline.distillation import FeatureMapDistillation, Teacher
from hedgehog.pipeline.modeling.convert import convert_base


def small_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.3, **sizes))


LENGTH = 24
BATCH = {
    "input_ids": torch.randint(0, 64, (1, LENGTH), generator=torch.Generator().manual_seed(1)),
    "mask": torch.ones(1, LENGTH, dtype=torch.bool),
    "position_ids": torch.arange(LENGTH).unsqueeze(0),
    "segment_ids": torch.zeros(1, LENGTH, dtype=torch.long),
    "real_tokens_in_global_batch": LENGTH,
}


def output_distillation(llama: Any) -> FeatureMapDistillation:
    config = DistillConfig(output_mse_weight=1.0, cross_entropy_weight=0.0)
    hedgehog = convert_base(llama, attention="linear", feature_map="hedgehog_softmax")
    module = FeatureMapDistillation(hedgehog, Teacher(llama, (0, 1)), (0, 1), config)
    module.measure_output_variance(BATCH)
    return module


def test_training_lowers_the_output_error_of_every_layer() -> None:
    module = output_distillation(small_llama())
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss, shares = module(BATCH)
        loss.backward()
        optimizer.step()
        losses.append(shares["loss_L"])
    assert (losses[-1] < 0.9 * losses[0]).all(), losses
    assert (torch.stack(losses).diff(dim=0) < 0).all(), losses


def test_a_layers_output_error_is_counted_in_the_variance_of_its_own_output() -> None:
    """Values ten times as large in the second layer alone: its error is a hundred times as large, its loss the same."""
    losses, variances = [], []
    for factor in (1.0, 10.0):
        llama = small_llama()
        with torch.no_grad():
            llama.model.layers[1].self_attn.v_proj.weight *= factor
        module = output_distillation(llama)
        losses.append(module(BATCH)[1]["loss_L"].tolist())
        variances.append(module.output_variance)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert 0.01 < losses[0][0] < 2 and 0.01 < losses[0][1] < 2
    assert variances[1][1] == pytest.approx(100 * variances[0][1], rel=1e-4)
    assert variances[1][0] == variances[0][0] != variances[0][1]

"""The choice of an implementation and its reason."""

from __future__ import annotations

import pytest
import torch

from hedgehog.kernels.backends import select_attention_backend
from hedgehog.kernels.linear_attention import chunked_linear_attention


def select(requested):
    return select_attention_backend(
        requested, device=torch.device("cpu"), dtype=torch.bfloat16, num_features=256, value_dim=128
    )


def test_auto_falls_back_to_torch_and_says_why():
    backend = select("auto")
    assert backend.name == "torch" and backend.causal_attention is chunked_linear_attention
    assert backend.reason == "no compiled kernel for cpu, bfloat16, F=256, V=128"


def test_torch_on_request():
    assert select("torch").reason == "requested"


def test_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match="unknown attention backend 'cuda'; known: auto, torch"):
        select("cuda")

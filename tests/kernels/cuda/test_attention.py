"""The backend as the model uses it: selected by name, with its own choice of segments, against PyTorch's forms."""

from __future__ import annotations

import pytest
import torch

from hedgehog.kernels.backends import select_attention_backend
from hedgehog.kernels.cuda.attention import num_segments, num_splits
from hedgehog.kernels.linear_attention import chunked_linear_attention

from .problems import EPS, random_problem, rms


def emulated(feature_map: str):
    return select_attention_backend(
        "emulated", device="cpu", dtype=torch.bfloat16, num_features=128, value_dim=64, feature_map=feature_map
    )


def test_fused_where_the_kernel_has_the_map():
    assert emulated("hedgehog_softmax").reason == "requested; φ inside the kernel"
    assert emulated("relu").fused is None and emulated("relu").reason == "requested; φ outside the kernel"


def test_features_and_fused_give_what_pytorch_gives():
    problem = random_problem(150, heads=2)
    ids = torch.tensor([[0] * 60 + [1] * 90])
    shared = {"mask_BL": torch.ones(1, 150, dtype=torch.bool), "segment_ids_BL": ids, "initial_state": None}
    phi_q, phi_k = (phi.bfloat16() for phi in problem.features(torch.float32))
    expected, state = chunked_linear_attention(phi_q, phi_k, problem.v, eps=EPS, return_state=True, **shared)
    backend = emulated("hedgehog_softmax")
    on_features = backend.causal_attention(phi_q, phi_k, problem.v, eps=EPS, return_state=True, **shared)
    weights = problem.weight_q, problem.weight_k
    fused = backend.fused.attend(problem.q, problem.k, problem.v, weights, eps=EPS, return_state=True, **shared)
    for out, after in (on_features, fused):
        assert rms(out.float() - expected.float()) <= 2e-3
        assert rms(after.kv_state_BHFV - state.kv_state_BHFV) <= 2e-3 * rms(state.kv_state_BHFV)


@pytest.mark.parametrize("heads,segments,splits", [(1, 4, 4), (2, 2, 2), (4, 1, 1), (5, 1, 1)])
def test_blocks_fill_the_multiprocessors(heads, segments, splits):
    cpu = torch.device("cpu")  # counts as four
    assert (num_segments(cpu, 1, heads), num_splits(cpu, 1, heads)) == (segments, splits)

"""The operator's gradient (PyTorch's, for now) against autograd through the quadratic form in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hedgehog.kernels.cuda.operators import linear_attention
from hedgehog.kernels.linear_attention import quadratic_linear_attention

from .problems import EPS, random_problem, rms

LIMIT = 1e-2


@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "hedgehog_exp", "hedgehog_joint", "given"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(feature_map, packed):
    problem = random_problem(90, heads=4, kv_heads=2, batch=2, feature_map=feature_map)
    if packed:
        ids = torch.zeros(2, 90, dtype=torch.long)
        ids[0, 40:] = 1
        mask = torch.ones(2, 90, dtype=torch.bool)
        mask[1, :7] = False
        problem = replace(problem, segment_ids=ids, mask=mask)
    names = [name for name in ("q", "k", "v", "weight_q", "weight_k") if getattr(problem, name) is not None]
    ours = {name: getattr(problem, name).detach().clone().requires_grad_() for name in names}
    exact = {name: getattr(problem, name).detach().double().requires_grad_() for name in names}
    grad_out = torch.randn(problem.v.shape[0], 4, 90, 64, generator=torch.Generator().manual_seed(1)).bfloat16()

    out = replace(problem, **ours).run()[0]
    out.backward(grad_out)
    phi_q, phi_k = replace(problem, **exact).features()
    expected = quadratic_linear_attention(
        phi_q, phi_k, exact["v"], mask_BL=problem.mask, segment_ids_BL=problem.segment_ids, eps=EPS
    )
    expected.backward(grad_out.double())
    for name in names:
        assert ours[name].grad.dtype == ours[name].dtype
        assert rms(ours[name].grad - exact[name].grad) <= LIMIT * rms(exact[name].grad), name


def test_gradients_of_the_states():
    """d(sum of final state)/d(initial state) is one where nothing intervenes; a border cuts it."""
    problem = random_problem(70)
    start = torch.rand(1, 2, 128, 64), torch.rand(1, 2, 128)
    for runs, expected in ((None, 1.0), (torch.tensor([[0] * 30 + [1] * 40], dtype=torch.int32), 0.0)):
        kv, k_sum = (x.clone().requires_grad_() for x in start)
        weights = problem.weight_q, problem.weight_k
        results = linear_attention(
            problem.q, problem.k, problem.v, *weights, None, runs, kv, k_sum, "hedgehog_softmax", EPS, 1, True
        )
        (results[2].sum() + 3 * results[3].sum()).backward()
        assert torch.allclose(kv.grad, torch.full_like(kv, expected))
        assert torch.allclose(k_sum.grad, torch.full_like(k_sum, 3 * expected))

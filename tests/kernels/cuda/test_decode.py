"""The decoding kernel, emulated: token by token it gives what the whole sequence gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hedgehog.kernels.cuda import operators
from hedgehog.kernels.cuda.operators import linear_attention_token
from hedgehog.kernels.linear_attention import LinearAttentionState, recurrent_linear_attention_step

from .problems import EPS, random_problem, rms

SHAPES = [(64, 128), (64, 256), (128, 128), (128, 256)]
MAPS = ["hedgehog_softmax", "hedgehog_exp", "hedgehog_joint", "given"]


def step(problem, at, state, *, splits=1):
    """One token by the kernel; `state` is updated in place."""
    mask = None if problem.mask is None else problem.mask[:, at : at + 1]
    q, k, v = (x[:, :, at : at + 1] for x in (problem.q, problem.k, problem.v))
    weights = problem.weight_q, problem.weight_k
    states = state.kv_state_BHFV, state.k_sum_BHF
    return linear_attention_token(q, k, v, *weights, mask, *states, problem.feature_map, EPS, splits)


def empty_state(problem, head_dim, features):
    return LinearAttentionState.zeros(problem.q.shape[0], problem.q.shape[1], features, head_dim)


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize(("head_dim", "features"), SHAPES)
def test_one_token_is_pytorchs_step(splits, feature_map, head_dim, features):
    problem = random_problem(1, head_dim=head_dim, features=features, feature_map=feature_map, batch=2, heads=4)
    state = LinearAttentionState(torch.rand(2, 4, features, head_dim), torch.rand(2, 4, features))
    phi_q, phi_k = (phi.bfloat16()[:, :, 0] for phi in problem.features(torch.float32))
    expected, after = recurrent_linear_attention_step(phi_q, phi_k, problem.v[:, :, 0], state.clone(), eps=EPS)
    out = step(problem, 0, state, splits=splits)
    assert rms(out[:, :, 0] - expected) <= 4e-3 * rms(expected)
    assert rms(state.kv_state_BHFV - after.kv_state_BHFV) <= 1e-4 * rms(after.kv_state_BHFV)
    assert rms(state.k_sum_BHF - after.k_sum_BHF) <= 1e-4 * rms(after.k_sum_BHF)


@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "given"])
def test_prefill_then_decode_is_the_whole(feature_map):
    problem = random_problem(80, feature_map=feature_map)
    prefix, _, kv_state, k_sum = problem.cut(0, 70).run()
    state = LinearAttentionState(kv_state, k_sum)
    pieces = [prefix] + [step(problem, at, state, splits=2) for at in range(70, 80)]
    assert rms(torch.cat(pieces, dim=2) - problem.expected()) <= 2e-3
    arrivals = operators._ARRIVALS[k_sum]  # one for all tokens, which each leaves as it was
    step(problem, 79, state, splits=4)
    assert operators._ARRIVALS[k_sum] is arrivals and not arrivals.any()


def test_padding_leaves_the_state_alone():
    problem = random_problem(2, batch=2)
    problem = replace(problem, mask=torch.tensor([[True, False], [True, True]]))
    state = empty_state(problem, 64, 128)
    step(problem, 0, state)
    before = state.clone()
    step(problem, 1, state, splits=4)
    assert torch.equal(state.kv_state_BHFV[0], before.kv_state_BHFV[0])
    assert torch.equal(state.k_sum_BHF[0], before.k_sum_BHF[0])
    assert not torch.equal(state.k_sum_BHF[1], before.k_sum_BHF[1])


def test_a_row_that_saw_nothing_gives_zero():
    problem = replace(random_problem(1), mask=torch.zeros(1, 1, dtype=torch.bool))
    assert (step(problem, 0, empty_state(problem, 64, 128)) == 0).all()


def test_nan_comes_out_as_nan():
    problem = random_problem(1)
    q = problem.q.clone()
    q[0, 1, 0, 5] = float("nan")
    out = step(replace(problem, q=q), 0, empty_state(problem, 64, 128))
    assert torch.isnan(out[0, 1]).all() and not torch.isnan(out[0, 0]).any()


def test_what_does_not_fit_is_refused_with_words():
    problem = random_problem(2)
    state = empty_state(problem, 64, 128)
    with pytest.raises(ValueError, match="splits must be 1, 2 or 4, not 3"):
        step(problem, 0, state, splits=3)
    with pytest.raises(ValueError, match="contiguous"):
        turned = LinearAttentionState(state.kv_state_BHFV, torch.zeros(1, 128, 2).transpose(1, 2))
        step(problem, 0, turned)
    with pytest.raises(ValueError, match="one token at a time, not 2"):
        linear_attention_token(
            problem.q, problem.k, problem.v, problem.weight_q, problem.weight_k, None, state.kv_state_BHFV,
            state.k_sum_BHF, "hedgehog_softmax", EPS, 1,
        )  # fmt: skip

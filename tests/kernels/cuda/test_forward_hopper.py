"""The wgmma forward kernel, emulated, held to what the mma.sync kernel is held to; and the switch between the two."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from hedgehog.kernels.cuda import attention, forward_choice, library
from hedgehog.kernels.cuda.forward_choice import SWITCH, choose_forward
from hedgehog.kernels.cuda.switches import switched
from hedgehog.kernels.linear_attention import LinearAttentionState

from .problems import Problem, random_problem, rms
from .test_forward import RMS_LIMIT, check, padding


@pytest.fixture(autouse=True)
def wgmma(monkeypatch):
    """Asks for the kernel, and fails a test in which another ran."""
    monkeypatch.setenv(SWITCH, "wgmma")
    ran = []
    forward = library.Library.forward

    def watched(self, arguments):
        ran.append(arguments.kernel)
        forward(self, arguments)

    monkeypatch.setattr(library.Library, "forward", watched)
    yield ran
    assert set(ran) <= {1}


def wide_problem(length: int, **options) -> Problem:
    return random_problem(length, head_dim=128, **options)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("features", [128, 256])
def test_every_tail(length, features):
    check(wide_problem(length, features=features, seed=length))


@pytest.mark.parametrize("feature_map", ["hedgehog_exp", "hedgehog_joint"])
@pytest.mark.parametrize("features", [128, 256])
def test_every_fused_map(feature_map, features):
    check(wide_problem(70, features=features, feature_map=feature_map))


def test_grouped_heads_padding_and_segments():
    problem = replace(wide_problem(200, batch=2), mask=padding(200, left=70, right=5))
    check(problem)
    check(problem, segments=3)
    assert (problem.run()[0][0, :, :70] == 0).all()  # rows that see no key


def test_what_lies_under_padding_does_not_matter():
    problem = replace(wide_problem(100, batch=2), mask=padding(100, left=9, right=9))
    hidden = ~problem.mask[:, None, :, None]
    noisy = replace(problem, k=problem.k.masked_fill(hidden, float("nan")), v=problem.v.masked_fill(hidden, 7.0))
    real = problem.mask[:, None, :, None]
    assert torch.equal(problem.run()[0] * real, noisy.run()[0] * real)
    assert torch.equal(problem.run()[2], noisy.run()[2])


@pytest.mark.parametrize("borders", [[10], [64], [1, 2, 3, 63, 128]])
def test_packed_sequences(borders):
    ids = torch.zeros(2, 140, dtype=torch.long)
    for border in borders:
        ids[1, border:] += 1
    problem = replace(wide_problem(140, batch=2), segment_ids=ids, mask=padding(140, left=12, right=20))
    check(problem)
    check(problem, segments=2)


@pytest.mark.parametrize("features", [128, 256])
def test_packing_with_an_initial_state_is_what_mma_gives(features, wgmma):
    ids = torch.zeros(1, 330, dtype=torch.long)
    ids[0, 100:] = 1
    ids[0, 190:] = 2
    start = LinearAttentionState(torch.rand(1, 2, features, 128), torch.rand(1, 2, features) + 1)
    problem = replace(wide_problem(330, features=features), segment_ids=ids, initial=start)
    found = problem.run(segments=3)
    assert wgmma == [1]
    with switched(SWITCH, "mma"):
        expected = problem.run(segments=3)
    assert wgmma == [1, 0]
    wgmma.clear()
    for one, other in zip(found, expected, strict=True):
        assert rms(one.float() - other.float()) <= 2e-3 * rms(other)


@pytest.mark.parametrize("cut_at", [1, 64, 77])
def test_split_and_resume(cut_at):
    problem = wide_problem(140)
    first, _, kv_state, k_sum = problem.cut(0, cut_at).run()
    rest, _, end_kv, end_k_sum = problem.cut(cut_at, 140, LinearAttentionState(kv_state, k_sum)).run()
    assert rms(torch.cat([first, rest], dim=2) - problem.expected()) <= RMS_LIMIT
    _, _, whole_kv, whole_k_sum = problem.run()
    assert rms(end_kv - whole_kv) <= 1e-5 * rms(whole_kv)
    assert rms(end_k_sum - whole_k_sum) <= 1e-5 * rms(whole_k_sum)


@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "hedgehog_exp", "hedgehog_joint"])
def test_ones_in_ones_out_and_large_inputs(feature_map):
    problem = wide_problem(140, feature_map=feature_map)
    out = replace(problem, v=torch.ones_like(problem.v)).run()[0]
    assert (out.float() - 1).abs().max() <= 2**-8
    large = replace(problem.cut(0, 70), q=problem.q[:, :, :70] * 12, k=problem.k[:, :, :70] * 12)
    out, expected = large.run()[0], large.expected()
    assert torch.isfinite(out).all()
    assert rms(out - expected) <= 0.02


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "hedgehog_exp"])
def test_nan_comes_out_as_nan(name, feature_map):
    problem = wide_problem(130, feature_map=feature_map)
    x = getattr(problem, name).clone()
    x[0, 0, 70, 3] = float("nan")
    out = replace(problem, **{name: x}).run()[0]
    assert torch.isnan(out[0, 0, 70]).any()
    if name != "q":
        assert torch.isnan(out[0, 0, 71:]).any(dim=-1).all()  # in the state from here on
    assert not torch.isnan(out[0, :, :64]).any()


def test_the_order_of_threads_does_not_matter(emulation):
    problem = wide_problem(200, heads=1)
    first = problem.run()
    for seed in range(4):
        emulation.seed_emulation(seed)
        for one, other in zip(first, problem.run(), strict=True):
            assert torch.equal(one, other), f"seed {seed}"


def test_the_check_at_first_use_looks_at_the_kernel_that_is_chosen(wgmma):
    assert attention.disagreement(torch.device("cpu"), 128, 128, "hedgehog_softmax") is None
    assert wgmma == [1, 1], "in one segment, and in as many as fill the GPU"


def test_the_switch(emulation, monkeypatch, caplog):
    assert choose_forward(emulation, 128, 256, "hedgehog_exp").reason == f"{SWITCH}=wgmma"
    forward_choice._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert choose_forward(emulation, 64, 256, "hedgehog_exp").kernel == "mma"
    assert [record.getMessage() for record in caplog.records] == [
        f"{SWITCH}=wgmma, but mma.sync runs: no wgmma kernel for head dim 64, F=256, hedgehog_exp here"
    ]
    assert choose_forward(emulation, 128, 256, "given").kernel == "mma"
    monkeypatch.delenv(SWITCH)
    assert choose_forward(emulation, 128, 256, "hedgehog_exp").kernel == "mma"
    monkeypatch.setenv(SWITCH, "tma")
    with pytest.raises(ValueError, match=f"{SWITCH}=tma: there are mma, wgmma"):
        choose_forward(emulation, 128, 256, "hedgehog_exp")

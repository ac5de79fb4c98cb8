"""Backward kernels that take the values whole, on mma.sync and on wgmma, held to what the others are; the choice."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hedgehog.kernels.cuda import backward_choice, gradients, library
from hedgehog.kernels.cuda.backward_choice import KERNEL_NUMBERS, SWITCH, choose_backward
from hedgehog.kernels.cuda.library import ForwardArguments, KernelError, emulated_library
from hedgehog.kernels.cuda.operators import linear_attention
from hedgehog.kernels.cuda.switches import switched
from hedgehog.kernels.linear_attention import LinearAttentionState, run_index_BL
from hedgehog.pipeline.allocation_peak import allocation_peak

from .problems import EPS, Problem, random_problem, rms
from .test_gradient import CPU, LIMIT, NAMES, by_kernels, check, grad_of_out, packed

SLICES, WHOLE, WGMMA = (KERNEL_NUMBERS[name] for name in ("slices", "whole", "wgmma"))
MAPS = ["hedgehog_softmax", "hedgehog_exp", "hedgehog_joint"]
both = pytest.mark.parametrize("ran", ["whole", "wgmma"], indirect=True)


@pytest.fixture(autouse=True)
def ran(monkeypatch, request):
    """The kernels that ran; fails a test in which others than the wanted did. By default those that nobody asks for."""
    wanted = getattr(request, "param", "whole")
    monkeypatch.delenv(SWITCH, raising=False)
    if wanted == "wgmma":
        monkeypatch.setenv(SWITCH, wanted)
    numbers: list[int] = []
    backward = library.Library.backward

    def watched(self, arguments):
        numbers.append(arguments.kernel)
        backward(self, arguments)

    monkeypatch.setattr(library.Library, "backward", watched)
    yield numbers
    assert set(numbers) <= {KERNEL_NUMBERS[wanted]}


def whole_problem(length: int, *, feature_map: str = "hedgehog_softmax", batch: int = 1, heads: int = 2) -> Problem:
    return random_problem(
        length, head_dim=128, features=256, feature_map=feature_map, batch=batch, heads=heads, kv_heads=heads
    )


@both
@pytest.mark.parametrize("feature_map", MAPS)
def test_every_map(feature_map, ran):
    check(whole_problem(70, feature_map=feature_map))
    assert len(ran) == 1


@both
@pytest.mark.parametrize("length", [2, 63, 64, 65, 129])
def test_tails(length):
    check(whole_problem(length), limit=LIMIT if length > 2 else 2 * LIMIT)


@both
@pytest.mark.parametrize("segments", [2, 4])
def test_segments(segments):
    check(whole_problem(290, batch=2), segments=segments)


@both
@pytest.mark.parametrize("feature_map", MAPS)
def test_padding(feature_map):
    problem = packed(whole_problem(133, batch=2, feature_map=feature_map), [], left=70, right=5)
    check(problem)
    found = by_kernels(problem, grad_of_out(problem))
    assert not found["k"][0, :, :70].any() and not found["v"][0, :, :70].any()


@both
@pytest.mark.parametrize("borders", [[10], [63, 65], [1, 2, 3, 128]])
def test_packed_sequences(borders):
    problem = packed(whole_problem(140, batch=2), borders, left=12, right=7)
    check(problem, segments=1 if borders == [10] else 3)


@both
def test_values_that_share_a_mean():
    problem = whole_problem(200, heads=1)
    check(replace(problem, v=problem.v + 8), segments=2)


@both
def test_a_long_sequence():
    check(whole_problem(1500, heads=1))


@both
@pytest.mark.parametrize("segments", [1, 2])
def test_states(segments):
    problem = whole_problem(130, batch=2)
    _, _, *start = problem.cut(0, 50).run()
    problem = packed(problem.cut(50, 130, LinearAttentionState(*start)), [60])
    grads = [grad_of_out(problem), 0.1 * torch.randn_like(start[0]), 0.1 * torch.randn_like(start[1])]
    leaves = [x.detach().clone().requires_grad_() for x in (*(getattr(problem, name) for name in NAMES), *start)]
    q, k, v, weight_q, weight_k, kv, k_sum = leaves
    runs = run_index_BL(problem.segment_ids, problem.mask).int()
    inputs = q, k, v, weight_q, weight_k, problem.mask, runs, kv, k_sum
    out, _, final_kv, final_k_sum = linear_attention(*inputs, problem.feature_map, EPS, segments, True)
    found = torch.autograd.grad([out, final_kv, final_k_sum], leaves, grads)
    expected = gradients.gradients_in_pytorch(inputs, tuple(grads), problem.feature_map, EPS)
    for ours, theirs in zip(found, expected, strict=True):
        assert rms(ours - theirs) <= LIMIT * rms(theirs)


@both
def test_one_token():
    """o is v then, so dv is do; what is left of the others is rounding."""
    problem = whole_problem(1, feature_map="hedgehog_exp")
    grad_out = grad_of_out(problem)
    found = by_kernels(problem, grad_out)
    assert rms(found.pop("v") - grad_out.float()) <= LIMIT
    assert all(rms(grad) <= LIMIT for grad in found.values())


@both
def test_nan_comes_out_as_nan():
    problem = whole_problem(130, heads=1)
    k = problem.k.clone()
    k[0, 0, 100, 3] = float("nan")
    found = by_kernels(replace(problem, k=k), grad_of_out(problem))
    assert torch.isnan(found["k"][0, 0, :101]).any(dim=-1).all()
    assert torch.isnan(found["q"][0, 0, 100:]).any(dim=-1).all()
    assert torch.isnan(found["weight_q"]).any() and torch.isnan(found["weight_k"]).any()


@both
def test_the_order_of_threads_does_not_matter(emulation):
    problem = packed(whole_problem(130, batch=2), [70], left=3)
    first = by_kernels(problem, grad_of_out(problem), segments=2)
    for seed in range(2):
        emulation.seed_emulation(seed)
        again = by_kernels(problem, grad_of_out(problem), segments=2)
        for name, grad in first.items():
            assert torch.equal(grad, again[name]), f"{name}, seed {seed}"


@both
def test_no_memory_beyond_the_results_grows_with_the_length():
    def beyond(length: int) -> int:
        problem = whole_problem(length)
        out, denominator, *_ = problem.run()
        with allocation_peak(CPU) as peak:
            found = gradients.linear_attention_backward(
                problem.q, problem.k, problem.v, problem.weight_q, problem.weight_k, None, None, None, None,
                denominator, out, None, None, problem.feature_map, EPS, 1,
            )  # fmt: skip
        return peak.num_bytes - sum(x.nbytes for x in found)

    assert beyond(300) == beyond(64)
    sizes = ForwardArguments(batch=2, heads=4, head_dim=128, features=256, length=1 << 30, segments=4)
    assert emulated_library().backward_scratch_bytes(sizes, WHOLE) == 3 * 2 * 4 * 256 * (128 + 1) * 4


@pytest.mark.parametrize(
    ("ran", "most"), [("whole", (24672, 11104, 82944)), ("wgmma", (12416, 5824, 82944))], indirect=["ran"]
)
def test_work_of_a_chunk(emulation, most):
    """wgmma's products are not counted; LOG.md has the table."""

    def work(chunks: int) -> tuple[int, ...]:
        problem = whole_problem(64 * chunks, heads=1)
        out = replace(problem, q=problem.q.requires_grad_()).run()[0]
        emulation.emulated_work()
        out.backward(torch.ones_like(out))
        return emulation.emulated_work()

    found = tuple(two - one for one, two in zip(work(1), work(2), strict=True))
    assert all(count <= limit for count, limit in zip(found, most, strict=True)), found


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((256, 128, "hedgehog_softmax", True), "share a key head here"),
        ((128, 128, "hedgehog_softmax", False), "head dim 128, F=128"),
        ((256, 64, "hedgehog_softmax", False), "head dim 64"),
        ((256, 128, "given", False), "given"),
        ((256, 128, "hedgehog_exp", False), None),
    ],
)
def test_what_they_serve(shape, words):
    choice = choose_backward(lambda name: gradients.whole_obstacle(CPU, *shape, name))
    assert choice.kernel == ("slices" if words else "whole")
    assert words is None or words in choice.reason


def test_the_switch(monkeypatch, caplog):
    def not_asked(name: str) -> str:
        raise AssertionError

    monkeypatch.setenv(SWITCH, "slices")
    assert choose_backward(not_asked) == ("slices", f"{SWITCH}=slices")
    monkeypatch.setenv(SWITCH, "wgmma")
    assert choose_backward(lambda name: None).kernel == "wgmma"
    backward_choice._say_once.cache_clear()
    assert choose_backward(lambda name: f"no {name}" if name == "wgmma" else None).kernel == "whole"
    assert f"{SWITCH}=wgmma, but others run: no wgmma" in caplog.text
    assert choose_backward(lambda name: f"no {name}") == ("slices", "no whole")
    monkeypatch.setenv(SWITCH, "halves")
    with pytest.raises(ValueError, match="HEDGEHOG_BACKWARD=halves: there are slices, whole, wgmma"):
        choose_backward(not_asked)


def test_a_shape_they_do_not_serve_is_refused():
    problem = random_problem(3, kv_heads=2)
    inputs = problem.q, problem.k, problem.v, problem.weight_q, problem.weight_k, None, None, None, None
    _, denominator, *_ = problem.run()
    with pytest.raises(KernelError):
        grads = grad_of_out(problem), None, None
        gradients.backward_kernels(inputs, denominator, grads, "hedgehog_softmax", EPS, 1, "whole")


@pytest.mark.parametrize("fault", ["memory", "numbers"])
def test_where_the_device_is_not_up_to_them_slices_serve(monkeypatch, emulation, caplog, fault):
    """An A100 has too little shared memory; and a device on which they are wrong does without them."""
    device = torch.device("cuda", 7)
    there = 227 * 1024 if fault == "numbers" else 163 * 1024
    monkeypatch.setattr(gradients, "library_for", lambda device: emulation)
    monkeypatch.setattr(gradients, "cuda_library", lambda capability: emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = SimpleNamespace(shared_memory_per_block_optin=there)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    asked = []

    def disagreement(*arguments: object) -> str | None:
        asked.append(arguments[-1])
        return "they differ from PyTorch here by 4.0%" if arguments[-1] == "whole" and fault == "numbers" else None

    monkeypatch.setattr(gradients, "gradient_disagreement", disagreement)
    gradients.whole_obstacle.cache_clear()
    gradients.backward_obstacle.cache_clear()
    with caplog.at_level(logging.WARNING):
        obstacle = gradients.whole_obstacle(device, 256, 128, "hedgehog_softmax", False)
        assert gradients.backward_obstacle(device, 256, 128, "hedgehog_softmax") is None
    expected = "differ" if fault == "numbers" else "needs 215808 bytes of shared memory, this GPU gives 166912"
    assert obstacle and expected in obstacle and f"named whole do not serve: {obstacle}" in caplog.text
    assert asked == (["whole", "slices"] if fault == "numbers" else ["slices"])
    gradients.whole_obstacle.cache_clear()
    gradients.backward_obstacle.cache_clear()


def test_the_check_at_first_use_runs_the_kernels_it_is_asked_about(monkeypatch, ran):
    assert gradients.gradient_disagreement(CPU, 256, 128, "hedgehog_softmax", "whole") is None
    assert ran == [WHOLE]
    right = gradients.backward_kernels

    def wrong(*arguments):
        found = right(*arguments)
        found[3][1] *= 1.5
        return found

    monkeypatch.setattr(gradients, "backward_kernels", wrong)
    assert "differ" in (gradients.gradient_disagreement(CPU, 256, 128, "hedgehog_softmax", "whole") or "")


def test_all_give_the_same_but_for_rounding(ran):
    problem = packed(whole_problem(200, batch=2), [90], left=5)
    grad_out = grad_of_out(problem)
    ours = by_kernels(problem, grad_out)
    with switched(SWITCH, "slices"):
        theirs = by_kernels(problem, grad_out)
    with switched(SWITCH, "wgmma"):
        by_warpgroups = by_kernels(problem, grad_out)
    assert ran == [WHOLE, SLICES, WGMMA]
    ran.clear()
    for name, grad in ours.items():
        assert rms(grad.float() - by_warpgroups[name].float()) <= LIMIT / 4 * rms(grad), name
        assert rms(grad.float() - theirs[name].float()) <= LIMIT * rms(grad), name

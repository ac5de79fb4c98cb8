"""The backward kernels, emulated, against autograd through the quadratic form in float64 on the same bf16 numbers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hedgehog.kernels.cuda import gradients
from hedgehog.kernels.cuda.backward_choice import KERNEL_NUMBERS, SWITCH
from hedgehog.kernels.cuda.library import ForwardArguments, emulated_library
from hedgehog.kernels.cuda.operators import linear_attention
from hedgehog.kernels.linear_attention import LinearAttentionState, quadratic_linear_attention, run_index_BL
from hedgehog.pipeline.allocation_peak import allocation_peak

from .problems import EPS, Problem, random_problem, rms

LIMIT = 1e-2
SHAPES = [(64, 128), (64, 256), (128, 128), (128, 256)]
MAPS = ["hedgehog_softmax", "hedgehog_exp", "hedgehog_joint", "given"]
NAMES = ("q", "k", "v", "weight_q", "weight_k")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def slices(monkeypatch):
    """Asks for the kernels that serve every shape; test_backward_whole.py has the others."""
    monkeypatch.setenv(SWITCH, "slices")


def grad_of_out(problem: Problem) -> Tensor:
    shape = *problem.q.shape[:3], problem.v.shape[-1]
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def by_kernels(problem: Problem, grad_out: Tensor, *, segments: int = 1) -> dict[str, Tensor]:
    leaves = {n: x.detach().clone().requires_grad_() for n in NAMES if (x := getattr(problem, n)) is not None}
    replace(problem, **leaves).run(segments=segments)[0].backward(grad_out)
    return {name: leaf.grad for name, leaf in leaves.items()}


def exactly(problem: Problem, grad_out: Tensor) -> dict[str, Tensor]:
    leaves = {n: x.detach().double().requires_grad_() for n in NAMES if (x := getattr(problem, n)) is not None}
    phi_q, phi_k = replace(problem, **leaves).features()
    quadratic_linear_attention(
        phi_q, phi_k, leaves["v"], mask_BL=problem.mask, segment_ids_BL=problem.segment_ids, eps=EPS
    ).backward(grad_out.double())
    return {name: leaf.grad for name, leaf in leaves.items()}


def check(problem: Problem, *, segments: int = 1, limit: float = LIMIT) -> None:
    """Errors relative to the gradient's own size."""
    grad_out = grad_of_out(problem)
    expected = exactly(problem, grad_out)
    for name, grad in by_kernels(problem, grad_out, segments=segments).items():
        assert grad.dtype == getattr(problem, name).dtype
        assert rms(grad - expected[name]) <= limit * rms(expected[name]), name


def packed(problem: Problem, borders: list[int], *, left: int = 0, right: int = 0) -> Problem:
    """The second of two rows packed at `borders`; padding left in the first and right in the second."""
    length = problem.q.shape[2]
    ids, mask = torch.zeros(2, length, dtype=torch.long), torch.ones(2, length, dtype=torch.bool)
    for border in borders:
        ids[1, border:] += 1
    mask[0, :left] = False
    mask[1, length - right :] = False
    return replace(problem, segment_ids=ids, mask=mask)


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize(("head_dim", "features"), SHAPES)
def test_every_map_in_every_shape(feature_map, head_dim, features):
    check(random_problem(70, head_dim=head_dim, features=features, feature_map=feature_map, kv_heads=2))


@pytest.mark.parametrize("length", [2, 63, 64, 65, 129])
@pytest.mark.parametrize(("head_dim", "features"), [(64, 128), (128, 256)])
def test_tails(length, head_dim, features):
    limit = LIMIT if length > 2 else 2 * LIMIT  # over few tokens no rounding averages out
    problem = random_problem(length, head_dim=head_dim, features=features, seed=length, kv_heads=1 + length % 2)
    check(problem, limit=limit)


@pytest.mark.parametrize("feature_map", ["hedgehog_exp", "given"])
def test_one_token(feature_map):
    """o is v then, whatever q and k are."""
    problem = random_problem(1, feature_map=feature_map, heads=4, kv_heads=2)
    grad_out = grad_of_out(problem)
    found = by_kernels(problem, grad_out)
    assert rms(found.pop("v") - grad_out.float().view(1, 2, 2, 1, 64).sum(2)) <= LIMIT
    assert all(rms(grad) <= LIMIT for grad in found.values())


@pytest.mark.parametrize("segments", [2, 4])
@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "given"])
def test_segments(segments, feature_map):
    check(random_problem(290, feature_map=feature_map, batch=2, kv_heads=segments // 2), segments=segments)


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "given"])
def test_grouped_heads(heads, kv_heads, feature_map):
    check(random_problem(66, feature_map=feature_map, batch=2, heads=heads, kv_heads=kv_heads))


def test_grouped_heads_and_slices_of_the_values():
    """dk is a sum over both."""
    check(random_problem(66, head_dim=128, features=256, heads=4, kv_heads=2))


@pytest.mark.parametrize("feature_map", MAPS)
def test_padding(feature_map):
    problem = packed(random_problem(133, batch=2, feature_map=feature_map), [], left=70, right=5)
    check(problem)
    found = by_kernels(problem, grad_of_out(problem))
    assert not found["k"][0, :, :70].any() and not found["v"][0, :, :70].any()


@pytest.mark.parametrize("borders", [[10], [64], [63, 65], [1, 2, 3, 128]])
@pytest.mark.parametrize("padded", [False, True])
def test_packed_sequences(borders, padded):
    left, right = (12, 7) if padded else (0, 0)
    problem = packed(random_problem(140, batch=2, kv_heads=1 + padded), borders, left=left, right=right)
    check(problem, segments=1 if borders == [10] else 3)


@pytest.mark.parametrize("feature_map", MAPS)
def test_values_that_share_a_mean(feature_map):
    """dφ is a small difference of large sums then; a dd from the rounded o would be some ten times off."""
    problem = random_problem(200, feature_map=feature_map)
    check(replace(problem, v=problem.v + 8), segments=2)


@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "hedgehog_exp"])
def test_flat_features(feature_map):
    """Features of 1/P (1 ± 0.1), whose differences are all that counts, cost bf16 a fiftieth of the differences."""
    problem = random_problem(200, feature_map=feature_map)
    check(replace(problem, q=problem.q * 0.1, k=problem.k * 0.1), limit=2.5e-2)


def test_keys_beyond_the_exponents_bound():
    """Beyond ±40 hedgehog_exp's keys bend, and so does their derivative."""
    problem = random_problem(40, feature_map="hedgehog_exp", heads=1)
    k = problem.k.clone()
    k[:, :, ::5] *= 25
    problem = replace(problem, k=k, q=problem.q * 0.1)
    z = k[:, :, ::5].double() @ problem.weight_k.double()
    assert ((z.abs() > 40).double().mean() > 0.05) and z.abs().max() > 60
    check(problem, limit=3e-2)


def test_a_long_sequence():
    check(random_problem(1500, heads=1))


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize(("head_dim", "features"), [(64, 128), (128, 256)])
def test_states(segments, head_dim, features):
    """Gradients of an initial state, and through the final one, against PyTorch's."""
    problem = random_problem(130, batch=2, head_dim=head_dim, features=features)
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


def test_gradients_of_the_states_alone():
    """d(sum of final state)/d(initial state) is one where nothing intervenes; a border cuts it."""
    problem = random_problem(70)
    start = torch.rand(1, 2, 128, 64), torch.rand(1, 2, 128)
    for runs, expected in ((None, 1.0), (torch.tensor([[0] * 30 + [1] * 40], dtype=torch.int32), 0.0)):
        kv, k_sum = (x.clone().requires_grad_() for x in start)
        weights = problem.weight_q, problem.weight_k
        results = linear_attention(
            problem.q, problem.k, problem.v, *weights, None, runs, kv, k_sum, "hedgehog_softmax", EPS, 1, True
        )
        grad_kv, grad_k_sum = torch.autograd.grad(results[2].sum() + 3 * results[3].sum(), (kv, k_sum))
        assert torch.allclose(grad_kv, torch.full_like(kv, expected))
        assert torch.allclose(grad_k_sum, torch.full_like(k_sum, 3 * expected))


def test_no_tokens_hand_the_final_states_gradient_on():
    problem = random_problem(3).cut(0, 0)
    kv, k_sum = (x.requires_grad_() for x in (torch.rand(1, 2, 128, 64), torch.rand(1, 2, 128)))
    results = replace(problem, initial=LinearAttentionState(kv, k_sum)).run()
    (2 * results[2].sum() + results[3].sum()).backward()
    assert (kv.grad == 2).all() and (k_sum.grad == 1).all()


@pytest.mark.parametrize("name", ["q", "k", "v", "grad"])
def test_nan_comes_out_as_nan(name):
    problem = random_problem(200)
    grad_out = grad_of_out(problem)
    x = grad_out.clone() if name == "grad" else getattr(problem, name).clone()
    x[0, 0, 150, 3] = float("nan")
    found = by_kernels(problem, x) if name == "grad" else by_kernels(replace(problem, **{name: x}), grad_out)
    assert torch.isnan(found["q"][0, 0, 150]).any()
    assert torch.isnan(found["k"][0, 0, :128]).any(dim=-1).all()  # each is seen by the token
    assert torch.isnan(found["weight_q"][0]).any() and torch.isnan(found["weight_k"][0]).any()


def test_the_order_of_threads_does_not_matter(emulation):
    problem = packed(random_problem(130, features=256, batch=2, kv_heads=2), [70], left=3)
    first = by_kernels(problem, grad_of_out(problem), segments=2)
    for seed in range(2):
        emulation.seed_emulation(seed)
        again = by_kernels(problem, grad_of_out(problem), segments=2)
        for name, grad in first.items():
            assert torch.equal(grad, again[name]), f"{name}, seed {seed}"


def test_gradients_that_are_not_laid_out_for_the_kernel():
    """As sum().backward() hands them over (one number, expanded), in float32, and unaligned."""
    problem = random_problem(65)
    ones = by_kernels(problem, torch.ones(1, 2, 65, 64, dtype=torch.bfloat16))
    wide = torch.ones(1, 2, 65, 67, dtype=torch.bfloat16)[..., 3:]
    for grad_out in (torch.ones(1, dtype=torch.bfloat16).expand(1, 2, 65, 64), wide):
        for name, grad in by_kernels(problem, grad_out).items():
            assert torch.equal(grad, ones[name])


@pytest.mark.parametrize(("head_dim", "features", "slices"), [(64, 128, 1), (128, 256, 2)])
def test_memory_beyond_the_results_does_not_grow_where_each_query_head_has_a_key_head(head_dim, features, slices):
    def beyond(length: int, kv_heads: int) -> int:
        problem = random_problem(length, head_dim=head_dim, features=features, kv_heads=kv_heads)
        out, denominator, *_ = problem.run()
        with allocation_peak(CPU) as peak:
            found = gradients.linear_attention_backward(
                problem.q, problem.k, problem.v, problem.weight_q, problem.weight_k, None, None, None, None,
                denominator, out, None, None, problem.feature_map, EPS, 1,
            )  # fmt: skip
        return peak.num_bytes - sum(x.nbytes for x in found)

    short, long = (beyond(length, 2) for length in (64, 300))
    assert long == short
    short, long = (beyond(length, 1) for length in (64, 300))
    assert long - short == 4 * slices * 2 * (300 - 64)


def test_the_state_of_a_segment_is_all_that_segments_cost():
    library = emulated_library()

    def scratch(length: int, segments: int) -> int:
        sizes = ForwardArguments(batch=2, heads=4, head_dim=128, features=256, length=length, segments=segments)
        return library.backward_scratch_bytes(sizes, KERNEL_NUMBERS["slices"])

    assert scratch(1 << 20, 1) == 0
    assert scratch(1 << 12, 4) == scratch(1 << 34, 4) == 3 * 2 * 4 * 256 * (128 + 2) * 4


def test_the_operator_keeps_pytorchs_rules():
    problem = random_problem(66)
    out, denominator, *_ = problem.run()
    inputs = problem.q, problem.k, problem.v, problem.weight_q, problem.weight_k, None, None, None, None
    torch.library.opcheck(
        gradients.linear_attention_backward,
        (*inputs, denominator, torch.ones_like(out), None, None, "hedgehog_softmax", EPS, 1),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("feature_map", ["hedgehog_exp", "given"])
def test_kernels_that_are_wrong_or_fail_on_a_device_do_not_serve_there(monkeypatch, feature_map):
    def look():
        return gradients.gradient_disagreement(CPU, 128, 64, feature_map)

    assert look() is None
    right = gradients.backward_kernels

    def wrong(*arguments):
        found = right(*arguments)
        found[1][0, 1, -1] += 1
        return found

    def nan(*arguments):
        found = right(*arguments)
        found[2][0, 0, 0, 0] = float("nan")
        return found

    def failing(*arguments):
        raise RuntimeError("no kernel image is available\nfor this device")

    for fault, words in ((wrong, "differ from PyTorch"), (nan, "by nan"), (failing, "fail here (no kernel image")):
        monkeypatch.setattr(gradients, "backward_kernels", fault)
        assert words in (look() or "")


def test_out_of_memory_is_no_verdict(monkeypatch):
    """A check that finds no memory, in the middle of a training step, says nothing of the kernels."""
    monkeypatch.setattr(gradients, "UNCHECKED_DEVICES", ())
    gradients.backward_obstacle.cache_clear()

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")

    with monkeypatch.context() as patch:
        patch.setattr(gradients, "backward_kernels", full)
        with pytest.raises(torch.OutOfMemoryError):
            gradients.backward_obstacle(CPU, 128, 64, "given")
    assert gradients.backward_obstacle(CPU, 128, 64, "given") is None
    gradients.backward_obstacle.cache_clear()


def test_a_gpu_with_less_shared_memory_takes_pytorchs_gradients(monkeypatch, emulation, caplog):
    device = torch.device("cuda", 7)
    monkeypatch.setattr(gradients, "cuda_library", lambda capability: emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    properties = SimpleNamespace(shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(gradients, "gradient_disagreement", lambda *_: None)
    obstacle = gradients.backward_obstacle(device, 256, 128, "hedgehog_softmax")
    assert obstacle == "a block of theirs needs 166656 bytes of shared memory, this GPU gives 101376"
    assert obstacle in caplog.text
    assert gradients.backward_obstacle(device, 128, 64, "hedgehog_softmax") is None
    gradients.backward_obstacle.cache_clear()


def test_pytorch_gives_the_gradients_where_the_kernels_cannot(monkeypatch):
    problem = packed(random_problem(90, heads=4, kv_heads=2, batch=2), [40], left=7)
    grad_out = grad_of_out(problem)
    ours = by_kernels(problem, grad_out)
    monkeypatch.setattr(gradients, "backward_obstacle", lambda *_: "they are not there")
    monkeypatch.setattr(gradients, "backward_kernels", None)
    for name, grad in by_kernels(problem, grad_out).items():
        assert not torch.equal(grad, ours[name])  # another computation
        assert rms(grad - ours[name]) <= LIMIT * rms(grad)

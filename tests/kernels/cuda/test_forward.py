"""The forward kernel, emulated, against the quadratic form in float64 on the same bf16 numbers.

With values of unit variance an output may be 2e-3 off in the mean square. Most of that is the rounding of o itself.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hedgehog.kernels.cuda.library import emulated_library
from hedgehog.kernels.cuda.operators import linear_attention
from hedgehog.kernels.linear_attention import LinearAttentionState

from .problems import EPS, Problem, random_problem, rms

RMS_LIMIT = 2e-3
SHAPES = [(64, 128), (64, 256), (128, 128), (128, 256)]
MAPS = ["hedgehog_softmax", "hedgehog_exp", "hedgehog_joint", "given"]


def check(problem: Problem, *, segments: int = 1) -> None:
    """o against the oracle, and S, z, d against sums over the oracle's features."""
    out, denominator, kv_state, k_sum = problem.run(segments=segments)
    expected = problem.expected()
    assert rms(out - expected) <= RMS_LIMIT
    assert (out - expected).abs().max() <= 8 * RMS_LIMIT * max(1.0, expected.abs().max().item())
    assert rms(out - expected) <= 4e-3 * rms(expected)

    phi_q, phi_k = problem.features()
    if problem.mask is not None:
        phi_k = phi_k * problem.mask[:, None, :, None]
    if problem.segment_ids is not None:
        return
    v = problem.v.double().repeat_interleave(problem.q.shape[1] // problem.v.shape[1], dim=1)
    assert rms(kv_state - phi_k.transpose(-1, -2) @ v) <= 3e-3 * rms(kv_state) + 1e-6
    assert rms(k_sum - phi_k.sum(dim=2)) <= 2e-3 * rms(k_sum) + 1e-6
    sums = (phi_q * phi_k.cumsum(dim=2)).sum(dim=-1)
    assert rms(denominator - sums) <= 4e-3 * rms(sums) + 1e-6


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
@pytest.mark.parametrize(("head_dim", "features"), SHAPES)
def test_every_shape_and_tail(length, head_dim, features):
    check(random_problem(length, head_dim=head_dim, features=features, seed=length))


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize(("head_dim", "features"), SHAPES)
def test_every_map_in_every_shape(feature_map, head_dim, features):
    check(random_problem(70, head_dim=head_dim, features=features, feature_map=feature_map))


@pytest.mark.parametrize("segments", [2, 4])
@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "given"])
def test_segments(segments, feature_map):
    check(random_problem(290, feature_map=feature_map, batch=2), segments=segments)


def test_segments_give_what_one_gives_with_packing_and_an_initial_state():
    problem = random_problem(330, batch=2)
    ids = torch.zeros(2, 330, dtype=torch.long)
    ids[0, 100:] = 1
    ids[0, 190:] = 2
    start = LinearAttentionState(torch.rand(2, 2, 128, 64), torch.rand(2, 2, 128) + 1)
    problem = replace(problem, segment_ids=ids, initial=start)
    whole, several = problem.run(), problem.run(segments=3)
    for one, other in zip(whole, several, strict=True):
        assert rms(one.float() - other.float()) <= 2e-3 * rms(one)


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (6, 2)])
@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "given"])
def test_grouped_heads(heads, kv_heads, feature_map):
    check(random_problem(66, heads=heads, kv_heads=kv_heads, feature_map=feature_map, batch=2))


def padding(length: int, *, left: int, right: int) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :left] = False
    mask[1, length - right :] = False
    return mask


@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "given"])
def test_padding(feature_map):
    problem = replace(random_problem(133, batch=2, feature_map=feature_map), mask=padding(133, left=70, right=5))
    check(problem)
    out = problem.run()[0]
    assert (out[0, :, :70] == 0).all()  # rows that see no key


def test_what_lies_under_padding_does_not_matter():
    problem = replace(random_problem(100, batch=2), mask=padding(100, left=9, right=9))
    hidden = ~problem.mask[:, None, :, None]
    noisy = replace(problem, k=problem.k.masked_fill(hidden, float("nan")), v=problem.v.masked_fill(hidden, 7.0))
    real = problem.mask[:, None, :, None]
    assert torch.equal(problem.run()[0] * real, noisy.run()[0] * real)
    assert torch.equal(problem.run()[2], noisy.run()[2])


@pytest.mark.parametrize("borders", [[10], [64], [63, 65], [1, 2, 3, 128]])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences(borders, masked):
    length = 140
    ids = torch.zeros(2, length, dtype=torch.long)
    for border in borders:
        ids[1, border:] += 1
    mask = padding(length, left=12, right=20) if masked else None
    problem = replace(random_problem(length, batch=2), segment_ids=ids, mask=mask)
    check(problem)
    check(problem, segments=2)


def test_state_after_packed_sequences_is_the_last_ones():
    problem = random_problem(150)
    ids = torch.tensor([[0] * 70 + [1] * 80])
    _, _, kv_state, k_sum = replace(problem, segment_ids=ids).run()
    _, _, last_kv, last_k_sum = problem.cut(70, 150).run()
    assert rms(kv_state - last_kv) <= 1e-5 * rms(last_kv)
    assert rms(k_sum - last_k_sum) <= 1e-5 * rms(last_k_sum)


@pytest.mark.parametrize("cut_at", [1, 64, 77])
@pytest.mark.parametrize(("head_dim", "features"), [(64, 128), (128, 256)])
def test_split_and_resume(cut_at, head_dim, features):
    problem = random_problem(140, head_dim=head_dim, features=features)
    first, _, kv_state, k_sum = problem.cut(0, cut_at).run()
    rest, _, end_kv, end_k_sum = problem.cut(cut_at, 140, LinearAttentionState(kv_state, k_sum)).run()
    joined = torch.cat([first, rest], dim=2)
    assert rms(joined - problem.expected()) <= RMS_LIMIT
    _, _, whole_kv, whole_k_sum = problem.run()
    assert rms(end_kv - whole_kv) <= 1e-5 * rms(whole_kv)
    assert rms(end_k_sum - whole_k_sum) <= 1e-5 * rms(whole_k_sum)


def test_initial_state_belongs_to_the_first_tokens_segment():
    problem = random_problem(100)
    start = LinearAttentionState(torch.rand(1, 2, 128, 64), torch.rand(1, 2, 128))
    ids = torch.tensor([[5] * 30 + [6] * 70])
    packed = replace(problem, segment_ids=ids, initial=start).run()[0]
    first = replace(problem.cut(0, 30), initial=start).run()[0]
    second = problem.cut(30, 100).run()[0]
    assert rms(packed - torch.cat([first, second], dim=2)) <= 2e-3


@pytest.mark.parametrize("feature_map", MAPS)
def test_ones_in_ones_out(feature_map):
    problem = random_problem(200, feature_map=feature_map)
    out = replace(problem, v=torch.ones_like(problem.v)).run(segments=2)[0]
    assert (out.float() - 1).abs().max() <= 2**-8


@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "hedgehog_exp", "hedgehog_joint"])
def test_large_inputs(feature_map):
    """Exponents of ±60: beyond hedgehog_exp's bound for keys; softmaxes that are all but one-hot."""
    problem = random_problem(70, feature_map=feature_map)
    problem = replace(problem, q=problem.q * 12, k=problem.k * 12)
    out, expected = problem.run()[0], problem.expected()
    assert torch.isfinite(out).all()
    assert rms(out - expected) <= 0.02


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "hedgehog_exp", "given"])
def test_nan_comes_out_as_nan(name, feature_map):
    problem = random_problem(100, feature_map=feature_map)
    x = getattr(problem, name).clone()
    x[0, 0, 70, 3] = float("nan")
    out = replace(problem, **{name: x}).run()[0]
    assert torch.isnan(out[0, 0, 70]).any()
    if name != "q":
        assert torch.isnan(out[0, 0, 71:]).any(dim=-1).all()  # in the state from here on
    assert not torch.isnan(out[0, :, :64]).any()


def test_the_order_of_threads_does_not_matter(emulation):
    problem = random_problem(130, head_dim=128, features=256, heads=1)
    first = problem.run(segments=2)
    for seed in range(3):
        emulation.seed_emulation(seed)
        for one, other in zip(first, problem.run(segments=2), strict=True):
            assert torch.equal(one, other), f"seed {seed}"


def test_scratch_does_not_grow_with_the_length():
    from hedgehog.kernels.cuda.library import ForwardArguments

    def scratch(length: int, segments: int) -> int:
        sizes = ForwardArguments(batch=2, heads=4, head_dim=128, features=256, length=length, segments=segments)
        return emulated_library().scratch_bytes(sizes)

    assert scratch(1 << 20, 1) == 0
    assert scratch(1 << 12, 4) == scratch(1 << 20, 4) == scratch(1 << 34, 4) == 3 * 2 * 4 * 256 * 129 * 4
    assert scratch(100, 4) == 1 * 2 * 4 * 256 * 129 * 4  # two chunks: two segments at most


def test_unaligned_inputs_are_copied_first():
    problem = random_problem(65)
    wide = torch.randn(1, 2, 65, 68).bfloat16()
    q = wide[..., 3:67]
    assert torch.equal(replace(problem, q=q).run()[0], replace(problem, q=q.contiguous()).run()[0])


def test_no_tokens_leave_the_state_as_it_was():
    problem = random_problem(3).cut(0, 0)
    start = LinearAttentionState(torch.rand(1, 2, 128, 64), torch.rand(1, 2, 128))
    out, _, kv_state, k_sum = replace(problem, initial=start).run()
    assert out.shape == (1, 2, 0, 64)
    assert torch.equal(kv_state, start.kv_state_BHFV) and torch.equal(k_sum, start.k_sum_BHF)


def call(problem, **changes):
    arguments = dict(
        q=problem.q,
        k=problem.k,
        v=problem.v,
        weight_q=problem.weight_q,
        weight_k=problem.weight_k,
        mask=None,
        runs=None,
        initial_kv=None,
        initial_k_sum=None,
        feature_map=problem.feature_map,
        eps=EPS,
        segments=1,
        return_state=False,
    )
    return linear_attention(**{**arguments, **changes})


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"q": torch.zeros(1, 2, 5, 64)}, "q .* must have 4 dimensions and be bfloat16"),
        ({"q": torch.zeros(1, 2, 5, 32, dtype=torch.bfloat16)}, "q has 32 dimensions a head and v 64"),
        ({"k": torch.zeros(1, 1, 4, 64, dtype=torch.bfloat16)}, "k .* must be \\(1, 1, 5, 64\\)"),
        ({"v": torch.zeros(1, 3, 5, 64, dtype=torch.bfloat16)}, "K a divisor of H"),
        ({"weight_q": torch.zeros(2, 64, 32)}, "weight_k .* must be \\(H, D, F/2\\) = \\(2, 64, 32\\)"),
        ({"weight_q": torch.zeros(2, 64, 32), "weight_k": torch.zeros(2, 64, 32)}, "64 features: the kernel has"),
        (
            {"q": torch.zeros(1, 1, 5, 64, dtype=torch.bfloat16).expand(1, 65536, 5, 64)},
            "65536 heads: .* at most 65535",
        ),
        ({"q": torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16).expand(70000, 2, 5, 64)}, "70000 rows .* cut the batch"),
        ({"weight_k": None}, "needs weight_q and weight_k"),
        ({"feature_map": "taylor"}, "no kernel for feature map 'taylor'; there are: given, hedgehog_softmax"),
        ({"mask": torch.ones(1, 5)}, "mask .* must be \\(1, 5\\) torch.bool"),
        ({"runs": torch.ones(1, 5)}, "runs .* torch.int32"),
        ({"initial_kv": torch.ones(1, 2, 128, 64)}, "come together"),
        ({"initial_kv": torch.ones(1, 2, 64, 64), "initial_k_sum": torch.ones(1, 2, 128)}, "initial_kv .* must be"),
    ],
)
def test_what_does_not_fit_is_refused_with_words(changes, words):
    with pytest.raises(ValueError, match=words):
        call(random_problem(5), **changes)


def test_the_operator_keeps_pytorchs_rules():
    problem = random_problem(66)
    arguments = (problem.q, problem.k, problem.v, problem.weight_q, problem.weight_k)
    torch.library.opcheck(
        linear_attention,
        (*arguments, None, None, None, None, "hedgehog_softmax", EPS, 1, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"),
    )

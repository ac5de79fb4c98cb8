"""Linear attention that computes its features along the way, against the quadratic form of features made before."""

from __future__ import annotations

import pytest
import torch

from hedgehog.kernels import mapped_limits
from hedgehog.kernels.feature_maps import FEATURE_MAPS, make_feature_map
from hedgehog.kernels.linear_attention import LinearAttentionState, quadratic_linear_attention
from hedgehog.kernels.mapped_attention import mapped_linear_attention
from hedgehog.kernels.mapped_limits import span_length

HEADS, DIM, CHUNK = 4, 6, 8


@pytest.fixture
def short_spans(monkeypatch):
    """Two chunks: a sequence of 40 has three spans, the last of one chunk."""
    monkeypatch.setitem(mapped_limits.CELLS_PER_SPAN, "cpu", 0)
    monkeypatch.setattr(mapped_limits, "MIN_CHUNKS_PER_SPAN", 2)
    assert span_length("cpu", 2, HEADS, 2 * DIM, CHUNK) == 2 * CHUNK


def problem(length, *, kv_heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    shapes = ((HEADS, DIM), (kv_heads, DIM), (kv_heads, 3))
    q, k, v = (torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64) for heads, dim in shapes)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def maps(name, dtype=torch.float64):
    made = [make_feature_map(name, num_heads=HEADS, head_dim=DIM, side=side).to(dtype) for side in ("query", "key")]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in weights(made):
            weight += 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)
    return made


def weights(made):
    return [weight for feature_map in made for weight in feature_map.parameters()]


def expected(q, k, v, map_q, map_k, *, positions_BL=None, **options):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return quadratic_linear_attention(map_q(q, positions_BL), map_k(k, positions_BL), v, **options)


def assert_same_with_gradients(out, reference, leaves, **tolerance):
    torch.testing.assert_close(out, reference, **tolerance)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    found, right = (torch.autograd.grad(x, leaves, grad, allow_unused=True) for x in (out, reference))
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 16, 17, 40])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_every_map_with_padding_packing_and_positions(name, length, kv_heads, short_spans):
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, : length // 3] = False
    mask[1, 1::5] = False
    borders = torch.tensor([3, 16, 20, 33])
    segments = torch.stack([torch.bucketize(torch.arange(length), borders), torch.arange(length) // 9 + 4])
    positions = torch.arange(length).expand(2, -1) + torch.tensor([[0], [70]])
    options = {"mask_BL": mask, "segment_ids_BL": segments, "positions_BL": positions}
    inputs, made = problem(length, kv_heads=kv_heads), maps(name)
    out, state = mapped_linear_attention(*inputs, *made, chunk_size=CHUNK, **options)
    assert state is None
    assert_same_with_gradients(out, expected(*inputs, *made, **options), [*inputs, *weights(made)])


def test_positions_count_from_zero(short_spans):
    inputs, made = problem(40), maps("cosformer")
    out, _ = mapped_linear_attention(*inputs, *made, chunk_size=CHUNK)
    torch.testing.assert_close(out, expected(*inputs, *made))


def test_gradcheck_with_a_state(short_spans):
    q, k, v = (x.detach()[:1, :, :5].requires_grad_() for x in problem(17, kv_heads=4))
    made = maps("hedgehog_exp")
    generator = torch.Generator().manual_seed(3)
    kv = torch.randn(1, HEADS, 2 * DIM, 3, generator=generator, dtype=torch.float64).requires_grad_()
    k_sum = (1 + torch.rand(1, HEADS, 2 * DIM, generator=generator, dtype=torch.float64)).requires_grad_()

    def attend(q, k, v, kv, k_sum, *_):
        initial = LinearAttentionState(kv, k_sum)
        out, state = mapped_linear_attention(q, k, v, *made, initial_state=initial, chunk_size=1, return_state=True)
        return out, state.kv_state_BHFV, state.k_sum_BHF

    # chunks of one token: three spans
    torch.autograd.gradcheck(attend, (q, k, v, kv, k_sum, *weights(made)), fast_mode=True)


def test_split_and_resume(short_spans):
    inputs, made = problem(40), maps("hedgehog_softmax")
    whole, final = mapped_linear_attention(*inputs, *made, chunk_size=CHUNK, return_state=True)
    state, parts = None, []
    for part in (slice(0, 19), slice(19, 20), slice(20, 40)):
        x = [tensor[:, :, part] for tensor in inputs]
        out, state = mapped_linear_attention(*x, *made, initial_state=state, chunk_size=CHUNK, return_state=True)
        parts.append(out)
    assert_same_with_gradients(torch.cat(parts, dim=2), whole, [*inputs, *weights(made)])
    torch.testing.assert_close(state.kv_state_BHFV, final.kv_state_BHFV)
    torch.testing.assert_close(state.k_sum_BHF, final.k_sum_BHF)


@pytest.mark.parametrize("learn", [(True, False), (False, True)], ids=["map of q", "map of k"])
def test_only_what_learns_gets_a_gradient(learn, short_spans):
    q, k, v = (x.detach() for x in problem(40))
    made = maps("hedgehog_softmax")
    for feature_map, learns in zip(made, learn, strict=True):
        feature_map.requires_grad_(learns)
    out, reference = mapped_linear_attention(q, k, v, *made, chunk_size=CHUNK)[0], expected(q, k, v, *made)
    assert_same_with_gradients(out, reference, [weight for weight in weights(made) if weight.requires_grad])
    for feature_map in made:
        feature_map.requires_grad_(False)
    assert not mapped_linear_attention(q, k, v, *made, chunk_size=CHUNK)[0].requires_grad
    v.requires_grad_()
    out, reference = mapped_linear_attention(q, k, v, *made, chunk_size=CHUNK)[0], expected(q, k, v, *made)
    assert_same_with_gradients(out, reference, [v])


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_beside_float64(dtype, near, short_spans):
    inputs, made = problem(40, dtype=dtype), maps("hedgehog_softmax", torch.float32)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    exact_maps = maps("hedgehog_softmax")
    out, _ = mapped_linear_attention(*inputs, *made, chunk_size=CHUNK)
    assert out.dtype == dtype
    reference = expected(*exact, *exact_maps)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(out, [*inputs, *weights(made)], grad.to(dtype))
    right = torch.autograd.grad(reference, [*exact, *weights(exact_maps)], grad)
    assert [x.dtype for x in found] == [dtype] * 3 + [torch.float32] * 2
    for x, y in zip([out, *found], [reference, *right], strict=True):
        assert (x.double() - y).norm() <= near * y.norm()


def test_nothing_of_the_features_size_is_kept():
    """q, k, v, o and the denominator, whatever F is; keys once for all query heads."""
    q, k, v = problem(40, dtype=torch.float32)
    made = maps("taylor", torch.float32)
    assert made[0].num_features > 4 * DIM
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        out, _ = mapped_linear_attention(q, k, v, *made, chunk_size=CHUNK)
    numbers = sum(x.numel() for x in kept.values() if x.is_floating_point())
    assert numbers == q.numel() + k.numel() + v.numel() + out.numel() + out[..., 0].numel()


def test_maps_that_have_to_be_called_are_refused():
    class Biased(type(maps("relu")[0])):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.bias = torch.nn.Parameter(torch.zeros(self.feature_dim))

    biased = [Biased(num_heads=HEADS, head_dim=DIM, side=side) for side in ("query", "key")]
    with pytest.raises(ValueError, match="parameters beside its projection, which would get no gradient: compute φ"):
        mapped_linear_attention(*problem(5, dtype=torch.float32), *biased)
    elsewhere = [feature_map.to("meta") for feature_map in maps("relu")]
    with pytest.raises(ValueError, match="a feature map lies on meta, not on cpu"):
        mapped_linear_attention(*problem(5), *elsewhere)


def test_no_tokens():
    q, k, v = (x[:, :, :0] for x in problem(5))
    made = maps("hedgehog_softmax")
    out, state = mapped_linear_attention(q, k, v, *made, return_state=True)
    assert out.shape == (2, HEADS, 0, 3) and not state.k_sum_BHF.any()
    assert torch.autograd.grad(out.sum() + state.k_sum_BHF.sum(), [q, k, *weights(made)])[0].shape == q.shape


def test_shapes_that_do_not_fit_are_named():
    q, k, v = problem(5)
    made = maps("elu")
    with pytest.raises(ValueError, match=r"k \(2, 2, 4, 6\) must be \(B, K, L, D\) = \(2, 2, 5, 6\)"):
        mapped_linear_attention(q, k[:, :, :4], v, *made)
    with pytest.raises(ValueError, match=r"v .* must be \(B, K, L, V\)"):
        mapped_linear_attention(q, k, v[:, :, :4], *made)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, not 0"):
        mapped_linear_attention(q, k, v, *made, chunk_size=0)

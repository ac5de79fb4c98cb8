"""The Triton kernel of the distillation loss, in Triton's interpreter, against the PyTorch form in float64.

The interpreter cannot multiply bfloat16, so there the kernel widens the operands of its products after they were
rounded: what is tested is the arithmetic of the 16-bit kernel, tile by tile, without its instructions.
"""

from __future__ import annotations

import os

import numpy
import pytest
import torch

from hedgehog.kernels import distill_backends, distill_limits, distill_loss
from hedgehog.kernels.feature_maps import make_feature_map

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: the kernels cannot run on CPU tensors", allow_module_level=True)
if triton.__version__.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
    pytest.skip("Triton 3.6's interpreter needs numpy before 2.4", allow_module_level=True)

from hedgehog.kernels import distill_tiles, distill_triton  # noqa: E402
from hedgehog.kernels.distill_triton import Tiles, pinned_tiles, triton_distillation_loss  # noqa: E402
from hedgehog.kernels.map_training import sampled_row_weights  # noqa: E402
from hedgehog.kernels.visible_ranges import Visibility  # noqa: E402
from hedgehog.pipeline.allocation_peak import allocation_peak  # noqa: E402

BATCH, HEADS, KV_HEADS, DIM = 2, 2, 1, 16
SMALL = Tiles(chunk=16, rows=32, passing=16, weight_rows=32)


def inputs(length, *, dim=DIM, heads=HEADS, batch=BATCH, dtype=torch.float32, size=2.0):
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, heads, length, dim), (batch, KV_HEADS, length, dim)]
    return [size * torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def maps(name="hedgehog_softmax", *, heads=HEADS, dim=DIM, feature_dim=None, noise=0.2):
    generator = torch.Generator().manual_seed(7)
    pair = [
        make_feature_map(name, num_heads=heads, head_dim=dim, feature_dim=feature_dim, side=side)
        for side in ("query", "key")
    ]
    for feature_map in pair:
        feature_map.weight.data += noise * torch.randn(feature_map.weight.shape, generator=generator)
    return pair


def mask_of(kind, length):
    """Row 0 and row 1 differ: padding left and right; holes and nothing at all."""
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    if kind == "left and right":
        mask[0, : length // 3] = False
        mask[1, length - length // 3 :] = False
    elif kind == "holes and nothing":
        mask[0, 1::4] = False
        mask[1] = False
    return None if kind == "none" else mask


def segments_of(length):
    return torch.stack([torch.arange(length) // 10, torch.arange(length) // 40])


def gradients(loss, pair):
    return torch.autograd.grad(loss, [m.weight for m in pair if m.weight.requires_grad], retain_graph=True)


def assert_agrees(result, pair, q, k, *, loss_error=1e-5, gradient_error=1e-4, **options):
    """Against float64 on the same numbers. `loss_error` is also the KL's error over the mean ℓ_i."""
    exact = distill_loss.attention_distillation_loss(q.double(), k.double(), *pair, **options)
    assert result.loss.dtype == result.kl_H.dtype == torch.float32
    # what float32 makes of nothing, as in a row that sees one key; weights of one's own may be far smaller
    nothing = 1e-15 if "row_weights_BL" in options else 1e-6
    torch.testing.assert_close(result.loss.detach().double(), exact.loss.detach(), rtol=loss_error, atol=nothing)
    scale = float((exact.kl_H + exact.entropy_H).mean())
    for name in ("kl_H", "entropy_H"):
        found, expected = getattr(result, name), getattr(exact, name)
        assert float((found - expected).abs().max()) <= loss_error * scale + 1e-6, name
    assert result.loss.requires_grad == exact.loss.requires_grad
    if exact.loss.requires_grad:
        for found, expected in zip(gradients(result.loss, pair), gradients(exact.loss, pair), strict=True):
            assert (found.double() - expected).norm() <= gradient_error * expected.norm() + nothing


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("padding", ["none", "left and right", "holes and nothing"])
@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_equals_the_pytorch_form_at_the_tails(length, padding, packed):
    q, k = inputs(length, heads=1)
    pair = maps(heads=1)
    options = {"mask_BL": mask_of(padding, length), "segment_ids_BL": segments_of(length) if packed else None}
    result = triton_distillation_loss(q, k, *pair, tiles=pinned_tiles(90), **options)
    assert_agrees(result, pair, q, k, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["hedgehog_softmax", "hedgehog_exp", "hedgehog_joint"])
def test_16_bit_operands_cost_less_than_a_hundredth_of_the_gradient(name, dtype):
    q, k = inputs(65, dtype=dtype, size=1.0)
    pair = maps(name)
    options = {"mask_BL": mask_of("left and right", 65), "segment_ids_BL": segments_of(65)}
    result = triton_distillation_loss(q, k, *pair, tiles=pinned_tiles(80), **options)
    assert_agrees(result, pair, q, k, loss_error=1e-3, gradient_error=1e-2, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_operands_have_room_for_the_weights_of_many_rows(dtype):
    """A row of a large batch weighs 1e-7, and float16 ends at 6e-8."""
    q, k = inputs(20, heads=1, dtype=dtype, size=1.0)
    pair, weights = maps(heads=1), torch.full((BATCH, 20), 1e-7)
    result = triton_distillation_loss(q, k, *pair, row_weights_BL=weights)
    assert_agrees(result, pair, q, k, loss_error=1e-3, gradient_error=1e-2, row_weights_BL=weights)


def test_the_maps_weights_keep_more_than_bfloat16s_bits():
    """A learned W is the identity and small changes; rounded to bfloat16, sharp maps would be others."""
    q, k = inputs(20, heads=1, dtype=torch.bfloat16)
    pair = maps(heads=1)
    for feature_map in pair:
        feature_map.weight.data *= 8
    assert_agrees(triton_distillation_loss(q, k, *pair), pair, q, k, loss_error=3e-3, gradient_error=1e-2)


@pytest.mark.parametrize("name", ["hedgehog_exp", "hedgehog_joint"])
def test_the_other_maps_in_float32(name):
    q, k = inputs(50)
    pair = maps(name)
    options = {"mask_BL": mask_of("left and right", 50)}
    result = triton_distillation_loss(q, k, *pair, tiles=pinned_tiles(86), **options)
    assert_agrees(result, pair, q, k, **options)


def test_segments_that_span_many_chunks_and_end_inside_them():
    """Z_i is put together from chunks before: of this segment only, keys alone, however many."""
    length = 120
    q, k = inputs(length, batch=1)
    mask = torch.ones(1, length, dtype=torch.bool)
    mask[:, :5], mask[:, 30:52], mask[:, 118:] = False, False, False
    segments = torch.cat([torch.zeros(24), torch.ones(70), torch.zeros(26)]).long()[None]
    pair = maps("hedgehog_exp")  # a key's features differ by orders of magnitude
    result = triton_distillation_loss(q, k, *pair, tiles=SMALL, mask_BL=mask, segment_ids_BL=segments)
    assert_agrees(result, pair, q, k, mask_BL=mask, segment_ids_BL=segments)


def test_the_maps_it_takes_are_those_that_validate_knows():
    assert {name for name, _ in distill_triton._FORMS} == set(distill_limits.FEATURE_MAPS)


def test_tiles_of_any_proportion_and_several_a_share(monkeypatch):
    monkeypatch.setattr(distill_triton, "WEIGHT_SHARES", 3)  # five tiles of 16: two, two and one
    q, k = inputs(70, batch=1, heads=1)
    pair = maps(heads=1)
    for tiles in (Tiles(chunk=32, rows=16, passing=16, weight_rows=16), Tiles(16, 64, 16, 64)):
        assert_agrees(triton_distillation_loss(q, k, *pair, tiles=tiles), pair, q, k)


@pytest.mark.parametrize(
    ("dim", "feature_dim", "dtype", "padding", "packed", "name"),
    [
        (64, 64, torch.float16, "left and right", True, "hedgehog_softmax"),
        (64, 128, torch.float32, "none", False, "hedgehog_joint"),
        (128, 128, torch.float32, "left and right", True, "hedgehog_softmax"),
        (128, 128, torch.float16, "holes and nothing", False, "hedgehog_exp"),
        (128, 32, torch.bfloat16, "none", True, "hedgehog_softmax"),
    ],
)
def test_head_and_feature_dims(dim, feature_dim, dtype, padding, packed, name):
    """Every two of these together, and all of them with two query heads on one key head."""
    q, k = inputs(70, dim=dim, size=1.0, dtype=dtype)
    pair = maps(name, dim=dim, feature_dim=feature_dim, noise=0.05)
    options = {"mask_BL": mask_of(padding, 70), "segment_ids_BL": segments_of(70) if packed else None}
    exact = dtype == torch.float32
    errors = {} if exact else {"loss_error": 1e-3, "gradient_error": 1e-2}
    result = triton_distillation_loss(q, k, *pair, tiles=pinned_tiles(90 if exact else 80), **options)
    assert_agrees(result, pair, q, k, **errors, **options)


@pytest.mark.parametrize("kind", ["one segment", "packed", "sampled"])
def test_bands_of_queries_and_blocks_of_keys(kind, monkeypatch):
    """g is gone after each; sums go on, tiles of which every query sees every key among them."""
    monkeypatch.setattr(distill_limits, "BAND_PROGRAMS", 4)  # two tiles of queries a band
    monkeypatch.setattr(distill_limits, "KEY_BLOCK", 64)
    length = 130
    q, k = inputs(length, heads=1)
    pair, mask, segments, weights = maps(heads=1), None, None, None
    if kind == "packed":
        mask = torch.ones(BATCH, length, dtype=torch.bool)
        mask[0, 50:100] = False  # a whole tile
        mask[1, 80:] = False
        segments = torch.stack([(torch.arange(length) > 110).int(), (torch.arange(length) > 20).int()])
    elif kind == "sampled":
        mask = mask_of("left and right", length)
        weights = sampled_row_weights(mask, 0.4, 32, 0.3)
        assert (weights.unfold(1, 32, 32) == 0).all(dim=2).sum() >= 4, "tiles that are passed over"
    options = {"mask_BL": mask, "segment_ids_BL": segments, "row_weights_BL": weights}
    result = triton_distillation_loss(q, k, *pair, tiles=SMALL, **options)
    assert_agrees(result, pair, q, k, **options)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_queries_and_a_few_heads_at_a_time(kv_heads, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 20, 4, DIM, generator=generator).transpose(1, 2)  # strided, as a model has it
    k = torch.randn(1, 20, kv_heads, DIM, generator=generator).transpose(1, 2)
    pair = maps(heads=4)
    whole = triton_distillation_loss(q, k, *pair)
    assert_agrees(whole, pair, q, k)
    monkeypatch.setattr(distill_limits, "MAX_SCRATCH_BYTES", 3 * 20 * 2 * DIM * 16)
    parts = triton_distillation_loss(q, k, *pair)
    assert torch.equal(parts.loss, whole.loss) and torch.equal(parts.kl_H, whole.kl_H)
    assert all(torch.equal(a, b) for a, b in zip(*(gradients(r.loss, pair) for r in (parts, whole)), strict=True))


class NoKernels:
    """Launches that do nothing: what is left of a pass is its allocations."""

    arg_names = ()

    def __getattr__(self, name):
        return self

    def __getitem__(self, grid):
        return lambda **arguments: None


@pytest.mark.parametrize(("heads", "at_once"), [(4, 4), (8, 3)])
def test_scratch_is_what_validate_reckons_with(heads, at_once, monkeypatch):
    """Torch's allocations during the pass, with bfloat16 operands as on a GPU."""
    length, feature_dim = 2000, 32
    monkeypatch.setattr(distill_limits, "MAX_SCRATCH_BYTES", at_once * length * 2 * feature_dim * 12)
    for kernels in ("_maps", "_tiles"):
        monkeypatch.setattr(distill_triton, kernels, NoKernels())
    q, k = inputs(length, batch=1, heads=heads, dtype=torch.bfloat16)
    pair = maps(heads=heads, feature_dim=feature_dim)
    assert distill_limits.heads_at_once(heads, length, 2 * feature_dim) == at_once
    with allocation_peak("cpu") as peak:
        triton_distillation_loss(q, k, *pair)
    expected = distill_limits.scratch_bytes(heads, 1, length, DIM, feature_dim, 2 * feature_dim)
    learned = sum(4 * weight.numel() for feature_map in pair for weight in feature_map.parameters())
    assert peak.num_bytes - learned == pytest.approx(expected, rel=0.05), "besides dW, which is another term"


@pytest.mark.parametrize("eps", [1e-30, 1e-2])
def test_eps_at_its_limits(eps):
    q, k = inputs(40)
    pair = maps()
    assert_agrees(triton_distillation_loss(q, k, *pair, eps=eps), pair, q, k, eps=eps)


def test_features_that_underflow_keep_a_finite_loss_and_a_gradient():
    q, k = inputs(20, size=200.0)
    pair = maps(noise=0.0)
    for dtype in (torch.float32, torch.bfloat16):
        result = triton_distillation_loss(q.to(dtype), k.to(dtype), *pair)
        assert result.loss.isfinite()
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients(result.loss, pair))


@triton.jit
def exp2_too_large(x, INTERPRETED: tl.constexpr):
    return tl.exp2(x) * (1 + 2.0**-22)


@triton.jit
def log2_too_small(x, INTERPRETED: tl.constexpr):
    exact = tl.log2(x)
    return exact - 2.0**-22 * tl.maximum(tl.abs(exact), 1.0)


def test_what_the_gpus_own_exp2_and_log2_cost(monkeypatch):
    """ex2.approx and lg2.approx are off by 2**-22 at most: here always, and so that it adds up."""
    monkeypatch.setattr(distill_tiles, "_exp2", exp2_too_large)
    monkeypatch.setattr(distill_tiles, "_log2", log2_too_small)
    q, k = inputs(40, heads=1)
    pair = maps("hedgehog_exp", heads=1)
    result = triton_distillation_loss(q, k, *pair, tiles=SMALL)
    assert_agrees(result, pair, q, k, loss_error=3e-6, gradient_error=3e-6)


def test_keys_beyond_the_exponents_bound():
    q, k = inputs(30, size=25.0)
    pair = maps("hedgehog_exp", noise=0.0)
    assert k.abs().max() > 45
    options = {"scale": 1e-3}
    assert_agrees(triton_distillation_loss(q, k, *pair, **options), pair, q, k, gradient_error=3e-4, **options)


def test_the_gradient_vanishes_where_the_student_is_the_teacher():
    """Keys that are all equal: 1/Z = a/s, and rounding either before the difference would leave noise."""
    q, k = inputs(60, dtype=torch.bfloat16)
    k = k[:, :, :1].expand_as(k)
    pair = maps()
    result = triton_distillation_loss(q, k, *pair)
    assert result.kl_H.abs().max() < 1e-5
    assert all(g.abs().max() < 1e-6 for g in gradients(result.loss, pair))


def test_row_weights_scale_and_the_given_log_sum():
    q, k = inputs(33)
    pair = maps()
    mask = mask_of("left and right", 33)
    weights = torch.rand(33, BATCH, generator=torch.Generator().manual_seed(1)).T  # strided
    options = {"mask_BL": mask, "row_weights_BL": weights, "scale": 0.4}
    computed = triton_distillation_loss(q, k, *pair, **options)
    assert_agrees(computed, pair, q, k, **options)
    visible = torch.ones(33, 33, dtype=torch.bool).tril() & mask[:, None, None, :]
    t = (0.4 * q @ k.transpose(-1, -2)).masked_fill(~visible, -torch.inf)
    given = triton_distillation_loss(q, k, *pair, log_sum_exp_BHL=torch.logsumexp(t, dim=-1), **options)
    assert_agrees(given, pair, q, k, **options)
    shifted = triton_distillation_loss(q, k, *pair, log_sum_exp_BHL=torch.logsumexp(t, dim=-1) + 1, **options)
    assert (shifted.loss - given.loss).abs() > 0.1, "the given sum is what is used"


@pytest.mark.parametrize("place", [0.0, 0.7])
def test_tiles_without_a_weight_are_passed_over(place):
    """Half of the rows in blocks of eight: tiles of sixteen are taken whole, by half, or not at all."""
    q, k = inputs(90)
    mask = mask_of("left and right", 90)
    weights = sampled_row_weights(mask, 0.4, 8, place)
    assert 0.3 < (weights == 0).float().mean() < 0.8
    pair = maps()
    tiles = Tiles(chunk=16, rows=32, passing=16, weight_rows=16)
    options = {"mask_BL": mask, "row_weights_BL": weights}
    result = triton_distillation_loss(q, k, *pair, tiles=tiles, **options)
    assert_agrees(result, pair, q, k, **options)


def test_a_row_without_a_weight_may_have_any_logits():
    """Its L is not known, or is the teacher's: its a is no number to multiply 0 with."""
    q, k = inputs(40, heads=1)
    weights = torch.full((BATCH, 40), 1 / 64)
    weights[:, 3::4] = 0
    q[:, :, 3::4] *= 40
    logits = (q @ k.expand_as(q).mT * DIM**-0.5).tril()
    assert logits.abs().max() > 215
    pair, options = maps(heads=1), {"row_weights_BL": weights}
    assert_agrees(triton_distillation_loss(q, k, *pair, tiles=SMALL, **options), pair, q, k, **options)
    given = torch.full((BATCH, 1, 40), float("nan"))
    given[weights[:, None] > 0] = logits.masked_fill(logits == 0, -torch.inf).logsumexp(-1)[weights[:, None] > 0]
    result = triton_distillation_loss(q, k, *pair, tiles=SMALL, log_sum_exp_BHL=given, **options)
    assert_agrees(result, pair, q, k, **options)


def test_one_visibility_serves_every_layer_of_its_batch_alone():
    q, k = inputs(20, heads=1)
    pair, mask = maps(heads=1), mask_of("left and right", 20)
    visibility = Visibility(mask, None, None)
    alone = triton_distillation_loss(q, k, *pair, mask_BL=mask)
    for _ in range(2):
        again = triton_distillation_loss(q, k, *pair, mask_BL=mask, visibility=visibility)
        assert torch.equal(again.loss, alone.loss)
    assert len(visibility._known) == 1
    with pytest.raises(ValueError, match="other masks"):
        triton_distillation_loss(q, k, *pair, mask_BL=mask.clone(), visibility=visibility)


def test_a_frozen_map_gets_no_gradient_and_the_other_one_its_own():
    q, k = inputs(20, batch=1)
    for frozen in (0, 1):
        pair = maps()
        pair[frozen].weight.requires_grad_(False)
        assert_agrees(triton_distillation_loss(q, k, *pair), pair, q, k)
    pair = maps()
    learning = triton_distillation_loss(q, k, *pair)
    measured = triton_distillation_loss(q, k, *pair, grad=False)
    assert not measured.loss.requires_grad
    assert torch.equal(measured.loss, learning.loss.detach()) and torch.equal(measured.kl_H, learning.kl_H)
    with torch.no_grad():
        assert not triton_distillation_loss(q, k, *pair).loss.requires_grad


def test_padding_is_never_read_and_no_real_token_is_no_loss():
    q, k = inputs(20)
    pair, mask = maps(), mask_of("left and right", 20)
    hidden = ~mask[:, None, :, None]
    clean = triton_distillation_loss(q, k, *pair, mask_BL=mask)
    q, k = (x.masked_fill(hidden, float("nan")) for x in (q, k))
    poisoned = triton_distillation_loss(q, k, *pair, mask_BL=mask)
    assert torch.equal(poisoned.loss, clean.loss)
    assert all(torch.equal(a, b) for a, b in zip(*(gradients(r.loss, pair) for r in (poisoned, clean)), strict=True))
    nothing = triton_distillation_loss(q, k, *pair, mask_BL=torch.zeros_like(mask))
    assert nothing.loss == 0 and (nothing.kl_H == 0).all()
    assert all((g == 0).all() for g in gradients(nothing.loss, pair))


def test_every_number_of_scratch_is_written_before_it_is_read(monkeypatch):
    """new_empty filled with NaN: nothing of it may reach a result."""
    q, k = inputs(37)
    pair, options = maps(), {"mask_BL": mask_of("holes and nothing", 37), "segment_ids_BL": segments_of(37)}

    new_empty = torch.Tensor.new_empty

    def poisoned(tensor, *size, **kwargs):
        fresh = new_empty(tensor, *size, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda tensor: torch.full_like(tensor, float("nan")))
    result = triton_distillation_loss(q, k, *pair, tiles=SMALL, **options)
    monkeypatch.undo()
    assert_agrees(result, pair, q, k, **options)


def test_mistakes_are_named():
    q, k = inputs(4)
    pair = maps()
    with pytest.raises(ValueError, match="log_sum_exp_BHL"):
        triton_distillation_loss(q, k, *pair, log_sum_exp_BHL=torch.zeros(BATCH, HEADS, 3))
    with pytest.raises(ValueError, match="mask_BL"):
        triton_distillation_loss(q, k, *pair, mask_BL=torch.ones(BATCH, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"k is torch\.bfloat16"):
        triton_distillation_loss(q, k.bfloat16(), *pair)
    with pytest.raises(ValueError, match="no kernel for float64"):
        triton_distillation_loss(q.double(), k.double(), *pair)
    with pytest.raises(ValueError, match="feature_dim 24"):
        triton_distillation_loss(q, k, *maps(feature_dim=24))


class TestChoice:
    """`distill_backends`, which no GPU is needed to ask."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        def capability(major, minor):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

        capability(9, 0)
        monkeypatch.setattr(distill_triton, "INTERPRETED", False)
        return capability

    def choose(self, pair=None, device="cuda", dtype=torch.bfloat16, requested="auto"):
        return distill_backends.select_distill_backend(requested, *(pair or maps()), device=device, dtype=dtype)

    def test_the_kernel_where_it_can_run_and_is_right(self, gpu, monkeypatch):
        monkeypatch.setattr(distill_backends, "disagreement", lambda *_: None)
        chosen = self.choose()
        assert (chosen.name, chosen.reason, chosen.loss) == ("triton", "sm_90, bfloat16", triton_distillation_loss)
        monkeypatch.setattr(distill_backends, "disagreement", lambda *_: "the kernel differs")
        assert self.choose()[:2] == ("torch", "the kernel differs")

    def test_the_pytorch_form_elsewhere_and_why(self, gpu, monkeypatch):
        plain = [make_feature_map("elu", num_heads=HEADS, head_dim=DIM, side=side) for side in ("query", "key")]
        chosen = [
            self.choose(device="cpu"),
            self.choose(requested="torch"),
            self.choose(dtype=torch.float32),
            self.choose(pair=plain),
            self.choose(pair=maps(feature_dim=24)),
        ]
        gpu(7, 5)
        chosen.append(self.choose())
        assert all(c.name == "torch" and c.loss is distill_loss.attention_distillation_loss for c in chosen)
        assert [c.reason for c in chosen] == [
            "no kernel for cpu",
            "requested",
            "float32 tiles do not fit on a GPU's chip; the kernel takes bfloat16 and float16",
            "no kernel for feature map elu",
            "head_dim 16, feature_dim 24: not both of 16, 32, 64, 128",
            "the kernel needs bfloat16 tensor cores (sm_80), the GPU is sm_75",
        ]

    def test_not_where_triton_interprets(self, gpu, monkeypatch):
        monkeypatch.setattr(distill_triton, "INTERPRETED", True)
        assert self.choose().reason == "TRITON_INTERPRET is set: no kernel is compiled in this process"

    def test_without_triton(self, gpu, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "hedgehog.kernels.distill_triton", None)
        assert self.choose().reason.startswith("Triton is not there: ")

    def test_an_unknown_backend_lists_the_known(self):
        with pytest.raises(ValueError, match="unknown backend 'cuda'; known: auto, torch"):
            self.choose(requested="cuda")

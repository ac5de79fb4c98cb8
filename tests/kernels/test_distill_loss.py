"""The tiled distillation loss against the materialised one, and both against the equation."""

from __future__ import annotations

import pytest
import torch

from hedgehog.kernels import map_training
from hedgehog.kernels.distill_loss import (
    LOSS_EPS,
    attention_distillation_loss,
    materialised_distillation_loss,
    output_mse_loss,
)
from hedgehog.kernels.feature_maps import FEATURE_MAPS, make_feature_map
from hedgehog.kernels.linear_attention import quadratic_linear_attention

BATCH, HEADS, DIM = 2, 4, 4


def maps(name="hedgehog_softmax", *, heads=HEADS, dtype=torch.float64, noise=0.1, **kwargs):
    generator = torch.Generator().manual_seed(7)
    pair = [make_feature_map(name, num_heads=heads, head_dim=DIM, side=side, **kwargs) for side in ("query", "key")]
    for feature_map in pair:
        feature_map.to(dtype)
        for parameter in feature_map.parameters():
            parameter.data += noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return pair


def teacher(length, *, batch=BATCH, heads=HEADS, kv_heads=2, dtype=torch.float64, size=2.0):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, length, DIM), (batch, kv_heads, length, DIM), (batch, kv_heads, length, 3)]
    return [size * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def padding(length, kind):
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    if kind == "left":
        mask[0, : length // 3] = False
    elif kind == "right":
        mask[1, length - length // 3 :] = False
    elif kind == "holes":
        mask[1, 1::4] = False
    elif kind == "one row":
        mask[0] = False
    return None if kind == "none" else mask


def weights_of(*feature_maps):
    return [parameter for feature_map in feature_maps for parameter in feature_map.parameters()]


def assert_same_loss(tiled, reference, feature_maps, rtol=1e-7):
    torch.testing.assert_close(tiled.loss.detach(), reference.loss.detach(), rtol=rtol, atol=0)
    torch.testing.assert_close(tiled.kl_H, reference.kl_H, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(tiled.entropy_H, reference.entropy_H, rtol=1e-5, atol=1e-7)
    weights = weights_of(*feature_maps)
    if not weights:
        assert not tiled.loss.requires_grad
        return
    grads = torch.autograd.grad(tiled.loss, weights)
    for grad, exact in zip(grads, torch.autograd.grad(reference.loss, weights), strict=True):
        assert (grad - exact).norm() <= 10 * rtol * exact.norm()


@pytest.mark.parametrize("causal", [True, False])
def test_reference_is_the_equation(causal):
    q, k, _ = teacher(5)
    mask, segments = padding(5, "left"), torch.tensor([[0, 0, 0, 0, 0], [1, 1, 2, 2, 2]])
    map_q, map_k = maps()
    row_weights = torch.rand(BATCH, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    result = materialised_distillation_loss(
        q, k, map_q, map_k, mask_BL=mask, segment_ids_BL=segments, row_weights_BL=row_weights, scale=0.7, causal=causal
    )
    phi_q, phi_k = map_q(q), map_k(k.repeat_interleave(2, dim=1))
    loss = torch.zeros((), dtype=torch.float64)
    kl_H, total = torch.zeros(HEADS, dtype=torch.float64), 0.0
    for b in range(BATCH):
        for i in range(5):
            if not mask[b, i]:
                continue
            total += float(row_weights[b, i])
            seen = [j for j in range(i + 1 if causal else 5) if mask[b, j] and segments[b, i] == segments[b, j]]
            for h in range(HEADS):
                a = torch.stack([0.7 * q[b, h, i] @ k[b, h // 2, j] for j in seen]).softmax(0)
                s = torch.stack([phi_q[b, h, i] @ phi_k[b, h, j] + LOSS_EPS for j in seen])
                row = -(a * (s / s.sum()).log()).sum()
                loss = loss + row_weights[b, i] * row / HEADS
                kl_H[h] += (row_weights[b, i] * (row + (a * a.log()).sum())).detach()
    torch.testing.assert_close(result.loss, loss)
    torch.testing.assert_close(result.kl_H, (kl_H / total).float())


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_tiled_equals_materialised_for_every_feature_map(name):
    q, k, _ = teacher(21)
    pair = maps(name)
    options = {"mask_BL": padding(21, "left"), "positions_BL": torch.arange(21).expand(BATCH, -1) + 3}
    tiled = attention_distillation_loss(q, k, *pair, block_size=8, **options)
    assert_same_loss(tiled, materialised_distillation_loss(q, k, *pair, **options), pair)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "encoder"])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("pad", ["none", "left", "right", "holes", "one row"])
@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_tiled_equals_materialised(length, pad, packed, causal):
    q, k, _ = teacher(length)
    pair = maps()
    segments = torch.stack([torch.arange(length) // 10, torch.arange(length) // 64]) if packed else None
    options = {"mask_BL": padding(length, pad), "segment_ids_BL": segments, "causal": causal}
    tiled = attention_distillation_loss(q, k, *pair, block_size=16, **options)
    assert_same_loss(tiled, materialised_distillation_loss(q, k, *pair, **options), pair)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "encoder"])
@pytest.mark.parametrize("max_cells", [1, 200, 2000])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_few_heads_at_a_time_change_nothing(kv_heads, max_cells, causal, monkeypatch):
    monkeypatch.setitem(map_training.MAX_CELLS, "cpu", max_cells)
    q, k, v = teacher(20, kv_heads=kv_heads)
    pair, options = maps(), {"mask_BL": padding(20, "left"), "causal": causal}
    tiled = attention_distillation_loss(q, k, *pair, block_size=4, **options)
    assert_same_loss(tiled, materialised_distillation_loss(q, k, *pair, **options), pair)
    output = output_mse_loss(q, k, v, *pair, **options)
    monkeypatch.undo()
    torch.testing.assert_close(output.mse_H, output_mse_loss(q, k, v, *pair, **options).mse_H)


@pytest.mark.parametrize("block_size", [4, 64])
def test_spans_of_an_encoder_that_are_filled_up_see_no_filling(block_size):
    """18 and 20 tokens are worked on together: the shorter row's filling must be hidden from it."""
    q, k, v = teacher(20)
    mask = torch.ones(BATCH, 20, dtype=torch.bool)
    mask[1, 18:] = False
    pair = maps("hedgehog_exp", noise=0.3)
    tiled = attention_distillation_loss(q, k, *pair, block_size=block_size, mask_BL=mask, causal=False)
    assert_same_loss(tiled, materialised_distillation_loss(q, k, *pair, mask_BL=mask, causal=False), pair)
    parts = [
        output_mse_loss(q[r : r + 1, :, :n], k[r : r + 1, :, :n], v[r : r + 1, :, :n], *pair, causal=False)
        for r, n in ((0, 20), (1, 18))
    ]
    whole = output_mse_loss(q, k, v, *pair, mask_BL=mask, causal=False)
    torch.testing.assert_close(whole.loss, (20 * parts[0].loss + 18 * parts[1].loss) / 38)


@pytest.mark.parametrize("block_size", [1, 7, 64, 500])
def test_block_size_changes_nothing(block_size):
    q, k, _ = teacher(30)
    pair = maps("hedgehog_exp", feature_dim=6)
    tiled = attention_distillation_loss(q, k, *pair, block_size=block_size)
    assert_same_loss(tiled, materialised_distillation_loss(q, k, *pair), pair)


def with_weights(map_q, map_k, loss):
    """`loss` as a function of the two weights, for gradcheck."""
    start = [feature_map.weight.detach().clone().requires_grad_() for feature_map in (map_q, map_k)]

    def function(weight_q, weight_k):
        for feature_map, weight in ((map_q, weight_q), (map_k, weight_k)):
            feature_map._parameters["weight"] = weight
        return loss(map_q, map_k).loss

    return function, start


@pytest.mark.parametrize("name", [n for n, cls in FEATURE_MAPS.items() if cls.trainable])
def test_gradcheck_attention_loss(name):
    q, k, _ = teacher(5, batch=1, heads=2, kv_heads=1)
    mask = torch.tensor([[False, True, True, True, True]])
    function, start = with_weights(
        *maps(name, heads=2, noise=0.3, feature_dim=2),
        lambda *pair: attention_distillation_loss(q, k, *pair, mask_BL=mask, block_size=3),
    )
    assert torch.autograd.gradcheck(function, start)


def test_gradcheck_output_loss():
    q, k, v = teacher(5, batch=1, heads=2, kv_heads=1)
    mask = torch.tensor([[True, True, True, True, False]])
    function, start = with_weights(
        *maps(heads=2, feature_dim=2), lambda *pair: output_mse_loss(q, k, v, *pair, mask_BL=mask)
    )
    assert torch.autograd.gradcheck(function, start)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "encoder"])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("pad", ["none", "left", "right", "holes", "one row"])
def test_output_loss_equals_quadratic_attention_against_softmax(pad, packed, causal):
    length = 20
    q, k, v = teacher(length)
    map_q, map_k = maps()
    mask = padding(length, pad)
    real = torch.ones(BATCH, length, dtype=torch.bool) if mask is None else mask
    segments = torch.arange(length).expand(BATCH, -1) // 8
    visible = torch.ones(length, length, dtype=torch.bool)
    visible = (visible.tril() if causal else visible) & real[:, None, None, :]
    if packed:
        visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
    k_heads, v_heads = (x.repeat_interleave(2, dim=1) for x in (k, v))
    logits = (0.6 * q @ k_heads.transpose(-1, -2)).masked_fill(~visible, -1e30)
    y = logits.softmax(-1) @ v_heads
    options = {"mask_BL": mask, "segment_ids_BL": segments if packed else None, "causal": causal}
    o = quadratic_linear_attention(map_q(q), map_k(k_heads), v, **options)
    error = ((o - y).square().mean(-1) * real[:, None]).sum(dim=(0, 2)) / real.sum()
    expected_grads = torch.autograd.grad(error.mean(), weights_of(map_q, map_k))

    for teacher_output in (None, y):
        result = output_mse_loss(q, k, v, map_q, map_k, scale=0.6, teacher_output_BHLV=teacher_output, **options)
        torch.testing.assert_close(result.mse_H, error.detach().float())
        torch.testing.assert_close(result.loss, error.mean())
        for grad, expected in zip(
            torch.autograd.grad(result.loss, weights_of(map_q, map_k)), expected_grads, strict=True
        ):
            torch.testing.assert_close(grad, expected)


def test_kl_is_zero_exactly_where_the_student_is_the_teacher():
    """Keys that are all equal: softmax attention is uniform, and so is any linear one."""
    q, k, v = teacher(10)
    k = k[:, :, :1].expand_as(k)
    v = v[:, :, :1].expand_as(v)
    pair = maps()
    result = attention_distillation_loss(q, k, *pair)
    torch.testing.assert_close(result.kl_H, torch.zeros(HEADS), atol=1e-7, rtol=0)
    uniform = torch.arange(1, 11).double().log().mean()
    torch.testing.assert_close(result.loss.detach(), uniform)
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(result.loss, weights_of(*pair)))
    assert output_mse_loss(q, k, v, *pair).loss < 1e-24


def test_training_the_maps_lowers_the_kl():
    q, k, _ = teacher(40, dtype=torch.float32, size=1.0)
    pair = maps(dtype=torch.float32, noise=0.0)
    optimizer = torch.optim.Adam(weights_of(*pair), lr=0.05)
    first = attention_distillation_loss(q, k, *pair).kl_H
    for _ in range(60):
        optimizer.zero_grad()
        attention_distillation_loss(q, k, *pair).loss.backward()
        optimizer.step()
    last = attention_distillation_loss(q, k, *pair, grad=False).kl_H
    assert (last < 0.6 * first).all()


def test_float32_gradients_agree_to_1e_4_at_some_length():
    q, k, _ = teacher(300, batch=1, heads=2, kv_heads=1, dtype=torch.float32)
    pair = maps("hedgehog_exp", heads=2, dtype=torch.float32)
    tiled = attention_distillation_loss(q, k, *pair)
    exact_pair = maps("hedgehog_exp", heads=2)
    exact_pair[0].weight.data.copy_(pair[0].weight.data)
    exact_pair[1].weight.data.copy_(pair[1].weight.data)
    exact = materialised_distillation_loss(q.double(), k.double(), *exact_pair)
    grads = torch.autograd.grad(tiled.loss, weights_of(*pair))
    for grad, expected in zip(grads, torch.autograd.grad(exact.loss, weights_of(*exact_pair)), strict=True):
        assert (grad.double() - expected).norm() <= 1e-4 * expected.norm()


def test_bfloat16_inputs_are_computed_in_float32():
    q, k, v = (x.bfloat16() for x in teacher(70))
    low, high = maps(dtype=torch.bfloat16), maps(dtype=torch.bfloat16)
    for feature_map in high:
        feature_map.float()
    for loss in (attention_distillation_loss, lambda q, k, *pair: output_mse_loss(q, k, v, *pair)):
        a, b = loss(q, k, *low), loss(q.float(), k.float(), *high)
        assert a.loss.dtype == torch.float32
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
        grads = torch.autograd.grad(a.loss, weights_of(*low)), torch.autograd.grad(b.loss, weights_of(*high))
        for grad, exact in zip(*grads, strict=True):
            assert grad.dtype == torch.bfloat16
            torch.testing.assert_close(grad.float(), exact, rtol=2**-8, atol=1e-9)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_extreme_values_stay_finite(name):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (100 * torch.randn(1, HEADS, 70, DIM, generator=generator).sign() for _ in range(3))
    k[:, :, 5:9] = 0
    pair = maps(name, dtype=torch.float32, noise=0.0)
    for result in (attention_distillation_loss(q, k, *pair), output_mse_loss(q, k, v, *pair)):
        assert result.loss.isfinite()
        if result.loss.requires_grad:
            assert all(g.isfinite().all() for g in torch.autograd.grad(result.loss, weights_of(*pair)))


def test_features_that_never_meet_keep_a_gradient():
    """s = 0 exactly on a pair the teacher looks at: eps, not a clamp, keeps the loss finite and the way back open."""
    q = torch.tensor([8.0, 0.0, 0.0, 0.0]).expand(1, 1, 3, 4).double()
    k = torch.tensor([0.0, 8.0, 0.0, 0.0]).expand(1, 1, 3, 4).double().clone()
    k[:, :, 2, 0] = 1.0
    pair = maps("relu", heads=1, noise=0.0)
    k[:, :, 1, 0] = 4.0
    result = attention_distillation_loss(q, k, *pair)
    assert result.loss.isfinite()
    assert any(g.abs().max() > 0 for g in torch.autograd.grad(result.loss, weights_of(*pair)))


def test_no_real_token_at_all():
    q, k, v = teacher(5)
    pair = maps()
    mask = torch.zeros(BATCH, 5, dtype=torch.bool)
    for result in (
        attention_distillation_loss(q, k, *pair, mask_BL=mask),
        output_mse_loss(q, k, v, *pair, mask_BL=mask),
    ):
        assert result.loss == 0
        assert all((g == 0).all() for g in torch.autograd.grad(result.loss, weights_of(*pair)))
    assert (attention_distillation_loss(q, k, *pair, mask_BL=mask).kl_H == 0).all()


def test_padding_is_never_read():
    q, k, v = teacher(12)
    mask, pair = padding(12, "left"), maps()
    hidden = (~mask)[:, None, :, None]
    q_bad, k_bad, v_bad = (x.masked_fill(hidden, float("nan")) for x in (q, k, v))
    for loss in (attention_distillation_loss, lambda q, k, *pair, **o: output_mse_loss(q, k, v_bad, *pair, **o)):
        clean, poisoned = loss(q, k, *pair, mask_BL=mask), loss(q_bad, k_bad, *pair, mask_BL=mask)
        torch.testing.assert_close(poisoned.loss, clean.loss)


def test_row_weights_scale_and_select_rows():
    q, k, v = teacher(9)
    pair = maps()
    for loss in (attention_distillation_loss, lambda q, k, *pair, **o: output_mse_loss(q, k, v, *pair, **o)):
        default = loss(q, k, *pair).loss
        uniform = torch.full((BATCH, 9), 1 / (BATCH * 9), dtype=torch.float64)
        torch.testing.assert_close(loss(q, k, *pair, row_weights_BL=2 * uniform).loss, 2 * default)
        first_half = torch.zeros(BATCH, 9, dtype=torch.float64)
        first_half[:, :5] = 1 / (BATCH * 5)
        selected = loss(q, k, *pair, row_weights_BL=first_half).loss
        torch.testing.assert_close(selected, loss(q[:, :, :5], k[:, :, :5], *pair).loss)


@pytest.mark.parametrize("length,fraction,block", [(70, 0.25, 8), (70, 0.5, 16), (10, 0.1, 16), (33, 1.0, 8)])
def test_sampled_rows_weigh_on_average_what_all_rows_do(length, fraction, block):
    mask = padding(length, "left")
    places = 960  # divisible by all that the numbers of blocks divide into
    drawn = torch.stack(
        [map_training.sampled_row_weights(mask, fraction, block, (i + 0.5) / places) for i in range(places)]
    )
    real = mask.float() / mask.sum()
    torch.testing.assert_close(drawn.double().mean(0), real.double(), rtol=0.03, atol=0)
    taken = (drawn > 0).any(dim=1).float().sum(dim=1) / length  # of the rows' places
    assert (taken - fraction).abs().max() <= block / length + 1e-6
    if fraction == 1:
        torch.testing.assert_close(drawn[0], real)


def test_blocks_without_a_weight_are_passed_over(monkeypatch):
    q, k, _ = teacher(96)
    pair = maps("hedgehog_softmax")
    weights = map_training.sampled_row_weights(padding(96, "right"), 0.3, 16, 0.4).double()
    options = {"mask_BL": padding(96, "right"), "row_weights_BL": weights}
    tiles = []
    softmax = torch.softmax

    def seen(t, **kwargs):
        tiles.append(t.shape)
        return softmax(t, **kwargs)

    monkeypatch.setattr(torch, "softmax", seen)
    tiled = attention_distillation_loss(q, k, *pair, block_size=16, **options)
    monkeypatch.undo()
    assert_same_loss(tiled, materialised_distillation_loss(q, k, *pair, **options), pair)
    assert sum(shape[-2] == 16 for shape in tiles) == 3, "of the six and four that the two rows have"


def test_gradient_scales_with_what_comes_in_and_is_off_on_request():
    q, k, _ = teacher(9)
    pair = maps()
    once = torch.autograd.grad(attention_distillation_loss(q, k, *pair).loss, weights_of(*pair))
    thrice = torch.autograd.grad(3 * attention_distillation_loss(q, k, *pair).loss, weights_of(*pair))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)
    without = attention_distillation_loss(q, k, *pair, grad=False)
    assert not without.loss.requires_grad
    with torch.no_grad():
        assert not attention_distillation_loss(q, k, *pair).loss.requires_grad
    torch.testing.assert_close(without.loss, attention_distillation_loss(q, k, *pair).loss.detach())


def test_a_frozen_map_gets_no_gradient_and_the_other_one_its_own():
    q, k, v = teacher(9)
    map_q, map_k = maps()
    for loss in (attention_distillation_loss, lambda q, k, *pair: output_mse_loss(q, k, v, *pair)):
        both = torch.autograd.grad(loss(q, k, map_q, map_k).loss, [map_q.weight, map_k.weight])
        for frozen, learning, expected in ((map_q, map_k, both[1]), (map_k, map_q, both[0])):
            frozen.requires_grad_(False)
            (grad,) = torch.autograd.grad(loss(q, k, map_q, map_k).loss, [learning.weight])
            torch.testing.assert_close(grad, expected)
            frozen.requires_grad_(True)


def test_only_the_weights_gradient_is_kept():
    pair = maps()
    for length in (20, 200):
        q, k, v = teacher(length)
        for loss in (attention_distillation_loss, lambda q, k, *pair, v=v: output_mse_loss(q, k, v, *pair)):
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                result = loss(q, k, *pair)
            kept = [t for t in saved if t.data_ptr() in {x.data_ptr() for x in result.loss.grad_fn.saved_tensors}]
            assert sorted(t.shape for t in kept) == sorted(w.shape for w in weights_of(*pair))


def test_mistakes_are_named():
    q, k, _ = teacher(4)
    pair = maps()
    with pytest.raises(ValueError, match="must be \\(B, K, L, D\\)"):
        attention_distillation_loss(q, k[:, :, :3], *pair)
    with pytest.raises(ValueError, match="mask_BL"):
        attention_distillation_loss(q, k, *pair, mask_BL=torch.ones(BATCH, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="log_sum_exp_BHL"):
        attention_distillation_loss(q, k, *pair, log_sum_exp_BHL=torch.zeros(BATCH, 4))
    with pytest.raises(ValueError, match="block_size"):
        attention_distillation_loss(q, k, *pair, block_size=0)

"""Feature maps: formulas, start values, gradients, limits."""

from __future__ import annotations

import math

import pytest
import torch

from hedgehog.kernels.feature_maps import FEATURE_MAPS, KEY_EXPONENT_BOUND, bounded_exponent, make_feature_map

HEADS, DIM = 2, 4
SIDES = ("query", "key")
LEARNED = [name for name, cls in FEATURE_MAPS.items() if cls.trainable]


def build(name, side, **kwargs):
    return make_feature_map(name, num_heads=HEADS, head_dim=DIM, side=side, **kwargs)


def pair(name, **kwargs):
    return tuple(build(name, side, **kwargs) for side in SIDES)


def inputs(length=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, HEADS, length, DIM, generator=generator, dtype=dtype)


def attention_weights(map_q, map_k, q, k):
    scores = map_q(q) @ map_k(k).transpose(-1, -2)
    return scores / scores.sum(dim=-1, keepdim=True)


def test_registry_holds_the_families_of_the_paper():
    learned = {"hedgehog_softmax", "hedgehog_exp", "hedgehog_joint", "relu"}
    fixed = {"elu", "performer", "cosformer", "taylor", "exp_t"}
    assert learned <= set(LEARNED)
    assert fixed <= set(FEATURE_MAPS) - set(LEARNED)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_width_is_num_features_and_gradcheck(name, side):
    feature_map = build(name, side).double()
    assert feature_map(inputs()).shape == (2, HEADS, 5, feature_map.num_features)
    x = inputs()[:1, :, :2].requires_grad_()
    projection = feature_map.projection_HDP
    if projection is not None:
        projection = (projection + 0.1 * torch.randn(projection.shape, dtype=torch.float64)).detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, w: feature_map.features(x, w), (x, projection))
    else:
        assert torch.autograd.gradcheck(feature_map, (x,))


@pytest.mark.parametrize("name", [n for n in FEATURE_MAPS if n != "taylor"])
def test_features_are_not_negative(name):
    for side in SIDES:
        assert (build(name, side)(5 * inputs(dtype=torch.float32)) >= 0).all()


def test_hedgehog_formulas():
    x = inputs()
    z = x  # identity at the start
    softmax = torch.cat([z.softmax(-1), (-z).softmax(-1)], dim=-1)
    joint = torch.cat([2 * z, -2 * z], dim=-1).softmax(-1)
    exp = torch.cat([z.exp(), (-z).exp()], dim=-1)
    for side in SIDES:
        torch.testing.assert_close(build("hedgehog_softmax", side).double()(x), softmax)
        torch.testing.assert_close(build("hedgehog_joint", side).double()(x), joint)
    torch.testing.assert_close(build("hedgehog_exp", "key").double()(x), exp)
    # a query's features are the paper's up to a factor per query, which cancels in the attention weights
    ratio = build("hedgehog_exp", "query").double()(x) / exp
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))


def test_baseline_formulas():
    x = inputs()
    torch.testing.assert_close(build("elu", "key")(x), torch.where(x > 0, x + 1, x.exp()))
    torch.testing.assert_close(build("relu", "key").double()(x), x.clamp_min(0))
    torch.testing.assert_close(build("exp_t", "key", options={"temperature": 2.0})(x), (2 * x).exp())
    t = (inputs(seed=1) @ x.transpose(-1, -2)) / math.sqrt(DIM)
    taylor_q, taylor_k = pair("taylor")
    torch.testing.assert_close(taylor_q(inputs(seed=1)) @ taylor_k(x).transpose(-1, -2), 1 + t + t * t / 2)


def test_cosformer_weighs_by_distance_and_saturates():
    map_q, map_k = pair("cosformer", options={"max_positions": 8})
    x = torch.ones(1, HEADS, 10, DIM, dtype=torch.float64)
    positions = torch.arange(10).unsqueeze(0)
    scores = map_q(x, positions) @ map_k(x, positions).transpose(-1, -2)
    i, j = torch.meshgrid(positions[0].double(), positions[0].double(), indexing="ij")
    expected = DIM * torch.cos((i.clamp(max=8) - j.clamp(max=8)) * math.pi / 16)
    torch.testing.assert_close(scores[0, 0], expected)
    torch.testing.assert_close(map_k(x), map_k(x, positions))
    shifted = map_q(x, positions + 3)
    assert not torch.allclose(shifted, map_q(x, positions))


def test_performer_approaches_softmax_attention_and_redraws():
    q, k = 0.7 * inputs(seed=3), 0.7 * inputs(seed=4)
    exact = ((q @ k.transpose(-1, -2)) / math.sqrt(DIM)).softmax(-1)

    def error(features):
        maps = pair("performer", feature_dim=features)
        return (attention_weights(*(m.double() for m in maps), q, k) - exact).abs().mean()

    assert error(4096) < 0.01 < error(8)

    map_q, map_k = pair("performer", feature_dim=8, seed=5)
    assert torch.equal(map_q.projection_HDP, map_k.projection_HDP)
    first = map_q.projection_HDP.clone()
    map_q.redraw(6)
    assert not torch.allclose(map_q.projection_HDP, first)
    map_q.redraw(5)
    assert torch.equal(map_q.projection_HDP, first)
    block = first[:, :, :DIM]
    gram = block.transpose(1, 2) @ block
    torch.testing.assert_close(gram, torch.diag_embed(torch.diagonal(gram, dim1=1, dim2=2)), atol=1e-4, rtol=0)

    map_q.redraw(7)
    map_k.load_state_dict(map_q.state_dict())
    assert torch.equal(map_k.projection_HDP, map_q.projection_HDP)


@pytest.mark.parametrize("name", LEARNED)
def test_start_is_the_identity(name):
    feature_map = build(name, "query", options={"init_scale": 0.5})
    torch.testing.assert_close(feature_map.weight, 0.5 * torch.eye(DIM).expand(HEADS, -1, -1))
    assert feature_map.weight.dtype == torch.float32
    torch.testing.assert_close(build(name, "query", feature_dim=3).weight, torch.eye(DIM)[:, :3].expand(HEADS, -1, -1))


def test_wide_start_identity_blocks_have_different_scales():
    weight = build("hedgehog_softmax", "query", feature_dim=10).weight
    eye = torch.eye(DIM)
    torch.testing.assert_close(weight, torch.cat([eye, eye / 2, eye[:, :2] / 4], dim=1).expand(HEADS, -1, -1))


def test_wide_start_orthogonal_blocks():
    options = {"init": "identity+orthogonal"}
    query, key = pair("hedgehog_exp", feature_dim=3 * DIM, options=options)
    assert torch.equal(query.weight, key.weight), "both sides must start with the same rotations"
    blocks = query.weight.unflatten(2, (3, DIM)).transpose(1, 2)
    eye = torch.eye(DIM)
    torch.testing.assert_close(blocks[:, 0], eye.expand(HEADS, -1, -1))
    torch.testing.assert_close(blocks @ blocks.transpose(-1, -2), eye.expand(HEADS, 3, -1, -1))
    distinct = blocks[:, 1:].flatten(0, 1)
    assert torch.cdist(distinct.flatten(1), distinct.flatten(1)).fill_diagonal_(9).min() > 0.1
    other_seed = build("hedgehog_exp", "query", feature_dim=3 * DIM, options=options, seed=1).weight
    assert not torch.allclose(other_seed, query.weight)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_construction_and_reset_leave_the_global_generator_alone(name):
    before = torch.get_rng_state()
    feature_map = build(name, "query", seed=3)
    start = {key: value.clone() for key, value in feature_map.state_dict().items()}
    for value in feature_map.state_dict().values():
        value.zero_()
    feature_map.reset_parameters()
    assert all(torch.equal(value, start[key]) for key, value in feature_map.state_dict().items())
    assert torch.equal(before, torch.get_rng_state())


def test_construction_on_the_meta_device():
    with torch.device("meta"):
        maps = [build(name, "key") for name in FEATURE_MAPS]
    assert all(tensor.is_meta for m in maps for tensor in m.state_dict().values())


@pytest.mark.parametrize("size", [100.0, 1e4])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_extreme_inputs_give_finite_features_and_gradients(name, side, size):
    feature_map = build(name, side)
    x = (size * torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])).expand(
        1, HEADS, 3, 4
    )
    x = x.clone().requires_grad_()
    phi = feature_map(x)
    assert phi.isfinite().all()
    phi.log1p().sum().backward() if name != "taylor" else phi.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in feature_map.parameters())


def test_bounded_exponent_is_exact_within_the_bound_and_never_flat():
    bound = KEY_EXPONENT_BOUND
    within = torch.linspace(-bound, bound, 101, dtype=torch.float64)
    assert torch.equal(bounded_exponent(within), within)
    beyond = torch.tensor([-1e6, -100.0, -bound - 1, bound + 1, 100.0, 1e6], dtype=torch.float64, requires_grad=True)
    bent = bounded_exponent(beyond)
    torch.testing.assert_close(bent.exp()[4], torch.tensor(math.exp(bound) * (1 + 100 - bound), dtype=torch.float64))
    (slope,) = torch.autograd.grad(bent.sum(), beyond)
    torch.testing.assert_close(slope, 1 / (1 + beyond.detach().abs() - bound))
    assert torch.exp(bent.float()).isfinite().all()


def test_large_exponents_stay_exact_in_float32():
    """|W x| of 15 and more is what trained maps reach after RoPE; attention must still be the paper's."""
    q, k = 6 * inputs(seed=1), 6 * inputs(seed=2)
    assert k.abs().max() > 13

    def exp(x):
        return torch.cat([x.exp(), (-x).exp()], dim=-1)

    exact = exp(q) @ exp(k).transpose(-1, -2)
    exact = exact / exact.sum(-1, keepdim=True)
    computed = attention_weights(*pair("hedgehog_exp"), q.float(), k.float())
    torch.testing.assert_close(computed.double(), exact, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_dtypes(name):
    feature_map = build(name, "key")
    has_tensors = feature_map.projection_HDP is not None
    x = inputs(dtype=torch.float32)
    assert feature_map(x.bfloat16()).dtype == (torch.float32 if has_tensors else torch.bfloat16)
    in_bf16 = feature_map.bfloat16()(x.bfloat16())
    assert in_bf16.dtype == torch.bfloat16
    exact = feature_map.double()(x.bfloat16().double())
    torch.testing.assert_close(in_bf16.double(), exact, rtol=2**-8, atol=1e-6)  # rounded once, at the end


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_a_slice_of_heads_gives_that_slice_of_features(name):
    feature_map = build(name, "query").double()
    x, heads = inputs(), slice(1, 2)
    projection = feature_map.projection_HDP
    part = feature_map.features(x[:, heads], None if projection is None else projection[heads])
    torch.testing.assert_close(part, feature_map(x)[:, heads])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"unknown feature map 'hedgehog'; known: hedgehog_softmax, hedgehog_exp"):
        build("hedgehog", "query")
    with pytest.raises(ValueError, match=r"'hedgehog_exp' has no option inti; its options: init, init_scale"):
        build("hedgehog_exp", "query", options={"inti": "identity"})
    with pytest.raises(ValueError, match="init must be"):
        build("hedgehog_exp", "query", options={"init": "random"})
    with pytest.raises(ValueError, match="'elu' has no projection"):
        build("elu", "query", feature_dim=8)
    with pytest.raises(ValueError, match="side must be"):
        build("elu", "value")
    with pytest.raises(ValueError, match="feature_dim must be at least 1"):
        build("relu", "key", feature_dim=0)


@pytest.mark.parametrize("value", ["big", True, 0, -1.0, float("nan"), float("inf"), None])
@pytest.mark.parametrize(
    "name, option", [("hedgehog_exp", "init_scale"), ("exp_t", "temperature"), ("cosformer", "max_positions")]
)
def test_an_option_that_is_no_positive_number_is_refused(name, option, value):
    with pytest.raises(ValueError, match=f"{option} must be a number > 0, not "):
        make_feature_map(name, num_heads=1, head_dim=8, side="query", options={option: value})

"""Linear attention: the quadratic form in float64 is the oracle; chunked, recurrent and non-causal agree with it."""

from __future__ import annotations

import pytest
import torch

from hedgehog.kernels.linear_attention import (
    LinearAttentionState,
    chunked_linear_attention,
    noncausal_linear_attention,
    quadratic_linear_attention,
    recurrent_linear_attention_step,
    run_index_BL,
)

CHUNK = 64


def problem(length, *, batch=2, heads=4, kv_heads=2, features=6, value_dim=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    phi_q = torch.rand(batch, heads, length, features, generator=generator, dtype=torch.float64)
    phi_k = torch.rand(batch, heads, length, features, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, length, value_dim, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (phi_q, phi_k, v)]


def random_state(batch=2, heads=4, features=6, value_dim=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(9)
    kv = torch.randn(batch, heads, features, value_dim, generator=generator, dtype=dtype)
    k_sum = 1 + torch.rand(batch, heads, features, generator=generator, dtype=dtype)
    return LinearAttentionState(kv.requires_grad_(), k_sum.requires_grad_())


def padding(length, kind, batch=2):
    mask = torch.ones(batch, length, dtype=torch.bool)
    amount = length // 3
    if kind == "left" and amount:
        mask[0, :amount] = False
    elif kind == "right" and amount:
        mask[0, -amount:] = False
    elif kind == "holes":
        mask[0, ::3] = False
    elif kind == "all":
        mask[0] = False
    return None if kind == "none" else mask


def packing(length, packed, batch=2):
    """Borders inside chunks, on chunk borders, and a run longer than a chunk; another layout in each row."""
    if not packed:
        return None
    first = torch.bucketize(torch.arange(length), torch.tensor([2, 3, 20, 63, 64, 70]))
    second = torch.bucketize(torch.arange(length), torch.tensor([64])) + 5
    return torch.stack([first, second])


def assert_same_with_gradients(inputs, form_a, form_b, extra=()):
    a, b = form_a(*inputs), form_b(*inputs)
    torch.testing.assert_close(a, b)
    grad_out = torch.randn(a.shape, generator=torch.Generator().manual_seed(1), dtype=a.dtype)
    leaves = [*inputs, *extra]
    for x, y in zip(torch.autograd.grad(a, leaves, grad_out), torch.autograd.grad(b, leaves, grad_out), strict=True):
        torch.testing.assert_close(x, y)


def test_quadratic_form_is_the_equation():
    phi_q, phi_k, v = (x.detach() for x in problem(5, kv_heads=2))
    mask = padding(5, "left")
    mask[0, 3] = False
    segments = torch.tensor([[0, 0, 0, 0, 0], [4, 4, 4, 2, 2]])
    out = quadratic_linear_attention(phi_q, phi_k, v, mask_BL=mask, segment_ids_BL=segments)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                seen = [j for j in range(i + 1) if mask[b, j] and segments[b, i] == segments[b, j]]
                s = [phi_q[b, h, i] @ phi_k[b, h, j] for j in seen]
                expected = torch.zeros(3, dtype=torch.float64)
                for weight, j in zip(s, seen, strict=True):
                    expected += weight / sum(s) * v[b, h // 2, j]
                torch.testing.assert_close(out[b, h, i], expected)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("pad", ["none", "left", "right", "holes", "all"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
def test_chunked_equals_quadratic(length, pad, packed):
    options = {"mask_BL": padding(length, pad), "segment_ids_BL": packing(length, packed)}
    assert_same_with_gradients(
        problem(length),
        lambda *x: chunked_linear_attention(*x, chunk_size=CHUNK, **options)[0],
        lambda *x: quadratic_linear_attention(*x, **options),
    )


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_any_chunk_size_and_any_number_of_kv_heads(kv_heads, chunk_size):
    options = {"mask_BL": padding(40, "left"), "segment_ids_BL": packing(40, True)}
    assert_same_with_gradients(
        problem(40, kv_heads=kv_heads),
        lambda *x: chunked_linear_attention(*x, chunk_size=chunk_size, **options)[0],
        lambda *x: quadratic_linear_attention(*x, **options),
    )


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("pad", ["none", "left", "holes", "all"])
@pytest.mark.parametrize("length", [1, 65])
def test_noncausal_equals_quadratic(length, pad, packed):
    options = {"mask_BL": padding(length, pad), "segment_ids_BL": packing(length, packed)}
    assert_same_with_gradients(
        problem(length),
        lambda *x: noncausal_linear_attention(*x, **options),
        lambda *x: quadratic_linear_attention(*x, causal=False, **options),
    )


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_gradcheck_chunked_with_state(packed):
    phi_q, phi_k, v = problem(5, batch=1, heads=2, kv_heads=1, features=2, value_dim=2)
    state = random_state(batch=1, heads=2, features=2, value_dim=2)
    mask = torch.tensor([[True, False, True, True, True]])
    segments = torch.tensor([[0, 0, 0, 3, 3]]) if packed else None

    def attend(phi_q, phi_k, v, kv, k_sum):
        out, final = chunked_linear_attention(
            phi_q,
            phi_k,
            v,
            mask_BL=mask,
            segment_ids_BL=segments,
            initial_state=LinearAttentionState(kv, k_sum),
            chunk_size=2,
            return_state=True,
        )
        assert final is not None
        return out, final.kv_state_BHFV, final.k_sum_BHF

    assert torch.autograd.gradcheck(attend, (phi_q, phi_k, v, state.kv_state_BHFV, state.k_sum_BHF))


def test_gradcheck_quadratic_and_noncausal():
    inputs = problem(4, batch=1, heads=2, kv_heads=1, features=3, value_dim=2)
    mask = torch.tensor([[False, True, True, True]])
    for form in (quadratic_linear_attention, noncausal_linear_attention):
        assert torch.autograd.gradcheck(lambda *x, form=form: form(*x, mask_BL=mask), inputs)


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 99])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_split_and_resume_equals_the_whole_with_gradients(cut, packed):
    length = 100
    mask = padding(length, "left")
    # a state goes on with the next call's first segment, so the cuts lie inside runs
    segments = (torch.arange(length) >= 20).long().expand(2, -1) if packed else None
    state = random_state()
    extra = (state.kv_state_BHFV, state.k_sum_BHF)

    def whole(*x):
        return chunked_linear_attention(*x, mask_BL=mask, segment_ids_BL=segments, initial_state=state)[0]

    def in_two(*x):
        outs, current = [], state
        for part in (slice(0, cut), slice(cut, length)):
            out, current = chunked_linear_attention(
                *(t[:, :, part] for t in x),
                mask_BL=mask[:, part],
                segment_ids_BL=None if segments is None else segments[:, part],
                initial_state=current,
                return_state=True,
            )
            outs.append(out)
        return torch.cat(outs, dim=2)

    assert_same_with_gradients(problem(length), whole, in_two, extra)


def test_initial_state_is_not_changed():
    state = random_state()
    before = state.clone()
    with torch.no_grad():
        chunked_linear_attention(*problem(70), initial_state=state, return_state=True)
    assert torch.equal(state.kv_state_BHFV, before.kv_state_BHFV) and torch.equal(state.k_sum_BHF, before.k_sum_BHF)


def test_final_state_is_the_last_segments_even_before_padding():
    length = 80
    phi_q, phi_k, v = (x.detach() for x in problem(length))
    segments = torch.zeros(2, length, dtype=torch.long)
    segments[:, 30:70] = 1
    segments[:, 70:] = -1  # padding with an id of its own
    mask = segments >= 0
    _, state = chunked_linear_attention(phi_q, phi_k, v, mask_BL=mask, segment_ids_BL=segments, return_state=True)
    assert state is not None
    torch.testing.assert_close(state.k_sum_BHF, phi_k[:, :, 30:70].sum(dim=2))
    v_heads = v.repeat_interleave(2, dim=1)[:, :, 30:70]
    torch.testing.assert_close(state.kv_state_BHFV, phi_k[:, :, 30:70].transpose(-1, -2) @ v_heads)


@pytest.mark.parametrize("prefill", [0, 1, 64, 70])
def test_prefill_then_recurrent_equals_quadratic(prefill):
    length = 75
    phi_q, phi_k, v = (x.detach() for x in problem(length))
    expected = quadratic_linear_attention(phi_q, phi_k, v)
    state = LinearAttentionState.zeros(2, 4, 6, 3, dtype=torch.float64)
    if prefill:
        out, state = chunked_linear_attention(
            phi_q[:, :, :prefill], phi_k[:, :, :prefill], v[:, :, :prefill], return_state=True
        )
        torch.testing.assert_close(out, expected[:, :, :prefill])
        assert state is not None
    size = state.num_bytes()
    for i in range(prefill, length):
        out, state = recurrent_linear_attention_step(phi_q[:, :, i], phi_k[:, :, i], v[:, :, i], state)
        torch.testing.assert_close(out, expected[:, :, i])
    assert state.num_bytes() == size == 8 * (2 * 4 * 6 * 3 + 2 * 4 * 6)


def test_left_padding_does_not_change_real_rows():
    phi_q, phi_k, v = (x.detach() for x in problem(70))
    alone, _ = chunked_linear_attention(phi_q[:, :, 13:], phi_k[:, :, 13:], v[:, :, 13:])
    mask = torch.arange(70).expand(2, -1) >= 13
    poisoned = [x.clone() for x in (phi_q, phi_k, v)]
    poisoned[1][:, :, :13] = float("nan")
    padded, _ = chunked_linear_attention(*poisoned, mask_BL=mask)
    torch.testing.assert_close(padded[:, :, 13:], alone)
    assert (padded[:, :, :13] == 0).all(), "a row that sees no key gives 0"


def test_a_row_without_any_key_gives_zero_output_and_finite_gradients():
    inputs = problem(5)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    for form in (
        quadratic_linear_attention,
        noncausal_linear_attention,
        lambda *x, **o: chunked_linear_attention(*x, **o)[0],
    ):
        out = form(*inputs, mask_BL=mask)
        assert (out == 0).all()
        for grad in torch.autograd.grad(out.sum(), inputs):
            assert grad.isfinite().all()


def test_eps_counts_once_in_every_form():
    phi_q, phi_k, v = (x.detach() for x in problem(9))
    eps = 0.3
    scores = (phi_q @ phi_k.transpose(-1, -2)).tril()
    expected = scores @ v.repeat_interleave(2, dim=1) / (scores.sum(-1, keepdim=True) + eps)
    torch.testing.assert_close(quadratic_linear_attention(phi_q, phi_k, v, eps=eps), expected)
    torch.testing.assert_close(chunked_linear_attention(phi_q, phi_k, v, eps=eps, chunk_size=4)[0], expected)
    last = noncausal_linear_attention(phi_q, phi_k, v, eps=eps)[:, :, -1]
    torch.testing.assert_close(last, expected[:, :, -1])
    state = LinearAttentionState.zeros(2, 4, 6, 3, dtype=torch.float64)
    for i in range(9):
        out, state = recurrent_linear_attention_step(phi_q[:, :, i], phi_k[:, :, i], v[:, :, i], state, eps=eps)
        torch.testing.assert_close(out, expected[:, :, i])


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_tiny_and_huge_features_keep_their_ratio_in_float32(size):
    """exp features reach e^±40: neither eps nor the range of float32 may show in output or gradients."""
    inputs = problem(70, dtype=torch.float32)
    oracle = [x.detach().double().requires_grad_() for x in inputs]
    scaled = [inputs[0], (inputs[1] * size).detach().requires_grad_(), inputs[2]]
    out, _ = chunked_linear_attention(*scaled)
    expected = quadratic_linear_attention(*oracle)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out.sum(), scaled)
    for grad, exact in zip(grads, torch.autograd.grad(expected.sum(), oracle), strict=True):
        unscaled = grad.double() * (size if grad is grads[1] else 1)
        torch.testing.assert_close(unscaled, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


def relative_rms(x, exact):
    return ((x.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


@pytest.mark.parametrize("mean", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("spread", [0.05, 2.0], ids=["flat", "peaked"])
def test_bfloat16_inputs_against_float64_on_the_same_inputs(spread, mean):
    """Flat features and values with a common mean are the hard case: dφ(q) is then a small difference of large sums."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 300, 16)

    def features():
        z = spread * torch.randn(shape, generator=generator)
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], dim=-1).bfloat16().requires_grad_()

    inputs = [features(), features(), (mean + torch.randn(shape, generator=generator)).bfloat16().requires_grad_()]
    out, state = chunked_linear_attention(*inputs, return_state=True)
    assert out.dtype == torch.bfloat16 and state is not None and state.kv_state_BHFV.dtype == torch.float32
    grad_out = torch.randn(shape, generator=generator).bfloat16()
    grads = torch.autograd.grad(out, inputs, grad_out)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = quadratic_linear_attention(*exact_inputs)
    assert relative_rms(out, exact) <= 2e-3
    for grad, exact_grad in zip(grads, torch.autograd.grad(exact, exact_inputs, grad_out.double()), strict=True):
        assert grad.dtype == torch.bfloat16
        assert relative_rms(grad, exact_grad) <= 1e-2


def test_constant_values_come_out_within_a_bfloat16_rounding():
    phi_q, phi_k, _ = (x.detach() for x in problem(3000, batch=1, heads=1, kv_heads=1, dtype=torch.bfloat16))
    ones = torch.ones(1, 1, 3000, 3, dtype=torch.bfloat16)
    out, state = chunked_linear_attention(phi_q, phi_k, ones, return_state=True)
    assert (out.float() - 1).abs().max() <= 2**-8
    assert state is not None
    step, _ = recurrent_linear_attention_step(phi_q[:, :, 0], phi_k[:, :, 0], ones[:, :, 0], state)
    assert (step.float() - 1).abs().max() <= 2**-8
    exact_sum = phi_k.double().sum(dim=2) + phi_k[:, :, 0].double()
    torch.testing.assert_close(state.k_sum_BHF.double(), exact_sum, rtol=1e-5, atol=0)  # z keeps growing in float32


def test_state_reorder_detach_and_size():
    state = random_state()
    kv, k_sum = state.kv_state_BHFV.detach().clone(), state.k_sum_BHF.detach().clone()
    detached = state.detach()
    assert not detached.kv_state_BHFV.requires_grad and not detached.k_sum_BHF.requires_grad
    index = torch.tensor([1, 1, 0])
    assert detached.reorder(index) is detached
    assert torch.equal(detached.kv_state_BHFV, kv[index]) and torch.equal(detached.k_sum_BHF, k_sum[index])
    assert LinearAttentionState.zeros(2, 4, 6, 3).num_bytes() == 4 * (2 * 4 * 6 * 3 + 2 * 4 * 6)


def test_run_index_counts_runs_and_gives_padding_its_neighbours():
    ids = torch.tensor([[5, 5, 1, 1, 5, 5]])
    assert run_index_BL(ids).tolist() == [[0, 0, 1, 1, 2, 2]]
    mask = torch.tensor([[False, True, True, False, True, False]])
    padded = torch.tensor([[0, 7, 7, 0, 8, 0]])
    assert run_index_BL(padded, mask).tolist() == [[0, 0, 0, 0, 1, 1]]


def test_backward_saves_inputs_output_and_denominator_only():
    def saved_bytes(length):
        inputs = problem(length, dtype=torch.float32)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            out, _ = chunked_linear_attention(*inputs)
        distinct = {t.data_ptr(): t.numel() * t.element_size() for t in saved}
        own = sum(t.numel() * t.element_size() for t in (*inputs, out))
        denominator = out.numel() // out.shape[-1] * 4
        return sum(distinct.values()), own + denominator

    for length in (64, 500, 1000):
        saved, allowed = saved_bytes(length)
        assert saved == allowed


def test_shape_mistakes_are_named():
    phi_q, phi_k, v = (x.detach() for x in problem(4))
    with pytest.raises(ValueError, match="must both be"):
        chunked_linear_attention(phi_q, phi_k[:, :, :3], v)
    with pytest.raises(ValueError, match="multiple of K"):
        quadratic_linear_attention(phi_q, phi_k, v.repeat(1, 2, 1, 1)[:, :3])
    with pytest.raises(ValueError, match="mask_BL"):
        chunked_linear_attention(phi_q, phi_k, v, mask_BL=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be bool"):
        chunked_linear_attention(phi_q, phi_k, v, mask_BL=torch.ones(2, 4))
    with pytest.raises(ValueError, match="chunk_size"):
        chunked_linear_attention(phi_q, phi_k, v, chunk_size=0)

"""Softmax attention as the teacher runs it: torch's own output, and a log-sum-exp that is one."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hedgehog.kernels import softmax_attention
from hedgehog.kernels.softmax_attention import MaterialisedAttentionError, causal_softmax_attention, obstacle

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_verdicts_kept() -> Iterator[None]:
    obstacle.cache_clear()
    yield
    obstacle.cache_clear()


def problem(length: int = 67, kv_heads: int = 4, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(length)
    return [torch.randn(2, heads, length, 24).to(dtype) for heads in (4, kv_heads, kv_heads)]


def log_sum_exp(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Written down, in float64."""
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = scale * q.double() @ keys.mT
    return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf).logsumexp(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 2, 67, 300])
def test_output_is_torchs_and_the_log_sum_exp_right(length: int, kv_heads: int, dtype: torch.dtype):
    q, k, v = problem(length, kv_heads, dtype)
    out, found = causal_softmax_attention(q, k, v, 0.3)
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=kv_heads != 4)
    assert torch.equal(out, torchs)
    assert found is not None and found.dtype == torch.float32
    error = float((found - log_sum_exp(q, k, 0.3)).abs().max())
    assert error < (2e-6 if dtype == torch.float32 else 1e-3)


def test_where_torch_chooses_another_kernel_there_is_none():
    q, k, v = problem()
    with sdpa_kernel(SDPBackend.MATH):
        out, found = causal_softmax_attention(q, k, v, 0.3)
    assert found is None
    torch.testing.assert_close(out, causal_softmax_attention(q, k, v, 0.3)[0])


def test_gradients_go_torchs_way():
    q, k, v = problem()
    out, found = causal_softmax_attention(q.requires_grad_(), k, v, 0.3)
    assert found is None and out.requires_grad


def test_no_tokens():
    out, found = causal_softmax_attention(*problem(length=0), 0.3)
    assert out.shape == (2, 4, 0, 24) and found is None


NAME = "flash on the CPU"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda out, total: (out, total * 1.4427), "wrong by"),
        (lambda out, total: (out, total + 1e-3), "wrong by 0.001 nats"),
        (lambda out, total: (out * 1.1, total), "its output by"),
        (lambda out, total: (out, total.mT), "its log-sum-exp is (2, 1, 4)"),
        (lambda out, total: (out, total.half()), "torch.float16"),
        (lambda out, total: (out, total * torch.nan), "wrong by inf nats"),
    ],
    ids=["bits", "nearly", "output", "shape", "dtype", "nan"],
)
def test_an_operator_that_has_changed_is_not_used(monkeypatch, caplog, wrong, reason):
    """In another torch it may count in bits, or lay its results out in another way."""
    flash = softmax_attention._OPERATORS[NAME]
    monkeypatch.setitem(softmax_attention._OPERATORS, NAME, lambda *inputs: wrong(*flash(*inputs)))
    q, k, v = problem()
    with caplog.at_level(logging.WARNING):
        out, found = causal_softmax_attention(q, k, v, 0.3)
        causal_softmax_attention(q, k, v, 0.3)
    assert found is None
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3))
    assert len(caplog.records) == 1 and reason in caplog.text and "the loss computes its own" in caplog.text


def test_an_operator_that_is_gone_is_not_used(monkeypatch):
    def gone(*inputs: object) -> None:
        raise AttributeError("no such operator\nand a long story")

    monkeypatch.setitem(softmax_attention._OPERATORS, NAME, gone)
    assert causal_softmax_attention(*problem(), 0.3)[1] is None
    assert obstacle(NAME, CPU, torch.float32, 24, False) == "it fails (no such operator)"


def test_a_torch_that_does_not_tell_its_choice(monkeypatch):
    q, k, v = problem()
    expected = causal_softmax_attention(q, k, v, 0.3)[0]
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda q, k, v: 1)
    out, found = causal_softmax_attention(q, k, v, 0.3)
    assert found is None and torch.equal(out, expected)
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert causal_softmax_attention(q, k, v, 0.3)[1] is None


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH])
def test_the_operator_is_that_of_torchs_choice(monkeypatch, backend):
    """On a GPU either of two; what they return has not been seen on one."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *inputs, **options: backend.value)
    q, k, v = (x.to("meta") for x in problem())
    assert softmax_attention._choice(q, k, v, 0.3, False) is None, "neither a CPU nor a GPU"

    class OnGPU:
        device, requires_grad, shape = torch.device("cuda"), False, (1, 4, 9, 24)

        def numel(self) -> int:
            return 4 * 9 * 24

    q = OnGPU()
    name = softmax_attention._operator_of(softmax_attention._choice(q, k, v, 0.3, False), q)
    assert name == {"FLASH_ATTENTION": "FlashAttention", "CUDNN_ATTENTION": "cuDNN"}.get(backend.name)


def test_grouped_heads_are_repeated_for_a_kernel_without_groups(monkeypatch):
    """torch's memory-efficient kernel, the only fused one for float32 on a GPU."""
    backends, choose = [], torch._fused_sdp_choice

    def without_groups(*inputs, enable_gqa, **options):
        backends.append(SDPBackend.MATH.value if enable_gqa else choose(*inputs, enable_gqa=False, **options))
        return backends[-1]

    q, k, v = problem(kv_heads=2)
    expected = causal_softmax_attention(q, k, v, 0.3)
    monkeypatch.setattr(torch, "_fused_sdp_choice", without_groups)
    for found, right in zip(causal_softmax_attention(q, k, v, 0.3), expected, strict=True):
        torch.testing.assert_close(found, right)
    assert backends == [SDPBackend.MATH.value, SDPBackend.FLASH_ATTENTION.value]


def test_large_matrices_of_attention_weights_are_refused(monkeypatch):
    q, k, v = problem()
    monkeypatch.setattr(softmax_attention, "MATERIALISED_LIMIT_BYTES", 2 * 4 * 67 * 67 * 4 - 1)
    causal_softmax_attention(q, k, v, 0.3)
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(MaterialisedAttentionError, match="24-wide heads in float32"):
        causal_softmax_attention(q, k, v, 0.3)

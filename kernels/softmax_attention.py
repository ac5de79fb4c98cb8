"""Causal softmax attention through torch's fused kernels, with the log-sum-exp that they compute anyway.

`torch.nn.functional.scaled_dot_product_attention` throws it away. Where torch would choose its FlashAttention, the
operator below it is called instead: the same output, and L_i = log Σ_j≤i exp(scale · q_i·k_j) beside it, which the
distillation loss then need not find with a pass of its own.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

TOLERANCE_NATS = 0.01
"""Largest error of L at which an operator counts as right; bfloat16 operands leave about 1e-4."""
logger = logging.getLogger(__name__)


def causal_softmax_attention(
    q_BHLD: Tensor, k_BKLD: Tensor, v_BKLV: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """(o_BHLV, L_BHL float32 in nats, or None where the kernel that torch chooses keeps it to itself).

    Query head h uses key/value head h // (H // K). No L × L matrix is formed.
    """
    grouped = q_BHLD.shape[1] != k_BKLD.shape[1]
    if _flash_is_chosen(q_BHLD, k_BKLD, v_BKLV, scale, grouped):
        device = q_BHLD.device
        if flash_obstacle(device, q_BHLD.dtype, q_BHLD.shape[-1], grouped) is None:
            return _flash(q_BHLD, k_BKLD, v_BKLV, scale)
    out = F.scaled_dot_product_attention(q_BHLD, k_BKLD, v_BKLV, is_causal=True, scale=scale, enable_gqa=grouped)
    return out, None


def _flash_is_chosen(q: Tensor, k: Tensor, v: Tensor, scale: float, grouped: bool) -> bool:
    """Whether scaled_dot_product_attention would run FlashAttention here; `sdpa_kernel` contexts are heeded."""
    if q.device.type not in ("cpu", "cuda") or q.numel() == 0 or (q.requires_grad and torch.is_grad_enabled()):
        return False
    if q.device.type == "cuda" and q.shape[-1] % 8:  # it would be padded first
        return False
    choose = torch._fused_sdp_choice  # pyright: ignore[reportPrivateImportUsage]
    choice = choose(q, k, v, None, 0.0, True, scale=scale, enable_gqa=grouped)
    return choice == SDPBackend.FLASH_ATTENTION.value


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The operators that scaled_dot_product_attention calls; both return o and L first."""
    if q.device.type == "cpu":
        out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    else:
        out, log_sum_exp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)
    return out, log_sum_exp.float()


@cache
def flash_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool) -> str | None:
    """Why the operator's L is not to be used on this device, or None. Found on a small problem once; said once.

    These operators are not torch's public interface, and a wrong L would train wrong feature maps in silence.
    """
    try:
        with torch.no_grad():
            error = _error_on_a_small_problem(device, dtype, head_dim, grouped)
    except (RuntimeError, AttributeError, TypeError, ValueError) as fault:
        obstacle = f"it fails ({(str(fault).strip() or type(fault).__name__).splitlines()[0]})"
    else:
        if error <= TOLERANCE_NATS:
            return None
        obstacle = f"it is wrong by {error:.3g} nats"
    logger.warning("FlashAttention's log-sum-exp is not used, the loss computes its own: %s", obstacle)
    return obstacle


def _error_on_a_small_problem(device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool) -> float:
    """Largest error of L, and of o, whichever is larger in units of its tolerance. NaN counts as the worst."""
    heads, kv_heads, length, scale = 4, 2 if grouped else 4, 70, 1.5 * head_dim**-0.5
    random = torch.Generator().manual_seed(0)  # not the caller's random numbers
    q, k, v = (
        torch.randn(2, count, length, head_dim, generator=random).to(device, dtype)
        for count in (heads, kv_heads, kv_heads)
    )
    out, found = _flash(q, k, v, scale)
    if found.shape != q.shape[:3]:
        raise ValueError(f"its shape is {tuple(found.shape)}")
    keys, values = (x.double().repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    logits = torch.matmul(q.double(), keys.transpose(-1, -2)) * scale
    logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool, device=device).triu(1), -torch.inf)
    wrong_sum = float((found.double() - logits.logsumexp(dim=-1)).abs().max())
    wrong_out = float((out.double() - torch.matmul(logits.softmax(dim=-1), values)).abs().max()) / 10
    return max(wrong_sum, wrong_out) if wrong_sum == wrong_sum and wrong_out == wrong_out else float("inf")

"""Softmax attention through torch's fused kernels, with the log-sum-exp that they compute anyway.

`torch.nn.functional.scaled_dot_product_attention` throws it away. Where torch would choose FlashAttention or cuDNN, the
operator below it is called instead: the same output, and L_i = log Σ_j≤i exp(scale · q_i·k_j) beside it, which the
distillation loss then need not find with a pass of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from .faults import first_line

LOG_SUM_TOLERANCE_NATS = 5e-4
"""Largest error of L at which an operator counts as right. bfloat16 operands leave 6e-5; the KL takes up ten times L's
error, and is some hundredths of a nat at best."""
OUTPUT_TOLERANCE = 0.03
"""The same for o, whose values are up to 4 here and rounded to 16 bits."""
MATERIALISED_LIMIT_BYTES = 2**30
"""Largest matrix of attention weights that torch's last resort may form, which knows neither flash nor tiles."""
logger = logging.getLogger(__name__)


class MaterialisedAttentionError(RuntimeError):
    """No fused kernel serves, and L × L attention weights would be too large."""


def causal_softmax_attention(
    q_BHLD: Tensor, k_BKLD: Tensor, v_BKLV: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """(o_BHLV, L_BHL), L in nats, float32 (float64 for float64); None where the kernel of torch's choice keeps it.

    Query head h uses key/value head h // (H // K). No L × L matrix is formed, but a small one where no fused kernel
    serves: MaterialisedAttentionError where it would be large.
    """
    grouped = q_BHLD.shape[1] != k_BKLD.shape[1]
    choice = _choice(q_BHLD, k_BKLD, v_BKLV, scale, grouped)
    if grouped and choice == SDPBackend.MATH.value:  # the memory-efficient kernel, float32's only one, has no groups
        k_BKLD, v_BKLV = (x.repeat_interleave(q_BHLD.shape[1] // x.shape[1], dim=1) for x in (k_BKLD, v_BKLV))
        grouped = False
        choice = _choice(q_BHLD, k_BKLD, v_BKLV, scale, grouped)
    if choice == SDPBackend.MATH.value:
        _check_materialised(q_BHLD)
    name = _operator_of(choice, q_BHLD)
    if name is not None and obstacle(name, q_BHLD.device, q_BHLD.dtype, q_BHLD.shape[-1], grouped) is None:
        return _OPERATORS[name](q_BHLD, k_BKLD, v_BKLV, scale)
    out = F.scaled_dot_product_attention(q_BHLD, k_BKLD, v_BKLV, is_causal=True, scale=scale, enable_gqa=grouped)
    return out, None


def bidirectional_softmax_attention(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLV: Tensor, scale: float, mask_BL: Tensor | None
) -> Tensor:
    """An encoder's: every token sees all real ones (mask_BL bool, True = real). (B, H, L, V); zero rows for padding."""
    if mask_BL is None:
        return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLV, scale=scale)
    seen_B11L = mask_BL[:, None, None, :]
    out = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLV, attn_mask=seen_B11L, scale=scale)
    return out.masked_fill(~mask_BL[:, None, :, None], 0)


def _choice(q: Tensor, k: Tensor, v: Tensor, scale: float, grouped: bool) -> int | None:
    """What scaled_dot_product_attention would run, a value of SDPBackend; `sdpa_kernel` contexts are heeded."""
    if q.device.type not in ("cpu", "cuda") or q.numel() == 0 or (q.requires_grad and torch.is_grad_enabled()):
        return None
    try:
        choose = torch._fused_sdp_choice  # pyright: ignore[reportPrivateImportUsage]
        return choose(q, k, v, None, 0.0, True, scale=scale, enable_gqa=grouped)
    except (AttributeError, TypeError):  # not torch's public interface
        return None


def _operator_of(choice: int | None, q: Tensor) -> str | None:
    """The name in `_OPERATORS` of a choice."""
    if q.device.type == "cuda" and q.shape[-1] % 8:  # it would be padded first
        return None
    if choice == SDPBackend.FLASH_ATTENTION.value:
        return "flash on the CPU" if q.device.type == "cpu" else "FlashAttention"
    return "cuDNN" if choice == SDPBackend.CUDNN_ATTENTION.value else None


def _check_materialised(q_BHLD: Tensor) -> None:
    """Raises MaterialisedAttentionError where torch's last resort would take more than MATERIALISED_LIMIT_BYTES."""
    batch, heads, length, head_dim = q_BHLD.shape
    num_bytes = batch * heads * length**2 * max(4, q_BHLD.element_size())
    if num_bytes > MATERIALISED_LIMIT_BYTES:
        raise MaterialisedAttentionError(
            f"torch has no fused attention for {head_dim}-wide heads in {str(q_BHLD.dtype).removeprefix('torch.')} on "
            f"this {q_BHLD.device.type} device: {length} tokens would take {num_bytes / 2**30:.1f} GiB a layer in "
            "attention weights"
        )


def _flash_on_the_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[:2]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    results = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    return results[0], results[1].reshape(q.shape[:3])


_OPERATORS: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "flash on the CPU": _flash_on_the_cpu,
    "FlashAttention": _flash,
    "cuDNN": _cudnn,
}
"""What scaled_dot_product_attention calls: o, and L in nats, float32."""


@cache
def obstacle(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool) -> str | None:
    """Why an operator's L is not to be used on this device, or None. Found on small problems once; said once.

    These operators are not torch's public interface, and a wrong L would train wrong feature maps in silence.
    """
    try:
        with torch.no_grad():
            errors = [_errors(_OPERATORS[name], device, dtype, head_dim, grouped, length) for length in (1, 70, 200)]
    except (RuntimeError, AttributeError, TypeError, ValueError) as fault:
        found = f"it fails ({first_line(fault)})"
    else:
        of_sum, of_out = (max(kind) for kind in zip(*errors, strict=True))
        if of_sum <= LOG_SUM_TOLERANCE_NATS and of_out <= OUTPUT_TOLERANCE:
            return None
        found = f"it is wrong by {of_sum:.3g} nats, and its output by {of_out:.3g}"
    logger.warning("the log-sum-exp of torch's %s is not used, the loss computes its own: %s", name, found)
    return found


def _errors(
    operator: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    grouped: bool,
    length: int,
) -> tuple[float, float]:
    """Largest errors of L and of o against float64. A NaN is infinitely wrong."""
    heads, kv_heads, scale = 4, 2 if grouped else 4, 1.5 * head_dim**-0.5
    random = torch.Generator().manual_seed(0)  # not the caller's random numbers
    q, k, v = (
        torch.randn(2, count, length, head_dim, generator=random).to(device, dtype)
        for count in (heads, kv_heads, kv_heads)
    )
    out, log_sum = operator(q, k, v, scale)
    if log_sum.shape != q.shape[:3] or log_sum.dtype != torch.promote_types(dtype, torch.float32):
        raise ValueError(f"its log-sum-exp is {tuple(log_sum.shape)} {log_sum.dtype}")
    keys, values = (x.double().repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    logits = torch.matmul(q.double(), keys.transpose(-1, -2)) * scale
    logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool, device=device).triu(1), -torch.inf)
    right = torch.matmul(logits.softmax(dim=-1), values), logits.logsumexp(dim=-1)
    wrong_out, wrong_sum = (
        float((found.double() - exact).abs().nan_to_num(nan=torch.inf).max())
        for found, exact in zip((out, log_sum), right, strict=True)
    )
    return wrong_sum, wrong_out

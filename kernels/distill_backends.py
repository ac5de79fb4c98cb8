"""The one place that chooses an implementation of the distillation loss, and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .distill_loss import DistillLoss, attention_distillation_loss
from .faults import first_line
from .feature_maps import FeatureMap

DISTILL_BACKENDS = ("auto", "torch")
TOLERANCE = 0.02
"""Relative error of the loss and (RMS) of dW at which a kernel counts as wrong; 16-bit operands cost about 0.003."""
_verdicts: dict[tuple[Any, ...], str | None] = {}


class DistillBackend(NamedTuple):
    """An implementation with the signature of `attention_distillation_loss`, its name, and why it was chosen."""

    name: str
    reason: str
    loss: Callable[..., DistillLoss]


def select_distill_backend(
    requested: str,
    map_q: FeatureMap,
    map_k: FeatureMap,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    causal: bool = True,
) -> DistillBackend:
    """With "auto" the Triton kernel where device, q's dtype and the maps allow it, else the PyTorch form.

    Triton is imported only for CUDA tensors. Raises ValueError listing the backends for an unknown one.
    """
    if requested not in DISTILL_BACKENDS:
        raise ValueError(f"unknown backend '{requested}'; known: {', '.join(DISTILL_BACKENDS)}")
    if requested == "torch":
        return _torch_form("requested")
    device = torch.device(device)
    if not causal:
        return _torch_form("the kernel is for causal attention")
    if device.type != "cuda":
        return _torch_form(f"no kernel for {device.type}")
    if torch.version.hip is not None:
        return _torch_form("the kernel is not made for ROCm")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return _torch_form(f"the kernel needs bfloat16 tensor cores (sm_80), the GPU is sm_{major}{minor}")
    if dtype == torch.float32:
        return _torch_form("float32 tiles do not fit on a GPU's chip; the kernel takes bfloat16 and float16")
    try:
        from .distill_triton import INTERPRETED, triton_distillation_loss, unsupported
    except ImportError as error:
        return _torch_form(f"Triton is not there: {error}")
    if INTERPRETED:
        return _torch_form("TRITON_INTERPRET is set: no kernel is compiled in this process")
    reason = unsupported(map_q, map_k, dtype)
    if reason is None:
        reason = disagreement(triton_distillation_loss, map_q, map_k, device, dtype)
    if reason is not None:
        return _torch_form(reason)
    return DistillBackend("triton", f"sm_{major}{minor}, {str(dtype).removeprefix('torch.')}", triton_distillation_loss)


def disagreement(
    kernel: Callable[..., DistillLoss], map_q: FeatureMap, map_k: FeatureMap, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why `kernel` is not to be trusted on this device: it fails, or differs from the PyTorch form. None: it may serve.

    A small random problem, once per device, dtype and kind of map: a wrong kernel would train wrong maps in silence.
    """
    weights = [m.projection_HDP for m in (map_q, map_k)]
    assert weights[0] is not None
    key = (kernel, map_q.name, map_q.side, map_k.name, map_k.side, tuple(weights[0].shape), device, dtype)
    if key not in _verdicts:
        _verdicts[key] = _compare(kernel, map_q, map_k, device, dtype)
    return _verdicts[key]


def _compare(
    kernel: Callable[..., DistillLoss], map_q: FeatureMap, map_k: FeatureMap, device: torch.device, dtype: torch.dtype
) -> str | None:
    weights = [m.projection_HDP for m in (map_q, map_k)]
    trained = [weight for weight in weights if weight is not None and weight.requires_grad]
    num_heads, head_dim = map_q.projection_HDP.shape[:2] if map_q.projection_HDP is not None else (1, map_q.head_dim)
    random = torch.Generator().manual_seed(0)  # not the caller's random numbers
    q, k = (torch.randn(1, num_heads, 130, head_dim, generator=random).to(device, dtype) for _ in range(2))

    def run(loss: Callable[..., DistillLoss], log_sum_exp_BHL: Tensor | None = None) -> list[Tensor]:
        with torch.enable_grad():
            result = loss(q, k, map_q, map_k, log_sum_exp_BHL=log_sum_exp_BHL)
            grads = torch.autograd.grad(result.loss, trained) if trained else ()
        # not the KL, a small difference of the two
        return [result.kl_H + result.entropy_H, result.entropy_H, result.loss.detach(), *grads]

    logits = torch.matmul(q.float(), k.float().transpose(-1, -2)) * head_dim**-0.5
    above = torch.ones(logits.shape[-2:], dtype=torch.bool, device=device).triu(1)
    try:
        # with its own log-sum-exp, and with a teacher's
        found = run(kernel) + run(kernel, logits.masked_fill(above, -torch.inf).logsumexp(dim=-1))
    except Exception as error:  # whatever the compiler or the driver says: there is another way
        return f"the kernel fails here ({first_line(error)})"
    for ours, right in zip(found, 2 * run(attention_distillation_loss), strict=True):
        error = float((ours.double() - right.double()).norm() / right.double().norm().clamp_min(1e-12))
        if not error <= TOLERANCE:
            return f"the kernel differs from PyTorch here by {error:.1%}; please report it"
    return None


def _torch_form(reason: str) -> DistillBackend:
    return DistillBackend("torch", reason, attention_distillation_loss)

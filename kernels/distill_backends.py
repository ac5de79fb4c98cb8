"""The one place that chooses an implementation of the distillation loss, and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .distill_loss import DistillLoss, attention_distillation_loss
from .feature_maps import FeatureMap

DISTILL_BACKENDS = ("auto", "torch")


class DistillBackend(NamedTuple):
    """An implementation with the signature of `attention_distillation_loss`, its name, and why it was chosen."""

    name: str
    reason: str
    loss: Callable[..., DistillLoss]


def select_distill_backend(
    requested: str, map_q: FeatureMap, map_k: FeatureMap, *, device: torch.device | str, dtype: torch.dtype
) -> DistillBackend:
    """With "auto" the Triton kernel where device, q's dtype and the maps allow it, else the PyTorch form.

    Triton is imported only for CUDA tensors. Raises ValueError listing the backends for an unknown one.
    """
    if requested not in DISTILL_BACKENDS:
        raise ValueError(f"unknown backend '{requested}'; known: {', '.join(DISTILL_BACKENDS)}")
    if requested == "torch":
        return _torch_form("requested")
    device = torch.device(device)
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
    if reason is not None:
        return _torch_form(reason)
    return DistillBackend("triton", f"sm_{major}{minor}, {str(dtype).removeprefix('torch.')}", triton_distillation_loss)


def _torch_form(reason: str) -> DistillBackend:
    return DistillBackend("torch", reason, attention_distillation_loss)

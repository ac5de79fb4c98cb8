"""Which implementation an estimate assumes where there is no GPU to ask: the one that sm_80 or later would choose.

The choices themselves are made in kernels/backends.py and kernels/distill_backends.py, with the device at hand.
"""

from __future__ import annotations

from typing import Literal

from .config import RunConfig
from .feature_map_checks import feature_map_size

AttentionKernel = Literal[
    "softmax", "PyTorch", "PyTorch, bidirectional", "CUDA kernel, φ outside", "CUDA kernel, φ inside"
]


def assumed_attention(config: RunConfig, head_dim: int, device: str) -> AttentionKernel:
    """What computes attention when the converted model is trained or generates."""
    from ..kernels.cuda.limits import FEATURES, FUSED_FEATURE_MAPS, HEAD_DIMS

    model = config.model
    if model.attention == "softmax":
        return "softmax"
    if config.data.is_labelled:  # an encoder's: two matrix products
        return "PyTorch, bidirectional"
    num_features = feature_map_size(model, head_dim).num_features
    if (
        config.engine.precision != "bfloat16"
        or model.attention_backend == "torch"
        or device != "cuda"
        or head_dim not in HEAD_DIMS
        or num_features not in FEATURES
    ):
        return "PyTorch"
    return "CUDA kernel, φ inside" if model.feature_map in FUSED_FEATURE_MAPS else "CUDA kernel, φ outside"


def assumed_loss(config: RunConfig, head_dim: int, device: str) -> Literal["PyTorch", "Triton kernel"]:
    """What computes the attention loss of stage one."""
    from ..kernels.distill_limits import FEATURE_MAPS, WIDTHS

    model = config.model
    serves = (
        device == "cuda"
        and not config.data.is_labelled
        and config.engine.precision == "bfloat16"
        and model.attention_backend == "auto"
        and model.feature_map in FEATURE_MAPS
        and {head_dim, model.feature_dim or head_dim} <= set(WIDTHS)
    )
    return "Triton kernel" if serves else "PyTorch"

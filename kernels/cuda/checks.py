"""Whether tensors fit each other and the kernels; what does not is named in words before anything is launched."""

from __future__ import annotations

import torch
from torch import Tensor

from .limits import FEATURE_MAP_NUMBERS, FEATURES, HEAD_DIMS

MOST_BLOCKS = 65535
"""Rows and heads are the second and third dimension of a grid, to which CUDA gives 16 bits."""


def checked_sizes(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor | None, weight_k: Tensor | None, feature_map: str
) -> tuple[int, int, int, int, int]:
    """(B, H, L, D, F), or ValueError that names what does not fit."""
    if feature_map not in FEATURE_MAP_NUMBERS:
        raise ValueError(f"no kernel for feature map '{feature_map}'; there are: {', '.join(FEATURE_MAP_NUMBERS)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.dtype != torch.bfloat16 or x.device != q.device:
            raise ValueError(
                f"{name} {tuple(x.shape)} {x.dtype} on {x.device} must have 4 dimensions and be bfloat16 on {q.device}"
            )
    batch, heads, length, width = q.shape
    if batch > MOST_BLOCKS or heads > MOST_BLOCKS:
        raise ValueError(
            f"{batch} rows of {heads} heads: the kernels take at most {MOST_BLOCKS} of each; cut the batch"
        )
    kv_heads, head_dim = v.shape[1], v.shape[3]
    if kv_heads < 1 or heads % kv_heads or (v.shape[0], v.shape[2]) != (batch, length):
        raise ValueError(f"v {tuple(v.shape)} must be (B, K, L, V) with K a divisor of H, q is {tuple(q.shape)}")
    if feature_map == "given":
        if weight_q is not None or weight_k is not None:
            raise ValueError("q and k are given as features already: no weights")
        features, k_shape = width, (batch, heads, length, width)
    else:
        if weight_q is None or weight_k is None:
            raise ValueError(f"feature map '{feature_map}' needs weight_q and weight_k")
        features, k_shape = 2 * weight_q.shape[-1], (batch, kv_heads, length, head_dim)
        for name, weight in (("weight_q", weight_q), ("weight_k", weight_k)):
            if tuple(weight.shape) != (heads, head_dim, features // 2) or weight.device != q.device:
                raise ValueError(
                    f"{name} {tuple(weight.shape)} on {weight.device} must be (H, D, F/2) = "
                    f"{(heads, head_dim, features // 2)} on {q.device}"
                )
        if width != head_dim:
            raise ValueError(f"q has {width} dimensions a head and v {head_dim}: the fused kernel wants as many")
    if tuple(k.shape) != k_shape:
        raise ValueError(f"k {tuple(k.shape)} must be {k_shape}")
    if head_dim not in HEAD_DIMS or features not in FEATURES:
        raise ValueError(f"head dim {head_dim} and {features} features: the kernel has {HEAD_DIMS} and {FEATURES}")
    return batch, heads, length, head_dim, features


def check_side_inputs(
    q: Tensor,
    mask: Tensor | None,
    runs: Tensor | None,
    initial_kv: Tensor | None,
    initial_k_sum: Tensor | None,
    sizes: tuple[int, int, int, int, int],
) -> None:
    batch, heads, length, head_dim, features = sizes
    if (initial_kv is None) != (initial_k_sum is None):
        raise ValueError("initial_kv and initial_k_sum come together")
    wanted = (
        ("mask", mask, (batch, length), torch.bool),
        ("runs", runs, (batch, length), torch.int32),
        ("initial_kv", initial_kv, (batch, heads, features, head_dim), torch.float32),
        ("initial_k_sum", initial_k_sum, (batch, heads, features), torch.float32),
    )
    for name, x, shape, dtype in wanted:
        if x is not None and (tuple(x.shape) != shape or x.dtype != dtype or x.device != q.device):
            raise ValueError(f"{name} {tuple(x.shape)} {x.dtype} on {x.device} must be {shape} {dtype} on {q.device}")

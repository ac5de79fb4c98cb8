"""Tensors as arguments of the kernels: what both directions read, put down once."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import ForwardArguments, Strides, address, current_stream
from .limits import FEATURE_MAP_NUMBERS


def forward_arguments(
    inputs: tuple[Tensor | None, ...],
    sizes: tuple[int, int, int, int, int],
    feature_map: str,
    eps: float,
    segments: int,
) -> ForwardArguments:
    """What both directions read; results, denominator and scratch are left to fill in.

    Args:
        inputs: q, k, v, weight_q, weight_k, mask, runs, initial_kv, initial_k_sum, checked, on one device. What the
            kernels cannot read as it lies is copied; `held` keeps the copies alive.
        sizes: batch, heads, length, head_dim, features, as `checked_sizes` returns them.
    """
    q, k, v, weight_q, weight_k, *others = inputs
    assert q is not None and k is not None and v is not None
    q, k, v = loadable(q), loadable(k), loadable(v)
    weights = [None if w is None else loadable(w.to(torch.bfloat16).contiguous()) for w in (weight_q, weight_k)]
    others = [None if x is None else x.contiguous() for x in others]
    mask, runs, initial_kv, initial_k_sum = others
    batch, heads, length, head_dim, features = sizes
    arguments = ForwardArguments(
        q=address(q),
        k=address(k),
        v=address(v),
        weight_q=address(weights[0]),
        weight_k=address(weights[1]),
        mask=address(mask),
        runs=address(runs),
        initial_kv=address(initial_kv),
        initial_k_sum=address(initial_k_sum),
        stream=current_stream(q.device),
        q_stride=token_strides(q),
        k_stride=token_strides(k),
        v_stride=token_strides(v),
        batch=batch,
        heads=heads,
        kv_heads=v.shape[1],
        length=length,
        head_dim=head_dim,
        features=features,
        feature_map=FEATURE_MAP_NUMBERS[feature_map],
        segments=segments,
        eps=eps,
    )
    arguments.held = (q, k, v, *weights, *others)
    return arguments


def token_strides(x_BHLD: Tensor) -> Strides:
    """Elements from one row, head and token to the next."""
    return Strides(*x_BHLD.stride()[:3])


def loadable(x: Tensor) -> Tensor:
    """x, or a copy of it where the kernel's loads of 16 bytes would not be aligned."""
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)

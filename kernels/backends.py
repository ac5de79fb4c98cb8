"""The one place that chooses an implementation of causal linear attention, and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .chunked_attention import chunked_linear_attention

BACKENDS = ("auto", "torch")


class Backend(NamedTuple):
    """An implementation with the signature of `chunked_linear_attention`, its name, and why it was chosen."""

    name: str
    reason: str
    causal_attention: Callable


def select_attention_backend(
    requested: str, *, device: torch.device | str, dtype: torch.dtype, num_features: int, value_dim: int
) -> Backend:
    """The backend called `requested`, or with "auto" the fastest that serves this device, dtype and shape.

    Raises ValueError listing the backends for any other name.
    """
    if requested == "torch":
        return Backend("torch", "requested", chunked_linear_attention)
    if requested == "auto":
        what = f"{torch.device(device).type}, {str(dtype).removeprefix('torch.')}, F={num_features}, V={value_dim}"
        return Backend("torch", f"no compiled kernel for {what}", chunked_linear_attention)
    raise ValueError(f"unknown attention backend '{requested}'; known: {', '.join(BACKENDS)}")

"""How a baseline in float32 multiplies matrices: exactly, or as its users let the tensor cores do it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def products_in(kind: str) -> Iterator[None]:
    """float32 matrix products as they are, in TF32, or (autocast) in bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    autocast = torch.autocast("cuda", torch.bfloat16) if kind == "bfloat16" else contextlib.nullcontext()
    try:
        with autocast:
            yield
    finally:
        torch.set_float32_matmul_precision(before)

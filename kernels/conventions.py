"""What every form of linear attention here holds to. With s_ij = φ(q_i)·φ(k_j):

    y_i = Σ_j s_ij v_j / (Σ_j s_ij + eps)        over the j that i may see

- eps is added once to each denominator, and is far smaller than any denominator that float32 features give. Its whole
  purpose: a row that sees no key gives 0, not NaN.
- Sums over keys (scores, state, denominator) are in float32, or float64 for float64 features, whatever comes in.
- `mask_BL` (bool, True = real token) takes keys out of φ(k), where the denominator sees it too. Rows that are
  padding themselves still give whatever the keys visible to them give.
- `segment_ids_BL` (int): a token sees its own segment only. A segment is a run of equal ids among the real tokens;
  padding belongs to the segment before it (at the very start: after it).

Shape letters: B batch, L length, H query heads, K key/value heads (H % K == 0; query head h reads v of head
h // (H//K)), F features, V value dim. φ(q) and φ(k) both have H heads; v is never repeated by the caller.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

DENOMINATOR_EPS = 1e-30


def run_index_BL(segment_ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Numbers the runs of equal ids 0, 1, 2, … along each row; padding as said above."""
    ids = segment_ids_BL
    if mask_BL is not None:
        positions = torch.arange(ids.shape[1], device=ids.device)
        last_real = torch.where(mask_BL, positions, -1).cummax(dim=1).values
        first_real = mask_BL.int().argmax(dim=1, keepdim=True)
        ids = ids.gather(1, torch.maximum(last_real, first_real))
    starts = torch.zeros_like(ids)
    starts[:, 1:] = (ids[:, 1:] != ids[:, :-1]).to(ids.dtype)
    return starts.cumsum(dim=1)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's own dtype if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """In it autocast, which would take φ and the sums to bfloat16, is off. The meta device has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def check_shapes(phi_q: Tensor, phi_k: Tensor, v: Tensor, mask: Tensor | None, segment_ids: Tensor | None) -> None:
    """Raises ValueError where the inputs of a linear attention do not fit together."""
    if phi_q.dim() != 4 or phi_k.shape != phi_q.shape:
        raise ValueError(f"phi_q {tuple(phi_q.shape)} and phi_k {tuple(phi_k.shape)} must both be (B, H, L, F)")
    batch, heads, length, _ = phi_q.shape
    if v.dim() != 4 or (v.shape[0], v.shape[2]) != (batch, length) or heads % v.shape[1]:
        raise ValueError(
            f"v {tuple(v.shape)} must be (B, K, L, V) with B={batch}, L={length} and H={heads} a multiple of K"
        )
    for name, tensor in (("mask_BL", mask), ("segment_ids_BL", segment_ids)):
        if tensor is not None and tuple(tensor.shape) != (batch, length):
            raise ValueError(f"{name} {tuple(tensor.shape)} must be (B, L) = {(batch, length)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask_BL must be bool (True = real token), not {mask.dtype}")

"""Which keys each query sees, as three integers a token: enough for a kernel to mask tiles and to skip them.

Query i sees key j where j ≤ i, both are real, and both are in one segment. Segments are contiguous (padding between
their tokens included), so what i sees lies between the first real token of its segment and i itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .conventions import run_index_BL


class VisibleRanges(NamedTuple):
    """int32, (B, L), on the batch's device; no value travels to the host.

    `start_BL`: first key that a real query sees; L for padding. `end_BL`: one past the last position whose queries see
    this key; 0 for padding. So i sees j where start_i ≤ i, j ≤ i and i < end_j.
    `count_BL`: how many keys a real query sees; 0 for padding.
    """

    start_BL: Tensor
    end_BL: Tensor
    count_BL: Tensor


def visible_ranges(
    batch: int, length: int, mask_BL: Tensor | None, segment_ids_BL: Tensor | None, device: torch.device
) -> VisibleRanges:
    """The ranges of a batch; `mask_BL` (bool, True = real) and `segment_ids_BL` as in `conventions`."""
    positions = torch.arange(length, device=device).expand(batch, length)
    real = torch.ones(batch, length, dtype=torch.bool, device=device) if mask_BL is None else mask_BL
    run = torch.zeros_like(positions) if segment_ids_BL is None else run_index_BL(segment_ids_BL, mask_BL)
    border = torch.ones(batch, 1, dtype=torch.bool, device=device)
    changes = run[:, 1:] != run[:, :-1]
    run_start = torch.where(torch.cat([border, changes], dim=1), positions, 0).cummax(dim=1).values
    last = torch.where(torch.cat([changes, border], dim=1), positions + 1, length)
    run_end = last.flip(1).cummin(dim=1).values.flip(1)
    seen = real.long().cumsum(dim=1)
    before_run = (seen - real.long()).gather(1, run_start)
    count = torch.where(real, seen - before_run, 0)
    start = torch.where(real & (count == 1), positions, 0).cummax(dim=1).values
    return VisibleRanges(
        torch.where(real, start, length).int(), torch.where(real, run_end, 0).int(), count.int().contiguous()
    )

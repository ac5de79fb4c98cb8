"""Where each token stands in its own sequence, when rows hold padding or several packed sequences.

B batch, L length. This file travels with every export.
"""

from __future__ import annotations

import torch

from ...kernels.linear_attention import run_index_BL


def row_positions(
    shape_BL: torch.Size | tuple[int, int],
    mask_BL: torch.Tensor | None,
    segment_ids_BL: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """(B, L): 0, 1, 2, … over the real tokens of each row, again from 0 at each segment's border."""
    if mask_BL is None:
        mask_BL = torch.ones(shape_BL, dtype=torch.bool, device=device)
    real_BL = mask_BL.long()
    count_BL = real_BL.cumsum(1)
    if segment_ids_BL is not None:
        run_BL = run_index_BL(segment_ids_BL, mask_BL)
        starts_BL = torch.ones_like(mask_BL)
        starts_BL[:, 1:] = run_BL[:, 1:] != run_BL[:, :-1]
        before_BL = torch.where(starts_BL, count_BL - real_BL, 0).cummax(1).values
        count_BL = count_BL - before_BL
    return (count_BL - 1).clamp_min(0)


def first_tokens(segment_ids_BL: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
    """(B, L) bool, True at the first real token of each packed segment."""
    first_BL = row_positions(segment_ids_BL.shape, mask_BL, segment_ids_BL, segment_ids_BL.device) == 0
    return first_BL if mask_BL is None else first_BL & mask_BL


__all__ = ["first_tokens", "row_positions"]

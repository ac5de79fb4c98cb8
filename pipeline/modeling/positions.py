"""Where each token stands in its own sequence, when rows hold padding or several packed sequences.

B batch, L length, N sequences. This file travels with every export.
"""

from __future__ import annotations

from typing import Any

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


def packed_segments(
    shape_BL: torch.Size | tuple[int, int],
    position_ids: torch.Tensor | None,
    packing: dict[str, Any],
    device: torch.device,
) -> torch.Tensor | None:
    """Segment ids (B, L) of rows that are packed in transformers' ways, or None where nothing says so.

    `packing` may have `seq_idx` (B, L) or `cu_seq_lens_q` (N + 1), the ends of the sequences of one row, as
    DataCollatorWithFlattening gives them; without both, `position_ids` that do not go up by one begin a sequence, as
    they do for transformers' masks. ValueError for what fits neither the batch nor its length.
    """
    seq_idx, ends_N = packing.get("seq_idx"), packing.get("cu_seq_lens_q")
    if seq_idx is not None:
        if tuple(seq_idx.shape) != tuple(shape_BL):
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}; the tokens have {tuple(shape_BL)}")
        return seq_idx.to(device)
    if ends_N is not None:
        length = shape_BL[1]
        if shape_BL[0] != 1 or ends_N.ndim != 1 or int(ends_N[0]) != 0 or int(ends_N[-1]) != length:
            raise ValueError(
                f"cu_seq_lens_q goes with one row and from 0 to its length, {length}; here are {shape_BL[0]} rows and "
                f"{ends_N.tolist()}. For several packed rows give segment_ids (batch, length)"
            )
        at_L = torch.arange(length, device=device)
        return torch.searchsorted(ends_N[1:].to(device, torch.long), at_L, right=True)[None]
    if position_ids is None or shape_BL[1] == 1:
        return None
    starts_BL = position_ids.to(device).diff(dim=1) != 1
    if not torch.compiler.is_compiling() and not bool(starts_BL.any()):  # a graph cannot ask
        return None
    return torch.nn.functional.pad(starts_BL.long().cumsum(1), (1, 0)).expand(shape_BL)


def first_tokens(segment_ids_BL: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
    """(B, L) bool, True at the first real token of each packed segment."""
    first_BL = row_positions(segment_ids_BL.shape, mask_BL, segment_ids_BL, segment_ids_BL.device) == 0
    return first_BL if mask_BL is None else first_BL & mask_BL


__all__ = ["first_tokens", "packed_segments", "row_positions"]

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

    `start_BL`: first key that a real query sees; L for padding. `end_BL`: one past the last real query that sees this
    key; 0 for padding. So i sees j where start_i ≤ i, j ≤ i and i < end_j.
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
    last = torch.where(torch.cat([changes, border], dim=1), positions, length)
    run_last = last.flip(1).cummin(dim=1).values.flip(1)
    # one past the last real token up to a position; at its run's last position, the run's own
    real_until = torch.where(real, positions + 1, 0).cummax(dim=1).values.gather(1, run_last)
    seen = real.long().cumsum(dim=1)
    before_run = (seen - real.long()).gather(1, run_start)
    count = torch.where(real, seen - before_run, 0)
    start = torch.where(real & (count == 1), positions, 0).cummax(dim=1).values
    return VisibleRanges(
        torch.where(real, start, length).int(), torch.where(real, real_until, 0).int(), count.int().contiguous()
    )


class TileTables(NamedTuple):
    """int32, what a kernel's tiles want to know beforehand.

    `spanned_BC`: 1 where the segment that goes on after a chunk had begun before it. `listed_BT`: the tiles of queries
    with any weight, in order; what comes after those is not read. `rank_BT`: how many of them come before each tile,
    and in the end all, (B, tiles + 1). `weighted_BL`: 1 for rows with a weight.
    """

    spanned_BC: Tensor
    listed_BT: Tensor
    rank_BT: Tensor
    weighted_BL: Tensor


def tile_tables(ranges: VisibleRanges, weights_BL: Tensor, chunk: int, rows: int) -> TileTables:
    """Tables for chunks of `chunk` tokens and tiles of `rows` queries; rows weigh `weights_BL` in the loss."""
    batch = weights_BL.shape[0]
    starts = _by_tile(torch.where(ranges.count_BL > 0, ranges.start_BL, -1), chunk, -1)
    chunk_starts = torch.arange(starts.shape[1], device=starts.device) * chunk
    weighted = weights_BL != 0
    counted = _by_tile(weighted, rows, False).any(dim=2)
    num_tiles = counted.shape[1]
    rank = torch.zeros(batch, num_tiles + 1, dtype=torch.long, device=counted.device)
    torch.cumsum(counted, dim=1, out=rank[:, 1:])
    places = torch.where(counted, rank[:, :-1], num_tiles)
    tiles = torch.arange(num_tiles, device=counted.device).expand(batch, -1)
    listed = torch.zeros_like(rank).scatter_(1, places, tiles)
    spanned = (starts.amax(dim=2) < chunk_starts).int()
    return TileTables(spanned, listed[:, :num_tiles].int().contiguous(), rank.int(), weighted.int())


def _by_tile(x_BL: Tensor, size: int, filling: float) -> Tensor:
    """(B, tiles, size), filled up at the end."""
    return torch.nn.functional.pad(x_BL, (0, -x_BL.shape[1] % size), value=filling).unflatten(1, (-1, size))


class Visibility:
    """The masks and row weights of one batch, and what a kernel's tiles want of them: worked out at the first layer."""

    def __init__(self, mask_BL: Tensor | None, segment_ids_BL: Tensor | None, row_weights_BL: Tensor | None) -> None:
        self._masks = (mask_BL, segment_ids_BL, row_weights_BL)
        self._known: dict[tuple[int, int], tuple[VisibleRanges, TileTables]] = {}

    def is_of(self, *masks: Tensor | None) -> bool:
        """Whether it was made of these very tensors: mask, segment ids and row weights."""
        return all(mine is given for mine, given in zip(self._masks, masks, strict=True))

    def tables(self, weights_BL: Tensor, chunk: int, rows: int) -> tuple[VisibleRanges, TileTables]:
        """Ranges and tables; `weights_BL` are the row weights, filled in where none were given."""
        if (chunk, rows) not in self._known:
            mask_BL, segment_ids_BL, _ = self._masks
            batch, length = weights_BL.shape
            ranges = visible_ranges(batch, length, mask_BL, segment_ids_BL, weights_BL.device)
            self._known[chunk, rows] = ranges, tile_tables(ranges, weights_BL, chunk, rows)
        return self._known[chunk, rows]

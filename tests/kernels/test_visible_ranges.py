"""Three integers a token against the mask they stand for."""

from __future__ import annotations

import pytest
import torch

from hedgehog.kernels.conventions import run_index_BL
from hedgehog.kernels.visible_ranges import tile_tables, visible_ranges

BATCH = 40


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_ranges_are_the_mask(padded, packed, length):
    generator = torch.Generator().manual_seed(length)
    mask = torch.rand(BATCH, length, generator=generator) < 0.6 if padded else None
    segments = torch.randint(0, 3, (BATCH, length), generator=generator) if packed else None
    real = torch.ones(BATCH, length, dtype=torch.bool) if mask is None else mask
    visible = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, :] & real[:, :, None]
    if segments is not None:
        run = run_index_BL(segments, mask)
        visible = visible & (run[:, :, None] == run[:, None, :])

    start, end, count = visible_ranges(BATCH, length, mask, segments, torch.device("cpu"))
    position = torch.arange(length)
    from_ranges = (
        (position <= position[:, None]) & (position[:, None] < end[:, None, :]) & (start <= position)[:, :, None]
    )
    assert torch.equal(from_ranges, visible)
    assert torch.equal(count, visible.sum(dim=2, dtype=torch.int32))
    first_seen = torch.where(visible.any(dim=2), visible.int().argmax(dim=2), length)
    assert torch.equal(start, first_seen.int())
    assert torch.equal(end == 0, ~real)
    last_seen_by = torch.where(visible.any(dim=1), length - visible.flip(1).int().argmax(dim=1), 0)
    assert torch.equal(end, last_seen_by.int())


@pytest.mark.parametrize("length", [1, 8, 21])
def test_tables_of_tiles(length):
    chunk, rows = 4, 8
    generator = torch.Generator().manual_seed(length)
    mask = torch.rand(BATCH, length, generator=generator) < 0.7
    segments = torch.randint(0, 2, (BATCH, length), generator=generator).cumsum(dim=1) // 6
    weights = mask * (torch.rand(BATCH, length, generator=generator) < 0.1).float()
    ranges = visible_ranges(BATCH, length, mask, segments, torch.device("cpu"))
    tables = tile_tables(ranges, weights, chunk, rows)
    starts = ranges.start_BL
    assert torch.equal(tables.weighted_BL, (weights > 0).int())
    for row in range(BATCH):
        counted = [bool((piece > 0).any()) for piece in weights[row].split(rows)]
        listed = [tile for tile, wanted in enumerate(counted) if wanted]
        assert tables.listed_BT[row, : len(listed)].tolist() == listed
        assert tables.rank_BT[row].tolist() == [sum(counted[:tile]) for tile in range(len(counted) + 1)]
        for place, first in enumerate(range(0, length, chunk)):
            later = starts[row, first + chunk :][mask[row, first + chunk :]]
            crosses = len(later) > 0 and int(later[0]) < first + chunk  # a segment goes on after this chunk
            if crosses:
                assert bool(tables.spanned_BC[row, place]) == (int(later[0]) < first), (row, place)

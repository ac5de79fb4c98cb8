"""Cutting padded and packed batches into dense causal problems."""

from __future__ import annotations

import torch

from hedgehog.kernels.spans import causal_spans, gather_spans, span_batches


def test_without_mask_every_row_is_one_span():
    spans = causal_spans(2, 5)
    assert [(s.row, s.positions, s.length) for s in spans] == [(0, slice(0, 5), 5), (1, slice(0, 5), 5)]


def test_padding_is_cut_off_and_segments_are_cut_apart():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    segments = torch.tensor([[9, 9, 4, 4, 5], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    spans = causal_spans(3, 5, mask, segments)
    assert [(s.row, s.length) for s in spans] == [(0, 2), (0, 1), (1, 3)]
    assert spans[0].positions == slice(2, 4) and spans[1].positions == slice(4, 5)
    assert isinstance(spans[2].positions, torch.Tensor) and spans[2].positions.tolist() == [0, 2, 3]


def test_batches_cover_every_span_and_head_once_within_the_budget():
    mask = torch.arange(50).expand(9, -1) < torch.tensor([50, 3, 17, 49, 48, 5, 16, 1, 44]).unsqueeze(1)
    spans = causal_spans(9, 50, mask)
    for max_cells in (1, 500, 5000, 10**9):
        seen = []
        for batch, heads in span_batches(spans, 4, max_cells, cells_per_token=8):
            longest = max(s.length for s in batch)
            num_heads = heads.stop - heads.start
            assert len(batch) * num_heads == 1 or len(batch) * num_heads * longest * 8 <= max_cells
            assert all(s.length >= 0.85 * longest for s in batch)
            seen += [(s.row, head) for s in batch for head in range(heads.start, heads.stop)]
        assert sorted(seen) == [(row, head) for row in range(9) for head in range(4)]


def test_gather_fills_up_with_zeros_and_repeats_key_heads():
    x = torch.arange(2 * 2 * 4, dtype=torch.float32).reshape(2, 2, 4, 1) + 1
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    spans = causal_spans(2, 4, mask)
    out = gather_spans(x, spans, slice(1, 3), num_heads=4, dtype=torch.float64)
    assert out.dtype == torch.float64 and out.shape == (2, 2, 3, 1)
    assert out[..., 0].tolist() == [[[1, 3, 4], [11, 12, 0]], [[5, 7, 8], [15, 16, 0]]]

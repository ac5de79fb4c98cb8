"""Turns padded and packed batches into dense causal problems, which need no mask at all.

Under causal attention within segments, padding is neither seen nor asked, so leaving it out changes nothing for the
real tokens. What remains is one dense causal problem per run of real tokens: a span. Spans of similar length are worked
on together, filled up at the end, where causality hides the filling from every real row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .conventions import run_index_BL

# A span joins longer ones if it is at least this long relative to the longest: the rest would be wasted work.
MIN_RELATIVE_LENGTH = 0.85


@dataclass(frozen=True)
class Span:
    """The real tokens of one segment of batch row `row`: positions in the row, as a slice where they adjoin."""

    row: int
    positions: slice | Tensor
    length: int


def causal_spans(
    batch_size: int, length: int, mask_BL: Tensor | None = None, segment_ids_BL: Tensor | None = None
) -> list[Span]:
    """The spans of a batch, in order. Reads mask and ids back to the host."""
    if mask_BL is None and segment_ids_BL is None:
        return [Span(row, slice(0, length), length) for row in range(batch_size)]
    real_BL = torch.ones(batch_size, length, dtype=torch.bool) if mask_BL is None else mask_BL.cpu()
    runs_BL = torch.zeros_like(real_BL, dtype=torch.long)
    if segment_ids_BL is not None:
        runs_BL = run_index_BL(segment_ids_BL.cpu(), real_BL)
    spans = []
    for row in range(batch_size):
        positions = real_BL[row].nonzero().squeeze(1)
        counts = torch.unique_consecutive(runs_BL[row, positions], return_counts=True)[1]
        for piece in positions.split(counts.tolist()):
            first, last, count = int(piece[0]), int(piece[-1]), len(piece)
            adjoin = last - first + 1 == count
            spans.append(Span(row, slice(first, last + 1) if adjoin else piece, count))
    return spans


def span_batches(
    spans: list[Span], num_heads: int, max_cells: int, cells_per_token: int
) -> Iterator[tuple[list[Span], slice]]:
    """Yields (spans, heads) to be worked on at once, so that spans · heads · longest · cells_per_token ≤ max_cells.

    Never less than one span and one head, whose cost is then linear in the span's length.
    """
    waiting = sorted(spans, key=lambda span: -span.length)
    while waiting:
        longest = waiting[0].length
        cells_per_head = longest * cells_per_token
        most = max(1, max_cells // (cells_per_head * num_heads))
        size = 1
        while size < min(most, len(waiting)) and waiting[size].length >= MIN_RELATIVE_LENGTH * longest:
            size += 1
        heads = num_heads if size > 1 else max(1, min(num_heads, max_cells // cells_per_head))
        for first in range(0, num_heads, heads):
            yield waiting[:size], slice(first, min(first + heads, num_heads))
        waiting = waiting[size:]


def gather_spans(x_BHLX: Tensor, spans: list[Span], heads: slice, num_heads: int, dtype: torch.dtype) -> Tensor:
    """The spans' rows of x for query heads `heads`, (heads, spans, longest, X) in `dtype`, zero after each span's end.

    x may have fewer heads than `num_heads` (GQA): each query head gets its own key/value head's rows.
    """
    if x_BHLX.shape[1] == num_heads:
        head_index: slice | list[int] = heads
    else:
        group = num_heads // x_BHLX.shape[1]
        head_index = [head // group for head in range(heads.start, heads.stop)]
    longest = max(span.length for span in spans)
    out = x_BHLX.new_empty(heads.stop - heads.start, len(spans), longest, x_BHLX.shape[-1], dtype=dtype)
    for n, span in enumerate(spans):
        positions = span.positions if isinstance(span.positions, slice) else span.positions.to(x_BHLX.device)
        out[:, n, : span.length] = x_BHLX[span.row][:, positions][head_index]
        out[:, n, span.length :] = 0
    return out

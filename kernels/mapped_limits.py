"""How many tokens `mapped_attention` takes at a time. Imports nothing: the memory estimate asks without torch."""

from __future__ import annotations

CELLS_PER_SPAN = {"cpu": 2**18, "cuda": 2**22}
"""Numbers in φ of a span, 1 and 16 MiB in float32, but for MIN_CHUNKS_PER_SPAN. Measured on a CPU, F = 64 to 256:
longer spans save no time from there on. A GPU wants more work in a call."""
MIN_CHUNKS_PER_SPAN = 4


def span_length(device: str, batch: int, num_heads: int, num_features: int, chunk_size: int) -> int:
    """Tokens in a span: whole chunks."""
    cells_per_chunk = max(1, batch * num_heads * chunk_size * num_features)
    cells = CELLS_PER_SPAN.get(device, CELLS_PER_SPAN["cuda"])
    return chunk_size * max(MIN_CHUNKS_PER_SPAN, cells // cells_per_chunk)

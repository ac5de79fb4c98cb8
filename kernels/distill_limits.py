"""What the Triton kernel of the distillation loss takes, and how much memory either form uses. Imports nothing."""

from __future__ import annotations

FEATURE_MAPS = ("hedgehog_softmax", "hedgehog_exp", "hedgehog_joint")
WIDTHS = (16, 32, 64, 128)
"""What head_dim and feature_dim may be: powers of two that one tile holds."""
MAX_SCRATCH_BYTES = 3 * 2**27
"""φ and dφ of the heads at hand, one head at least. All 32 heads of Llama-2 7B at 4k tokens are 384 MiB."""
WEIGHT_SHARES = 32
"""Programs a head over which dW is summed: enough, with 32 heads, for the largest GPU. Their partial sums are small."""
MAX_CELLS = {"cpu": 2**19, "cuda": 2**25}
"""In PyTorch: numbers in the largest tensor of one step. On a CPU a few of them should stay in the last cache."""
CHUNK = 64
"""Tokens after which the running sum of φ(k) is kept."""
BAND_PROGRAMS = 512
"""Tiles of queries, over all heads at hand, whose g is kept at once: just under four programs for each of an H200's
132 multiprocessors. With blocks of KEY_BLOCK keys that is 256 MiB, whatever the length."""
KEY_BLOCK = 2048
"""Keys after which the g of a band of queries is used and gone. dφ is read and written once more for each block."""
QUERY_TILE = 128
"""Queries in the largest tile."""


def heads_at_once(num_heads: int, num_tokens: int, num_features: int, operand_bytes: int = 2) -> int:
    """Heads that are worked on together: φ(q) and φ(k) as operands, and both dφ in float32, are what scratch is."""
    bytes_per_head = num_tokens * num_features * (2 * operand_bytes + 8)
    return max(1, min(num_heads, MAX_SCRATCH_BYTES // max(1, bytes_per_head)))


def band_shape(batch: int, heads: int, length: int, rows: int = QUERY_TILE) -> tuple[int, int]:
    """(tiles of `rows` queries in a band, keys in a block): whole tiles, as many as there are at most."""
    num_tiles = -(-length // rows)
    return min(max(1, BAND_PROGRAMS // max(1, batch * heads)), num_tiles), min(KEY_BLOCK, num_tiles * rows)


def scratch_bytes(
    num_heads: int, batch: int, length: int, head_dim: int, feature_dim: int, num_features: int, operand_bytes: int = 2
) -> int:
    """The kernel's largest allocations at once: φ, dφ, sums of φ(k), four numbers a row; g of a band and a block of
    keys; a float32 W, and dW in parts and summed.
    """
    tokens = batch * length
    heads = heads_at_once(num_heads, tokens, num_features, operand_bytes)
    tiles, keys = band_shape(batch, heads, length)
    per_token = num_features * (2 * operand_bytes + 8) + 4 * num_features // CHUNK + 16
    per_head = 4 * head_dim * feature_dim * (WEIGHT_SHARES + 2)
    g = batch * tiles * QUERY_TILE * keys * operand_bytes
    return heads * (tokens * per_token + per_head + g)

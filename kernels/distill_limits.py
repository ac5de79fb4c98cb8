"""What the Triton kernel of the distillation loss takes, and how much memory either form uses. Imports nothing."""

from __future__ import annotations

FEATURE_MAPS = ("hedgehog_softmax", "hedgehog_exp", "hedgehog_joint")
WIDTHS = (16, 32, 64, 128)
"""What head_dim and feature_dim may be: powers of two that one tile holds."""
MAX_SCRATCH_BYTES = 2**28
"""Scratch for the heads at hand, one head at least. All 32 heads of Llama-2 7B at 4k tokens are 256 MiB."""
WEIGHT_SHARES = 32
"""Programs a head over which dW is summed: enough, with 32 heads, for the largest GPU. Their partial sums are small."""
MAX_CELLS = {"cpu": 2**19, "cuda": 2**25}
"""In PyTorch: numbers in the largest tensor of one step. On a CPU a few of them should stay in the last cache."""
CHUNK = 64
"""Tokens after which the running sum of φ(k) is kept."""


def heads_at_once(num_heads: int, num_tokens: int, num_features: int, operand_bytes: int = 2) -> int:
    """Heads that are worked on together: φ(q) and φ(k) as operands, and dφ in float32, are what their scratch is."""
    bytes_per_head = num_tokens * num_features * (2 * operand_bytes + 4)
    return max(1, min(num_heads, MAX_SCRATCH_BYTES // max(1, bytes_per_head)))


def scratch_bytes(
    num_heads: int, num_tokens: int, head_dim: int, feature_dim: int, num_features: int, operand_bytes: int = 2
) -> int:
    """The kernel's largest allocations at once: φ, dφ, sums of φ(k), L and Z; a float32 W, and dW in parts and summed.

    `num_tokens`: batch times length.
    """
    per_token = num_features * (2 * operand_bytes + 4) + 4 * num_features // CHUNK + 8
    per_head = 4 * head_dim * feature_dim * (WEIGHT_SHARES + 2)
    return heads_at_once(num_heads, num_tokens, num_features, operand_bytes) * (num_tokens * per_token + per_head)

"""What a call has to do, whoever does it: operations and bytes, and the least time that they take.

Letters: d head dim (of q, k and v), f features, c = 64 tokens a chunk, T length. bf16 is 2 bytes. A product of an
(m, n) and an (n, p) matrix counts 2·m·n·p. Within a chunk the whole c×c tile is counted, not its causal half: the
tensor cores compute all of it. Exponentials, the normaliser and the weights (read once a head) are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CHUNK = 64
PASSES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Ceilings:
    """What a large copy (read and write counted) and a large bf16 product reach in the same run."""

    bytes_per_s: float
    flop_per_s: float


@dataclass(frozen=True)
class Work:
    """Of one kernel: the arithmetic and the traffic may overlap."""

    flop: float
    num_bytes: float


def limit_s(parts: Sequence[Work], ceilings: Ceilings) -> float:
    """The least time: of each kernel the longer of arithmetic and memory, one kernel after the other."""
    return sum(max(part.flop / ceilings.flop_per_s, part.num_bytes / ceilings.bytes_per_s) for part in parts)


def total_flop(parts: Sequence[Work]) -> float:
    return sum(part.flop for part in parts)


def total_bytes(parts: Sequence[Work]) -> float:
    return sum(part.num_bytes for part in parts)


def linear_attention_work(passes: str, heads: int, length: int, head_dim: int, features: int) -> list[Work]:
    """Causal linear attention from q, k, v, with φ = f(W x) computed inside. A token and head:

    Forward, 6df + 2c(d+f) FLOP (131 k at d = 128, f = 128; 246 k at f = 256) and 8d + 4 bytes (q, k, v, o; d_i in
    float32):
        W x of q and of k, each 2·d·f/2        2df
        φq φkᵀ, times v                        2cf + 2cd
        φq S, S += φkᵀ v                       4df

    Backward, 18df + 6c(d+f) FLOP (393 k, 737 k): two sweeps, nothing saved but q, k, v, o and d_i.
        forward sweep: φq, φk again            2df
            dn vᵀ, its product with φk         2cd + 2cf
            dn Sᵀ, S += φkᵀ v                  4df
            through W to dq, and dW_q          2df
        reverse sweep: φq, φk again            2df
            dn vᵀ, its product with φq         2cd + 2cf
            φq φkᵀ, its product with dn        2cf + 2cd
            v Rᵀ, φk R, R += φqᵀ dn            6df
            through W to dk, and dW_k          2df
    and 24d + 16 bytes: q, k, v, o, do read and dq written by the one, q, k, v, do read and dk, dv written by the
    other; d_i read by both, dd_i written and read.
    """
    tokens, d, f, c = heads * length, head_dim, features, CHUNK
    forward = Work(tokens * (6 * d * f + 2 * c * (d + f)), tokens * (8 * d + 4))
    backward = Work(tokens * (18 * d * f + 6 * c * (d + f)), tokens * (24 * d + 16))
    return {"forward": [forward], "backward": [backward]}.get(passes, [forward, backward])


def softmax_work(passes: str, heads: int, length: int, head_dim: int) -> list[Work]:
    """Causal softmax attention that keeps no T×T matrix; half of the square, T²/2 pairs a head.

    Forward q kᵀ and p v: 4d a pair; q, k, v, o. Backward q kᵀ again, do vᵀ, dv, dq, dk: 10d a pair; q, k, v, o, do
    and dq, dk, dv.
    """
    pairs, tokens, d = heads * length**2 / 2, heads * length, head_dim
    forward, backward = Work(pairs * 4 * d, tokens * 8 * d), Work(pairs * 10 * d, tokens * 16 * d)
    return {"forward": [forward], "backward": [backward]}.get(passes, [forward, backward])


def decoding_work(batch: int, heads: int, head_dim: int, features: int) -> list[Work]:
    """One token a row: φ of q and k (2df), S += φk vᵀ and φq S (4df).

    The state, f·(d + 1) float32 a head, is read and written; q, k, v, o; the weights, f·d bf16 a head, are read once
    whatever the batch.
    """
    d, f, rows = head_dim, features, batch * heads
    return [Work(rows * 6 * d * f, rows * (8 * f * (d + 1) + 8 * d) + heads * 2 * d * f)]


def softmax_decoding_work(batch: int, heads: int, head_dim: int, positions: int) -> list[Work]:
    """One token a row on a cache of so many positions: 4d FLOP and 4d bytes a position; q and o."""
    rows, d = batch * heads, head_dim
    return [Work(rows * positions * 4 * d, rows * (positions * 4 * d + 4 * d))]

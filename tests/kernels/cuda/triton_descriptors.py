"""Prints the matrix descriptors that Triton's compiler gives wgmma for known layouts, as JSON; a process of its own.

A product of tiles that were loaded row by row: what lies in shared memory is the tile's rows, with the 128-byte
swizzle. So an operand whose rows are M or N is K-major, and one whose rows are k is MN-major. Start addresses are left
out: Triton adds them at run time.
"""

from __future__ import annotations

import json
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

M, N, K = 64, 128, 64


@triton.jit
def product(
    a, b, out, A_ROWS_ARE_K: tl.constexpr, B_ROWS_ARE_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    if A_ROWS_ARE_K:  # noqa: SIM108  a branch of the compiler's
        x = tl.trans(tl.load(a + k[:, None] * M + m[None, :]))
    else:
        x = tl.load(a + m[:, None] * K + k[None, :])
    if B_ROWS_ARE_K:  # noqa: SIM108
        y = tl.load(b + k[:, None] * N + n[None, :])
    else:
        y = tl.trans(tl.load(b + n[:, None] * K + k[None, :]))
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, y))


def constants(a_rows_are_k: bool, b_rows_are_k: bool) -> list[dict[str, int]]:
    """Of each wgmma in turn: the constants in its two descriptors, and its two transposition bits."""
    source = ASTSource(
        product,
        {"a": "*bf16", "b": "*bf16", "out": "*fp32"},
        constexprs={"A_ROWS_ARE_K": a_rows_are_k, "B_ROWS_ARE_K": b_rows_are_k, "M": M, "N": N, "K": K},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    sums = dict(re.findall(r"(?:add\.s64|or\.b64)\s+(%rd\d+), %rd\d+, (-?\d+);", ptx))
    form = r"wgmma\.mma_async\.sync\.aligned\.m64n128k16\S+ \{[^}]*\}, (%rd\d+), (%rd\d+), \S+ 1, 1, ([01]), ([01]);"
    return [
        {
            "a": int(sums[a]) % 2**64,
            "b": int(sums[b]) % 2**64,
            "transpose_a": int(transpose_a),
            "transpose_b": int(transpose_b),
        }
        for a, b, transpose_a, transpose_b in re.findall(form, ptx)
    ]


if __name__ == "__main__":
    print(json.dumps([[constants(a, b) for b in (False, True)] for a in (False, True)]))

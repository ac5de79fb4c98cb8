"""Triton kernels of the distillation loss that see each token once: φ, and from dφ to dW.

Shape letters and conventions as in `distill_tiles`, which has the loss itself.
"""

# Inside a kernel names stand for Triton's own types, which a type checker does not know.
# pyright: basic, reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
from __future__ import annotations

import triton
import triton.language as tl

# Forms of φ(x), with z = FACTOR·W x
TWO_SOFTMAXES = tl.constexpr(0)
ONE_SOFTMAX = tl.constexpr(1)
BOUNDED_EXP = tl.constexpr(2)

_TINY = tl.constexpr(1e-30)  # keeps padding's 0/0 a number


@triton.jit
def dot(a, b, INTERPRETED: tl.constexpr):
    """a @ b, accumulated in float32. float32 operands in three tf32 products, about as exact as float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _dot_two_terms(a, b, INTERPRETED: tl.constexpr):
    """a @ b for float32 b, which is split into two terms of a's dtype: 16 bits of b survive even in bfloat16."""
    if a.dtype == tl.float32:
        return dot(a, b, INTERPRETED)
    high = b.to(a.dtype)
    low = (b - high.to(tl.float32)).to(a.dtype)
    return dot(a, high, INTERPRETED) + dot(a, low, INTERPRETED)


@triton.jit
def _bounded_exponent(z, bound):
    """`feature_maps.bounded_exponent`."""
    excess = tl.maximum(tl.abs(z) - bound, 0.0)
    return z - tl.where(z > 0, 1.0, -1.0) * (excess - tl.log(1.0 + excess))


@triton.jit
def _features(z, bound, FORM: tl.constexpr):
    """The two halves of φ, float32."""
    if FORM == TWO_SOFTMAXES:
        plus = tl.exp(z - tl.max(z, axis=1)[:, None])
        minus = tl.exp(tl.min(z, axis=1)[:, None] - z)
        return plus / tl.sum(plus, axis=1)[:, None], minus / tl.sum(minus, axis=1)[:, None]
    elif FORM == ONE_SOFTMAX:
        top = tl.max(tl.abs(z), axis=1)[:, None]
        plus = tl.exp(z - top)
        minus = tl.exp(-z - top)
        total = (tl.sum(plus, axis=1) + tl.sum(minus, axis=1))[:, None]
        return plus / total, minus / total
    else:
        bent = _bounded_exponent(z, bound)
        return tl.exp(bent), tl.exp(-bent)


@triton.jit
def _projected_gradient(plus, minus, grad_plus, grad_minus, bound, FORM: tl.constexpr):
    """dz from dφ and the rounded φ, float32.

    Means are over Σ φ, which rounding leaves off 1: what all of dφ have in common has to cancel.
    """
    if FORM == TWO_SOFTMAXES:
        mean_plus = tl.sum(plus * grad_plus, axis=1) / tl.maximum(tl.sum(plus, axis=1), _TINY)
        mean_minus = tl.sum(minus * grad_minus, axis=1) / tl.maximum(tl.sum(minus, axis=1), _TINY)
        return plus * (grad_plus - mean_plus[:, None]) - minus * (grad_minus - mean_minus[:, None])
    elif FORM == ONE_SOFTMAX:
        total = tl.maximum(tl.sum(plus, axis=1) + tl.sum(minus, axis=1), _TINY)
        mean = (tl.sum(plus * grad_plus, axis=1) + tl.sum(minus * grad_minus, axis=1)) / total
        return plus * (grad_plus - mean[:, None]) - minus * (grad_minus - mean[:, None])
    else:
        # the exponent's slope, 1/(1 + excess), where max(φ) = exp(bound)·(1 + excess)
        slope = tl.minimum(tl.exp(bound) / tl.maximum(tl.maximum(plus, minus), 1.0), 1.0)
        return (plus * grad_plus - minus * grad_minus) * slope


@triton.jit
def map_features(
    x,  # (B, heads, L, D), strides below
    weight,  # (heads at hand, D, P), float32
    phi,  # out: (B, G, L, F), operand dtype
    tail,  # out: (B, G, chunks, F), float32: Σ φ over the chunk's keys that are seen beyond it
    end,  # (B, L)
    stride_batch,
    stride_head,
    stride_row,
    first_head,
    heads_per_x_head,
    num_heads,
    length,
    factor,
    bound,
    D: tl.constexpr,
    P: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_TAIL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """φ of BLOCK tokens of one head. Zero for padding, which is never read."""
    chunk = tl.program_id(0)
    problem = tl.program_id(1).to(tl.int64)
    batch, head = problem // num_heads, problem % num_heads
    rows = chunk * BLOCK + tl.arange(0, BLOCK)
    in_features = tl.arange(0, D)
    out_features = tl.arange(0, P)
    ends = tl.load(end + batch * length + rows, mask=rows < length, other=0)
    real = (ends > 0)[:, None]
    x += batch * stride_batch + ((first_head + head) // heads_per_x_head) * stride_head
    tokens = tl.load(x + rows[:, None] * stride_row + in_features[None, :], mask=real, other=0.0)
    w = tl.load(weight + head * D * P + in_features[:, None] * P + out_features[None, :])
    plus, minus = _features(_dot_two_terms(tokens, w, INTERPRETED) * factor, bound, FORM)
    plus = tl.where(real, plus, 0.0).to(phi.dtype.element_ty)
    minus = tl.where(real, minus, 0.0).to(phi.dtype.element_ty)

    phi += problem * length * (2 * P)
    places = phi + rows[:, None] * (2 * P) + out_features[None, :]
    inside = (rows < length)[:, None]
    tl.store(places, plus, mask=inside)
    tl.store(places + P, minus, mask=inside)
    if WITH_TAIL:
        beyond = (ends > (chunk + 1) * BLOCK)[:, None]
        tail += (problem * tl.num_programs(0) + chunk) * (2 * P)
        tl.store(tail + out_features, tl.sum(tl.where(beyond, plus.to(tl.float32), 0.0), axis=0))
        tl.store(tail + P + out_features, tl.sum(tl.where(beyond, minus.to(tl.float32), 0.0), axis=0))


@triton.jit
def weight_gradient(
    x,
    phi,  # (B, G, L, F), operand dtype
    grad_phi,  # (B, G, L, F), float32
    counted,  # (B, L), int32: 0 where there is no gradient, and nothing is read
    partial,  # out: (shares, G, D, P), float32
    stride_batch,
    stride_head,
    stride_row,
    first_head,
    heads_per_x_head,
    num_heads,
    length,
    num_tiles,  # of BLOCK tokens, in the whole batch
    tiles_per_share,
    factor,
    bound,
    D: tl.constexpr,
    P: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One share's part of dW of one head, tile after tile. Grid: (shares, G)."""
    share = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    tiles_per_row = tl.cdiv(length, BLOCK)
    in_features = tl.arange(0, D)
    out_features = tl.arange(0, P)
    x += ((first_head + head) // heads_per_x_head) * stride_head
    total = tl.zeros([D, P], dtype=tl.float32)
    for tile in range(share * tiles_per_share, tl.minimum((share + 1) * tiles_per_share, num_tiles)):
        batch = (tile // tiles_per_row).to(tl.int64)
        rows = (tile % tiles_per_row) * BLOCK + tl.arange(0, BLOCK)
        real = (tl.load(counted + batch * length + rows, mask=rows < length, other=0) > 0)[:, None]
        tokens = tl.load(
            x + batch * stride_batch + rows[:, None] * stride_row + in_features[None, :], mask=real, other=0.0
        )
        places = (batch * num_heads + head) * length * (2 * P) + rows[:, None] * (2 * P) + out_features[None, :]
        plus = tl.load(phi + places, mask=real, other=0.0).to(tl.float32)
        minus = tl.load(phi + places + P, mask=real, other=0.0).to(tl.float32)
        grad_plus = tl.load(grad_phi + places, mask=real, other=0.0)
        grad_minus = tl.load(grad_phi + places + P, mask=real, other=0.0)
        grad_z = _projected_gradient(plus, minus, grad_plus, grad_minus, bound, FORM) * factor
        if tokens.dtype == tl.float16:  # which lacks the range for dz; its 11 bits fit tf32 exactly
            tokens = tokens.to(tl.float32)
        total += _dot_two_terms(tl.trans(tokens), grad_z, INTERPRETED)
    places = in_features[:, None] * P + out_features[None, :]
    tl.store(partial + (share * num_heads + head) * D * P + places, total)

"""Triton kernels of the distillation loss: what `distill_loss` computes, in tiles that never leave the chip.

Notation of `distill_loss`: t_ij = scale·q_i·k_j, a_ij = exp(t_ij − L_i), s_ij = φ(q_i)·φ(k_j) + eps, Z_i = Σ_j s_ij,
g_ij = w_i (1/Z_i − a_ij/s_ij). Five kernels, in this order, on a few heads at a time:

    map_features      φ(q), φ(k), rounded once to the operand dtype; per chunk the sum of its keys' features
    row_statistics    L_i (unless the teacher's forward hands it out) and Z_i
    sweep_queries     a tile of queries stays, keys pass by:  ℓ_i, entropy_i, dφ(q_i) = Σ_j g_ij φ(k_j)
    sweep_keys        a tile of keys stays, queries pass by:  dφ(k_j) = Σ_i g_ij φ(q_i)
    weight_gradient   through φ, recomputed, to dW = Σ_i x_i dz_iᵀ; one partial sum a program, added up in order

Why L and Z come first: near its goal the student has 1/Z ≈ a/s, and their difference is all the gradient there is. It
is formed in float32 and rounded after; Σ φ/Z − Σ (a/s) φ with a rounded ratio, which an online softmax would allow,
loses it.

Cost a token and head at length T, causal (half the pairs), F = 2P features, in FLOP:

    row_statistics    d·T for L (nothing if it is given); Z costs O(F·chunk)
    sweep_queries     (d + 2F)·T
    sweep_keys        (d + 2F)·T
    map_features, weight_gradient   16·d·P together, W and dz in two terms; no factor T

Together (3d + 4F)·T, or (2d + 4F)·T with L given: 1408·T or 1280·T at d = 128, F = 256. One pass over the tiles
would be (d + 3F)·T = 896·T, but then either side's dφ is added to by many programs at once. Without float atomics,
whose order changes the result from run to run, t and s are formed once per side instead, as in flash attention's
backward: the price of determinism is a factor 1.43.

Bytes a token and head at F = 256 and 16-bit operands: φ(q), φ(k) written once, 1 KB; dφ in float32 written and read
once per side, 4 KB; row statistics 32 B. Within a sweep a tile of 128 rows reads 2·(d + F) B per passing token, from
the L2 cache. φ of the passing side is read, not recomputed: forming it for a tile of 64 keys again would cost 2·64·d·P
FLOP and 64·F exponentials for each tile of queries, a third more arithmetic and more exponentials than the loss itself.

Shape letters: B batch, L length, G heads at hand, D head dim, P projected dim, F = 2P. Every kernel's second grid axis
is b·G + g. Masks come as `visible_ranges`: padding has start = L and end = 0. Tile sizes: BLOCK_Q, BLOCK_K, powers of
two of at least 16, like D and P. SAMPLED: many rows weigh nothing, and tiles of only such rows are passed over. UPCAST
widens the operands of products, for Triton's interpreter, which cannot multiply bfloat16.
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

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_FAR_BELOW = tl.constexpr(-1e30)  # finite, so that differences of it are numbers


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    """a @ b, accumulated in float32. float32 operands in three tf32 products, about as exact as float32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _dot_two_terms(a, b, UPCAST: tl.constexpr):
    """a @ b for float32 b, which is split into two terms of a's dtype: 16 bits of b survive even in bfloat16."""
    if a.dtype == tl.float32:
        return _dot(a, b, UPCAST)
    high = b.to(a.dtype)
    low = (b - high.to(tl.float32)).to(a.dtype)
    return _dot(a, high, UPCAST) + _dot(a, low, UPCAST)


@triton.jit
def _rows(pointer, rows, length, width: tl.constexpr, stride):
    """Rows of a matrix, zero from `length` on."""
    columns = tl.arange(0, width)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=(rows < length)[:, None], other=0.0)


@triton.jit
def _bounded_exponent(z, bound):
    """`feature_maps.bounded_exponent`, and its derivative."""
    excess = tl.maximum(tl.abs(z) - bound, 0.0)
    bent = z - tl.where(z > 0, 1.0, -1.0) * (excess - tl.log(1.0 + excess))
    return bent, 1.0 / (1.0 + excess)


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
        bent, _ = _bounded_exponent(z, bound)
        return tl.exp(bent), tl.exp(-bent)


@triton.jit
def _projected_gradient(z, grad_plus, grad_minus, bound, FORM: tl.constexpr):
    """dz from dφ."""
    plus, minus = _features(z, bound, FORM)
    if FORM == TWO_SOFTMAXES:
        mean_plus = tl.sum(plus * grad_plus, axis=1)[:, None]
        mean_minus = tl.sum(minus * grad_minus, axis=1)[:, None]
        return plus * (grad_plus - mean_plus) - minus * (grad_minus - mean_minus)
    elif FORM == ONE_SOFTMAX:
        mean = (tl.sum(plus * grad_plus, axis=1) + tl.sum(minus * grad_minus, axis=1))[:, None]
        return plus * (grad_plus - mean) - minus * (grad_minus - mean)
    else:
        _, slope = _bounded_exponent(z, bound)
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
    UPCAST: tl.constexpr,
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
    plus, minus = _features(_dot_two_terms(tokens, w, UPCAST) * factor, bound, FORM)
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
def row_statistics(
    q,
    k,
    phi_q,
    phi_k,
    tail,
    start,  # (B, L)
    end,
    count,
    row_weight,  # (B, L), float32
    log2_sum,  # out unless given: (B, G, L), L_i in bits
    z,  # out: (B, G, L), Z_i
    q_stride_batch,
    q_stride_head,
    q_stride_row,
    k_stride_batch,
    k_stride_head,
    k_stride_row,
    first_head,
    heads_per_k_head,
    num_heads,
    length,
    scale,
    eps,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_LOG_SUM: tl.constexpr,
    SAMPLED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """L_i by an online sum over all keys (0 where no row of the chunk weighs anything); Z_i from the sums of whole
    chunks before this one, and one tile."""
    num_chunks = tl.num_programs(0)
    chunk = num_chunks - 1 - tl.program_id(0)  # the longest loops first
    problem = tl.program_id(1).to(tl.int64)
    batch, head = problem // num_heads, problem % num_heads
    offsets = tl.arange(0, BLOCK)
    rows = chunk * BLOCK + offsets
    features = tl.arange(0, F)
    starts = tl.load(start + batch * length + rows, mask=rows < length, other=length)
    counts = tl.load(count + batch * length + rows, mask=rows < length, other=0)
    real = starts < length
    seen_from = tl.where(real, rows, -1)
    first = tl.min(starts, axis=0)
    end += batch * length
    phi_q += problem * length * F
    phi_k += problem * length * F

    phi_rows = _rows(phi_q, rows, length, F, F)
    phi_keys = _rows(phi_k, rows, length, F, F)
    ends = tl.load(end + rows, mask=rows < length, other=0)
    visible = (rows[None, :] <= seen_from[:, None]) & (seen_from[:, None] < ends[None, :])
    total = tl.sum(tl.where(visible, _dot(phi_rows, tl.trans(phi_keys), UPCAST), 0.0), axis=1)
    state = tl.zeros([F], dtype=tl.float32)
    tail += problem * num_chunks * F
    for before in range(first // BLOCK, chunk):
        state += tl.load(tail + before * F + features)
    carried = tl.sum(phi_rows.to(tl.float32) * state[None, :], axis=1)
    total += tl.where(starts < chunk * BLOCK, carried, 0.0) + counts.to(tl.float32) * eps
    tl.store(z + problem * length + rows, tl.where(real, total, 1.0), mask=rows < length)

    if WITH_LOG_SUM:
        q += batch * q_stride_batch + (first_head + head) * q_stride_head
        k += batch * k_stride_batch + ((first_head + head) // heads_per_k_head) * k_stride_head
        queries = _rows(q, rows, length, D, q_stride_row)
        highest = tl.zeros([BLOCK], dtype=tl.float32) + _FAR_BELOW
        mass = tl.zeros([BLOCK], dtype=tl.float32)
        stop = tl.minimum((chunk + 1) * BLOCK, length)
        if SAMPLED:
            weights = tl.load(row_weight + batch * length + rows, mask=rows < length, other=0.0)
            stop = tl.where(tl.max(tl.abs(weights), axis=0) > 0, stop, 0)
        for key_start in range(first // BLOCK * BLOCK, stop, BLOCK):
            columns = key_start + offsets
            keys = _rows(k, columns, length, D, k_stride_row)
            ends = tl.load(end + columns, mask=columns < length, other=0)
            visible = (columns[None, :] <= seen_from[:, None]) & (seen_from[:, None] < ends[None, :])
            t = tl.where(visible, _dot(queries, tl.trans(keys), UPCAST) * (scale * _LOG2_E), _FAR_BELOW)
            higher = tl.maximum(highest, tl.max(t, axis=1))
            mass = mass * tl.exp2(highest - higher)
            mass += tl.sum(tl.where(visible, tl.exp2(t - higher[:, None]), 0.0), axis=1)
            highest = higher
        reached = real & (mass > 0)
        result = highest + tl.log2(tl.where(reached, mass, 1.0))
        tl.store(log2_sum + problem * length + rows, tl.where(reached, result, 0.0), mask=rows < length)


@triton.jit
def sweep_queries(
    q,
    k,
    phi_q,
    phi_k,
    start,
    end,
    row_weight,  # (B, L), float32
    log2_sum,
    z,
    cross_entropy,  # out: (B, G, L), w_i ℓ_i
    entropy,  # out: (B, G, L), w_i·entropy_i
    grad_phi,  # out: (B, G, L, F), float32
    q_stride_batch,
    q_stride_head,
    q_stride_row,
    k_stride_batch,
    k_stride_head,
    k_stride_row,
    first_head,
    heads_per_k_head,
    num_heads,
    length,
    scale,
    eps,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    SAMPLED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """BLOCK_Q queries of one head against all keys that any of them sees."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest loops first
    problem = tl.program_id(1).to(tl.int64)
    batch, head = problem // num_heads, problem % num_heads
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < length
    starts = tl.load(start + batch * length + rows, mask=inside, other=length)
    real = starts < length
    seen_from = tl.where(real, rows, -1)
    end += batch * length
    q += batch * q_stride_batch + (first_head + head) * q_stride_head
    k += batch * k_stride_batch + ((first_head + head) // heads_per_k_head) * k_stride_head
    phi_k += problem * length * F
    statistics = problem * length + rows
    queries = _rows(q, rows, length, D, q_stride_row)
    phi_rows = _rows(phi_q + problem * length * F, rows, length, F, F)
    log2_sums = tl.load(log2_sum + statistics, mask=real, other=0.0)  # padding's may be infinite
    z_rows = tl.load(z + statistics, mask=inside, other=1.0)
    inverse_z = 1.0 / z_rows

    teacher_log2_s = tl.zeros([BLOCK_Q], dtype=tl.float32)
    teacher_t = tl.zeros([BLOCK_Q], dtype=tl.float32)
    grad = tl.zeros([BLOCK_Q, F], dtype=tl.float32)
    first_key = tl.min(starts, axis=0) // BLOCK_K * BLOCK_K
    weights = tl.load(row_weight + batch * length + rows, mask=inside, other=0.0)
    stop = tl.minimum((tile + 1) * BLOCK_Q, length)
    if SAMPLED:
        stop = tl.where(tl.max(tl.abs(weights), axis=0) > 0, stop, 0)
    for key_start in range(first_key, stop, BLOCK_K):
        columns = key_start + tl.arange(0, BLOCK_K)
        keys = _rows(k, columns, length, D, k_stride_row)
        phi_keys = _rows(phi_k, columns, length, F, F)
        ends = tl.load(end + columns, mask=columns < length, other=0)
        visible = (columns[None, :] <= seen_from[:, None]) & (seen_from[:, None] < ends[None, :])
        t = tl.where(visible, _dot(queries, tl.trans(keys), UPCAST) * (scale * _LOG2_E), 0.0)
        s = _dot(phi_rows, tl.trans(phi_keys), UPCAST) + eps
        a = tl.where(visible, tl.exp2(t - log2_sums[:, None]), 0.0)
        teacher_log2_s += tl.sum(a * tl.log2(s), axis=1)
        teacher_t += tl.sum(a * t, axis=1)
        if WITH_GRAD:
            g = tl.where(visible, inverse_z[:, None] - a / s, 0.0)
            grad += _dot(g.to(phi_keys.dtype), phi_keys, UPCAST)

    log2_z = tl.log2(z_rows)
    tl.store(cross_entropy + statistics, weights * (log2_z - teacher_log2_s) * _LN_2, mask=inside)
    tl.store(entropy + statistics, weights * (log2_sums - teacher_t) * _LN_2, mask=inside)
    if WITH_GRAD:
        places = grad_phi + problem * length * F + rows[:, None] * F + tl.arange(0, F)[None, :]
        tl.store(places, grad * weights[:, None], mask=inside[:, None])


@triton.jit
def _gradient_of_keys(
    keys, phi_keys, columns, ends, weights, rows, start, q, phi_q, log2_sum, z, q_stride_row, length, scale, eps,
    D: tl.constexpr, F: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What the queries `rows` add to dφ of a tile of keys."""
    inside = rows < length
    starts = tl.load(start + rows, mask=inside, other=length)
    seen_from = tl.where(starts < length, rows, -1)
    queries = _rows(q, rows, length, D, q_stride_row)
    phi_rows = _rows(phi_q, rows, length, F, F)
    log2_sums = tl.load(log2_sum + rows, mask=inside, other=0.0)
    inverse_z = 1.0 / tl.load(z + rows, mask=inside, other=1.0)
    visible = (columns[:, None] <= seen_from[None, :]) & (seen_from[None, :] < ends[:, None])
    t = _dot(keys, tl.trans(queries), UPCAST) * (scale * _LOG2_E)
    s = _dot(phi_keys, tl.trans(phi_rows), UPCAST) + eps
    a = tl.exp2(t - log2_sums[None, :])
    # a weight of 0 is no factor: in a row without one, L is not known and a may be infinite
    counts = visible & (weights != 0)[None, :]
    g = tl.where(counts, (inverse_z[None, :] - a / s) * weights[None, :], 0.0)
    return _dot(g.to(phi_rows.dtype), phi_rows, UPCAST)


@triton.jit
def sweep_keys(
    q,
    k,
    phi_q,
    phi_k,
    start,
    end,
    row_weight,
    log2_sum,
    z,
    grad_phi,  # out: (B, G, L, F), float32
    q_stride_batch,
    q_stride_head,
    q_stride_row,
    k_stride_batch,
    k_stride_head,
    k_stride_row,
    first_head,
    heads_per_k_head,
    num_heads,
    length,
    scale,
    eps,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SAMPLED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """BLOCK_K keys of one head against all queries that see any of them; tiles are (keys, queries)."""
    tile = tl.program_id(0)
    problem = tl.program_id(1).to(tl.int64)
    batch, head = problem // num_heads, problem % num_heads
    columns = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    ends = tl.load(end + batch * length + columns, mask=columns < length, other=0)
    start += batch * length
    row_weight += batch * length
    q += batch * q_stride_batch + (first_head + head) * q_stride_head
    k += batch * k_stride_batch + ((first_head + head) // heads_per_k_head) * k_stride_head
    phi_q += problem * length * F
    log2_sum += problem * length
    z += problem * length
    keys = _rows(k, columns, length, D, k_stride_row)
    phi_keys = _rows(phi_k + problem * length * F, columns, length, F, F)

    grad = tl.zeros([BLOCK_K, F], dtype=tl.float32)
    for row_start in range(tile * BLOCK_K // BLOCK_Q * BLOCK_Q, tl.max(ends, axis=0), BLOCK_Q):
        rows = row_start + tl.arange(0, BLOCK_Q)
        inside = rows < length
        weights = tl.load(row_weight + rows, mask=inside, other=0.0)
        if SAMPLED:
            if tl.max(tl.abs(weights), axis=0) > 0:
                grad += _gradient_of_keys(
                    keys, phi_keys, columns, ends, weights, rows, start, q, phi_q, log2_sum, z, q_stride_row, length,
                    scale, eps, D, F, UPCAST,
                )  # fmt: skip
        else:
            grad += _gradient_of_keys(
                keys, phi_keys, columns, ends, weights, rows, start, q, phi_q, log2_sum, z, q_stride_row, length,
                scale, eps, D, F, UPCAST,
            )  # fmt: skip
    places = grad_phi + problem * length * F + columns[:, None] * F + tl.arange(0, F)[None, :]
    tl.store(places, grad, mask=(columns < length)[:, None])


@triton.jit
def weight_gradient(
    x,
    weight,
    grad_phi,  # (B, G, L, F), float32, zero for padding
    end,
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
    UPCAST: tl.constexpr,
):
    """One share's part of dW of one head, tile after tile. Grid: (shares, G)."""
    share = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    tiles_per_row = tl.cdiv(length, BLOCK)
    in_features = tl.arange(0, D)
    out_features = tl.arange(0, P)
    places = in_features[:, None] * P + out_features[None, :]
    w = tl.load(weight + head * D * P + places)
    x += ((first_head + head) // heads_per_x_head) * stride_head
    total = tl.zeros([D, P], dtype=tl.float32)
    for tile in range(share * tiles_per_share, tl.minimum((share + 1) * tiles_per_share, num_tiles)):
        batch = (tile // tiles_per_row).to(tl.int64)
        rows = (tile % tiles_per_row) * BLOCK + tl.arange(0, BLOCK)
        real = (tl.load(end + batch * length + rows, mask=rows < length, other=0) > 0)[:, None]
        tokens = tl.load(
            x + batch * stride_batch + rows[:, None] * stride_row + in_features[None, :], mask=real, other=0.0
        )
        grads = (
            grad_phi + (batch * num_heads + head) * length * (2 * P) + rows[:, None] * (2 * P) + out_features[None, :]
        )
        grad_plus = tl.load(grads, mask=real, other=0.0)
        grad_minus = tl.load(grads + P, mask=real, other=0.0)
        z = _dot_two_terms(tokens, w, UPCAST) * factor
        grad_z = _projected_gradient(z, grad_plus, grad_minus, bound, FORM) * factor
        if tokens.dtype == tl.float16:  # which lacks the range for dz; its 11 bits fit tf32 exactly
            tokens = tokens.to(tl.float32)
        total += _dot_two_terms(tl.trans(tokens), grad_z, UPCAST)
    tl.store(partial + (share * num_heads + head) * D * P + places, total)

"""Triton kernels of the distillation loss: what `distill_loss` computes, in tiles, with no more than a band of T×T.

Notation of `distill_loss`: t_ij = scale·q_i·k_j, a_ij = exp(t_ij − L_i), s_ij = φ(q_i)·φ(k_j) + eps, Z_i = Σ_j s_ij,
g_ij = w_i (1/Z_i − a_ij/s_ij). In this order, on a few heads at a time:

    map_features      φ(q), φ(k), rounded once to the operand dtype; per chunk the sum of its keys' features
    carry_tails       that sum over all chunks before, segment by segment
    row_sums          Z_i, from it and one tile
    log_sums          L_i, unless the teacher's forward hands it out
    sweep             a tile of queries stays, keys pass by:  KL_i, entropy_i, g_ij, dφ(q_i) = Σ_j g_ij φ(k_j)
    keys_gradient     a tile of keys stays, g passes by:  dφ(k_j) = Σ_i g_ij φ(q_i)
    weight_gradient   from dφ and φ to dW = Σ_i x_i dz_iᵀ; one partial sum a program, added up in order

`sweep` and `keys_gradient` take turns: a band of queries against a block of keys leaves g, in the operand dtype, for
the second of them, whose only work is one product. A band holds the same number of pairs at every length.

Why L and Z come first: near its goal the student has 1/Z ≈ a/s, and their difference is all the gradient there is. It
is formed in float32 and rounded after; Σ φ/Z − Σ (a/s) φ with a rounded ratio, which an online softmax would allow,
loses it.

Cost a token and head at length T, causal (half the pairs), F = 2P features, in FLOP:

    log_sums          d·T (nothing if L is given)
    sweep             (d + 2F)·T
    keys_gradient     F·T
    map_features, row_sums, weight_gradient   12·d·P + 256·F together (W and dz in two terms); no factor T

Together (d + 3F)·T = 896·T at d = 128, F = 256, which is what loss and gradient take, and 1024·T where L is not given.

Why g goes through memory. dφ(q) and dφ(k) cannot both stay in registers, and float atomics would change the result from
run to run. For 128 × 64 pairs, on a multiprocessor of sm_90 (2048 products of bfloat16 a cycle), the whole loss is 3584
cycles of the tensor cores. Deterministic ways, by arithmetic:

    g kept for a band: 16 KiB written, 16 KiB read, nothing formed twice                            3584 cycles
    t and s formed once for either side, as in flash attention's backward                           5120, and all of
                                                                             the work on single elements twice
    dφ(q) added to memory, program after program in a fixed order: 128 KiB read and written, and a wait for one's turn
    dφ(q) in parts: the same bytes, and memory that grows with T²
    dφ(q) pushed through φ to dW_q tile by tile (it is linear): 512 more cycles, 1024 in two terms, and 64 KiB for dW
        in registers, where dφ(k) and this tile's dφ(q) leave nothing

The price is that dφ in float32 (128 KiB a tile of 128) is read and written once for each block of keys, and each band
of queries: with 2048 of both, as for 32 heads, 12 % of the sweeps' bytes.

What bounds them on sm_90, in cycles for 128 × 64 pairs, as counted in the machine code (`compile_distill_tiles.py`) and
by the rates of the pipes; nothing here is measured:

                     tensor cores   issue (8 warps, 4 schedulers)   exp2, log2 (16 a cycle)   shared memory (128 B)
    sweep            2560           1200                            1024                      2050
    keys_gradient    1024           340                             -                         640

With no overlap at all between products and the rest that is 5120 cycles, where 790 TFLOP/s would take 4480. Two groups
of four warps run out of step between the two barriers of an iteration, which overlaps some of it. One block a
multiprocessor: of 227 KiB of shared memory φ(q) and q take 96 and two tiles of keys 96; dφ takes 128 of 255 registers.
Two blocks of 64 × 32 would overlap more, but there the products of t and s are bound by shared memory (1.5 times as
long), which costs what the overlap gains. From the L2 cache sweep reads 48 KiB a tile, keys_gradient 48, as a dense
product with tiles of 128 × 256 does.

The work on an element is: log2 s, a/s = exp2(t − L − log2 s), a = (a/s)·s, two sums, g. A tile of keys that every query
of the tile sees is not masked. A row without a weight has L = 1e30, so that a and g vanish whatever t is.

Shape letters: B batch, L length, G heads at hand, D head dim, P projected dim, F = 2P. Every kernel's second grid axis
is b·G + g. Masks come as `visible_ranges`: padding has start = L and end = 0. Tile sizes: BLOCK_Q ≥ BLOCK_K, powers of
two of at least 16, like D and P; a tile of BLOCK_Q is a multiple of one of BLOCK_K. INTERPRETED: for Triton's
interpreter, which cannot multiply bfloat16, operands of products are widened, and instructions are functions.
"""

# Inside a kernel names stand for Triton's own types, which a type checker does not know.
# pyright: basic, reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
from __future__ import annotations

import triton
import triton.language as tl

from .distill_maps import dot

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_FAR = tl.constexpr(1e30)  # finite, so that differences of it are numbers


@triton.jit
def _exp2(x, INTERPRETED: tl.constexpr):
    """2**x to 2**-22, by one instruction. tl.exp2 takes four, to keep subnormal results, which here are 0."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _log2(x, INTERPRETED: tl.constexpr):
    """log2 x to 2**-22 near 1, by one instruction, for normal x. tl.log2 is a polynomial with a branch."""
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _rows(pointer, rows, length, width: tl.constexpr, stride, MASKED: tl.constexpr):
    """Rows of a matrix; if MASKED, zero from `length` on."""
    places = pointer + rows[:, None] * stride + tl.arange(0, width)[None, :]
    if MASKED:
        return tl.load(places, mask=(rows < length)[:, None], other=0.0)
    return tl.load(places)


@triton.jit
def _key_tiles(rows, starts, counts, first, stop, length, BLOCK_K: tl.constexpr):
    """(full_from, full_until): in between, of `first` to `stop`, every real row of the tile sees every key.

    Both are `first` plus whole tiles. Nothing is full where the rows are of several segments, or padding is among
    their keys.
    """
    real = starts < length
    last_start = tl.max(tl.where(real, starts, 0), axis=0)
    hidden = tl.max(tl.where(real, rows - starts + 1 - counts, 0), axis=0)
    first_row = tl.min(tl.where(real, rows, length), axis=0)
    tiles = tl.maximum(tl.cdiv(stop - first, BLOCK_K), 0)
    lead = tl.minimum(tl.maximum(tl.cdiv(last_start - first, BLOCK_K), 0), tiles)
    full = tl.minimum(tl.maximum((tl.minimum(first_row + 1, stop) - first) // BLOCK_K, 0), tiles) - lead
    one_segment = (hidden == 0) & (tl.min(starts, axis=0) == last_start)
    full = tl.where(one_segment, tl.maximum(full, 0), 0)
    return first + lead * BLOCK_K, first + (lead + full) * BLOCK_K


@triton.jit
def carry_tails(
    tail,  # (B, G, chunks, F), float32; out: Σ of the tails before
    spanned,  # (B, chunks), int32: whether what was seen before the chunk is seen beyond it
    num_heads,
    num_chunks,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each chunk's tail becomes what its own queries see of the chunks before, in order. Grid: (F/BLOCK, B·G)."""
    problem = tl.program_id(1).to(tl.int64)
    spanned += problem // num_heads * num_chunks
    tail += problem * num_chunks * F + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros([BLOCK], dtype=tl.float32)
    for chunk in tl.range(num_chunks, num_stages=8):  # loads that are under way
        own = tl.load(tail + chunk * F)
        goes_on = tl.load(spanned + chunk)
        tl.store(tail + chunk * F, state)
        state = tl.where(goes_on > 0, state, 0.0) + own


@triton.jit
def row_sums(
    phi_q,
    phi_k,
    tail,  # (B, G, chunks, F): from `carry_tails`
    start,  # (B, L)
    end,
    count,
    z,  # out: (B, G, L), Z_i; 1 for padding
    num_heads,
    length,
    eps,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Z_i of one chunk, from the sum over the chunks before and one tile."""
    chunk = tl.program_id(0)
    problem = tl.program_id(1).to(tl.int64)
    batch = problem // num_heads
    rows = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = rows < length
    starts = tl.load(start + batch * length + rows, mask=inside, other=length)
    counts = tl.load(count + batch * length + rows, mask=inside, other=0)
    ends = tl.load(end + batch * length + rows, mask=inside, other=0)
    real = starts < length
    seen_from = tl.where(real, rows, -1)
    phi_rows = _rows(phi_q + problem * length * F, rows, length, F, F, True)
    phi_keys = _rows(phi_k + problem * length * F, rows, length, F, F, True)
    visible = (rows[None, :] <= seen_from[:, None]) & (seen_from[:, None] < ends[None, :])
    total = tl.sum(tl.where(visible, dot(phi_rows, tl.trans(phi_keys), INTERPRETED), 0.0), axis=1)
    before = tl.load(tail + (problem * tl.num_programs(0) + chunk) * F + tl.arange(0, F))
    carried = tl.sum(phi_rows.to(tl.float32) * before[None, :], axis=1)
    total += tl.where(starts < chunk * BLOCK, carried, 0.0) + counts.to(tl.float32) * eps
    tl.store(z + problem * length + rows, tl.where(real, total, 1.0), mask=inside)


@triton.jit
def _add_mass(
    queries, highest, mass, k, k_stride_row, key_start, seen_from, end, length, scale_log2,
    D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One step of an online log-sum-exp, in bits."""
    columns = key_start + tl.arange(0, BLOCK_K)
    keys = _rows(k, columns, length, D, k_stride_row, MASKED)
    t = dot(queries, tl.trans(keys), INTERPRETED) * scale_log2
    if MASKED:
        ends = tl.load(end + columns, mask=columns < length, other=0)
        visible = (columns[None, :] <= seen_from[:, None]) & (seen_from[:, None] < ends[None, :])
        t = tl.where(visible, t, -_FAR)
    higher = tl.maximum(highest, tl.max(t, axis=1))
    p = _exp2(t - higher[:, None], INTERPRETED)
    if MASKED:
        p = tl.where(visible, p, 0.0)
    return higher, mass * _exp2(highest - higher, INTERPRETED) + tl.sum(p, axis=1)


@triton.jit
def log_sums(
    q,
    k,
    start,
    end,
    count,
    listed,  # (B, tiles of queries): those with a weight, in order
    rank,  # (B, tiles + 1): how many of them come before a tile
    log2_sum,  # out: (B, G, L), L_i in bits, for listed tiles; 0 for padding
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
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """L_i of a tile of queries by an online sum over all keys."""
    num_tiles = tl.num_programs(0)
    problem = tl.program_id(1).to(tl.int64)
    batch, head = problem // num_heads, problem % num_heads
    place = num_tiles - 1 - tl.program_id(0)  # the longest loops first
    if place >= tl.load(rank + batch * (num_tiles + 1) + num_tiles):
        return
    tile = tl.load(listed + batch * num_tiles + place)
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < length
    starts = tl.load(start + batch * length + rows, mask=inside, other=length)
    counts = tl.load(count + batch * length + rows, mask=inside, other=0)
    real = starts < length
    seen_from = tl.where(real, rows, -1)
    end += batch * length
    q += batch * q_stride_batch + (first_head + head) * q_stride_head
    k += batch * k_stride_batch + ((first_head + head) // heads_per_k_head) * k_stride_head
    queries = _rows(q, rows, length, D, q_stride_row, True)
    scale_log2 = scale * _LOG2_E

    highest = tl.zeros([BLOCK_Q], dtype=tl.float32) - _FAR
    mass = tl.zeros([BLOCK_Q], dtype=tl.float32)
    first = tl.min(starts, axis=0) // BLOCK_K * BLOCK_K
    stop = tl.minimum((tile + 1) * BLOCK_Q, length)
    full_from, full_until = _key_tiles(rows, starts, counts, first, stop, length, BLOCK_K)
    for key_start in range(full_from, full_until, BLOCK_K):
        highest, mass = _add_mass(
            queries, highest, mass, k, k_stride_row, key_start, seen_from, end, length, scale_log2,
            D, BLOCK_K, False, INTERPRETED,
        )  # fmt: skip
    for passed in range(first, stop - (full_until - full_from), BLOCK_K):
        key_start = tl.where(passed < full_from, passed, passed + (full_until - full_from))
        highest, mass = _add_mass(
            queries, highest, mass, k, k_stride_row, key_start, seen_from, end, length, scale_log2,
            D, BLOCK_K, True, INTERPRETED,
        )  # fmt: skip
    reached = real & (mass > 0)
    result = highest + tl.log2(tl.where(reached, mass, 1.0))
    tl.store(log2_sum + problem * length + rows, tl.where(reached, result, 0.0), mask=inside)


@triton.jit
def _add_pairs(
    queries, phi_rows, log2_sums, weights, weight_over_z, surprise, log2_a, grad,
    k, k_stride_row, phi_k, g, key_start, seen_from, end, length, scale_log2, eps,
    D: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr,
    WITH_GRAD: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to the sums of a tile of queries; its w·g goes to `g`, in the operand dtype."""
    key_start = tl.multiple_of(key_start, BLOCK_K)
    columns = key_start + tl.arange(0, BLOCK_K)
    keys = _rows(k, columns, length, D, k_stride_row, MASKED)
    phi_keys = _rows(phi_k, columns, length, F, F, MASKED)
    t = dot(queries, tl.trans(keys), INTERPRETED) * scale_log2 - log2_sums[:, None]
    s = dot(phi_rows, tl.trans(phi_keys), INTERPRETED) + eps
    if MASKED:
        ends = tl.load(end + columns, mask=columns < length, other=0)
        visible = (columns[None, :] <= seen_from[:, None]) & (seen_from[:, None] < ends[None, :])
        t = tl.where(visible, t, -_FAR)
    log2_ratio = t - _log2(s, INTERPRETED)
    ratio = _exp2(log2_ratio, INTERPRETED)  # a/s
    a = ratio * s
    surprise += tl.sum(a * log2_ratio, axis=1)
    log2_a += tl.sum(a * t, axis=1)
    if WITH_GRAD:
        weighted = weight_over_z[:, None] - ratio * weights[:, None]
        if MASKED:
            weighted = tl.where(visible, weighted, 0.0)
        rounded = weighted.to(phi_keys.dtype)
        tl.store(g + key_start, rounded)
        grad += dot(rounded, phi_keys, INTERPRETED)
    return surprise, log2_a, grad


@triton.jit(do_not_specialize=["first_place", "key_block", "num_heads", "num_tiles", "tiles_per_block", "length"])
def sweep(
    q,
    k,
    phi_q,
    phi_k,
    start,
    end,
    count,
    listed,
    rank,
    row_weight,  # (B, L), float32
    log2_sum,
    z,
    kl,  # in and out: (B, G, L), w_i KL_i
    entropy,  # in and out: (B, G, L), w_i·entropy_i
    grad_phi,  # out, in and out from the second block of keys on: (B, G, L, F), float32, for listed tiles
    g,  # out: (B, G, band·BLOCK_Q, keys_per_block), w_i g_ij
    q_stride_batch,
    q_stride_head,
    q_stride_row,
    k_stride_batch,
    k_stride_head,
    k_stride_row,
    first_head,
    heads_per_k_head,
    num_heads,
    num_tiles,
    first_place,
    key_block,
    tiles_per_block,
    length,
    scale,
    eps,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A tile of queries against those of one block of keys that any of them sees. Grid: (band, B·G)."""
    keys_per_block = tiles_per_block * BLOCK_Q
    first_key = key_block * keys_per_block
    problem = tl.program_id(1).to(tl.int64)
    batch, head = problem // num_heads, problem % num_heads
    place = first_place + tl.program_id(0)
    if place >= tl.load(rank + batch * (num_tiles + 1) + num_tiles):
        return
    tile = tl.load(listed + batch * num_tiles + place)
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < length
    starts = tl.load(start + batch * length + rows, mask=inside, other=length)
    # in whole tiles of `keys_gradient`
    first_seen = tl.min(starts, axis=0) // BLOCK_Q * BLOCK_Q
    last_key = tl.minimum((tile + 1) * BLOCK_Q, length)
    first = tl.maximum(first_seen, first_key)
    stop = tl.minimum(last_key, first_key + keys_per_block)
    if first >= stop:
        return
    counts = tl.load(count + batch * length + rows, mask=inside, other=0)
    real = starts < length
    seen_from = tl.where(real, rows, -1)
    end += batch * length
    q += batch * q_stride_batch + (first_head + head) * q_stride_head
    k += batch * k_stride_batch + ((first_head + head) // heads_per_k_head) * k_stride_head
    phi_k += problem * length * F
    statistics = problem * length + rows
    queries = tl.load(q + rows[:, None] * q_stride_row + tl.arange(0, D)[None, :], mask=real[:, None], other=0.0)
    phi_rows = _rows(phi_q + problem * length * F, rows, length, F, F, True)
    weights = tl.load(row_weight + batch * length + rows, mask=inside, other=0.0)
    counted = weights != 0
    # so far above that a/s is 0 in a row without a weight, whose L may be anything
    log2_sums = tl.load(log2_sum + statistics, mask=counted, other=_FAR)
    z_rows = tl.load(z + statistics, mask=inside, other=1.0)
    weight_over_z = weights / z_rows
    local_rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    g += problem * tl.num_programs(0) * BLOCK_Q * keys_per_block - first_key
    g = g + local_rows[:, None] * keys_per_block + tl.arange(0, BLOCK_K)[None, :]
    scale_log2 = scale * _LOG2_E

    surprise = tl.zeros([BLOCK_Q], dtype=tl.float32)
    log2_a = tl.zeros([BLOCK_Q], dtype=tl.float32)
    grad = tl.zeros([BLOCK_Q, F], dtype=tl.float32)
    full_from, full_until = _key_tiles(rows, starts, counts, first, stop, length, BLOCK_K)
    for key_start in range(full_from, full_until, BLOCK_K):
        surprise, log2_a, grad = _add_pairs(
            queries, phi_rows, log2_sums, weights, weight_over_z, surprise, log2_a, grad,
            k, k_stride_row, phi_k, g, key_start, seen_from, end, length, scale_log2, eps,
            D, F, BLOCK_K, WITH_GRAD, False, INTERPRETED,
        )  # fmt: skip
    for passed in range(first, stop - (full_until - full_from), BLOCK_K):
        key_start = tl.where(passed < full_from, passed, passed + (full_until - full_from))
        surprise, log2_a, grad = _add_pairs(
            queries, phi_rows, log2_sums, weights, weight_over_z, surprise, log2_a, grad,
            k, k_stride_row, phi_k, g, key_start, seen_from, end, length, scale_log2, eps,
            D, F, BLOCK_K, WITH_GRAD, True, INTERPRETED,
        )  # fmt: skip

    surprise += tl.where(stop == last_key, tl.log2(z_rows), 0.0)
    divergence = tl.load(kl + statistics, mask=inside) + weights * surprise * _LN_2
    tl.store(kl + statistics, divergence, mask=inside)
    disorder = tl.load(entropy + statistics, mask=inside) - weights * log2_a * _LN_2
    tl.store(entropy + statistics, disorder, mask=inside)
    if WITH_GRAD:
        places = grad_phi + problem * length * F + rows[:, None] * F + tl.arange(0, F)[None, :]
        grad += tl.load(places, mask=inside[:, None] & (first_seen < first_key), other=0.0)
        tl.store(places, grad, mask=inside[:, None])


@triton.jit(
    do_not_specialize=["first_place", "band", "key_block", "num_heads", "num_tiles", "tiles_per_block", "length"]
)
def keys_gradient(
    g,  # (B, G, band·BLOCK_Q, keys_per_block), from `sweep`
    phi_q,
    end,
    listed,
    rank,
    grad_phi,  # out, in and out from the second band on: (B, G, L, F), float32
    num_heads,
    num_tiles,
    first_place,
    band,
    key_block,
    tiles_per_block,
    length,
    F: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    STEP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """dφ of a tile of BLOCK_Q keys: Σ over the band's queries that see any of them. Grid: (tiles_per_block, B·G)."""
    keys_per_block = tiles_per_block * BLOCK_Q
    first_key = key_block * keys_per_block
    problem = tl.program_id(1).to(tl.int64)
    batch = problem // num_heads
    in_block = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = first_key + in_block
    inside = columns < length
    tile = first_key // BLOCK_Q + tl.program_id(0)
    if tile >= num_tiles:
        return
    rank += batch * (num_tiles + 1)
    listed += batch * num_tiles
    seen_until = tl.max(tl.load(end + batch * length + columns, mask=inside, other=0), axis=0)
    earliest = tl.load(rank + tile)
    if earliest >= first_place + band:
        return
    begin = tl.maximum(earliest, first_place)
    stop = tl.minimum(tl.load(rank + tl.cdiv(seen_until, BLOCK_Q)), first_place + band)
    if (begin >= stop) & (earliest < first_place):
        return

    phi_q += problem * length * F
    g += problem * band * BLOCK_Q * keys_per_block + in_block[None, :]
    grad = tl.zeros([BLOCK_Q, F], dtype=tl.float32)
    for step in range(begin * (BLOCK_Q // STEP), stop * (BLOCK_Q // STEP)):
        rows_passed = step * STEP + tl.arange(0, STEP)
        at = tl.load(listed + step // (BLOCK_Q // STEP))
        rows = at * BLOCK_Q + step % (BLOCK_Q // STEP) * STEP + tl.arange(0, STEP)
        phi_rows = _rows(phi_q, rows, length, F, F, True)
        weighted = tl.load(g + (rows_passed - first_place * BLOCK_Q)[:, None] * keys_per_block)
        grad += dot(tl.trans(weighted), phi_rows, INTERPRETED)
    places = grad_phi + problem * length * F + columns[:, None] * F + tl.arange(0, F)[None, :]
    grad += tl.load(places, mask=inside[:, None] & (earliest < first_place), other=0.0)
    tl.store(places, grad, mask=inside[:, None])

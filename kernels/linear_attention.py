"""Linear attention on features φ: y_i = Σ_j s_ij v_j / (Σ_j s_ij + eps), s_ij = φ(q_i)·φ(k_j), j ≤ i where causal.

Three causal forms that agree: `quadratic_linear_attention` (obviously right, T×T, the oracle),
`recurrent_linear_attention_step` (one token, constant state) and `chunked_linear_attention` (training and prefill: linear
in T, saves its inputs, the output and the denominator). `noncausal_linear_attention` looks both ways.

Shape letters: B batch, L length, H query heads, K key/value heads (H % K == 0; query head h reads v of head h // (H//K)),
F features, V value dim, C chunk. φ(q) and φ(k) both have H heads; v is never repeated by the caller.

What holds in every form:
- eps is added once to each denominator, and far smaller than any denominator that float32 features can give. Its
  whole purpose: a row that sees no key gives 0, not NaN.
- Sums over keys (scores, state, denominator) are in float32, or float64 for float64 features, whatever comes in.
- `mask_BL` (bool, True = real token) takes keys out of φ(k), where the denominator sees it too. Rows that are
  padding themselves still give whatever the keys visible to them give.
- `segment_ids_BL` (int): a token sees its own segment only. A segment is a run of equal ids among the real tokens;
  padding belongs to the segment before it (at the very start: after it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DENOMINATOR_EPS = 1e-30
DEFAULT_CHUNK_SIZE = 64


@dataclass
class LinearAttentionState:
    """What a causal head remembers of all earlier tokens: S = Σ φ(k) vᵀ and z = Σ φ(k), float32 (or float64)."""

    kv_state_BHFV: Tensor
    k_sum_BHF: Tensor

    @classmethod
    def zeros(
        cls,
        batch_size: int,
        num_heads: int,
        num_features: int,
        value_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> LinearAttentionState:
        """The state before the first token."""
        return cls(
            torch.zeros(batch_size, num_heads, num_features, value_dim, device=device, dtype=dtype),
            torch.zeros(batch_size, num_heads, num_features, device=device, dtype=dtype),
        )

    def reorder(self, index_B: Tensor) -> LinearAttentionState:
        """Takes the rows `index_B` (beam search, batch selection), in place; returns itself."""
        index_B = index_B.to(self.kv_state_BHFV.device)
        self.kv_state_BHFV = self.kv_state_BHFV.index_select(0, index_B)
        self.k_sum_BHF = self.k_sum_BHF.index_select(0, index_B)
        return self

    def detach(self) -> LinearAttentionState:
        """The same numbers in a new state that no gradient flows through; shares memory."""
        return LinearAttentionState(self.kv_state_BHFV.detach(), self.k_sum_BHF.detach())

    def clone(self) -> LinearAttentionState:
        """A copy with memory of its own."""
        return LinearAttentionState(self.kv_state_BHFV.clone(), self.k_sum_BHF.clone())

    def num_bytes(self) -> int:
        """Bytes that both tensors take; does not depend on how many tokens were seen."""
        return sum(t.numel() * t.element_size() for t in (self.kv_state_BHFV, self.k_sum_BHF))


def run_index_BL(segment_ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Numbers the runs of equal ids 0, 1, 2, … along each row; padding takes the number of its neighbour (see above)."""
    ids = segment_ids_BL
    if mask_BL is not None:
        positions = torch.arange(ids.shape[1], device=ids.device)
        last_real = torch.where(mask_BL, positions, -1).cummax(dim=1).values
        first_real = mask_BL.int().argmax(dim=1, keepdim=True)
        ids = ids.gather(1, torch.maximum(last_real, first_real))
    starts = torch.zeros_like(ids)
    starts[:, 1:] = (ids[:, 1:] != ids[:, :-1]).to(ids.dtype)
    return starts.cumsum(dim=1)


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_shapes(phi_q: Tensor, phi_k: Tensor, v: Tensor, mask: Tensor | None, segment_ids: Tensor | None) -> None:
    if phi_q.dim() != 4 or phi_k.shape != phi_q.shape:
        raise ValueError(f"phi_q {tuple(phi_q.shape)} and phi_k {tuple(phi_k.shape)} must both be (B, H, L, F)")
    batch, heads, length, _ = phi_q.shape
    if v.dim() != 4 or (v.shape[0], v.shape[2]) != (batch, length) or heads % v.shape[1]:
        raise ValueError(
            f"v {tuple(v.shape)} must be (B, K, L, V) with B={batch}, L={length} and H={heads} a multiple of K"
        )
    for name, tensor in (("mask_BL", mask), ("segment_ids_BL", segment_ids)):
        if tensor is not None and tuple(tensor.shape) != (batch, length):
            raise ValueError(f"{name} {tuple(tensor.shape)} must be (B, L) = {(batch, length)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask_BL must be bool (True = real token), not {mask.dtype}")


def quadratic_linear_attention(
    phi_q_BHLF: Tensor,
    phi_k_BHLF: Tensor,
    v_BKLV: Tensor,
    *,
    causal: bool = True,
    mask_BL: Tensor | None = None,
    segment_ids_BL: Tensor | None = None,
    eps: float = DENOMINATOR_EPS,
) -> Tensor:
    """The definition, with all T×T scores in memory: the oracle of every other form. Returns o_BHLV in v's dtype.

    Accumulates in float32 (float64 for float64 features). Differentiated by autograd.
    """
    _check_shapes(phi_q_BHLF, phi_k_BHLF, v_BKLV, mask_BL, segment_ids_BL)
    acc = _accumulation_dtype(phi_q_BHLF)
    length = phi_q_BHLF.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool, device=v_BKLV.device)
    if causal:
        visible = visible.tril()
    visible = visible[None, None]
    if mask_BL is not None:
        visible = visible & mask_BL[:, None, None, :]
    if segment_ids_BL is not None:
        run_BL = run_index_BL(segment_ids_BL, mask_BL)
        visible = visible & (run_BL[:, None, :, None] == run_BL[:, None, None, :])
    scores_BHLL = torch.matmul(phi_q_BHLF.to(acc), phi_k_BHLF.to(acc).transpose(-1, -2))
    scores_BHLL = scores_BHLL.masked_fill(~visible, 0)
    v_BHLV = v_BKLV.to(acc).repeat_interleave(phi_q_BHLF.shape[1] // v_BKLV.shape[1], dim=1)
    denominator = scores_BHLL.sum(dim=-1, keepdim=True) + eps
    return (torch.matmul(scores_BHLL, v_BHLV) / denominator).to(v_BKLV.dtype)


@torch.no_grad()
def recurrent_linear_attention_step(
    phi_q_BHF: Tensor,
    phi_k_BHF: Tensor,
    v_BKV: Tensor,
    state: LinearAttentionState,
    *,
    eps: float = DENOMINATOR_EPS,
) -> tuple[Tensor, LinearAttentionState]:
    """One token: S += φ(k) vᵀ, z += φ(k), o = φ(q) S / (φ(q)·z + eps). Returns (o_BHV in v's dtype, state).

    Updates `state` in place, in the state's own dtype; no gradient.
    """
    batch, heads, features = phi_q_BHF.shape
    acc, value_dim = state.kv_state_BHFV.dtype, v_BKV.shape[-1]
    phi_q, phi_k = phi_q_BHF.to(acc), phi_k_BHF.to(acc)
    v_BHV = v_BKV.to(acc).repeat_interleave(heads // v_BKV.shape[1], dim=1)
    kv_state = state.kv_state_BHFV.view(batch * heads, features, value_dim)
    kv_state.baddbmm_(phi_k.reshape(-1, features, 1), v_BHV.reshape(-1, 1, value_dim))
    state.k_sum_BHF += phi_k
    numerator = torch.bmm(phi_q.reshape(-1, 1, features), kv_state).view(batch, heads, value_dim)
    denominator = (phi_q * state.k_sum_BHF).sum(dim=-1, keepdim=True) + eps
    return (numerator / denominator).to(v_BKV.dtype), state


@dataclass
class _Chunks:
    """Cuts (B, H, L, ·) tensors into chunks of (B·H, C, ·) in the accumulation dtype, and knows each chunk's borders."""

    num_heads: int
    num_kv_heads: int
    length: int
    chunk_size: int
    acc: torch.dtype
    mask_BL: Tensor | None
    run_BL: Tensor | None

    def spans(self) -> list[slice]:
        starts = range(0, self.length, self.chunk_size)
        return [slice(start, min(start + self.chunk_size, self.length)) for start in starts]

    def take(self, x_BHLX: Tensor, span: slice) -> Tensor:
        return x_BHLX[:, :, span].to(self.acc).flatten(0, 1)

    def take_keys(self, phi_k_BHLF: Tensor, span: slice) -> Tensor:
        phi_k = phi_k_BHLF[:, :, span].to(self.acc)
        if self.mask_BL is not None:
            phi_k = phi_k.masked_fill(~self.mask_BL[:, None, span, None], 0)
        return phi_k.flatten(0, 1)

    def take_values(self, v_BKLV: Tensor, span: slice) -> Tensor:
        group = self.num_heads // self.num_kv_heads
        v = v_BKLV[:, :, span].to(self.acc)
        return (v if group == 1 else v.repeat_interleave(group, dim=1)).flatten(0, 1)

    def keep_visible_(self, scores: Tensor, span: slice) -> Tensor:
        """Zeroes, in place, the scores (B·H, C, C) that lie above the diagonal or cross a segment border."""
        scores.tril_()
        if self.run_BL is not None:
            run = self.run_BL[:, span]
            same = (run.unsqueeze(2) == run.unsqueeze(1)).to(scores.dtype)
            scores.view(-1, self.num_heads, *scores.shape[1:]).mul_(same.unsqueeze(1))
        return scores

    def sees_state(self, span: slice) -> Tensor | None:
        """(B·H, C, 1), 1 where the query's segment is the one that the state before the chunk belongs to."""
        if self.run_BL is None:
            return None
        return self._per_head(self.run_BL[:, span] == self._run_before(span))

    def enters_state(self, span: slice) -> Tensor | None:
        """(B·H, C, 1), 1 where the key's segment is the one that goes on after the chunk."""
        if self.run_BL is None:
            return None
        return self._per_head(self.run_BL[:, span] == self.run_BL[:, span.stop - 1 : span.stop])

    def state_survives(self, span: slice) -> Tensor | None:
        """(B·H, 1, 1), 1 where no border lies between the state before the chunk and the chunk's end."""
        if self.run_BL is None:
            return None
        return self._per_head(self.run_BL[:, span.stop - 1 : span.stop] == self._run_before(span))

    def _run_before(self, span: slice) -> Tensor:
        """The run before the chunk; an initial state belongs to the first token's run."""
        assert self.run_BL is not None
        before = max(span.start - 1, 0)
        return self.run_BL[:, before : before + 1]

    def _per_head(self, flags_BC: Tensor) -> Tensor:
        return flags_BC.to(self.acc).repeat_interleave(self.num_heads, dim=0).unsqueeze(-1)


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


class _ChunkedLinearAttention(torch.autograd.Function):
    """Sequential over chunks, batched over (batch, head). Backward: one sweep forwards, one backwards.

    With dn = do/d and dd = −dn·o, and S, z the state before a chunk, R, r its counterpart after the chunk:
        forward sweep  (S += φkᵀ v,  z += Σ φk):  dφq = tril(dn vᵀ + dd) φk + dn Sᵀ + dd z
        reverse sweep  (R += φqᵀ dn, r += Σ dd φq): dφk = tril(dn vᵀ + dd)ᵀ φq + v Rᵀ + r,  dv = tril(φq φkᵀ)ᵀ dn + φk R
    """

    @staticmethod
    def forward(
        ctx: Any,
        phi_q: Tensor,
        phi_k: Tensor,
        v: Tensor,
        initial_kv: Tensor | None,
        initial_k_sum: Tensor | None,
        chunks: _Chunks,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, length, features = phi_q.shape
        value_dim = v.shape[-1]
        if initial_kv is None or initial_k_sum is None:
            kv_state = phi_q.new_zeros(batch * heads, features, value_dim, dtype=chunks.acc)
            k_sum = phi_q.new_zeros(batch * heads, features, 1, dtype=chunks.acc)
        else:
            kv_state = initial_kv.to(chunks.acc).reshape(-1, features, value_dim).clone()
            k_sum = initial_k_sum.to(chunks.acc).reshape(-1, features, 1).clone()
        initial = (kv_state.clone(), k_sum.clone()) if initial_kv is not None else (None, None)
        out = torch.empty(batch, heads, length, value_dim, dtype=v.dtype, device=v.device)
        denominator = torch.empty(batch, heads, length, 1, dtype=chunks.acc, device=v.device)
        for span in chunks.spans():
            q, k, v_chunk = (
                chunks.take(phi_q, span),
                chunks.take_keys(phi_k, span),
                chunks.take_values(v, span),
            )
            scores = chunks.keep_visible_(torch.bmm(q, k.transpose(1, 2)), span)
            q_state = _scaled(q, chunks.sees_state(span))
            numerator = torch.bmm(scores, v_chunk).baddbmm_(q_state, kv_state)
            d = scores.sum(dim=-1, keepdim=True).baddbmm_(q_state, k_sum).add_(eps)
            out[:, :, span] = numerator.div_(d).view(batch, heads, -1, value_dim)
            denominator[:, :, span] = d.view(batch, heads, -1, 1)
            _advance_state_(kv_state, k_sum, k, v_chunk, chunks, span)
        ctx.save_for_backward(phi_q, phi_k, v, out, denominator, *initial)
        ctx.chunks = chunks
        ctx.initial_shapes = None if initial_kv is None else (initial_kv.dtype, batch, heads)
        return out, kv_state.view(batch, heads, features, value_dim), k_sum.view(batch, heads, features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, grad_kv, grad_k_sum = grads
        phi_q, phi_k, v, out, denominator, initial_kv, initial_k_sum = ctx.saved_tensors
        chunks: _Chunks = ctx.chunks
        batch, heads, _, features = phi_q.shape
        value_dim, group = v.shape[-1], heads // v.shape[1]
        grad_q, grad_k, grad_v = torch.empty_like(phi_q), torch.empty_like(phi_k), torch.empty_like(v)

        def numerator_and_denominator_grads(span: slice) -> tuple[Tensor, Tensor]:
            dn = chunks.take(grad_out, span) / chunks.take(denominator, span)
            return dn, (dn * chunks.take(out, span)).sum(dim=-1, keepdim=True).neg_()

        if initial_kv is None:
            kv_state = phi_q.new_zeros(batch * heads, features, value_dim, dtype=chunks.acc)
            k_sum = phi_q.new_zeros(batch * heads, features, 1, dtype=chunks.acc)
        else:
            kv_state, k_sum = initial_kv.clone(), initial_k_sum.clone()
        for span in chunks.spans():
            k, v_chunk = chunks.take_keys(phi_k, span), chunks.take_values(v, span)
            dn, dd = numerator_and_denominator_grads(span)
            grad_scores = chunks.keep_visible_(torch.baddbmm(dd, dn, v_chunk.transpose(1, 2)), span)
            grad_q_state = torch.bmm(dn, kv_state.transpose(1, 2)).baddbmm_(dd, k_sum.transpose(1, 2))
            grad_q_chunk = torch.bmm(grad_scores, k).add_(_scaled(grad_q_state, chunks.sees_state(span)))
            grad_q[:, :, span] = grad_q_chunk.view(batch, heads, -1, features)
            _advance_state_(kv_state, k_sum, k, v_chunk, chunks, span)

        grad_kv = grad_kv.reshape(-1, features, value_dim).to(chunks.acc, copy=True)
        grad_k_sum = grad_k_sum.reshape(-1, features, 1).to(chunks.acc, copy=True)
        for span in reversed(chunks.spans()):
            q, k, v_chunk = (
                chunks.take(phi_q, span),
                chunks.take_keys(phi_k, span),
                chunks.take_values(v, span),
            )
            dn, dd = numerator_and_denominator_grads(span)
            scores = chunks.keep_visible_(torch.bmm(q, k.transpose(1, 2)), span)
            grad_scores = chunks.keep_visible_(torch.baddbmm(dd, dn, v_chunk.transpose(1, 2)), span)
            enters = chunks.enters_state(span)
            grad_k_state = torch.bmm(v_chunk, grad_kv.transpose(1, 2)).add_(grad_k_sum.transpose(1, 2))
            grad_k_chunk = torch.bmm(grad_scores.transpose(1, 2), q).add_(_scaled(grad_k_state, enters))
            grad_k_chunk = grad_k_chunk.view(batch, heads, -1, features)
            if chunks.mask_BL is not None:
                grad_k_chunk.masked_fill_(~chunks.mask_BL[:, None, span, None], 0)
            grad_k[:, :, span] = grad_k_chunk
            grad_v_chunk = torch.bmm(scores.transpose(1, 2), dn).baddbmm_(_scaled(k, enters), grad_kv)
            grad_v_chunk = grad_v_chunk.view(batch, v.shape[1], group, -1, value_dim)
            grad_v[:, :, span] = grad_v_chunk.squeeze(2) if group == 1 else grad_v_chunk.sum(dim=2)
            q_state, survives = _scaled(q, chunks.sees_state(span)), chunks.state_survives(span)
            if survives is not None:
                grad_kv.mul_(survives)
                grad_k_sum.mul_(survives)
            grad_kv.baddbmm_(q_state.transpose(1, 2), dn)
            grad_k_sum.baddbmm_(q_state.transpose(1, 2), dd)

        if ctx.initial_shapes is None:
            return grad_q, grad_k, grad_v, None, None, None, None
        dtype = ctx.initial_shapes[0]
        grad_initial = grad_kv.view(batch, heads, features, value_dim).to(dtype)
        return (
            grad_q,
            grad_k,
            grad_v,
            grad_initial,
            grad_k_sum.view(batch, heads, features).to(dtype),
            None,
            None,
        )


def _advance_state_(kv_state: Tensor, k_sum: Tensor, k: Tensor, v: Tensor, chunks: _Chunks, span: slice) -> None:
    """S ← S + φkᵀ v and z ← z + Σ φk over one chunk, in place; starts afresh after a segment border."""
    survives = chunks.state_survives(span)
    if survives is not None:
        kv_state.mul_(survives)
        k_sum.mul_(survives)
    k = _scaled(k, chunks.enters_state(span))
    kv_state.baddbmm_(k.transpose(1, 2), v)
    k_sum.add_(k.sum(dim=1).unsqueeze(-1))


def chunked_linear_attention(
    phi_q_BHLF: Tensor,
    phi_k_BHLF: Tensor,
    v_BKLV: Tensor,
    *,
    mask_BL: Tensor | None = None,
    segment_ids_BL: Tensor | None = None,
    initial_state: LinearAttentionState | None = None,
    eps: float = DENOMINATOR_EPS,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    return_state: bool = False,
) -> tuple[Tensor, LinearAttentionState | None]:
    """Causal linear attention, linear in L. Returns (o_BHLV in v's dtype, final state or None).

    Saves φ(q), φ(k), v, o and the denominator for the backward, and the initial state if there is one; scratch does
    not grow with L. Gradients reach `initial_state`, and come back from the returned state. `initial_state` is not
    changed; it belongs to the first (real) token's segment, the final state to the last one's.
    """
    _check_shapes(phi_q_BHLF, phi_k_BHLF, v_BKLV, mask_BL, segment_ids_BL)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    chunks = _Chunks(
        num_heads=phi_q_BHLF.shape[1],
        num_kv_heads=v_BKLV.shape[1],
        length=phi_q_BHLF.shape[2],
        chunk_size=chunk_size,
        acc=_accumulation_dtype(phi_q_BHLF),
        mask_BL=mask_BL,
        run_BL=None if segment_ids_BL is None else run_index_BL(segment_ids_BL, mask_BL),
    )
    initial_kv = None if initial_state is None else initial_state.kv_state_BHFV
    initial_k_sum = None if initial_state is None else initial_state.k_sum_BHF
    out, kv_state, k_sum = _ChunkedLinearAttention.apply(
        phi_q_BHLF, phi_k_BHLF, v_BKLV, initial_kv, initial_k_sum, chunks, eps
    )
    return out, LinearAttentionState(kv_state, k_sum) if return_state else None


def noncausal_linear_attention(
    phi_q_BHLF: Tensor,
    phi_k_BHLF: Tensor,
    v_BKLV: Tensor,
    *,
    mask_BL: Tensor | None = None,
    segment_ids_BL: Tensor | None = None,
    eps: float = DENOMINATOR_EPS,
) -> Tensor:
    """Every token sees every real token of its segment. Returns o_BHLV in v's dtype; linear in L, by autograd."""
    _check_shapes(phi_q_BHLF, phi_k_BHLF, v_BKLV, mask_BL, segment_ids_BL)
    if segment_ids_BL is None:
        return _noncausal_one_segment(phi_q_BHLF, phi_k_BHLF, v_BKLV, mask_BL, eps)
    rows = []
    for row, run_L in enumerate(run_index_BL(segment_ids_BL, mask_BL)):
        lengths = torch.unique_consecutive(run_L, return_counts=True)[1].tolist()
        pieces, start = [], 0
        for length in lengths:
            at = (slice(row, row + 1), slice(None), slice(start, start + length))
            mask = None if mask_BL is None else mask_BL[at[0], at[2]]
            pieces.append(_noncausal_one_segment(phi_q_BHLF[at], phi_k_BHLF[at], v_BKLV[at], mask, eps))
            start += length
        rows.append(torch.cat(pieces, dim=2))
    return torch.cat(rows)


def _noncausal_one_segment(phi_q: Tensor, phi_k: Tensor, v: Tensor, mask_BL: Tensor | None, eps: float) -> Tensor:
    acc = _accumulation_dtype(phi_q)
    phi_q, phi_k = phi_q.to(acc), phi_k.to(acc)
    if mask_BL is not None:
        phi_k = phi_k.masked_fill(~mask_BL[:, None, :, None], 0)
    v_BHLV = v.to(acc).repeat_interleave(phi_q.shape[1] // v.shape[1], dim=1)
    numerator = torch.matmul(phi_q, torch.matmul(phi_k.transpose(-1, -2), v_BHLV))
    denominator = torch.matmul(phi_q, phi_k.sum(dim=2).unsqueeze(-1)) + eps
    return (numerator / denominator).to(v.dtype)

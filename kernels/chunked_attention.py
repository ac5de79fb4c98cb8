"""Causal linear attention chunk by chunk: linear in L, with a backward of its own that saves next to nothing.

Sequential over chunks of C tokens, batched over (batch, head). S, z are the state before a chunk; the scores within it
are tril(φq φkᵀ):

    numerator = tril(φq φkᵀ) v + φq S        denominator d = rowsum tril(φq φkᵀ) + φq·z + eps        o = numerator/d

Backward, with dn = do/d and dd = −dn·o, and R, r the state's gradient after the chunk; two sweeps:

    forwards  (S += φkᵀ v,  z += Σ φk):       dφq = tril(dn vᵀ + dd) φk + dn Sᵀ + dd z
    backwards (R += φqᵀ dn, r += Σ dd φq):    dφk = tril(dn vᵀ + dd)ᵀ φq + v Rᵀ + r      dv = tril(φq φkᵀ)ᵀ dn + φk R
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_state import LinearAttentionState
from .conventions import DENOMINATOR_EPS, check_shapes, run_index_BL, without_autocast

# Work per token grows with C, calls fall with 1/C. Measured on a CPU, F = 128 and 256: 64 is the fastest or next to it.
DEFAULT_CHUNK_SIZE = 64


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
    """Causal linear attention. Returns (o_BHLV in v's dtype, final state or None).

    Saves φ(q), φ(k), v, o and the denominator for the backward, and the initial state if there is one; scratch does
    not grow with L. Gradients reach `initial_state`, and come back from the returned state. `initial_state` is not
    changed; it belongs to the first (real) token's segment, the final state to the last one's.
    """
    check_shapes(phi_q_BHLF, phi_k_BHLF, v_BKLV, mask_BL, segment_ids_BL)
    problem = Problem.of(phi_q_BHLF, v_BKLV, mask_BL, segment_ids_BL, phi_q_BHLF.dtype, eps, chunk_size)
    initial = (None, None) if initial_state is None else (initial_state.kv_state_BHFV, initial_state.k_sum_BHF)
    out, kv_state, k_sum = _ChunkedLinearAttention.apply(phi_q_BHLF, phi_k_BHLF, v_BKLV, *initial, problem)
    return out, LinearAttentionState(kv_state, k_sum) if return_state else None


@dataclass(frozen=True)
class Problem:
    """One call's sizes and borders. Takes chunks out of (B, H, L, ·) as (B·H, C, ·) in the accumulation dtype."""

    batch_size: int
    num_heads: int
    num_kv_heads: int
    length: int
    chunk_size: int
    eps: float
    dtype: torch.dtype
    mask_BL: Tensor | None
    run_BL: Tensor | None

    @classmethod
    def of(
        cls,
        q_BHLX: Tensor,
        v_BKLV: Tensor,
        mask_BL: Tensor | None,
        segment_ids_BL: Tensor | None,
        feature_dtype: torch.dtype,
        eps: float,
        chunk_size: int,
    ) -> Problem:
        """Of q or φ(q) (B, H, L, ·) and v (B, K, L, V), for features of a dtype: sums in float32 at least.

        Raises ValueError for a chunk_size below 1.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
        return cls(
            batch_size=q_BHLX.shape[0],
            num_heads=q_BHLX.shape[1],
            num_kv_heads=v_BKLV.shape[1],
            length=q_BHLX.shape[2],
            chunk_size=chunk_size,
            eps=eps,
            dtype=torch.promote_types(feature_dtype, torch.float32),
            mask_BL=mask_BL,
            run_BL=None if segment_ids_BL is None else run_index_BL(segment_ids_BL, mask_BL),
        )

    def chunks(self, span: slice) -> list[tuple[slice, slice]]:
        """Each chunk's place in the sequence and within the span."""
        starts = range(span.start, span.stop, self.chunk_size)
        chunks = [slice(start, min(start + self.chunk_size, span.stop)) for start in starts]
        return [(chunk, slice(chunk.start - span.start, chunk.stop - span.start)) for chunk in chunks]

    def take(self, x_BHLX: Tensor, chunk: slice) -> Tensor:
        return x_BHLX[:, :, chunk].to(self.dtype).flatten(0, 1)

    def take_keys(self, phi_k_BHSF: Tensor, chunk: slice, within: slice) -> Tensor:
        """φ(k) of a chunk, out of a span's in which it lies at `within`."""
        return self.hide_padding(phi_k_BHSF[:, :, within].to(self.dtype), chunk).flatten(0, 1)

    def take_values(self, v_BKLV: Tensor, chunk: slice) -> Tensor:
        v, group = v_BKLV[:, :, chunk].to(self.dtype), self.num_heads // self.num_kv_heads
        return (v if group == 1 else v.repeat_interleave(group, dim=1)).flatten(0, 1)

    def put(self, out_BHLX: Tensor, chunk: slice, x: Tensor) -> None:
        out_BHLX[:, :, chunk] = x.view(self.batch_size, -1, *x.shape[1:])

    def hide_padding(self, x_BHCX: Tensor, chunk: slice) -> Tensor:
        return x_BHCX if self.mask_BL is None else x_BHCX.masked_fill(~self.mask_BL[:, None, chunk, None], 0)

    def keep_visible_(self, scores: Tensor, chunk: slice) -> Tensor:
        """Zeroes, in place, the scores (B·H, C, C) that lie above the diagonal or cross a segment border."""
        scores.tril_()
        if self.run_BL is not None:
            run = self.run_BL[:, chunk]
            same = (run.unsqueeze(2) == run.unsqueeze(1)).to(scores.dtype)
            scores.view(self.batch_size, self.num_heads, *scores.shape[1:]).mul_(same.unsqueeze(1))
        return scores

    def queries_on_state(self, q: Tensor, chunk: slice) -> Tensor:
        """q, zero where its segment is not the one that the state before the chunk belongs to."""
        return q if self.run_BL is None else q * self._per_head(self.run_BL[:, chunk] == self._run_before(chunk))

    def keys_into_state(self, k: Tensor, chunk: slice) -> Tensor:
        """k, zero where its segment is not the one that goes on after the chunk."""
        return k if self.run_BL is None else k * self._per_head(self.run_BL[:, chunk] == self._run_at_end(chunk))

    def forget_across_border_(self, chunk: slice, *states: Tensor) -> None:
        """Zeroes states (in place) of rows in which a border lies between the state before the chunk and its end."""
        if self.run_BL is not None:
            survives = self._per_head(self._run_at_end(chunk) == self._run_before(chunk))
            for state in states:
                state.mul_(survives)

    def _run_before(self, chunk: slice) -> Tensor:
        """(B, 1). An initial state belongs to the first token's run."""
        assert self.run_BL is not None
        before = max(chunk.start - 1, 0)
        return self.run_BL[:, before : before + 1]

    def _run_at_end(self, chunk: slice) -> Tensor:
        assert self.run_BL is not None
        return self.run_BL[:, chunk.stop - 1 : chunk.stop]

    def _per_head(self, flags_BC: Tensor) -> Tensor:
        return flags_BC.to(self.dtype).repeat_interleave(self.num_heads, dim=0).unsqueeze(-1)

    def start_state(
        self, num_features: int, v: Tensor, kv_state: Tensor | None, k_sum: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """S (B·H, F, V) and z (B·H, F, 1) with memory of their own: zeros, or copies of what is given."""
        shape = (self.batch_size * self.num_heads, num_features)
        if kv_state is None or k_sum is None:
            return v.new_zeros(*shape, v.shape[-1], dtype=self.dtype), v.new_zeros(*shape, 1, dtype=self.dtype)
        return (
            kv_state.to(self.dtype, copy=True).reshape(*shape, v.shape[-1]),
            k_sum.to(self.dtype, copy=True).reshape(*shape, 1),
        )

    def advance_state_(self, kv_state: Tensor, k_sum: Tensor, k: Tensor, v: Tensor, chunk: slice) -> None:
        """S ← S + φkᵀ v and z ← z + Σ φk over one chunk, in place; afresh after a segment border."""
        self.forget_across_border_(chunk, kv_state, k_sum)
        k = self.keys_into_state(k, chunk)
        kv_state.baddbmm_(k.transpose(1, 2), v)
        k_sum.add_(k.sum(dim=1).unsqueeze(-1))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, kv_state: Tensor, k_sum: Tensor, chunk: slice
    ) -> tuple[Tensor, Tensor]:
        """(o, d) of one chunk."""
        scores = self.keep_visible_(torch.bmm(q, k.transpose(1, 2)), chunk)
        q_state = self.queries_on_state(q, chunk)
        numerator = torch.bmm(scores, v).baddbmm_(q_state, kv_state)
        d = scores.sum(dim=-1, keepdim=True).baddbmm_(q_state, k_sum).add_(self.eps)
        return numerator.div_(d), d

    def state_shapes(self, kv_state: Tensor, k_sum: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, F, V) and (B, H, F)."""
        shape = (self.batch_size, self.num_heads, kv_state.shape[1])
        return kv_state.view(*shape, -1), k_sum.view(shape)


class Features(Protocol):
    """φ(q) and φ(k), (B, H, S, F), a span of S tokens at a time, and who wants their gradients.

    Spans begin at multiples of the chunk. A gradient comes while its span is the last one asked for.
    """

    num_features: int

    def spans(self) -> list[slice]: ...

    def queries(self, span: slice) -> Tensor: ...

    def keys(self, span: slice) -> Tensor: ...

    def take_query_gradient(self, span: slice, grad_phi_q: Tensor) -> None: ...

    def take_key_gradient(self, span: slice, grad_phi_k: Tensor) -> None: ...


def attend(
    problem: Problem, features: Features, v: Tensor, initial_kv: Tensor | None, initial_k_sum: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o in v's dtype, d (B, H, L, 1), final S (B, H, F, V), final z (B, H, F))."""
    kv_state, k_sum = problem.start_state(features.num_features, v, initial_kv, initial_k_sum)
    shape = (problem.batch_size, problem.num_heads, problem.length)
    out, denominator = v.new_empty(*shape, v.shape[-1]), v.new_empty(*shape, 1, dtype=problem.dtype)

    def attend_span(span: slice) -> None:
        # a function of its own: nothing of a span is held when the next one is made
        phi_q, phi_k = features.queries(span), features.keys(span)
        for chunk, within in problem.chunks(span):
            k, v_chunk = problem.take_keys(phi_k, chunk, within), problem.take_values(v, chunk)
            o, d = problem.attend(problem.take(phi_q, within), k, v_chunk, kv_state, k_sum, chunk)
            problem.put(out, chunk, o)
            problem.put(denominator, chunk, d)
            problem.advance_state_(kv_state, k_sum, k, v_chunk, chunk)

    for span in features.spans():
        attend_span(span)
    return out, denominator, *problem.state_shapes(kv_state, k_sum)


def differentiate(
    problem: Problem,
    features: Features,
    v: Tensor,
    out: Tensor,
    denominator: Tensor,
    initial: Sequence[Tensor | None],
    grads: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dv, dS, dz) of what `attend` gave for `initial` S and z; φ's gradients go to `features`.

    `grads` are those of o and of the final S and z.
    """
    grad_out, grad_final_kv, grad_final_k_sum = grads
    grad_v, grad_d = torch.empty_like(v), torch.empty_like(denominator)
    # dφq is a small difference of two large sums, one of them through dd. An o rounded to bfloat16 would leave its
    # error there alone (measured: 7 % to 360 % of dφq where values share a mean), so o is computed again.
    out_is_rounded = out.dtype != problem.dtype

    kv_state, k_sum = problem.start_state(features.num_features, v, *initial)

    def sweep_forwards(span: slice) -> None:
        phi_k, phi_q = features.keys(span), features.queries(span)
        grad_phi_q = torch.empty_like(phi_q)
        for chunk, within in problem.chunks(span):
            k, v_chunk = problem.take_keys(phi_k, chunk, within), problem.take_values(v, chunk)
            if out_is_rounded:
                o, d = problem.attend(problem.take(phi_q, within), k, v_chunk, kv_state, k_sum, chunk)
            else:
                o, d = problem.take(out, chunk), problem.take(denominator, chunk)
            dn = problem.take(grad_out, chunk) / d
            dd = (dn * o).sum(dim=-1, keepdim=True).neg_()
            problem.put(grad_d, chunk, dd)
            grad_scores = problem.keep_visible_(torch.baddbmm(dd, dn, v_chunk.transpose(1, 2)), chunk)
            dn, dd = problem.queries_on_state(dn, chunk), problem.queries_on_state(dd, chunk)
            grad_q_chunk = torch.bmm(grad_scores, k).baddbmm_(dn, kv_state.transpose(1, 2))
            problem.put(grad_phi_q, within, grad_q_chunk.baddbmm_(dd, k_sum.transpose(1, 2)))
            problem.advance_state_(kv_state, k_sum, k, v_chunk, chunk)
        features.take_query_gradient(span, grad_phi_q)

    for span in features.spans():
        sweep_forwards(span)

    grad_kv, grad_k_sum = problem.start_state(features.num_features, v, grad_final_kv, grad_final_k_sum)

    def sweep_backwards(span: slice) -> None:
        phi_q, phi_k = features.queries(span), features.keys(span)
        grad_phi_k = torch.empty_like(phi_k)
        for chunk, within in reversed(problem.chunks(span)):
            q, k = problem.take(phi_q, within), problem.take_keys(phi_k, chunk, within)
            v_chunk = problem.take_values(v, chunk)
            dn, dd = problem.take(grad_out, chunk) / problem.take(denominator, chunk), problem.take(grad_d, chunk)
            scores = problem.keep_visible_(torch.bmm(q, k.transpose(1, 2)), chunk)
            grad_scores = problem.keep_visible_(torch.baddbmm(dd, dn, v_chunk.transpose(1, 2)), chunk)

            grad_k_state = torch.bmm(v_chunk, grad_kv.transpose(1, 2)).add_(grad_k_sum.transpose(1, 2))
            grad_k_chunk = problem.keys_into_state(grad_k_state, chunk).baddbmm_(grad_scores.transpose(1, 2), q)
            grad_k_chunk = grad_k_chunk.view(problem.batch_size, problem.num_heads, *grad_k_chunk.shape[1:])
            grad_phi_k[:, :, within] = problem.hide_padding(grad_k_chunk, chunk)

            grad_v_chunk = torch.bmm(scores.transpose(1, 2), dn)
            grad_v_chunk.baddbmm_(problem.keys_into_state(k, chunk), grad_kv)
            by_kv_head = grad_v_chunk.view(problem.batch_size, problem.num_kv_heads, -1, *grad_v_chunk.shape[1:])
            grad_v[:, :, chunk] = by_kv_head.squeeze(2) if by_kv_head.shape[2] == 1 else by_kv_head.sum(dim=2)

            problem.forget_across_border_(chunk, grad_kv, grad_k_sum)
            q_state = problem.queries_on_state(q, chunk)
            grad_kv.baddbmm_(q_state.transpose(1, 2), dn)
            grad_k_sum.baddbmm_(q_state.transpose(1, 2), dd)
        features.take_key_gradient(span, grad_phi_k)

    for span in reversed(features.spans()):
        sweep_backwards(span)
    return grad_v, *problem.state_shapes(grad_kv, grad_k_sum)


def initial_state_gradients(
    initial_kv: Tensor | None, grad_kv: Tensor, grad_k_sum: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """dS (B, H, F, V) and dz (B, H, F) in the initial state's dtype; None where there was no such state."""
    if initial_kv is None:
        return None, None
    return grad_kv.to(initial_kv.dtype), grad_k_sum.to(initial_kv.dtype)


class _GivenFeatures:
    """Features that the caller has: one span."""

    def __init__(self, phi_q: Tensor, phi_k: Tensor) -> None:
        self._phi_q, self._phi_k = phi_q, phi_k
        self.num_features = phi_q.shape[-1]
        self.grad_phi_q: Tensor | None = None
        self.grad_phi_k: Tensor | None = None

    def spans(self) -> list[slice]:
        return [slice(0, self._phi_q.shape[2])]

    def queries(self, span: slice) -> Tensor:
        return self._phi_q

    def keys(self, span: slice) -> Tensor:
        return self._phi_k

    def take_query_gradient(self, span: slice, grad_phi_q: Tensor) -> None:
        self.grad_phi_q = grad_phi_q

    def take_key_gradient(self, span: slice, grad_phi_k: Tensor) -> None:
        self.grad_phi_k = grad_phi_k


class _ChunkedLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        phi_q: Tensor,
        phi_k: Tensor,
        v: Tensor,
        initial_kv: Tensor | None,
        initial_k_sum: Tensor | None,
        problem: Problem,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, denominator, final_kv, final_k_sum = attend(
            problem, _GivenFeatures(phi_q, phi_k), v, initial_kv, initial_k_sum
        )
        ctx.save_for_backward(phi_q, phi_k, v, out, denominator, initial_kv, initial_k_sum)
        ctx.problem = problem
        return out, final_kv, final_k_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        phi_q, phi_k, v, out, denominator, *initial = ctx.saved_tensors
        features = _GivenFeatures(phi_q, phi_k)
        with without_autocast(v.device):
            grad_v, *grad_state = differentiate(ctx.problem, features, v, out, denominator, initial, grads)
        initial_grads = initial_state_gradients(initial[0], *grad_state)
        return features.grad_phi_q, features.grad_phi_k, grad_v, *initial_grads, None

"""Linear attention on features φ, in three causal forms that agree, and without causality.

- `quadratic_linear_attention`: obviously right, T×T scores in memory, the oracle of the others.
- `recurrent_linear_attention_step`: one token, a state of constant size; decoding.
- `chunked_linear_attention` (in its own file): linear in T with its own backward; training and prefill.
- `noncausal_linear_attention`: every token sees all of its segment.

`conventions.py` says what holds in all of them: eps, dtypes, padding, segments, shape letters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_state import LinearAttentionState
from .chunked_attention import DEFAULT_CHUNK_SIZE, chunked_linear_attention
from .conventions import DENOMINATOR_EPS, accumulation_dtype, check_shapes, run_index_BL

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "DENOMINATOR_EPS",
    "LinearAttentionState",
    "chunked_linear_attention",
    "noncausal_linear_attention",
    "quadratic_linear_attention",
    "recurrent_linear_attention_step",
    "run_index_BL",
]


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
    check_shapes(phi_q_BHLF, phi_k_BHLF, v_BKLV, mask_BL, segment_ids_BL)
    acc = accumulation_dtype(phi_q_BHLF)
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
    check_shapes(phi_q_BHLF, phi_k_BHLF, v_BKLV, mask_BL, segment_ids_BL)
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
    acc = accumulation_dtype(phi_q)
    phi_q, phi_k = phi_q.to(acc), phi_k.to(acc)
    if mask_BL is not None:
        phi_k = phi_k.masked_fill(~mask_BL[:, None, :, None], 0)
    v_BHLV = v.to(acc).repeat_interleave(phi_q.shape[1] // v.shape[1], dim=1)
    numerator = torch.matmul(phi_q, torch.matmul(phi_k.transpose(-1, -2), v_BHLV))
    denominator = torch.matmul(phi_q, phi_k.sum(dim=2).unsqueeze(-1)) + eps
    return (numerator / denominator).to(v.dtype)

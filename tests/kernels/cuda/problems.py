"""Random inputs for the kernels and what they should give: the quadratic form in float64 on the same bf16 numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hedgehog.kernels.cuda.operators import linear_attention
from hedgehog.kernels.feature_maps import make_feature_map
from hedgehog.kernels.linear_attention import LinearAttentionState, quadratic_linear_attention, run_index_BL

EPS = 1e-30


@dataclass(frozen=True)
class Problem:
    """One call. `feature_map` "given" hands φ over; its q and k are then features of hedgehog_softmax."""

    q: Tensor
    k: Tensor
    v: Tensor
    weight_q: Tensor | None
    weight_k: Tensor | None
    feature_map: str
    mask: Tensor | None = None
    segment_ids: Tensor | None = None
    initial: LinearAttentionState | None = None

    def run(self, *, segments: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(o, d, S, z) by the kernel."""
        runs = None if self.segment_ids is None else run_index_BL(self.segment_ids, self.mask).int()
        state = self.initial
        return linear_attention(
            self.q,
            self.k,
            self.v,
            self.weight_q,
            self.weight_k,
            self.mask,
            runs,
            None if state is None else state.kv_state_BHFV,
            None if state is None else state.k_sum_BHF,
            self.feature_map,
            EPS,
            segments,
            True,
        )

    def features(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """φ(q), φ(k), each (B, H, L, F), not rounded."""
        if self.feature_map == "given":
            return self.q.to(dtype), self.k.to(dtype)
        assert self.weight_q is not None and self.weight_k is not None
        k = self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], dim=1)
        sides = (("query", self.q, self.weight_q), ("key", k, self.weight_k))
        phi_q, phi_k = (
            make_feature_map(self.feature_map, num_heads=1, head_dim=1, side=side).features(x.to(dtype), w.to(dtype))
            for side, x, w in sides
        )
        return phi_q, phi_k

    def expected(self) -> Tensor:
        """o in float64. An initial state must have come from `split`."""
        phi_q, phi_k = self.features()
        return quadratic_linear_attention(
            phi_q, phi_k, self.v.double(), mask_BL=self.mask, segment_ids_BL=self.segment_ids, eps=EPS
        )

    def cut(self, start: int, stop: int, initial: LinearAttentionState | None = None) -> Problem:
        """The tokens from start to stop, going on from `initial`."""
        return replace(
            self,
            q=self.q[:, :, start:stop],
            k=self.k[:, :, start:stop],
            v=self.v[:, :, start:stop],
            mask=None if self.mask is None else self.mask[:, start:stop],
            segment_ids=None if self.segment_ids is None else self.segment_ids[:, start:stop],
            initial=initial,
        )


def random_problem(
    length: int,
    *,
    head_dim: int = 64,
    features: int = 128,
    feature_map: str = "hedgehog_softmax",
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    seed: int = 0,
) -> Problem:
    """Standard normal q, k, v and weights that give z unit variance, all in bf16; L-strided as a model has them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    def tokens(num_heads: int) -> Tensor:
        return normal(batch, length, num_heads, head_dim).transpose(1, 2)

    q, k, v = tokens(heads), tokens(kv_heads), tokens(kv_heads)
    weight_q, weight_k = (
        (normal(heads, head_dim, features // 2).float() / head_dim**0.5).bfloat16().float() for _ in range(2)
    )
    if feature_map != "given":
        return Problem(q, k, v, weight_q, weight_k, feature_map)
    phi_q, phi_k = Problem(q, k, v, weight_q, weight_k, "hedgehog_softmax").features(torch.float32)
    return Problem(phi_q.bfloat16(), phi_k.bfloat16(), v, None, None, feature_map)


def rms(x: Tensor) -> float:
    """Root mean square."""
    return x.double().pow(2).mean().sqrt().item()

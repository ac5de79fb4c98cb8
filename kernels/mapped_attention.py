"""Causal linear attention from q and k themselves, the feature maps computed along the way.

φ(q) and φ(k) exist for a span of tokens at a time, in the forward pass and again in each sweep of the backward, which
gives the gradients to q, k and the maps' weights at the end of the span. So what is kept for the backward is q, k, v, o
and the denominator, as with a fused kernel: linear in L, no factor F/D, and keys are not repeated for grouped heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_state import LinearAttentionState
from .chunked_attention import DEFAULT_CHUNK_SIZE, Problem, attend, differentiate, initial_state_gradients
from .conventions import DENOMINATOR_EPS, accumulation_dtype, check_shapes, without_autocast
from .feature_maps import FeatureMap
from .mapped_limits import span_length


def mapped_linear_attention(
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    v_BKLV: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    *,
    positions_BL: Tensor | None = None,
    mask_BL: Tensor | None = None,
    segment_ids_BL: Tensor | None = None,
    initial_state: LinearAttentionState | None = None,
    eps: float = DENOMINATOR_EPS,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    return_state: bool = False,
) -> tuple[Tensor, LinearAttentionState | None]:
    """`chunked_linear_attention` of map_q(q) and map_k(k): (o_BHLV in v's dtype, final state or None).

    q (B, H, L, D), k (B, K, L, D): each query head has its own map of its keys. φ is rounded once, to v's dtype, or
    float32 for float16, which would overflow. `positions_BL` are absolute; by default 0, 1, 2, … Everything else as in
    `chunked_linear_attention`. Gradients reach q, k, v, the maps' projections and the initial state.

    Raises:
        ValueError: shapes that do not fit, or maps that `why_not_mapped` refuses.
    """
    check_shapes(q_BHLD, q_BHLD, v_BKLV, mask_BL, segment_ids_BL)
    batch, _, length, head_dim = q_BHLD.shape
    if k_BKLD.shape != (batch, v_BKLV.shape[1], length, head_dim):
        raise ValueError(f"k {tuple(k_BKLD.shape)} must be (B, K, L, D) = {(batch, v_BKLV.shape[1], length, head_dim)}")
    obstacle = why_not_mapped(map_q, map_k, q_BHLD.device)
    if obstacle is not None:
        raise ValueError(f"{obstacle}: compute φ first, and give it to chunked_linear_attention")
    dtype = torch.float32 if v_BKLV.dtype == torch.float16 else v_BKLV.dtype
    if positions_BL is None:
        positions_BL = torch.arange(length, device=q_BHLD.device).unsqueeze(0)
    problem = Problem.of(q_BHLD, v_BKLV, mask_BL, segment_ids_BL, dtype, eps, chunk_size)
    initial = (None, None) if initial_state is None else (initial_state.kv_state_BHFV, initial_state.k_sum_BHF)
    weights = (map_q.projection_HDP, map_k.projection_HDP)
    out, kv_state, k_sum = _MappedLinearAttention.apply(
        q_BHLD, k_BKLD, v_BKLV, *weights, *initial, problem, (map_q, map_k), positions_BL, dtype
    )
    return out, LinearAttentionState(kv_state, k_sum) if return_state else None


def why_not_mapped(map_q: FeatureMap, map_k: FeatureMap, device: torch.device) -> str | None:
    """Why these maps have to be called as modules, or None."""
    for feature_map in (map_q, map_k):
        weight = feature_map.projection_HDP
        if weight is not None and weight.device != device:
            return f"a feature map lies on {weight.device}, not on {device}"  # a hook of the module's brings it here
        if any(parameter is not weight for parameter in feature_map.parameters()):
            return "a feature map has parameters beside its projection, which would get no gradient"
    return None


class _Recorded(NamedTuple):
    """φ of a span with what it was made of, for autograd."""

    span: slice
    x: Tensor
    weight: Tensor | None
    phi: Tensor


class _Side:
    """φ of queries or of keys, a span at a time, and the gradients to what it is made of."""

    def __init__(
        self,
        feature_map: FeatureMap,
        x_BKLD: Tensor,
        weight: Tensor | None,
        group: int,
        positions_BL: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._map, self._x, self._weight, self._group = feature_map, x_BKLD, weight, group
        self._positions, self._dtype = positions_BL, dtype
        self._recorded: _Recorded | None = None
        self.grad_x: Tensor | None = None
        self.grad_weight: Tensor | None = None

    def want(self, x: bool, weight: bool) -> None:
        """Which gradients there will be."""
        self.grad_x = torch.empty_like(self._x) if x else None
        if weight and self._weight is not None:
            self.grad_weight = torch.zeros_like(self._weight, dtype=accumulation_dtype(self._weight))

    def leave_others(self, span: slice) -> None:
        if self._recorded is not None and self._recorded.span != span:
            self._recorded = None

    def features(self, span: slice) -> Tensor:
        if self._recorded is not None and self._recorded.span == span:
            return self._recorded.phi.detach()
        x, weight = self._x[:, :, span], self._weight
        if not self._wants_gradients:
            return self._features(x, weight, span)
        x = x.detach().requires_grad_(self.grad_x is not None)
        weight = None if weight is None else weight.detach().requires_grad_(self.grad_weight is not None)
        with torch.enable_grad():
            self._recorded = _Recorded(span, x, weight, self._features(x, weight, span))
        return self._recorded.phi.detach()

    def _features(self, x_BKSD: Tensor, weight: Tensor | None, span: slice) -> Tensor:
        x_BHSD = x_BKSD if self._group == 1 else x_BKSD.repeat_interleave(self._group, dim=1)
        return self._map.features(x_BHSD, weight, self._positions[:, span]).to(self._dtype)

    @property
    def _wants_gradients(self) -> bool:
        return self.grad_x is not None or self.grad_weight is not None

    def pull_back(self, span: slice, grad_phi: Tensor) -> None:
        if not self._wants_gradients:
            return
        recorded = self._recorded
        assert recorded is not None and recorded.span == span
        wanted = [x for x in (recorded.x, recorded.weight) if x is not None and x.requires_grad]
        grads = iter(torch.autograd.grad(recorded.phi, wanted, grad_phi))
        if self.grad_x is not None:
            self.grad_x[:, :, span] = next(grads)
        if self.grad_weight is not None:
            self.grad_weight += next(grads)


class _MappedFeatures:
    def __init__(
        self,
        problem: Problem,
        q: Tensor,
        k: Tensor,
        weights: tuple[Tensor | None, Tensor | None],
        maps: tuple[FeatureMap, FeatureMap],
        positions: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.num_features = maps[0].num_features
        self._length = problem.length
        batch, heads, chunk_size = problem.batch_size, problem.num_heads, problem.chunk_size
        self._step = span_length(q.device.type, batch, heads, self.num_features, chunk_size)
        self.query_side = _Side(maps[0], q, weights[0], 1, positions, dtype)
        self.key_side = _Side(maps[1], k, weights[1], q.shape[1] // k.shape[1], positions, dtype)

    def spans(self) -> list[slice]:
        return [slice(start, min(start + self._step, self._length)) for start in range(0, self._length, self._step)]

    def _leave_others(self, span: slice) -> None:
        """Before there is φ of this span; where one sweep ends the next begins, with the same span."""
        for side in (self.query_side, self.key_side):
            side.leave_others(span)

    def queries(self, span: slice) -> Tensor:
        self._leave_others(span)
        return self.query_side.features(span)

    def keys(self, span: slice) -> Tensor:
        self._leave_others(span)
        return self.key_side.features(span)

    def take_query_gradient(self, span: slice, grad_phi_q: Tensor) -> None:
        self.query_side.pull_back(span, grad_phi_q)

    def take_key_gradient(self, span: slice, grad_phi_k: Tensor) -> None:
        self.key_side.pull_back(span, grad_phi_k)


class _MappedLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight_q: Tensor | None,
        weight_k: Tensor | None,
        initial_kv: Tensor | None,
        initial_k_sum: Tensor | None,
        problem: Problem,
        maps: tuple[FeatureMap, FeatureMap],
        positions: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        features = _MappedFeatures(problem, q, k, (weight_q, weight_k), maps, positions, dtype)
        out, denominator, final_kv, final_k_sum = attend(problem, features, v, initial_kv, initial_k_sum)
        ctx.save_for_backward(q, k, v, weight_q, weight_k, positions, out, denominator, initial_kv, initial_k_sum)
        ctx.problem, ctx.maps, ctx.dtype = problem, maps, dtype
        return out, final_kv, final_k_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weight_q, weight_k, positions, out, denominator, *initial = ctx.saved_tensors
        features = _MappedFeatures(ctx.problem, q, k, (weight_q, weight_k), ctx.maps, positions, ctx.dtype)
        sides = features.query_side, features.key_side
        for side, x, weight in zip(sides, (0, 1), (3, 4), strict=True):
            side.want(ctx.needs_input_grad[x], ctx.needs_input_grad[weight])
        with without_autocast(v.device):
            grad_v, *grad_state = differentiate(ctx.problem, features, v, out, denominator, initial, grads)
        grad_weights = [
            None if side.grad_weight is None else side.grad_weight.to(weight.dtype)
            for side, weight in zip(sides, (weight_q, weight_k), strict=True)
        ]
        grad_inputs = sides[0].grad_x, sides[1].grad_x, grad_v
        return *grad_inputs, *grad_weights, *initial_state_gradients(initial[0], *grad_state), None, None, None, None

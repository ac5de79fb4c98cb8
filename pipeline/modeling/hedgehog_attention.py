"""Linear attention with feature maps, as every converted model has it in place of softmax attention.

    φ(x) = f(W x)        y_i = Σ_{j≤i} (φ(q_i)·φ(k_j)) v_j / Σ_{j≤i} φ(q_i)·φ(k_j)

A family's own attention module gives q, k (after RoPE, where there is one) and v, and takes y.
B batch, L length, H query heads, K key/value heads, D head dim, F features, V value dim (= D).
This file travels with every export.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...kernels.backends import Backend
from ...kernels.conventions import without_autocast
from ...kernels.feature_maps import FeatureMap, make_feature_map
from ...kernels.linear_attention import (
    LinearAttentionState,
    noncausal_linear_attention,
    recurrent_linear_attention_step,
)
from ...kernels.mapped_attention import why_not_mapped
from .hedgehog_cache import HedgehogCache

FEATURE_MAP_NAMES = ("feature_map_q", "feature_map_k")


class HedgehogAttention(nn.Module):
    """One feature map for queries and one for keys, per query head: a base class before the family's own attention.

    The family's __init__ sets `config`, `layer_idx` and `head_dim`, and calls `add_feature_maps`.
    """

    config: Any
    layer_idx: int
    head_dim: int
    feature_map_q: FeatureMap
    feature_map_k: FeatureMap
    _rounded: tuple[Any, tuple[torch.Tensor, torch.Tensor]] | None

    def add_feature_maps(self) -> None:
        """The maps that the config asks for, at their initial values."""
        for name, side in zip(FEATURE_MAP_NAMES, ("query", "key"), strict=True):
            feature_map = make_feature_map(
                self.config.feature_map,
                num_heads=self.config.num_attention_heads,
                head_dim=self.head_dim,
                feature_dim=self.config.feature_dim,
                side=side,
                seed=self.config.feature_map_seed,
                options=self.config.feature_map_options,
            )
            self.add_module(name, feature_map)
        self._rounded = None

    def train(self, mode: bool = True):
        self._rounded = None  # an optimizer may write through .data, of which no version tells
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        """As nn.Module's, but .to(bfloat16) and .half() leave the feature maps fp32: φ is rounded once, after it."""
        self._rounded = None
        if not recurse:
            return super()._apply(fn, recurse=False)
        for name, child in self.named_children():
            child._apply(keeping_float32(fn) if name in FEATURE_MAP_NAMES else fn)
        return super()._apply(fn, recurse=False)

    def attend(
        self,
        q_BHLD: torch.Tensor,
        k_BKLD: torch.Tensor,
        v_BKLV: torch.Tensor,
        *,
        cache: HedgehogCache | None,
        mask_BL: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        backend: Backend | None,
    ) -> torch.Tensor:
        """Causal linear attention → (B, H, L, V). mask_BL bool, True for real tokens, or None.

        The layer's state in `cache`, if there is one, goes on. φ is computed in fp32 and rounded once to the values'
        dtype; sums are fp32.
        """
        layer = None if cache is None else cache.layer(self.layer_idx)
        state = None if layer is None else layer.state
        if state is not None and not torch.compiler.is_compiling():
            state = state.usable_here()
        assert backend is not None, "the model chooses the backend"
        attend = self._attend_fused if self._is_fused(backend, q_BHLD, k_BKLD, v_BKLV) else self._attend
        with without_autocast(v_BKLV.device):
            o_BHLV, state = attend(
                q_BHLD,
                k_BKLD,
                v_BKLV,
                backend,
                mask_BL=mask_BL,
                position_ids=position_ids,
                segment_ids=segment_ids,
                state=state,
                return_state=layer is not None,
            )
        if layer is not None:
            layer.store(state, num_new_tokens=q_BHLD.shape[2])
        return o_BHLV

    def attend_bidirectional(
        self,
        q_BHLD: torch.Tensor,
        k_BHLD: torch.Tensor,
        v_BHLV: torch.Tensor,
        *,
        mask_BL: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """An encoder's linear attention, every token seeing all real ones → (B, H, L, V). φ and sums as in `attend`.

        q, k and v are all that is kept for the backward pass, where the rest is computed again.
        """

        def of_values(q_BHLD: torch.Tensor, k_BHLD: torch.Tensor, v_BHLV: torch.Tensor) -> torch.Tensor:
            with without_autocast(v_BHLV.device):
                dtype = torch.float32 if v_BHLV.dtype == torch.float16 else v_BHLV.dtype
                phi_q_BHLF = self.feature_map_q(q_BHLD, position_ids).to(dtype)
                phi_k_BHLF = self.feature_map_k(k_BHLD, position_ids).to(dtype)
                eps = self.config.attention_eps
                return noncausal_linear_attention(phi_q_BHLF, phi_k_BHLF, v_BHLV, mask_BL=mask_BL, eps=eps)

        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler decides itself what it keeps
            return of_values(q_BHLD, k_BHLD, v_BHLV)
        return checkpoint(of_values, q_BHLD, k_BHLD, v_BHLV, use_reentrant=False, preserve_rng_state=False)

    def _attend(
        self,
        q_BHLD: torch.Tensor,
        k_BKLD: torch.Tensor,
        v_BKLV: torch.Tensor,
        backend: Backend,
        *,
        mask_BL: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        state: LinearAttentionState | None,
        return_state: bool,
    ) -> tuple[torch.Tensor, Any]:
        """φ in PyTorch: along the way where the backend does so, else before it."""
        shared = {
            "mask_BL": mask_BL,
            "segment_ids_BL": segment_ids,
            "initial_state": state,
            "eps": self.config.attention_eps,
            "chunk_size": self.config.chunk_size,
            "return_state": return_state,
        }
        is_decoding, maps = _is_decoding(q_BHLD, state), (self.feature_map_q, self.feature_map_k)
        along_the_way = backend.mapped is not None and not is_decoding and not torch.compiler.is_compiling()
        if along_the_way and why_not_mapped(*maps, q_BHLD.device) is None:
            assert backend.mapped is not None
            return backend.mapped(q_BHLD, k_BKLD, v_BKLV, *maps, positions_BL=position_ids, **shared)
        # each query head maps its own copy of the keys
        num_groups = q_BHLD.shape[1] // k_BKLD.shape[1]
        k_BHLD = k_BKLD if num_groups == 1 else k_BKLD.repeat_interleave(num_groups, dim=1)
        # the same rounded φ in numerator and denominator; fp16 would overflow
        dtype = torch.float32 if v_BKLV.dtype == torch.float16 else v_BKLV.dtype
        phi_q_BHLF = self.feature_map_q(q_BHLD, position_ids).to(dtype)
        phi_k_BHLF = self.feature_map_k(k_BHLD, position_ids).to(dtype)
        if is_decoding:
            assert state is not None
            return self._one_token(phi_q_BHLF, phi_k_BHLF, v_BKLV, mask_BL, state)
        return backend.causal_attention(phi_q_BHLF, phi_k_BHLF, v_BKLV, **shared)

    def _is_fused(self, backend: Backend, *q_k_v: torch.Tensor) -> bool:
        """Whether the backend computes φ itself, from this layer's q, k and v."""
        if backend.fused is None or any(x.dtype != torch.bfloat16 for x in q_k_v):
            return False
        weights = self.feature_map_q.projection_HDP, self.feature_map_k.projection_HDP
        # offloaded, they come when the map is called
        return all(weight is not None and weight.device == q_k_v[0].device for weight in weights)

    def _attend_fused(
        self,
        q_BHLD: torch.Tensor,
        k_BKLD: torch.Tensor,
        v_BKLV: torch.Tensor,
        backend: Backend,
        *,
        mask_BL: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        state: LinearAttentionState | None,
        return_state: bool,
    ) -> tuple[torch.Tensor, Any]:
        """φ inside the backend's kernel; none of its maps looks at positions."""
        assert backend.fused is not None
        weight_q, weight_k = self.feature_map_q.projection_HDP, self.feature_map_k.projection_HDP
        assert weight_q is not None and weight_k is not None
        projections, eps = (weight_q, weight_k), self.config.attention_eps
        if _is_decoding(q_BHLD, state):
            assert state is not None
            o_BH1V = backend.fused.attend_token(
                q_BHLD, k_BKLD, v_BKLV, self._decoding_weights(*projections), mask_B1=mask_BL, state=state, eps=eps
            )
            return o_BH1V, state
        return backend.fused.attend(
            q_BHLD,
            k_BKLD,
            v_BKLV,
            projections,
            mask_BL=mask_BL,
            segment_ids_BL=segment_ids,
            initial_state=state,
            eps=eps,
            return_state=return_state,
        )

    def _decoding_weights(self, weight_q: torch.Tensor, weight_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In bfloat16, kept until a weight changes: rounding them costs as much as half a token's work."""
        if torch.compiler.is_compiling() or weight_q.is_inference() or weight_k.is_inference():
            return weight_q, weight_k  # a graph keeps nothing, inference tensors have no version; the kernel rounds
        state = [(w._version, w.data_ptr(), w.device) for w in (weight_q, weight_k)]
        if self._rounded is None or self._rounded[0] != state:
            rounded = (weight_q.detach().bfloat16().contiguous(), weight_k.detach().bfloat16().contiguous())
            self._rounded = state, rounded
        return self._rounded[1]

    def _one_token(
        self,
        phi_q_BHLF: torch.Tensor,
        phi_k_BHLF: torch.Tensor,
        v_BKLV: torch.Tensor,
        mask_BL: torch.Tensor | None,
        state: LinearAttentionState,
    ) -> tuple[torch.Tensor, LinearAttentionState]:
        if mask_BL is not None:
            phi_k_BHLF = phi_k_BHLF * mask_BL[:, None, :, None]  # padding is zeroed in φ(k): softmax of 0 is not 0
        phi_q_BHF, phi_k_BHF, v_BKV = phi_q_BHLF[:, :, 0], phi_k_BHLF[:, :, 0], v_BKLV[:, :, 0]
        eps = self.config.attention_eps
        o_BHV, state = recurrent_linear_attention_step(phi_q_BHF, phi_k_BHF, v_BKV, state, eps=eps)
        return o_BHV.unsqueeze(2), state


def _is_decoding(q_BHLD: torch.Tensor, state: LinearAttentionState | None) -> bool:
    return q_BHLD.shape[2] == 1 and state is not None and not torch.is_grad_enabled()


def keeping_float32(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn` of nn.Module._apply without its step down to half precision: device moves and fp64 still happen."""

    def keeping(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        if tensor.dtype == torch.float32 and moved.dtype in (torch.bfloat16, torch.float16):
            return tensor.to(moved.device)
        return moved

    return keeping


__all__ = ["FEATURE_MAP_NAMES", "HedgehogAttention", "keeping_float32"]

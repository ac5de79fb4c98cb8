"""One layer of Hedgehog-Llama: linear attention with feature maps in place of softmax attention.

    φ(x) = f(W x)        y_i = Σ_{j≤i} (φ(q_i)·φ(k_j)) v_j / Σ_{j≤i} φ(q_i)·φ(k_j)        q, k after RoPE

B batch, L length, H query heads, K key/value heads, D head dim, F features, V value dim (= D).
This file travels with every export.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

from ...kernels.backends import Backend
from ...kernels.feature_maps import FeatureMap, make_feature_map
from ...kernels.linear_attention import LinearAttentionState, recurrent_linear_attention_step
from ...kernels.mapped_attention import why_not_mapped
from .configuration_hedgehog_llama import HedgehogLlamaConfig
from .hedgehog_cache import HedgehogCache, the_cache_given

FEATURE_MAP_NAMES = ("feature_map_q", "feature_map_k")


class HedgehogLlamaRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's RoPE whose frequencies stay fp32: .bfloat16(), which DeepSpeed calls, would spoil far positions."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        return super()._apply(_keeping_float32(fn), recurse)


class HedgehogLlamaAttention(LlamaAttention):
    """Linear attention with Llama's projections and one feature map for queries, one for keys, per query head."""

    config: HedgehogLlamaConfig
    feature_map_q: FeatureMap
    feature_map_k: FeatureMap

    def __init__(self, config: HedgehogLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for name, side in zip(FEATURE_MAP_NAMES, ("query", "key"), strict=True):
            feature_map = make_feature_map(
                config.feature_map,
                num_heads=config.num_attention_heads,
                head_dim=self.head_dim,
                feature_dim=config.feature_dim,
                side=side,
                seed=config.feature_map_seed,
                options=config.feature_map_options,
            )
            self.add_module(name, feature_map)
        self._rounded: tuple[Any, tuple[torch.Tensor, torch.Tensor]] | None = None

    def train(self, mode: bool = True):
        self._rounded = None  # an optimizer may write through .data, of which no version tells
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        """As nn.Module's, but .to(bfloat16) and .half() leave the feature maps fp32: φ is rounded once, after it."""
        self._rounded = None
        if not recurse:
            return super()._apply(fn, recurse=False)
        for name, child in self.named_children():
            child._apply(_keeping_float32(fn) if name in FEATURE_MAP_NAMES else fn)
        return super()._apply(fn, recurse=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: HedgehogCache | None = None,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        attention_backend: Backend | None = None,
        cache: HedgehogCache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states (B, L, hidden) → the same shape. attention_mask (B, L) bool, True for real tokens, or None.

        φ is computed in fp32 and rounded once to the values' dtype; sums are fp32.
        """
        B, L = hidden_states.shape[:2]
        q_BHLD = self.q_proj(hidden_states).view(B, L, -1, self.head_dim).transpose(1, 2)
        k_BKLD = self.k_proj(hidden_states).view(B, L, -1, self.head_dim).transpose(1, 2)
        v_BKLV = self.v_proj(hidden_states).view(B, L, -1, self.head_dim).transpose(1, 2)
        q_BHLD, k_BKLD = apply_rotary_pos_emb(q_BHLD, k_BKLD, *position_embeddings)

        cache = cast("HedgehogCache | None", the_cache_given(past_key_values, cache))
        layer = None if cache is None else cache.layer(self.layer_idx)
        state = None if layer is None else layer.state
        if state is not None and not torch.compiler.is_compiling():
            state = state.usable_here()
        assert attention_backend is not None, "the model chooses the backend"
        attend = self._attend_fused if self._is_fused(attention_backend, q_BHLD, k_BKLD, v_BKLV) else self._attend
        with torch.autocast(hidden_states.device.type, enabled=False):  # it would take φ and the sums to bf16
            o_BHLV, state = attend(
                q_BHLD,
                k_BKLD,
                v_BKLV,
                attention_backend,
                mask_BL=attention_mask,
                position_ids=position_ids,
                segment_ids=segment_ids,
                state=state,
                return_state=layer is not None,
            )
        if layer is not None:
            layer.store(state, num_new_tokens=L)
        return self.o_proj(o_BHLV.transpose(1, 2).reshape(B, L, -1)), None

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
        k_BHLD = repeat_kv(k_BKLD, self.num_key_value_groups)  # each query head maps its own copy of the keys
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


class HedgehogLlamaDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer around the attention that the config asks for."""

    def __init__(self, config: HedgehogLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.attention == "linear":
            self.self_attn = HedgehogLlamaAttention(config, layer_idx)


def _is_decoding(q_BHLD: torch.Tensor, state: LinearAttentionState | None) -> bool:
    return q_BHLD.shape[2] == 1 and state is not None and not torch.is_grad_enabled()


def _keeping_float32(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn` of nn.Module._apply without its step down to half precision: device moves and fp64 still happen."""

    def keeping(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        if tensor.dtype == torch.float32 and moved.dtype in (torch.bfloat16, torch.float16):
            return tensor.to(moved.device)
        return moved

    return keeping


__all__ = ["FEATURE_MAP_NAMES", "HedgehogLlamaAttention", "HedgehogLlamaDecoderLayer", "HedgehogLlamaRotaryEmbedding"]

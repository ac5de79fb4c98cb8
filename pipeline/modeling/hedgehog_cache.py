"""The decoding state of a converted model: one fixed-size sum per layer, whatever the length.

B batch, H query heads, F features, V value dim. Per layer: S = Σ φ(k)vᵀ (B, H, F, V) and z = Σ φ(k) (B, H, F), fp32.
This file travels with every export.
"""

from __future__ import annotations

from typing import cast

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from ...kernels.linear_attention import LinearAttentionState

CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls a cache, in arguments and results: `cache` from 5.24 on. This project's models take both."""


def the_cache_given(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The one that came, by either name. ValueError where two came."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument: give one of them")
    return cache if past_key_values is None else past_key_values


class HedgehogCacheLayer(CacheLayerMixin):
    """One layer's state. Nothing grows: `num_seen_tokens` is only a count (padding included)."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: LinearAttentionState | None = None
        self.num_seen_tokens = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise RuntimeError("a linear-attention state is made by its first forward pass")

    def update(self, *args, **kwargs):
        raise RuntimeError("linear attention keeps sums, not keys and values: HedgehogCache cannot be update()d")

    def store(self, state: LinearAttentionState, num_new_tokens: int) -> None:
        """Replace the state by one that has also seen `num_new_tokens` more tokens (padding included)."""
        self.state = state
        self.num_seen_tokens += num_new_tokens
        self.is_initialized = True

    def num_bytes(self) -> int:
        return 0 if self.state is None else self.state.num_bytes()

    def get_seq_length(self) -> int:
        return self.num_seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1  # transformers' word for "no maximum"

    def offload(self) -> None:
        raise RuntimeError("a linear-attention state is small and of constant size: it is not offloaded")

    prefetch = offload

    def reset(self) -> None:
        self.state = None
        self.num_seen_tokens = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.state is not None:
            self.state = self.state.reorder(beam_idx.to(self.state.kv_state_BHFV.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            device = self.state.kv_state_BHFV.device
            rows_B = torch.arange(self.state.kv_state_BHFV.shape[0], device=device)
            self.state = self.state.reorder(rows_B.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices)

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a HedgehogCache cannot be cropped: its state is a sum over all tokens seen, and no token can be taken "
            "out of it. Reset it and run the shorter sequence, or copy.deepcopy() it before going on (made under "
            "torch.no_grad()). Assisted decoding cannot do without: a model with linear attention is no draft model"
        )


class HedgehogCache(Cache):
    """What `past_key_values` is for linear attention. Its size does not depend on how much was read or generated.

    Beam search reorders it; left padding leaves no trace in it; several tokens may arrive at a time.
    `num_real_tokens_B` counts each row's tokens without padding: the next token's position.
    """

    def __init__(self, num_hidden_layers: int) -> None:
        super().__init__(layers=[HedgehogCacheLayer() for _ in range(num_hidden_layers)])
        self.num_real_tokens_B: torch.Tensor | None = None
        self._is_being_read = False

    def begin_reading(self) -> None:
        """Before the first layer reads new tokens. ValueError where an earlier pass failed between two layers."""
        if self._is_being_read:
            raise ValueError(
                "an earlier pass with these past_key_values failed midway: some layers have read its tokens, others "
                "have not. Begin with a new cache, or reset() this one"
            )
        self._is_being_read = True

    def end_reading(self, num_real_tokens_B: torch.Tensor) -> None:
        """After the last layer. `num_real_tokens_B`: each row's tokens so far, without padding."""
        self.num_real_tokens_B = num_real_tokens_B
        self._is_being_read = False

    def layer(self, layer_index: int) -> HedgehogCacheLayer:
        return cast(HedgehogCacheLayer, self.layers[layer_index])

    def num_bytes(self) -> int:
        """Bytes that the states of all layers take."""
        return sum(layer.num_bytes() for layer in cast("list[HedgehogCacheLayer]", self.layers))

    def reset(self) -> None:
        super().reset()
        self.num_real_tokens_B = None
        self._is_being_read = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(cast(torch.LongTensor, beam_idx))
        if self.num_real_tokens_B is not None:
            self.num_real_tokens_B = self.num_real_tokens_B[beam_idx.to(self.num_real_tokens_B.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.num_real_tokens_B is not None:
            self.num_real_tokens_B = self.num_real_tokens_B.repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)


__all__ = ["HedgehogCache", "HedgehogCacheLayer"]

"""What callers give a linear-attention model beside tokens, looked at before it is used: masks and caches.

A sum that was read wrongly gives wrong numbers and no error, so that what does not fit is refused here, with the cure.
B batch, L new tokens, P tokens that the cache has read. This file travels with every export.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from .hedgehog_attention import HedgehogAttention
from .hedgehog_cache import HedgehogCache


def padding_mask(
    attention_mask: torch.Tensor | None, cache: HedgehogCache | None, shape_BL: tuple[int, int], device: torch.device
) -> torch.Tensor | None:
    """The new tokens' part of `attention_mask` (B, L) or (B, P + L), as bool (B, L); ValueError for another shape."""
    if attention_mask is None:
        return None
    B, L = shape_BL
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask.ndim != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] not in (L, past + L):
        widths = f"({B}, {L})" + (f" or, with what past_key_values has read, ({B}, {past + L})" if past else "")
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; linear attention is causal by itself and takes "
            f"(batch, length) with 0 for padding, here {widths}"
        )
    return attention_mask[:, -L:].to(device=device, dtype=torch.bool)


def hedgehog_cache(
    cache: Cache | None, attention: HedgehogAttention, num_layers: int, num_rows: int
) -> HedgehogCache | None:
    """`cache`, if it is one that this model can go on from with this batch. ValueError otherwise."""
    if cache is None:
        return None
    if not isinstance(cache, HedgehogCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; linear attention needs a HedgehogCache: pass None and it is "
            "made. (Prefix tuning gives keys and values to attend to: use LoRA or prompt tuning)"
        )
    state = cache.layer(0).state
    heads, features = attention.config.num_attention_heads, attention.feature_map_q.num_features
    expected = (heads, features, attention.head_dim)
    if len(cache.layers) != num_layers or (state is not None and tuple(state.kv_state_BHFV.shape[1:]) != expected):
        held = "" if state is None else f" of (heads, features, head dim) {tuple(state.kv_state_BHFV.shape[1:])}"
        raise ValueError(
            f"past_key_values is another model's: it has {len(cache.layers)} layers{held}; this one has {num_layers} "
            f"of {expected}"
        )
    seen_B = cache.num_real_tokens_B
    if seen_B is not None and seen_B.shape[0] != num_rows:
        raise ValueError(
            f"past_key_values holds the state of {seen_B.shape[0]} rows, and the batch has {num_rows}: "
            "batch_repeat_interleave() or batch_select_indices() make them equal"
        )
    return cache


def check_mask_of_past(cache: HedgehogCache, attention_mask: torch.Tensor | None) -> None:
    """ValueError for a mask (B, P + …) that hides what the cache has read, or shows what it has not."""
    seen_B, past = cache.num_real_tokens_B, cache.get_seq_length()
    if attention_mask is None or seen_B is None or torch.compiler.is_compiling():
        return
    real_B = attention_mask[:, :past].to(seen_B.device, torch.bool).sum(1)
    if real_B.shape == seen_B.shape and not torch.equal(real_B, seen_B):  # other shapes are told of elsewhere
        row = int((real_B != seen_B).nonzero()[0])
        raise ValueError(
            f"row {row}: attention_mask has {int(real_B[row])} real tokens where past_key_values has read "
            f"{int(seen_B[row])}. What was read is part of a sum and cannot be masked afterwards (the padding behind a "
            "row that ended early, say): leave the mask as it was, or run the whole rows again without past_key_values"
        )


__all__ = ["check_mask_of_past", "hedgehog_cache", "padding_mask"]

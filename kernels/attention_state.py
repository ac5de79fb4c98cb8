"""What a causal linear-attention head remembers of all earlier tokens, and its size that never grows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def usable_here(self) -> LinearAttentionState:
        """Itself, or a copy where it was made under torch.inference_mode() and that has ended: such tensors can be
        neither updated in place nor kept for a gradient outside of it."""
        made_there = self.kv_state_BHFV.is_inference() or self.k_sum_BHF.is_inference()
        return self.clone() if made_there and not torch.is_inference_mode_enabled() else self

    def num_bytes(self) -> int:
        """Bytes that both tensors take; does not depend on how many tokens were seen."""
        return sum(t.numel() * t.element_size() for t in (self.kv_state_BHFV, self.k_sum_BHF))

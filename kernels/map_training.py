"""What every loss on feature maps shares: cutting a batch into spans and heads, φ with gradient, and adding up dW."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .distill_limits import MAX_CELLS
from .feature_maps import FeatureMap
from .precomputed_gradient import attach_gradient
from .spans import Span, causal_spans, gather_spans, span_batches


class MapTraining:
    """One batch of one layer: q and k, frozen, and the two maps whose weights' gradient is wanted.

    Work goes in batches of (spans, heads); N = heads × spans at hand, T the longest span's length. Everything is in
    `dtype`: float32, or float64 for float64 q. Raises ValueError where the shapes do not fit.
    """

    def __init__(
        self,
        q_BHLD: Tensor,
        k_BKLD: Tensor,
        map_q: FeatureMap,
        map_k: FeatureMap,
        *,
        scale: float | None,
        mask_BL: Tensor | None,
        segment_ids_BL: Tensor | None,
        positions_BL: Tensor | None,
        row_weights_BL: Tensor | None,
        grad: bool,
    ) -> None:
        batch, self.num_heads, length, head_dim = q_BHLD.shape
        if k_BKLD.shape[0] != batch or self.num_heads % k_BKLD.shape[1] or k_BKLD.shape[2:] != q_BHLD.shape[2:]:
            raise ValueError(f"k {tuple(k_BKLD.shape)} must be (B, K, L, D), H % K == 0, for q {tuple(q_BHLD.shape)}")
        for name, tensor in (
            ("mask_BL", mask_BL),
            ("segment_ids_BL", segment_ids_BL),
            ("positions_BL", positions_BL),
            ("row_weights_BL", row_weights_BL),
        ):
            if tensor is not None and tuple(tensor.shape) != (batch, length):
                raise ValueError(f"{name} {tuple(tensor.shape)} must be (B, L) = {(batch, length)}")
        self.scale = head_dim**-0.5 if scale is None else float(scale)
        self.dtype = torch.promote_types(q_BHLD.dtype, torch.float32)
        self.device = q_BHLD.device
        self.weights_BL = row_weights(q_BHLD, mask_BL, row_weights_BL, self.dtype)
        if positions_BL is None:
            positions_BL = torch.arange(length, device=self.device).expand(batch, length)
        self._positions_BL = positions_BL
        self.mask_BL, self.segment_ids_BL = mask_BL, segment_ids_BL
        self._maps = (map_q, map_k)
        projections = [feature_map.projection_HDP for feature_map in self._maps]
        wanted = grad and torch.is_grad_enabled()
        self.learns = tuple(wanted and p is not None and p.requires_grad for p in projections)
        self._parameters = [p for p, learns in zip(projections, self.learns, strict=True) if p is not None and learns]
        self._grads = [torch.zeros_like(p, dtype=self.dtype) for p in self._parameters]

    @property
    def needs_grad(self) -> bool:
        """Whether there is any weight to find a gradient for."""
        return bool(self._parameters)

    def batches(self, cells_per_token: int) -> Iterator[tuple[list[Span], slice]]:
        """(spans, heads) to be worked on at once, where each token of each head costs `cells_per_token` numbers."""
        max_cells = MAX_CELLS.get(self.device.type, MAX_CELLS["cuda"])
        batch, length = self.weights_BL.shape
        spans = causal_spans(batch, length, self.mask_BL, self.segment_ids_BL)
        return span_batches(spans, self.num_heads, max_cells, cells_per_token)

    def take(self, x_BHLX: Tensor, spans: list[Span], heads: slice) -> Tensor:
        """(N, T, X) of a tensor with H or K heads, without gradient; zero after each span's end."""
        x = gather_spans(x_BHLX.detach(), spans, heads, self.num_heads, self.dtype)
        return x.flatten(0, 1)

    def take_weights(self, spans: list[Span], heads: slice) -> Tensor:
        """Row weights (N, T), zero after each span's end."""
        weights = gather_spans(self.weights_BL[:, None, :, None], spans, slice(0, 1), 1, self.dtype)
        return weights[0, :, :, 0].repeat(heads.stop - heads.start, 1)

    def take_real(self, spans: list[Span], heads: slice) -> Tensor | None:
        """(N, T) bool: False after each span's end. None where all end together: told without asking the device."""
        lengths = [span.length for span in spans]
        if min(lengths) == max(lengths):
            return None
        ends = torch.tensor(lengths, device=self.device)
        real = torch.arange(max(lengths), device=self.device) < ends[:, None]
        return real.repeat(heads.stop - heads.start, 1)

    def per_head(self, x_N: Tensor, heads: slice) -> Tensor:
        """Sums over the spans at hand: (heads,)."""
        return x_N.view(heads.stop - heads.start, -1).sum(dim=1)

    def features(
        self, q_NTD: Tensor, k_NTD: Tensor, spans: list[Span], heads: slice
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """φ(q), φ(k), each (N, T, F), and the leaves that `add_gradient` wants their gradient for."""
        num_heads = heads.stop - heads.start
        positions = gather_spans(self._positions_BL[:, None, :, None], spans, slice(0, 1), 1, torch.long)
        phis, leaves = [], []
        for feature_map, learns, x in zip(self._maps, self.learns, (q_NTD, k_NTD), strict=True):
            projection = feature_map.projection_HDP
            if projection is not None:
                projection = projection.detach()[heads].to(self.dtype)
            if learns and projection is not None:
                leaves.append(projection.requires_grad_())
            with torch.set_grad_enabled(learns):
                phi = feature_map.features(x.view(1, num_heads, -1, x.shape[-1]), projection, positions.view(1, -1))
                phis.append(phi.view(*x.shape[:2], -1))
        return phis[0], phis[1], leaves

    def add_gradient(
        self, outputs: list[Tensor], grad_outputs: list[Tensor], leaves: list[Tensor], heads: slice
    ) -> None:
        """Adds the mean over heads of Σ grad_outputs·outputs to the loss, as far as dW is concerned."""
        if not leaves:
            return
        pairs = [(out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if out.requires_grad]
        grads = torch.autograd.grad([out for out, _ in pairs], leaves, [grad for _, grad in pairs])
        for total, part in zip(self._grads, grads, strict=True):
            total[heads] += part / self.num_heads

    def add_weight_gradient(self, side: int, heads: slice, grad_HDP: Tensor) -> None:
        """Adds the mean over heads of a gradient to the weights of map `side` (0 query, 1 key), which learns."""
        self._grads[sum(self.learns[:side])][heads] += grad_HDP / self.num_heads

    def attach(self, loss: Tensor) -> Tensor:
        """`loss` tied to the maps' weights, with the gradient added up so far."""
        return attach_gradient(loss, self._parameters, self._grads)

    def row_mean(self, sum_H: Tensor) -> Tensor:
        """Σ_i w_i x_i per head → weighted mean over rows, float32; 0 where there is no real token at all."""
        total = self.weights_BL.sum()
        return (sum_H / torch.where(total == 0, torch.ones_like(total), total)).float()


def check_log_sum_exp(log_sum_exp_BHL: Tensor | None, q_BHLD: Tensor) -> None:
    """Raises ValueError unless there is a number for every row and head of q, or none at all."""
    if log_sum_exp_BHL is not None and log_sum_exp_BHL.shape != q_BHLD.shape[:3]:
        raise ValueError(f"log_sum_exp_BHL {tuple(log_sum_exp_BHL.shape)} must be (B, H, L) {tuple(q_BHLD.shape[:3])}")


def sampled_row_weights(mask_BL: Tensor, fraction: float, block: int, place: float) -> Tensor:
    """Row weights (B, L), float32, for a loss over a sample of the query rows: unbiased for that over all of them.

    The loss is a mean over rows, and a row costs as much alone as among others. Of the n blocks of `block` rows m =
    ceil(fraction·n) are taken, evenly spread, from `place` in [0, 1) on: with a uniform `place` each is taken with
    probability m/n. Rows taken weigh n/m times 1/number of real tokens, all others 0. `mask_BL`: True = real.
    """
    length = mask_BL.shape[1]
    num_blocks = -(-length // block)
    taken = math.ceil(fraction * num_blocks - 1e-9)
    chosen = (torch.arange(taken, dtype=torch.float64) + place) * num_blocks / taken
    weights = torch.zeros(num_blocks)
    weights[chosen.long().clamp_max(num_blocks - 1)] = num_blocks / taken
    rows = weights.repeat_interleave(block)[:length].to(mask_BL.device)
    return rows * mask_BL / mask_BL.sum().clamp_min(1)


def row_weights(q_BHLD: Tensor, mask_BL: Tensor | None, row_weights_BL: Tensor | None, dtype: torch.dtype) -> Tensor:
    """w_i, (B, L): as given, or 1/number of real tokens; zero on padding."""
    batch, _, length, _ = q_BHLD.shape
    real = torch.ones(batch, length, dtype=torch.bool, device=q_BHLD.device) if mask_BL is None else mask_BL
    if row_weights_BL is None:
        return real.to(dtype) / real.sum().clamp_min(1)
    return row_weights_BL.to(dtype).masked_fill(~real, 0)

"""The distillation loss through the Triton kernels of `distill_tiles`: shapes, tile sizes, scratch and launches.

Same mathematics and same arguments as `distill_loss.attention_distillation_loss`, which is its fallback and its oracle.
Scratch for a few heads at a time, linear in length: per token and head 2·F operand numbers for φ and F float32 for dφ.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import distill_tiles
from .distill_limits import CHUNK, WEIGHT_SHARES, WIDTHS, heads_at_once
from .distill_loss import DEFAULT_BLOCK_SIZE, LOSS_EPS, DistillLoss
from .feature_maps import KEY_EXPONENT_BOUND, FeatureMap
from .map_training import MapTraining, check_log_sum_exp
from .visible_ranges import VisibleRanges, visible_ranges

_kernels: Any = distill_tiles  # a launch takes plain numbers where the signature says constexpr

INTERPRETED = not isinstance(_kernels.map_features, triton.runtime.JITFunction)
"""Whether Triton interprets in this process (TRITON_INTERPRET=1): on CPU tensors, for tests, very slowly."""

# (form of φ, factor on z) by the map's name and side
_FORMS: dict[tuple[str, str], tuple[Any, float]] = {
    ("hedgehog_softmax", "query"): (distill_tiles.TWO_SOFTMAXES, 1.0),
    ("hedgehog_softmax", "key"): (distill_tiles.TWO_SOFTMAXES, 1.0),
    ("hedgehog_exp", "query"): (distill_tiles.ONE_SOFTMAX, 1.0),
    ("hedgehog_exp", "key"): (distill_tiles.BOUNDED_EXP, 1.0),
    ("hedgehog_joint", "query"): (distill_tiles.ONE_SOFTMAX, 2.0),
    ("hedgehog_joint", "key"): (distill_tiles.ONE_SOFTMAX, 2.0),
}


class Tiles(NamedTuple):
    """A pinned launch configuration, in tokens a tile.

    `chunk`: of `map_features` and `row_statistics`, which share the chunks. `rows`: the tile of a sweep that stays;
    `passing`: the one that goes by. `weight_rows`: of `weight_gradient`.
    """

    chunk: int
    rows: int
    passing: int
    weight_rows: int
    warps: int = 8
    stages: int = 2


def pinned_tiles(capability: int) -> Tiles:
    """The tiles for a compute capability (80, 90, …), sized for D = 128, F = 256 and 16-bit operands.

    Shared memory decides: 227 KiB a block on sm_90, sm_100 and sm_103, 163 KiB on sm_80 and sm_87, 99 KiB on the rest.
    On sm_90 a passing tile of 32 would leave the tensor cores waiting: an instruction reads 64 rows of the staying tile
    from shared memory whatever its width.
    """
    if capability in (90, 100, 103):
        return Tiles(chunk=CHUNK, rows=128, passing=64, weight_rows=32)
    if capability in (80, 87):
        return Tiles(chunk=CHUNK, rows=64, passing=64, weight_rows=32)
    return Tiles(chunk=CHUNK, rows=64, passing=32, weight_rows=16)


def unsupported(map_q: FeatureMap, map_k: FeatureMap, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot serve these maps and q's dtype; None where it can."""
    for feature_map in (map_q, map_k):
        if (feature_map.name, feature_map.side) not in _FORMS:
            return f"no kernel for feature map {feature_map.name}"
        if feature_map.head_dim not in WIDTHS or feature_map.feature_dim not in WIDTHS:
            widths = ", ".join(map(str, WIDTHS))
            return f"head_dim {feature_map.head_dim}, feature_dim {feature_map.feature_dim}: not both of {widths}"
    if map_q.num_features != map_k.num_features:
        return "the two maps differ in feature_dim"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    return None


def triton_distillation_loss(
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    *,
    scale: float | None = None,
    mask_BL: Tensor | None = None,
    segment_ids_BL: Tensor | None = None,
    positions_BL: Tensor | None = None,
    row_weights_BL: Tensor | None = None,
    eps: float = LOSS_EPS,
    block_size: int = DEFAULT_BLOCK_SIZE,
    grad: bool = True,
    log_sum_exp_BHL: Tensor | None = None,
    tiles: Tiles | None = None,
) -> DistillLoss:
    """Loss, KL per head and the gradient to the maps' weights; the same bits whenever it is run on one GPU.

    Arguments as `attention_distillation_loss`; `block_size` is that form's and not read here. `log_sum_exp_BHL` is
    L_i in nats over the keys that i sees, where the teacher's forward hands it out (any value at padding); it is
    computed where it does not. `tiles` overrides the pinned ones.

    Products have operands of q's dtype, those with φ or g of bfloat16 (float32 for float32 q; float16 lacks the
    range), and accumulate in float32; all else is float32. Raises ValueError where shapes do not fit or `unsupported`
    names a reason.
    """
    reason = unsupported(map_q, map_k, q_BHLD.dtype)
    if reason is not None:
        raise ValueError(reason)
    work = MapTraining(
        q_BHLD,
        k_BKLD,
        map_q,
        map_k,
        scale=scale,
        mask_BL=mask_BL,
        segment_ids_BL=segment_ids_BL,
        positions_BL=positions_BL,
        row_weights_BL=row_weights_BL,
        grad=grad,
    )
    check_log_sum_exp(log_sum_exp_BHL, q_BHLD)
    batch, num_heads, length, _ = q_BHLD.shape
    ranges = visible_ranges(batch, length, mask_BL, segment_ids_BL, q_BHLD.device)
    sampled = row_weights_BL is not None  # not looked at: that would wait for the GPU
    launches = _Launches(q_BHLD, k_BKLD, work, (map_q, map_k), ranges, eps, tiles, sampled)
    loss_H = torch.zeros(num_heads, dtype=torch.float32, device=q_BHLD.device)
    entropy_H = torch.zeros_like(loss_H)
    step = heads_at_once(num_heads, batch * length, map_q.num_features, launches.operand_dtype.itemsize)
    with torch.cuda.device(q_BHLD.device) if q_BHLD.is_cuda else nullcontext():  # Triton launches on the current device
        for first in range(0, num_heads, step):
            heads = slice(first, min(first + step, num_heads))
            loss_H[heads], entropy_H[heads] = launches.run(heads, log_sum_exp_BHL)
    return DistillLoss(work.attach(loss_H.mean()), work.row_mean(loss_H - entropy_H), work.row_mean(entropy_H))


class _Launches:
    """The five kernels on one batch, some heads at a time."""

    def __init__(
        self,
        q_BHLD: Tensor,
        k_BKLD: Tensor,
        work: MapTraining,
        maps: tuple[FeatureMap, FeatureMap],
        ranges: VisibleRanges,
        eps: float,
        tiles: Tiles | None,
        sampled: bool,
    ) -> None:
        # rows of D adjoining numbers; every other stride may be anything
        self.q, self.k = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (q_BHLD, k_BKLD))
        if self.k.dtype != self.q.dtype:
            raise ValueError(f"k is {self.k.dtype}, q is {self.q.dtype}")
        self.work, self.maps, self.ranges, self.eps = work, maps, ranges, eps
        self.batch, self.num_heads, self.length, self.head_dim = q_BHLD.shape
        self.row_weights = work.weights_BL.contiguous()
        self.num_features = maps[0].num_features
        self.device = q_BHLD.device
        self.operand_dtype = torch.float32 if q_BHLD.dtype == torch.float32 else torch.bfloat16
        if tiles is None:
            major, minor = torch.cuda.get_device_capability(self.device) if q_BHLD.is_cuda else (8, 0)
            tiles = pinned_tiles(10 * major + minor)
        self.tiles = tiles
        self.upcast = INTERPRETED
        self.sampled = sampled
        self.options = {"num_warps": tiles.warps, "num_stages": tiles.stages}

    def run(self, heads: slice, log_sum_exp_BHL: Tensor | None) -> tuple[Tensor, Tensor]:
        """Adds dW of these heads to the gradient; returns Σ_i w_i ℓ_i and Σ_i w_i·entropy_i, each (G,)."""
        if self.batch * self.length == 0:
            zero = torch.zeros(heads.stop - heads.start, device=self.device)
            return zero, zero
        phi_q, _ = self._features(0, heads)
        phi_k, tail = self._features(1, heads)
        assert tail is not None
        statistics = self._statistics(phi_q, phi_k, tail, heads, log_sum_exp_BHL)
        grad_phi = phi_q.new_empty(phi_q.shape if self.work.needs_grad else (1,), dtype=torch.float32)
        sums = self._sweep_queries(phi_q, phi_k, statistics, grad_phi, heads)
        if self.work.learns[0]:
            self._weight_gradient(0, grad_phi, heads)
        if self.work.learns[1]:
            self._sweep_keys(phi_q, phi_k, statistics, grad_phi, heads)
            self._weight_gradient(1, grad_phi, heads)
        return sums

    def _features(self, side: int, heads: slice) -> tuple[Tensor, Tensor | None]:
        """φ (B, G, L, F) of one side; for keys also the chunks' tails (B, G, chunks, F)."""
        num = heads.stop - heads.start
        chunks = _cdiv(self.length, self.tiles.chunk)
        phi = self.q.new_empty(self.batch, num, self.length, self.num_features, dtype=self.operand_dtype)
        tail = phi.new_empty((self.batch, num, chunks, self.num_features) if side else (1,), dtype=torch.float32)
        _kernels.map_features[(chunks, self.batch * num)](
            **self._side(side, heads),
            phi=phi,
            tail=tail,
            end=self.ranges.end_BL,
            num_heads=num,
            length=self.length,
            BLOCK=self.tiles.chunk,
            WITH_TAIL=bool(side),
            **self.options,
        )
        return phi, tail if side else None

    def _statistics(
        self, phi_q: Tensor, phi_k: Tensor, tail: Tensor, heads: slice, log_sum_exp_BHL: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """L_i in bits and Z_i, each (B, G, L)."""
        z = phi_q.new_empty(phi_q.shape[:3], dtype=torch.float32)
        if log_sum_exp_BHL is None:
            log2_sum = torch.empty_like(z)
        else:
            log2_sum = (log_sum_exp_BHL[:, heads].float() * 1.4426950408889634).contiguous()
        _kernels.row_statistics[(tail.shape[2], self.batch * phi_q.shape[1])](
            **self._pair(heads),
            phi_q=phi_q,
            phi_k=phi_k,
            tail=tail,
            count=self.ranges.count_BL,
            row_weight=self.row_weights,
            log2_sum=log2_sum,
            z=z,
            BLOCK=self.tiles.chunk,
            WITH_LOG_SUM=log_sum_exp_BHL is None,
            **self.options,
        )
        return log2_sum, z

    def _sweep_queries(
        self, phi_q: Tensor, phi_k: Tensor, statistics: tuple[Tensor, Tensor], grad_phi: Tensor, heads: slice
    ) -> tuple[Tensor, Tensor]:
        log2_sum, z = statistics
        cross_entropy, entropy = torch.empty_like(z), torch.empty_like(z)
        _kernels.sweep_queries[(_cdiv(self.length, self.tiles.rows), self.batch * phi_q.shape[1])](
            **self._pair(heads),
            phi_q=phi_q,
            phi_k=phi_k,
            row_weight=self.row_weights,
            log2_sum=log2_sum,
            z=z,
            cross_entropy=cross_entropy,
            entropy=entropy,
            grad_phi=grad_phi,
            BLOCK_Q=self.tiles.rows,
            BLOCK_K=self.tiles.passing,
            WITH_GRAD=self.work.learns[0],
            **self.options,
        )
        return cross_entropy.sum(dim=(0, 2)), entropy.sum(dim=(0, 2))

    def _sweep_keys(
        self, phi_q: Tensor, phi_k: Tensor, statistics: tuple[Tensor, Tensor], grad_phi: Tensor, heads: slice
    ) -> None:
        log2_sum, z = statistics
        _kernels.sweep_keys[(_cdiv(self.length, self.tiles.rows), self.batch * phi_q.shape[1])](
            **self._pair(heads),
            phi_q=phi_q,
            phi_k=phi_k,
            row_weight=self.row_weights,
            log2_sum=log2_sum,
            z=z,
            grad_phi=grad_phi,
            BLOCK_Q=self.tiles.passing,
            BLOCK_K=self.tiles.rows,
            **self.options,
        )

    def _weight_gradient(self, side: int, grad_phi: Tensor, heads: slice) -> None:
        num = heads.stop - heads.start
        num_tiles = self.batch * _cdiv(self.length, self.tiles.weight_rows)
        per_share = _cdiv(num_tiles, WEIGHT_SHARES)
        shares = _cdiv(num_tiles, per_share)
        width = self.num_features // 2
        partial = grad_phi.new_empty(shares, num, self.head_dim, width)
        _kernels.weight_gradient[(shares, num)](
            **self._side(side, heads),
            grad_phi=grad_phi,
            end=self.ranges.end_BL,
            partial=partial,
            num_heads=num,
            length=self.length,
            num_tiles=num_tiles,
            tiles_per_share=per_share,
            BLOCK=self.tiles.weight_rows,
            **self.options,
        )
        self.work.add_weight_gradient(side, heads, partial.sum(dim=0))

    def _side(self, side: int, heads: slice) -> dict[str, Any]:
        """What the kernels of one side want: its tokens, its map's weights and form."""
        x, feature_map = (self.q, self.k)[side], self.maps[side]
        form, factor = _FORMS[feature_map.name, feature_map.side]
        weight = feature_map.projection_HDP
        assert weight is not None
        return {
            "x": x,
            "weight": weight.detach()[heads].float().contiguous(),
            "stride_batch": x.stride(0),
            "stride_head": x.stride(1),
            "stride_row": x.stride(2),
            "first_head": heads.start,
            "heads_per_x_head": self.num_heads // x.shape[1],
            "factor": factor,
            "bound": KEY_EXPONENT_BOUND,
            "D": self.head_dim,
            "P": feature_map.feature_dim,
            "FORM": form,
            "UPCAST": self.upcast,
        }

    def _pair(self, heads: slice) -> dict[str, Any]:
        """What the kernels want that look at pairs of a query and a key."""
        return {
            "q": self.q,
            "k": self.k,
            "start": self.ranges.start_BL,
            "end": self.ranges.end_BL,
            "q_stride_batch": self.q.stride(0),
            "q_stride_head": self.q.stride(1),
            "q_stride_row": self.q.stride(2),
            "k_stride_batch": self.k.stride(0),
            "k_stride_head": self.k.stride(1),
            "k_stride_row": self.k.stride(2),
            "first_head": heads.start,
            "heads_per_k_head": self.num_heads // self.k.shape[1],
            "num_heads": heads.stop - heads.start,
            "length": self.length,
            "scale": self.work.scale,
            "eps": self.eps,
            "D": self.head_dim,
            "F": self.num_features,
            "SAMPLED": self.sampled,
            "UPCAST": self.upcast,
        }


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)

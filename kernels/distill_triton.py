"""The distillation loss through the Triton kernels of `distill_tiles`: shapes, tile sizes, scratch and launches.

Same mathematics and same arguments as `distill_loss.attention_distillation_loss`, which is its fallback and its oracle.
Scratch for a few heads at a time, linear in length: per token and head 2·F operand numbers for φ and 2·F float32 for
dφ; and g for a band of queries and a block of keys, which does not grow.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import distill_maps, distill_tiles
from .distill_limits import CHUNK, WEIGHT_SHARES, WIDTHS, band_shape, heads_at_once
from .distill_loss import DEFAULT_BLOCK_SIZE, LOSS_EPS, DistillLoss
from .feature_maps import KEY_EXPONENT_BOUND, FeatureMap
from .map_training import MapTraining, check_log_sum_exp
from .visible_ranges import Visibility

# a launch takes plain numbers where the signature says constexpr
_maps: Any = distill_maps
_tiles: Any = distill_tiles

INTERPRETED = not isinstance(_tiles.sweep, triton.runtime.JITFunction)
"""Whether Triton interprets in this process (TRITON_INTERPRET=1): on CPU tensors, for tests, very slowly."""

# (form of φ, factor on z) by the map's name and side
_FORMS: dict[tuple[str, str], tuple[Any, float]] = {
    ("hedgehog_softmax", "query"): (distill_maps.TWO_SOFTMAXES, 1.0),
    ("hedgehog_softmax", "key"): (distill_maps.TWO_SOFTMAXES, 1.0),
    ("hedgehog_exp", "query"): (distill_maps.ONE_SOFTMAX, 1.0),
    ("hedgehog_exp", "key"): (distill_maps.BOUNDED_EXP, 1.0),
    ("hedgehog_joint", "query"): (distill_maps.ONE_SOFTMAX, 2.0),
    ("hedgehog_joint", "key"): (distill_maps.ONE_SOFTMAX, 2.0),
}


class Tiles(NamedTuple):
    """A pinned launch configuration, in tokens a tile.

    `chunk`: of `map_features` and `row_sums`, which share the chunks. `rows`: the tile of queries of `sweep` and
    `log_sums`, and that of keys of `keys_gradient`; `passing`: the tile that goes by, at most `rows`. `weight_rows`: of
    `weight_gradient`. `stages`: tiles in flight in `sweep`; `product_stages`: in `keys_gradient`.
    """

    chunk: int
    rows: int
    passing: int
    weight_rows: int
    warps: int = 8
    stages: int = 2
    product_stages: int = 5


def pinned_tiles(capability: int) -> Tiles:
    """The tiles for a compute capability (80, 90, …), sized for D = 128, F = 256 and 16-bit operands.

    Shared memory decides: 227 KiB a block on sm_90, sm_100 and sm_103, 163 KiB on sm_80 and sm_87, 99 KiB on the rest.
    On sm_90 a passing tile of 32 would leave the tensor cores waiting: an instruction reads 64 rows of the staying tile
    from shared memory whatever its width.
    """
    if capability in (90, 100, 103):
        return Tiles(chunk=CHUNK, rows=128, passing=64, weight_rows=64)
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
    visibility: Visibility | None = None,
    tiles: Tiles | None = None,
) -> DistillLoss:
    """Loss, KL per head and the gradient to the maps' weights; the same bits whenever it is run on one GPU.

    Arguments as `attention_distillation_loss`; `block_size` is that form's and not read here. `log_sum_exp_BHL` is
    L_i in nats over the keys that i sees, where the teacher's forward hands it out (any value at padding); it is
    computed where it does not. `visibility`, of these masks and row weights, saves working them out again for each
    layer. `tiles` overrides the pinned ones.

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
    if visibility is None:
        visibility = Visibility(mask_BL, segment_ids_BL, row_weights_BL)
    elif not visibility.is_of(mask_BL, segment_ids_BL, row_weights_BL):
        raise ValueError("visibility is of other masks or row weights")
    batch, num_heads, length, _ = q_BHLD.shape
    launches = _Launches(q_BHLD, k_BKLD, work, (map_q, map_k), visibility, eps, tiles)
    kl_H = torch.zeros(num_heads, dtype=torch.float32, device=q_BHLD.device)
    entropy_H = torch.zeros_like(kl_H)
    step = heads_at_once(num_heads, batch * length, map_q.num_features, launches.operand_dtype.itemsize)
    with torch.cuda.device(q_BHLD.device) if q_BHLD.is_cuda else nullcontext():  # Triton launches on the current device
        for first in range(0, num_heads if batch * length else 0, step):
            heads = slice(first, min(first + step, num_heads))
            kl_H[heads], entropy_H[heads] = launches.run(heads, log_sum_exp_BHL)
    return DistillLoss(work.attach((kl_H + entropy_H).mean()), work.row_mean(kl_H), work.row_mean(entropy_H))


class _Launches:
    """The kernels on one batch, some heads at a time."""

    def __init__(
        self,
        q_BHLD: Tensor,
        k_BKLD: Tensor,
        work: MapTraining,
        maps: tuple[FeatureMap, FeatureMap],
        visibility: Visibility,
        eps: float,
        tiles: Tiles | None,
    ) -> None:
        # rows of D adjoining numbers; every other stride may be anything
        self.q, self.k = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (q_BHLD, k_BKLD))
        if self.k.dtype != self.q.dtype:
            raise ValueError(f"k is {self.k.dtype}, q is {self.q.dtype}")
        self.work, self.maps, self.eps = work, maps, eps
        self.batch, self.num_heads, self.length, self.head_dim = q_BHLD.shape
        self.row_weights = work.weights_BL.contiguous()
        self.num_features = maps[0].num_features
        self.device = q_BHLD.device
        self.operand_dtype = torch.float32 if q_BHLD.dtype == torch.float32 else torch.bfloat16
        if tiles is None:
            major, minor = torch.cuda.get_device_capability(self.device) if q_BHLD.is_cuda else (8, 0)
            tiles = pinned_tiles(10 * major + minor)
        self.tiles = tiles
        self.num_tiles = _cdiv(self.length, tiles.rows)
        if self.batch * self.length:
            self.ranges, self.tables = visibility.tables(self.row_weights, tiles.chunk, tiles.rows)
        self.options = {"num_warps": tiles.warps, "num_stages": tiles.stages}

    def run(self, heads: slice, log_sum_exp_BHL: Tensor | None) -> tuple[Tensor, Tensor]:
        """Adds dW of these heads to the gradient; returns Σ_i w_i KL_i and Σ_i w_i·entropy_i, each (G,)."""
        num = heads.stop - heads.start
        grid = self.batch * num
        phi_q, _ = self._features(0, heads)
        phi_k, tail = self._features(1, heads)
        assert tail is not None
        pair = self._pair(heads) | {"phi_q": phi_q, "phi_k": phi_k}
        log2_sum, z = self._log_sums(pair, grid, heads, log_sum_exp_BHL), self._row_sums(pair, tail, grid)
        kl, entropy = torch.zeros_like(z), torch.zeros_like(z)
        learns = self.work.needs_grad
        grads = [phi_q.new_empty(phi_q.shape if learns else (1,), dtype=torch.float32) for _ in range(2)]
        band, keys = band_shape(self.batch, num, self.length, self.tiles.rows)
        g = phi_q.new_empty(grid * band * self.tiles.rows * keys if learns else 1)
        pair |= {"g": g, "tiles_per_block": keys // self.tiles.rows}
        for first_place in range(0, self.num_tiles, band):
            for key_block in range(_cdiv(self.length, keys)):
                at = {"first_place": first_place, "key_block": key_block}
                _tiles.sweep[band, grid](
                    **_taken(_tiles.sweep, pair),
                    **at,
                    row_weight=self.row_weights,
                    log2_sum=log2_sum,
                    z=z,
                    kl=kl,
                    entropy=entropy,
                    grad_phi=grads[0],
                    WITH_GRAD=learns,
                    **self.options,
                )
                if self.work.learns[1]:
                    _tiles.keys_gradient[pair["tiles_per_block"], grid](
                        **_taken(_tiles.keys_gradient, pair),
                        **at,
                        grad_phi=grads[1],
                        band=band,
                        STEP=self.tiles.passing,
                        num_warps=self.tiles.warps,
                        num_stages=self.tiles.product_stages,
                    )
        for side, phi, counted in ((0, phi_q, self.tables.weighted_BL), (1, phi_k, self.ranges.end_BL)):
            if self.work.learns[side]:
                self._weight_gradient(side, phi, grads[side], counted, heads)
        return kl.sum(dim=(0, 2)), entropy.sum(dim=(0, 2))

    def _features(self, side: int, heads: slice) -> tuple[Tensor, Tensor | None]:
        """φ (B, G, L, F) of one side; for keys also the chunks' tails (B, G, chunks, F)."""
        num = heads.stop - heads.start
        chunks = _cdiv(self.length, self.tiles.chunk)
        phi = self.q.new_empty(self.batch, num, self.length, self.num_features, dtype=self.operand_dtype)
        tail = phi.new_empty((self.batch, num, chunks, self.num_features) if side else (1,), dtype=torch.float32)
        _maps.map_features[(chunks, self.batch * num)](
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

    def _row_sums(self, pair: dict[str, Any], tail: Tensor, grid: int) -> Tensor:
        """Z_i, (B, G, L)."""
        z = tail.new_empty(*tail.shape[:2], self.length)
        chunks, block = tail.shape[2], min(self.num_features, 64)
        _tiles.carry_tails[self.num_features // block, grid](
            tail=tail,
            spanned=self.tables.spanned_BC,
            num_heads=tail.shape[1],
            num_chunks=chunks,
            F=self.num_features,
            BLOCK=block,
            num_warps=1,
        )
        _tiles.row_sums[chunks, grid](
            **_taken(_tiles.row_sums, pair), tail=tail, z=z, BLOCK=self.tiles.chunk, **self.options
        )
        return z

    def _log_sums(self, pair: dict[str, Any], grid: int, heads: slice, log_sum_exp_BHL: Tensor | None) -> Tensor:
        """L_i in bits, (B, G, L)."""
        if log_sum_exp_BHL is not None:
            return (log_sum_exp_BHL[:, heads].float() * 1.4426950408889634).contiguous()
        log2_sum = self.q.new_empty(self.batch, heads.stop - heads.start, self.length, dtype=torch.float32)
        taken = _taken(_tiles.log_sums, pair) | {"BLOCK_K": self.tiles.rows}
        _tiles.log_sums[self.num_tiles, grid](**taken, log2_sum=log2_sum, **self.options)
        return log2_sum

    def _weight_gradient(self, side: int, phi: Tensor, grad_phi: Tensor, counted: Tensor, heads: slice) -> None:
        num = heads.stop - heads.start
        num_tiles = self.batch * _cdiv(self.length, self.tiles.weight_rows)
        per_share = _cdiv(num_tiles, WEIGHT_SHARES)
        shares = _cdiv(num_tiles, per_share)
        width = self.num_features // 2
        partial = grad_phi.new_empty(shares, num, self.head_dim, width)
        _maps.weight_gradient[(shares, num)](
            **_taken(_maps.weight_gradient, self._side(side, heads)),
            phi=phi,
            grad_phi=grad_phi,
            counted=counted,
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
            "INTERPRETED": INTERPRETED,
        }

    def _pair(self, heads: slice) -> dict[str, Any]:
        """What the kernels want that look at pairs of a query and a key."""
        return {
            "q": self.q,
            "k": self.k,
            "start": self.ranges.start_BL,
            "end": self.ranges.end_BL,
            "count": self.ranges.count_BL,
            "listed": self.tables.listed_BT,
            "rank": self.tables.rank_BT,
            "q_stride_batch": self.q.stride(0),
            "q_stride_head": self.q.stride(1),
            "q_stride_row": self.q.stride(2),
            "k_stride_batch": self.k.stride(0),
            "k_stride_head": self.k.stride(1),
            "k_stride_row": self.k.stride(2),
            "first_head": heads.start,
            "heads_per_k_head": self.num_heads // self.k.shape[1],
            "num_heads": heads.stop - heads.start,
            "num_tiles": self.num_tiles,
            "length": self.length,
            "scale": self.work.scale,
            "eps": self.eps,
            "D": self.head_dim,
            "F": self.num_features,
            "BLOCK_Q": self.tiles.rows,
            "BLOCK_K": self.tiles.passing,
            "INTERPRETED": INTERPRETED,
        }


def _taken(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those that the kernel takes."""
    return {name: value for name, value in arguments.items() if name in kernel.arg_names}


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)

"""Attention distillation: soft cross-entropy between softmax attention and its linear student, without T×T.

With t_ij = scale·q_i·k_j, L_i = log Σ_j exp t_ij, a_ij = exp(t_ij − L_i), and s_ij = φ(q_i)·φ(k_j) + eps,
Z_i = Σ_{j≤i} s_ij:

    ℓ_i  = −Σ_{j≤i} a_ij log(s_ij/Z_i)          KL_i = ℓ_i − (L_i − Σ_j a_ij t_ij)
    g_ij = w_i (1/Z_i − a_ij/s_ij)              dφ(q_i) = Σ_{j≤i} g_ij φ(k_j)      dφ(k_j) = Σ_{i≥j} g_ij φ(q_i)

One pass over blocks of query rows: a block sees all its keys at once, so L, Z, the loss and g come from the same tile,
which then adds to dφ and is gone. dφ of the heads at hand goes straight into dW. Memory: O(L) for a fixed block size.
With `causal=False` (an encoder) every sum runs over all keys of the row's segment.

Shape letters: B batch, L length, H query heads, K key heads, D head dim, F features; N = heads × spans at hand, T the
longest span's length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .conventions import run_index_BL
from .feature_maps import FeatureMap
from .map_training import MapTraining, check_log_sum_exp, row_weights
from .output_loss import OutputLoss, output_mse_loss
from .visible_ranges import Visibility

__all__ = [
    "DEFAULT_BLOCK_SIZE",
    "LOSS_EPS",
    "DistillLoss",
    "OutputLoss",
    "attention_distillation_loss",
    "materialised_distillation_loss",
    "output_mse_loss",
]

# s + eps keeps log s finite, and a/s a gradient, where features hardly meet; a clamp would kill the gradient there.
LOSS_EPS = 1e-6
# Half a block per row is work above the diagonal; smaller blocks make slower products. Measured on a CPU, 128 to 2048
# tokens: 64 is the fastest or next to it.
DEFAULT_BLOCK_SIZE = 64
_FAR = 1e30  # what a hidden logit is lowered by: finite, for a·t


@dataclass(frozen=True)
class DistillLoss:
    """`loss` = mean over heads of Σ_i w_i ℓ_i, tied to the maps' weights.

    `kl_H` (what ℓ exceeds the teacher's own entropy by) and `entropy_H` are means over rows with weights w: nats,
    float32, detached.
    """

    loss: Tensor
    kl_H: Tensor
    entropy_H: Tensor


def attention_distillation_loss(
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
    causal: bool = True,
) -> DistillLoss:
    """Loss, KL per head, and the gradient to the maps' weights, in one pass; q and k get no gradient.

    `scale` is 1/√D by default. `mask_BL` (bool, True = real) and `segment_ids_BL` as in `conventions`; padding is
    neither query nor key. Row weights w_i are by default 1/number of real tokens; those of padding count as zero.
    Blocks of rows that weigh nothing are passed over (`map_training.sampled_row_weights`). `causal=False`: every query
    sees all real keys of its segment.
    `grad=False` leaves the gradient out (evaluation). `log_sum_exp_BHL`, L_i in nats, is for the GPU kernel and not
    used here: a block sees all its keys at once, where softmax costs as little, and Σ_j a_ij is exactly 1. Nor is
    `visibility`. Computes in float32 (float64 for float64 q): g is formed before any rounding. Raises ValueError where
    shapes do not fit.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
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
    loss_H = torch.zeros(work.num_heads, dtype=work.dtype, device=work.device)
    entropy_H = torch.zeros_like(loss_H)
    for spans, heads in work.batches(cells_per_token=block_size):
        q, k = work.take(q_BHLD, spans, heads), work.take(k_BKLD, spans, heads)
        phi_q, phi_k, leaves = work.features(q, k, spans, heads)
        weights = work.take_weights(spans, heads)
        visible = _CausalTiles(q) if causal else _WholeRows(q, work.take_real(spans, heads))
        grad_phi_q, grad_phi_k, loss_N, entropy_N = _pass_over_tiles(
            q * work.scale, k, phi_q.detach(), phi_k.detach(), weights, eps, block_size, work.needs_grad, visible
        )
        loss_H[heads] += work.per_head(loss_N, heads)
        entropy_H[heads] += work.per_head(entropy_N, heads)
        work.add_gradient([phi_q, phi_k], [grad_phi_q, grad_phi_k], leaves, heads)
    return DistillLoss(work.attach(loss_H.mean()), work.row_mean(loss_H - entropy_H), work.row_mean(entropy_H))


class _CausalTiles:
    """Tiles on and below the diagonal; what is hidden lies in their last, square part."""

    def __init__(self, q_NTD: Tensor) -> None:
        self._lower = self._above = q_NTD.new_empty(0, 0)

    def begin(self, block_size: int) -> None:
        self._lower = self._lower.new_ones(block_size, block_size).tril()
        self._above = (1 - self._lower) * -_FAR

    def num_keys(self, stop: int) -> int:
        return stop

    def hide(self, t: Tensor, rows: slice) -> None:
        size = t.shape[1]
        t[:, :, rows].add_(self._above[:size, :size])

    def sum(self, s: Tensor, rows: slice) -> Tensor:
        size = s.shape[1]
        return (s[:, :, rows] * self._lower[:size, :size]).sum(dim=-1).add_(s[:, :, : rows.start].sum(dim=-1))

    def zero(self, g: Tensor, rows: slice) -> None:
        size = g.shape[1]
        g[:, :, rows].mul_(self._lower[:size, :size])


class _WholeRows:
    """Every query sees every key of its span; what is hidden is what fills shorter spans up."""

    def __init__(self, q_NTD: Tensor, real_NT: Tensor | None) -> None:
        self._length = q_NTD.shape[1]
        self._real_N1T = None if real_NT is None else real_NT[:, None].to(q_NTD.dtype)

    def begin(self, block_size: int) -> None:
        pass

    def num_keys(self, stop: int) -> int:
        return self._length

    def hide(self, t: Tensor, rows: slice) -> None:
        if self._real_N1T is not None:
            t.add_((1 - self._real_N1T) * -_FAR)

    def sum(self, s: Tensor, rows: slice) -> Tensor:
        return s.sum(dim=-1) if self._real_N1T is None else torch.linalg.vecdot(s, self._real_N1T)

    def zero(self, g: Tensor, rows: slice) -> None:
        if self._real_N1T is not None:
            g.mul_(self._real_N1T)


def _pass_over_tiles(
    q_NTD: Tensor,
    k_NTD: Tensor,
    phi_q_NTF: Tensor,
    phi_k_NTF: Tensor,
    weights_NT: Tensor,
    eps: float,
    block_size: int,
    needs_grad: bool,
    visible: _CausalTiles | _WholeRows,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dφ(q), dφ(k) (both meaningless without `needs_grad`), Σ_i w_i ℓ_i (N,) and Σ_i w_i·entropy_i (N,)."""
    num, length, _ = q_NTD.shape
    block_size = min(block_size, length)
    visible.begin(block_size)
    tiles = [q_NTD.new_empty(num * block_size * length) for _ in range(3)]
    grad_q, grad_k = torch.empty_like(phi_q_NTF), torch.zeros_like(phi_k_NTF)
    cross_entropy, entropy = q_NTD.new_zeros(num), q_NTD.new_zeros(num)
    starts = range(0, length, block_size)
    wanted = torch.stack([weights_NT[:, start : start + block_size].any() for start in starts]).tolist()
    for start, is_wanted in zip(starts, wanted, strict=True):
        stop = min(start + block_size, length)
        if not is_wanted:  # no row of it has a weight
            grad_q[:, start:stop] = 0
            continue
        rows, size, keys = slice(start, stop), stop - start, slice(0, visible.num_keys(stop))
        t, a, s = (tile[: num * size * keys.stop].view(num, size, keys.stop) for tile in tiles)
        w = weights_NT[:, rows]

        torch.bmm(q_NTD[:, rows], k_NTD[:, keys].transpose(1, 2), out=t)
        visible.hide(t, rows)
        torch.softmax(t, dim=-1, out=a)
        log_sum = t.amax(dim=-1) - a.amax(dim=-1).log()
        entropy += (w * (log_sum - torch.linalg.vecdot(a, t))).sum(dim=1)

        torch.bmm(phi_q_NTF[:, rows], phi_k_NTF[:, keys].transpose(1, 2), out=s)
        s.add_(eps)
        z = visible.sum(s, rows)
        log_s = torch.log(s, out=t)  # where a key is hidden, a = 0 and log s is finite
        cross_entropy += (w * (z.log() - torch.linalg.vecdot(a, log_s))).sum(dim=1)

        if needs_grad:
            g = torch.div(a, s, out=a)
            torch.sub(z.reciprocal().unsqueeze(-1), g, out=g)
            visible.zero(g, rows)
            grad_q[:, rows] = torch.bmm(g, phi_k_NTF[:, keys]).mul_(w.unsqueeze(-1))
            grad_k[:, keys] += torch.bmm(g.transpose(1, 2), phi_q_NTF[:, rows] * w.unsqueeze(-1))
    return grad_q, grad_k, cross_entropy, entropy


def materialised_distillation_loss(
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
    causal: bool = True,
) -> DistillLoss:
    """The same loss written down directly, T×T in memory, differentiated by autograd: the reference for tests."""
    batch, heads, length, head_dim = q_BHLD.shape
    dtype = torch.promote_types(q_BHLD.dtype, torch.float32)
    q = q_BHLD.detach().to(dtype)
    k = k_BKLD.detach().to(dtype).repeat_interleave(heads // k_BKLD.shape[1], dim=1)
    real_BL = torch.ones(batch, length, dtype=torch.bool, device=q.device) if mask_BL is None else mask_BL
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device)
    visible = (visible.tril() if causal else visible) & real_BL[:, None, None, :]
    if segment_ids_BL is not None:
        run_BL = run_index_BL(segment_ids_BL, mask_BL)
        visible = visible & (run_BL[:, None, :, None] == run_BL[:, None, None, :])
    blind = ~visible.any(dim=-1, keepdim=True)

    t = torch.matmul(q, k.transpose(-1, -2)) * (head_dim**-0.5 if scale is None else scale)
    a = torch.softmax(t.masked_fill(~(visible | blind), -torch.inf), dim=-1).masked_fill(~visible, 0)
    s = torch.matmul(map_q(q, positions_BL), map_k(k, positions_BL).transpose(-1, -2)) + eps
    z = s.masked_fill(~visible, 0).sum(dim=-1, keepdim=True)
    log_b = s.masked_fill(~visible, 1).log() - z.masked_fill(blind, 1).log()

    w_B1L = row_weights(q_BHLD, mask_BL, row_weights_BL, dtype).unsqueeze(1)
    cross_entropy_BHL = -(a * log_b).sum(dim=-1)
    entropy_BHL = -torch.xlogy(a, a).sum(dim=-1)
    total_weight = w_B1L.sum()
    total_weight = torch.where(total_weight == 0, torch.ones_like(total_weight), total_weight)
    entropy_H = (w_B1L * entropy_BHL).sum(dim=(0, 2))
    loss_H = (w_B1L * cross_entropy_BHL).sum(dim=(0, 2))
    kl_H = (loss_H.detach() - entropy_H) / total_weight
    return DistillLoss(loss_H.mean(), kl_H.float(), (entropy_H / total_weight).float())

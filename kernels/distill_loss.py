"""Attention distillation: soft cross-entropy between softmax attention and its linear student, without T×T.

With t_ij = scale·q_i·k_j, a_ij = exp(t_ij − L_i), L_i = log Σ_j exp t_ij, s_ij = φ(q_i)·φ(k_j) + eps, Z_i = Σ_{j≤i} s_ij:

    ℓ_i  = −Σ_{j≤i} a_ij log(s_ij/Z_i)          KL_i = ℓ_i − (L_i − Σ_j a_ij t_ij)
    g_ij = w_i (1/Z_i − a_ij/s_ij)              dφ(q_i) = Σ_{j≤i} g_ij φ(k_j)      dφ(k_j) = Σ_{i≥j} g_ij φ(q_i)

One pass over blocks of query rows: a block sees all its keys at once, so L, Z, the loss and g come from the same tile,
which then adds to dφ and is gone. dφ of the heads at hand goes straight into dW. Memory: O(L) for a fixed block size.

Shape letters: B batch, L length, H query heads, K key heads, D head dim, P projected dim; N = heads × spans at hand, T
the span's length, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .feature_maps import FeatureMap
from .linear_attention import DENOMINATOR_EPS, chunked_linear_attention, run_index_BL
from .precomputed_gradient import attach_gradient
from .spans import Span, causal_spans, gather_spans, span_batches

# s + eps keeps log s finite and its gradient a/s alive where features do not meet at all. One visible key's share.
LOSS_EPS = 1e-6
DEFAULT_BLOCK_SIZE = 64
# Numbers in one tile, of which three exist at a time: on a CPU they should stay in the last-level cache.
MAX_TILE_CELLS = {"cpu": 2**19, "cuda": 2**25}


@dataclass(frozen=True)
class DistillLoss:
    """`loss` = mean over heads of Σ_i w_i ℓ_i, tied to the maps' weights. `kl_H` (its excess over the teacher's own
    entropy) and `entropy_H` are means over rows with weights w, in nats, float32, detached."""

    loss: Tensor
    kl_H: Tensor
    entropy_H: Tensor


@dataclass(frozen=True)
class OutputLoss:
    """`loss` = mean over heads of Σ_i w_i |o_i − y_i|²/V, tied to the maps' weights; `mse_H` the mean over rows."""

    loss: Tensor
    mse_H: Tensor


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
) -> DistillLoss:
    """Loss, KL per head, and the gradient to the maps' weights, in one pass; q and k get no gradient.

    `scale` is 1/√D by default. `mask_BL` (bool, True = real) and `segment_ids_BL` as in `linear_attention`: padding is
    neither query nor key. Row weights w_i are by default 1/number of real tokens; padding's are ignored. `grad=False`
    leaves the gradient out (evaluation). Computes in float32 (float64 for float64 q), g before any rounding.
    """
    problem = _Problem(q_BHLD, k_BKLD, map_q, map_k, mask_BL, segment_ids_BL, positions_BL, row_weights_BL, grad)
    scale = q_BHLD.shape[-1] ** -0.5 if scale is None else scale
    loss_H, entropy_H = problem.zeros_H(), problem.zeros_H()
    for spans, heads in problem.batches(cells_per_token=block_size):
        q, k = problem.gather(q_BHLD, spans, heads), problem.gather(k_BKLD, spans, heads)
        weights = problem.gather_weights(spans)
        (phi_q, phi_k), projections = problem.features(q, k, spans, heads)
        grad_q, grad_k, cross_entropy_N, entropy_N = _pass_over_tiles(
            q.flatten(0, 1) * scale, k.flatten(0, 1), phi_q.detach(), phi_k.detach(),
            weights.repeat(q.shape[0], 1), eps, block_size, problem.needs_grad,
        )  # fmt: skip
        loss_H[heads] += cross_entropy_N.view(q.shape[:2]).sum(dim=1)
        entropy_H[heads] += entropy_N.view(q.shape[:2]).sum(dim=1)
        problem.add_gradients([phi_q, phi_k], [grad_q, grad_k], projections, heads)
    total_weight = problem.total_weight()
    kl_H, entropy_H = ((x / total_weight).float() for x in (loss_H - entropy_H, entropy_H))
    return DistillLoss(problem.attach(loss_H.mean()), kl_H, entropy_H)


def _pass_over_tiles(
    q_NTD: Tensor,
    k_NTD: Tensor,
    phi_q_NTF: Tensor,
    phi_k_NTF: Tensor,
    weights_NT: Tensor,
    eps: float,
    block_size: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over row blocks. Returns dφ(q), dφ(k) (zeros without `needs_grad`), Σ w ℓ and Σ w·entropy, both (N,)."""
    num, length, _ = q_NTD.shape
    block_size = min(block_size, length)
    lower = q_NTD.new_ones(block_size, block_size).tril()
    above = (1 - lower) * -1e30  # finite, for a·t below
    tiles = [q_NTD.new_empty(num * block_size * length) for _ in range(3)]
    grad_q, grad_k = torch.empty_like(phi_q_NTF), torch.zeros_like(phi_k_NTF)
    cross_entropy, entropy = q_NTD.new_zeros(num), q_NTD.new_zeros(num)
    for start in range(0, length, block_size):
        stop = min(start + block_size, length)
        rows, size = slice(start, stop), stop - start
        t, a, s = (tile[: num * size * stop].view(num, size, stop) for tile in tiles)
        w = weights_NT[:, rows]

        torch.bmm(q_NTD[:, rows], k_NTD[:, :stop].transpose(1, 2), out=t)
        t[:, :, rows].add_(above[:size, :size])
        torch.softmax(t, dim=-1, out=a)
        log_sum = t.amax(dim=-1) - a.amax(dim=-1).log()
        entropy += (w * (log_sum - torch.linalg.vecdot(a, t))).sum(dim=1)

        torch.bmm(phi_q_NTF[:, rows], phi_k_NTF[:, :stop].transpose(1, 2), out=s)
        s.add_(eps)
        z = (s[:, :, rows] * lower[:size, :size]).sum(dim=-1).add_(s[:, :, :start].sum(dim=-1))
        log_s = torch.log(s, out=t)  # above the diagonal a = 0 and log s is finite
        cross_entropy += (w * (z.log() - torch.linalg.vecdot(a, log_s))).sum(dim=1)

        if needs_grad:
            g = torch.div(a, s, out=a)
            torch.sub(z.reciprocal().unsqueeze(-1), g, out=g)
            g[:, :, rows].mul_(lower[:size, :size])
            grad_q[:, rows] = torch.bmm(g, phi_k_NTF[:, :stop]).mul_(w.unsqueeze(-1))
            grad_k[:, :stop] += torch.bmm(g.transpose(1, 2), phi_q_NTF[:, rows] * w.unsqueeze(-1))
    return grad_q, grad_k, cross_entropy, entropy


def output_mse_loss(
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    v_BKLV: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    *,
    teacher_output_BHLV: Tensor | None = None,
    scale: float | None = None,
    mask_BL: Tensor | None = None,
    segment_ids_BL: Tensor | None = None,
    positions_BL: Tensor | None = None,
    row_weights_BL: Tensor | None = None,
    eps: float = DENOMINATOR_EPS,
    grad: bool = True,
) -> OutputLoss:
    """Mean squared error between linear attention's output and softmax attention's, with dW computed at once.

    The teacher's output is computed where none is given. Arguments otherwise as in `attention_distillation_loss`;
    `eps` is that of linear attention. Memory is linear in L.
    """
    problem = _Problem(q_BHLD, k_BKLD, map_q, map_k, mask_BL, segment_ids_BL, positions_BL, row_weights_BL, grad)
    scale = q_BHLD.shape[-1] ** -0.5 if scale is None else scale
    loss_H = problem.zeros_H()
    for spans, heads in problem.batches(cells_per_token=map_q.num_features):
        q, k, v = (problem.gather(x, spans, heads) for x in (q_BHLD, k_BKLD, v_BKLV))
        if teacher_output_BHLV is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            y = problem.gather(teacher_output_BHLV, spans, heads)
        (phi_q, phi_k), projections = problem.features(q, k, spans, heads)
        with torch.set_grad_enabled(problem.needs_grad):
            o, _ = chunked_linear_attention(phi_q[None], phi_k[None], v.flatten(0, 1)[None], eps=eps)
            error = (o[0].view_as(y) - y).square().mean(dim=-1) * problem.gather_weights(spans)
            partial_H = error.sum(dim=(1, 2))
        loss_H[heads] += partial_H.detach()
        problem.add_gradients([partial_H], [torch.ones_like(partial_H)], projections, heads)
    return OutputLoss(problem.attach(loss_H.mean()), (loss_H / problem.total_weight()).float())


class _Problem:
    """What both losses share: checked inputs, cutting into spans and heads, and adding up dW for the trainable maps."""

    def __init__(
        self,
        q_BHLD: Tensor,
        k_BKLD: Tensor,
        map_q: FeatureMap,
        map_k: FeatureMap,
        mask_BL: Tensor | None,
        segment_ids_BL: Tensor | None,
        positions_BL: Tensor | None,
        row_weights_BL: Tensor | None,
        grad: bool,
    ) -> None:
        batch, self.num_heads, length, _ = q_BHLD.shape
        if self.num_heads % k_BKLD.shape[1] or k_BKLD.shape[0] != batch or k_BKLD.shape[2:] != q_BHLD.shape[2:]:
            raise ValueError(
                f"k {tuple(k_BKLD.shape)} does not fit q {tuple(q_BHLD.shape)}: (B, K, L, D) with H % K == 0"
            )
        self.dtype = torch.promote_types(q_BHLD.dtype, torch.float32)
        self.device = q_BHLD.device
        self.spans = causal_spans(batch, length, mask_BL, segment_ids_BL)
        self.weights_BL = row_weights(q_BHLD, mask_BL, row_weights_BL, self.dtype)
        self.positions_BL = positions_BL
        self.maps = (map_q, map_k)
        trainable = [m.projection_HDP for m in self.maps if m.trainable and grad and torch.is_grad_enabled()]
        self.parameters = [p for p in trainable if p is not None and p.requires_grad]
        self.grads = [torch.zeros_like(p, dtype=self.dtype) for p in self.parameters]
        self.needs_grad = bool(self.parameters)

    def zeros_H(self) -> Tensor:
        return torch.zeros(self.num_heads, dtype=self.dtype, device=self.device)

    def total_weight(self) -> Tensor:
        """Σ w, or 1 where there is no real token at all."""
        total = self.weights_BL.sum()
        return torch.where(total == 0, torch.ones_like(total), total)

    def batches(self, cells_per_token: int):
        return span_batches(self.spans, self.num_heads, MAX_TILE_CELLS.get(self.device.type, 2**25), cells_per_token)

    def gather(self, x_BHLX: Tensor, spans: list[Span], heads: slice) -> Tensor:
        return gather_spans(x_BHLX.detach(), spans, heads, self.num_heads, self.dtype)

    def gather_weights(self, spans: list[Span]) -> Tensor:
        """(spans, longest), zero after each span's end."""
        return gather_spans(self.weights_BL[:, None, :, None], spans, slice(0, 1), 1, self.dtype)[0, :, :, 0]

    def features(
        self, q: Tensor, k: Tensor, spans: list[Span], heads: slice
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """φ of both sides, (N, T, F), and the leaves their gradient goes to (None for a map that does not learn)."""
        positions = None
        if self.positions_BL is not None:
            positions = gather_spans(self.positions_BL[:, None, :, None], spans, slice(0, 1), 1, torch.long)
        else:
            positions = torch.zeros(1, len(spans), q.shape[2], 1, dtype=torch.long, device=self.device)
            for n, span in enumerate(spans):
                at = span.positions
                positions[0, n, : span.length, 0] = (
                    torch.arange(at.start, at.stop, device=self.device) if isinstance(at, slice) else at.to(self.device)
                )
        phis, leaves = [], []
        for feature_map, x in zip(self.maps, (q, k), strict=True):
            projection, leaf = feature_map.projection_HDP, None
            if projection is not None:
                learns = any(projection is p for p in self.parameters)
                projection = projection.detach()[heads].to(self.dtype)
                if learns:
                    leaf = projection = projection.requires_grad_()
            with torch.set_grad_enabled(leaf is not None):
                phi = feature_map.features(x.flatten(1, 2)[None], projection, positions.view(1, -1))[0]
                phis.append(phi.view(q.shape[0] * q.shape[1], q.shape[2], -1))
            leaves.append(leaf)
        return phis, leaves

    def add_gradients(
        self, outputs: list[Tensor], grad_outputs: list[Tensor], leaves: list[Tensor | None], heads: slice
    ) -> None:
        inputs = [leaf for leaf in leaves if leaf is not None]
        if not inputs:
            return
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if o.requires_grad]
        grads = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs])
        for total, part in zip(self.grads, grads, strict=True):
            total[heads] += part / self.num_heads

    def attach(self, loss: Tensor) -> Tensor:
        return attach_gradient(loss, self.parameters, self.grads)


def row_weights(q_BHLD: Tensor, mask_BL: Tensor | None, row_weights_BL: Tensor | None, dtype: torch.dtype) -> Tensor:
    """w_i: as given, or 1/number of real tokens; zero on padding."""
    batch, _, length, _ = q_BHLD.shape
    real = torch.ones(batch, length, dtype=torch.bool, device=q_BHLD.device) if mask_BL is None else mask_BL
    if row_weights_BL is None:
        return real.to(dtype) / real.sum().clamp_min(1)
    return row_weights_BL.to(dtype).masked_fill(~real, 0)


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
) -> DistillLoss:
    """The same loss written down directly, T×T in memory, differentiated by autograd: the reference for tests."""
    batch, heads, length, head_dim = q_BHLD.shape
    dtype = torch.promote_types(q_BHLD.dtype, torch.float32)
    q = q_BHLD.detach().to(dtype)
    k = k_BKLD.detach().to(dtype).repeat_interleave(heads // k_BKLD.shape[1], dim=1)
    real_BL = torch.ones(batch, length, dtype=torch.bool, device=q.device) if mask_BL is None else mask_BL
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril() & real_BL[:, None, None, :]
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

"""Output distillation (LoLCATs): squared error between linear attention's output and softmax attention's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked_attention import chunked_linear_attention
from .conventions import DENOMINATOR_EPS
from .feature_maps import FeatureMap
from .linear_attention import noncausal_linear_attention
from .map_training import MapTraining


@dataclass(frozen=True)
class OutputLoss:
    """`loss` = mean over heads of Σ_i w_i |o_i − y_i|²/V, tied to the maps' weights.

    `mse_H` (float32, detached) is the mean over rows with weights w.
    """

    loss: Tensor
    mse_H: Tensor


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
    causal: bool = True,
) -> OutputLoss:
    """The loss and, in the same pass, its gradient to the maps' weights; nothing else is kept. Memory is linear in L.

    The teacher's output (H heads) is computed where none is given. q, k and v get no gradient. Arguments otherwise as
    in `attention_distillation_loss`; `eps` is that of linear attention. Computes in float32 (float64 for float64 q).
    """
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
    loss_H = torch.zeros(work.num_heads, dtype=work.dtype, device=work.device)
    for spans, heads in work.batches(cells_per_token=map_q.num_features):
        q, k, v = (work.take(x, spans, heads) for x in (q_BHLD, k_BKLD, v_BKLV))
        real_NT = None if causal else work.take_real(spans, heads)
        if teacher_output_BHLV is None:
            # with four dimensions: torch's fused kernel takes no fewer
            mask = None if real_NT is None else real_NT[:, None, None]  # of keys
            attended = F.scaled_dot_product_attention(
                q[:, None], k[:, None], v[:, None], mask, is_causal=causal, scale=work.scale
            )
            y = attended[:, 0]
        else:
            y = work.take(teacher_output_BHLV, spans, heads)
        phi_q, phi_k, leaves = work.features(q, k, spans, heads)
        with torch.set_grad_enabled(work.needs_grad):
            if causal:
                o = chunked_linear_attention(phi_q[None], phi_k[None], v[None], eps=eps)[0][0]
            else:
                of_spans = [x[:, None] for x in (phi_q, phi_k, v)]
                o = noncausal_linear_attention(*of_spans, mask_BL=real_NT, eps=eps)[:, 0]
            error_N = ((o - y).square().mean(dim=-1) * work.take_weights(spans, heads)).sum(dim=1)
        loss_H[heads] += work.per_head(error_N.detach(), heads)
        work.add_gradient([error_N], [torch.ones_like(error_N)], leaves, heads)
    return OutputLoss(work.attach(loss_H.mean()), work.row_mean(loss_H))

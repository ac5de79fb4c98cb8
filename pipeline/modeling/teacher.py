"""The frozen base as a teacher: its queries, keys and values, layer by layer, and nothing kept of a layer once left.

B batch, L length, H query heads, K key/value heads, D head dim, V value dim (= D).

The attention runs through torch's fused kernels with is_causal (kernels/softmax_attention.py), row by row where rows
differ (left padding, packed segments), so that no L × L matrix or mask is ever formed. Every weight is used by calling
the module that owns it, so ZeRO-3 gathers layer by layer and quantized layers work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ...kernels.linear_attention import run_index_BL
from ...kernels.softmax_attention import bidirectional_softmax_attention, causal_softmax_attention
from .architecture import Architecture, architecture_of
from .positions import row_positions


@dataclass(frozen=True)
class TeacherLayer:
    """What a layer's softmax attention compared (q and k after RoPE). Query head h uses k/v head h // (H // K)."""

    layer_index: int
    q_BHLD: torch.Tensor
    k_BKLD: torch.Tensor
    v_BKLV: torch.Tensor
    scale: float
    o_BHLV: torch.Tensor  # softmax attention's output, before its projection
    log_sum_exp_BHL: torch.Tensor | None = None  # log Σ_j exp(scale q_i·k_j), where attention hands it out
    is_causal: bool = True


class TeacherForward:
    """Runs a frozen model up to the last layer asked for, and yields the attention inputs of those asked for.

        for layer in TeacherForward(base)(input_ids_BL, layers=[8, 9]):
            loss = attention_distillation_loss(layer.q_BHLD, layer.k_BKLD, …)

    No layer above the last one asked for is run, nor that layer's MLP, nor the logits. No gradient is recorded
    inside; the caller's own grad mode holds between layers. A layer's MLP runs after the layer was handed out: let go
    of it (`del layer`) at the loop's end, and q, k, v and o are not beside the MLP's activations, nor the next layer's.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.architecture: Architecture = architecture_of(base)
        self.decoder = self.architecture.decoder(base)
        self.layers = self.architecture.layers(base)

    def __call__(
        self,
        input_ids_BL: torch.Tensor,
        *,
        layers: Iterable[int] | None = None,
        mask_BL: torch.Tensor | None = None,
        position_ids_BL: torch.Tensor | None = None,
        segment_ids_BL: torch.Tensor | None = None,
        token_type_ids_BL: torch.Tensor | None = None,
        entering_BLE: torch.Tensor | None = None,
        keep_entering: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Iterator[TeacherLayer]:
        """Yield a TeacherLayer for each of `layers` (default: all), in ascending order.

        mask_BL        1 or True for real tokens; padding may stand anywhere. Rows of padding come out as zeros
        position_ids   default: 0, 1, 2, … over each row's real tokens, again from 0 at each segment's border
        segment_ids    packed rows: runs of equal ids attend only to themselves; not for an encoder
        token_type_ids of an encoder: which tokens are of a pair's second text
        entering_BLE   hidden states that enter the first of `layers`, if known: no layer below it is run
        keep_entering  is given those states where they are computed here, and returns those to go on with

        Raises ValueError for a layer that does not exist, and for an encoder's rows that are packed.
        """
        wanted = set(range(len(self.layers))) if layers is None else set(layers)
        outside = sorted(wanted - set(range(len(self.layers))))
        if outside:
            raise ValueError(f"layers {outside} do not exist: the model has layers 0 to {len(self.layers) - 1}")
        if not wanted:
            return
        mask_BL = None if mask_BL is None else mask_BL.bool()
        is_causal = self.architecture.is_causal
        if segment_ids_BL is not None and not is_causal:
            raise ValueError("segment_ids: an encoder's rows are padded, not packed")
        spans = attention_spans(mask_BL, segment_ids_BL) if is_causal else None
        if position_ids_BL is None:
            position_ids_BL = row_positions(input_ids_BL.shape, mask_BL, segment_ids_BL, input_ids_BL.device)
        first, last = min(wanted), max(wanted)
        given = entering_BLE is not None
        architecture, decoder = self.architecture, self.decoder
        # no_grad as this generator's decorator would keep the last layer yielded while the next one is computed
        with torch.no_grad():
            hidden_BLE = entering_BLE
            if hidden_BLE is None:
                hidden_BLE = architecture.embed(decoder, input_ids_BL, position_ids_BL, token_type_ids_BL)
            positions = architecture.positions(decoder, hidden_BLE, position_ids_BL)
        del entering_BLE
        for layer_index in range(first if given else 0, last + 1):
            if layer_index == first and not given and keep_entering is not None:
                hidden_BLE = keep_entering(hidden_BLE)
            layer = self.layers[layer_index]
            with torch.no_grad():
                seen = _attend(architecture, layer, layer_index, hidden_BLE, positions, spans, mask_BL)
            o_BHLV = seen.o_BHLV
            if layer_index in wanted:
                yield seen
            del seen
            if layer_index == last:
                return
            with torch.no_grad():
                hidden_BLE = architecture.after_attention(layer, hidden_BLE, _side_by_side(o_BHLV))
                del o_BHLV
                hidden_BLE = architecture.after_mlp(layer, hidden_BLE)


def attention_spans(
    mask_BL: torch.Tensor | None, segment_ids_BL: torch.Tensor | None
) -> list[tuple[int, int, int]] | None:
    """[(row, start, end)]: the stretches of real tokens that attend causally within themselves; None if that is
    every whole row.

    Right padding alone needs no spans: causality keeps it from being seen. Padding inside a stretch splits nothing that
    belongs together, so it is not allowed there: ValueError.
    """
    right_padded = mask_BL is None or bool((mask_BL.long().diff(dim=1) <= 0).all())
    if segment_ids_BL is None and right_padded:
        return None
    given = mask_BL if mask_BL is not None else segment_ids_BL
    assert given is not None
    real_BL = torch.ones(given.shape, dtype=torch.bool) if mask_BL is None else mask_BL.bool().cpu()
    run_BL = torch.zeros(given.shape, dtype=torch.long)
    if segment_ids_BL is not None:
        run_BL = run_index_BL(segment_ids_BL.cpu(), real_BL)
    spans = []
    for row in range(given.shape[0]):
        for run in run_BL[row][real_BL[row]].unique().tolist():
            places = (real_BL[row] & (run_BL[row] == run)).nonzero().flatten()
            start, end = int(places[0]), int(places[-1]) + 1
            if end - start != len(places):
                raise ValueError(f"row {row}: padding between the tokens of a sequence; pad left or right of it")
            spans.append((row, start, end))
    return spans


def _attend(
    architecture: Architecture,
    layer: nn.Module,
    layer_index: int,
    hidden_BLE: torch.Tensor,
    positions: object,
    spans: list[tuple[int, int, int]] | None,
    mask_BL: torch.Tensor | None,
) -> TeacherLayer:
    q_BHLD, k_BKLD, v_BKLV = architecture.heads(layer, hidden_BLE, positions)
    scale = architecture.scale(layer)
    if not architecture.is_causal:
        o_BHLV, log_sum_exp_BHL = bidirectional_softmax_attention(q_BHLD, k_BKLD, v_BKLV, scale, mask_BL), None
    elif spans is None:
        o_BHLV, log_sum_exp_BHL = causal_softmax_attention(q_BHLD, k_BKLD, v_BKLV, scale)
    else:
        o_BHLV = torch.zeros_like(q_BHLD)
        log_sum_exp_BHL = torch.zeros_like(q_BHLD[..., 0], dtype=torch.promote_types(q_BHLD.dtype, torch.float32))
        for row, start, end in spans:
            here = (slice(row, row + 1), slice(None), slice(start, end))
            o_BHLV[here], part = causal_softmax_attention(q_BHLD[here], k_BKLD[here], v_BKLV[here], scale)
            if part is None:
                log_sum_exp_BHL = None
            elif log_sum_exp_BHL is not None:
                log_sum_exp_BHL[here] = part
    return TeacherLayer(
        layer_index, q_BHLD, k_BKLD, v_BKLV, scale, o_BHLV, log_sum_exp_BHL, is_causal=architecture.is_causal
    )


def _side_by_side(o_BHLV: torch.Tensor) -> torch.Tensor:
    """(B, H, L, V) → (B, L, H V)."""
    return o_BHLV.transpose(1, 2).reshape(o_BHLV.shape[0], o_BHLV.shape[2], -1)


__all__ = ["TeacherForward", "TeacherLayer", "attention_spans"]

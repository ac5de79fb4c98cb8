"""Groups of layers for distill's array, sized so that all elements end together, and what each of them costs.

An element that trains layers a to b runs the teacher's layers 0 to b for every token, and the loss of its own:

    cost(a, b) = (b + 1) · forward + (b - a + 1) · own

so that the elements of the upper layers get fewer of them. With distill.cache_hidden_states, E epochs run the layers
below a only once for a row: the first term is then (b - a + 1 + a / E) · forward. With H heads, D head dim, F features,
P feature_dim, N weights of a decoder layer, T tokens in a row and s distill.query_fraction, a token takes on average
(T+1)/2 keys, and in FLOPs (2 per product):

    forward = 2N + 4·D·H·(T+1)/2            linear layers; q·k and the weighted sum of values
    own     = s·(2D + 6F)·H·(T+1)/2         q·k again; φ(q)·φ(k), dφ(q), dφ(k)
              + 8·D·P·H                     W x and dW, for q and for k
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..feature_map_checks import feature_map_size
from ..hidden_state_size import lower_layers_share
from ..model_shape import ModelShape
from .gpu_hours import gathering_flops, sequence_tokens

if TYPE_CHECKING:
    from ..config import RunConfig

LOSS_SLOWNESS = 4.0
"""Time of a FLOP of the loss, which is in float32, over one of the teacher's forward pass in bfloat16."""


@dataclass(frozen=True)
class DistillCost:
    """What a token costs in one layer, in units of FLOPs at the teacher's speed."""

    forward: float
    """Teacher forward of one layer, or under ZeRO-3 the wait for its weights where that is longer."""
    own: float
    """Loss and maps of one trained layer."""
    lower_share: float = 1.0
    """How often the layers below a group's first run for a row, over how often the others do: 1, or 1/E."""

    def of(self, layers: Sequence[int]) -> float:
        """A group's cost per token: all layers up to its last, and its own."""
        return self.runs(layers) * self.forward + len(layers) * self.own

    def runs(self, layers: Sequence[int]) -> float:
        """Teacher layers that a group runs for a token, in the mean over the epochs."""
        return max(layers) + 1 - min(layers) * (1 - self.lower_share)


def distill_flops(config: RunConfig, shape: ModelShape, row_tokens: float) -> tuple[float, float]:
    """(forward, own) of the module's equations: FLOPs per token of a layer's teacher, and of its loss and maps."""
    heads, head_dim = shape.num_heads, shape.head_dim
    feature_dim = config.model.feature_dim or head_dim
    num_features = feature_map_size(config.model, head_dim).num_features
    keys = (row_tokens + 1) / 2
    forward = 2 * shape.num_layer_weights + 4 * head_dim * heads * keys
    pairs = config.distill.query_fraction * heads * keys
    own = (2 * head_dim + 6 * num_features) * pairs + 8 * head_dim * feature_dim * heads
    return forward, own


def distill_cost(
    config: RunConfig, shape: ModelShape, row_tokens: float, num_rows: int | None = None, num_gpus: int = 1
) -> DistillCost:
    """Cost per token of a layer that is run, and of one that is trained as well.

    Args:
        row_tokens: tokens in a typical row.
        num_rows: training rows, where known; with `distill.max_steps` they decide how many epochs there are.
        num_gpus: of the job, or of an element of the array.
    """
    forward, own = distill_flops(config, shape, row_tokens)
    micro_batch_tokens = config.distill.micro_batch_size * sequence_tokens(config, config.distill, row_tokens)
    forward = max(forward, gathering_flops(config, shape, num_gpus, micro_batch_tokens))
    share = lower_layers_share(config, num_rows)
    if config.slurm.trained_layer_cost is not None:
        return DistillCost(forward, config.slurm.trained_layer_cost * forward, share)
    slowness = LOSS_SLOWNESS if config.engine.precision == "bfloat16" else 1.0
    return DistillCost(forward, slowness * own, share)


def balanced_groups(layers: Sequence[int], num_groups: int, cost: DistillCost) -> list[list[int]]:
    """Split ascending layers into at most `num_groups` consecutive groups; the dearest is as cheap as can be.

    Fewer groups come back where more would not end earlier: every array must run the last layer's teacher somewhere.
    """
    assert layers and num_groups >= 1
    # A group's cost decides where it ends, so the best limit is the cost of one of the possible groups.
    limits = sorted(
        {cost.of(layers[first : last + 1]) for first in range(len(layers)) for last in range(first, len(layers))}
    )
    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        groups = _greedy(layers, limits[middle], cost)
        if groups is not None and len(groups) <= num_groups:
            high = middle
        else:
            low = middle + 1
    groups = _greedy(layers, limits[low], cost)
    assert groups is not None and len(groups) <= num_groups
    return groups


def _greedy(layers: Sequence[int], limit: float, cost: DistillCost) -> list[list[int]] | None:
    """Groups that are as long as the limit allows, from the first layer on; None where one layer exceeds it."""
    groups: list[list[int]] = []
    for layer in layers:
        if groups and cost.of([*groups[-1], layer]) <= limit * (1 + 1e-12):
            groups[-1].append(layer)
        elif cost.of([layer]) <= limit * (1 + 1e-12):
            groups.append([layer])
        else:
            return None
    return groups


def layers_text(layers: Sequence[int]) -> str:
    """Ascending layers as `distill.layers` writes them: `0-7` or `0-3,8,10-11`."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def layers_of(text: str) -> list[int]:
    """The layers that `0-3,8` names, ascending."""
    layers: set[int] = set()
    for span in text.split(","):
        first, _, last = span.partition("-")
        layers |= set(range(int(first), int(last or first) + 1))
    return sorted(layers)

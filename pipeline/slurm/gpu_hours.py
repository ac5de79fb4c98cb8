"""GPU-hours on paper: FLOPs at a stated share of an A100's peak, and the weights that ZeRO-3 sends around.

Under ZeRO-3 with n GPUs a micro-batch waits for every layer's weights, of which each GPU receives (n - 1)/n; DeepSpeed
fetches the next layer during this one's arithmetic, so that a layer takes the longer of the two. Not in the figures: a
job's start, loading, validation, checkpoints, padding, what small kernels leave idle, evaluate and export.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..feature_map_checks import feature_map_size
from ..model_shape import ModelShape

if TYPE_CHECKING:
    from ..config import RunConfig, ScheduleConfig

PEAK_FLOPS_PER_S = 312e12
"""An A100's in bfloat16."""
UTILISATION = 0.4
REFERENCE_FLOPS_PER_S = UTILISATION * PEAK_FLOPS_PER_S
GATHER_BYTES_PER_S = 200e9
"""What a GPU receives from the others of its node: two thirds of an A100's 300 GB/s of NVLink in one direction. Between
nodes it is several times less, which is not reckoned with."""


def gathering_flops(config: RunConfig, shape: ModelShape, num_gpus: int, micro_batch_tokens: float) -> float:
    """Time to gather a layer's weights under ZeRO-3, in FLOPs per token at the reference speed; 0 where none is."""
    if config.engine.zero_stage != 3 or num_gpus == 1:
        return 0.0
    value_bytes = 2 if config.engine.precision == "bfloat16" else 4
    received = value_bytes * shape.num_layer_weights * (num_gpus - 1) / num_gpus
    return received / GATHER_BYTES_PER_S * REFERENCE_FLOPS_PER_S / micro_batch_tokens


def sequence_tokens(config: RunConfig, schedule: ScheduleConfig, row_tokens: float) -> float:
    """Tokens of a sequence in a batch: a row's, or nearly all that there is room for where rows are packed."""
    return config.data.max_length_tokens if schedule.packing else row_tokens


def num_training_tokens(
    config: RunConfig, schedule: ScheduleConfig, num_rows: int | None, row_tokens: float
) -> float | None:
    """Tokens that a stage trains on; None where the number of rows is not known."""
    if schedule.max_steps is not None:
        return schedule.max_steps * schedule.global_batch_size * sequence_tokens(config, schedule, row_tokens)
    if num_rows is None:
        return None
    # packed sequences hold several rows: the tokens are those of the rows either way
    return math.ceil(schedule.epochs * num_rows) * row_tokens


def finetune_gpu_hours(
    config: RunConfig, shape: ModelShape, row_tokens: float, num_rows: int | None, num_gpus: int
) -> float | None:
    """GPU-hours of the whole finetuning; None where the number of rows is not known.

    A token passes every frozen weight N of a layer forward (2N FLOPs), backward for the gradient of the activations
    alone (2N), and forward again with gradient_checkpointing; attention's backward costs twice its forward. What the
    adapters themselves cost is a few thousandths.
    """
    from ..memory_estimate import SUMMARY_SHARE

    finetune = config.finetune
    num_tokens = num_training_tokens(config, finetune, num_rows, row_tokens)
    if num_tokens is None:
        return None
    passes = 3 if finetune.gradient_checkpointing else 2
    arithmetic = passes * 2 * shape.num_layer_weights + (passes + 1) * _attention_flops(config, shape, row_tokens)
    micro_batch_tokens = finetune.micro_batch_size * sequence_tokens(config, finetune, row_tokens)
    gathering = 2 * gathering_flops(config, shape, num_gpus, micro_batch_tokens)
    logits = SUMMARY_SHARE * 2 * 2 * shape.vocab_size * shape.hidden_size
    per_token = shape.num_layers * max(arithmetic, gathering) + logits
    return num_tokens * per_token / REFERENCE_FLOPS_PER_S / 3600


def _attention_flops(config: RunConfig, shape: ModelShape, row_tokens: float) -> float:
    """A layer's attention forward, per token, the linear layers left out: quadratic, or in chunks with a state."""
    heads, head_dim = shape.num_heads, shape.head_dim
    if config.model.attention == "softmax":
        return 4 * head_dim * heads * (row_tokens + 1) / 2
    size = feature_map_size(config.model, head_dim)
    features, chunk = size.num_features, config.model.chunk_size
    # W x for q and k; scores and weighted sum in the chunk; the state's update and what is read from it
    return heads * (4 * size.num_weights + 2 * chunk * (features + head_dim) + 4 * features * head_dim)

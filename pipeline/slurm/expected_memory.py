"""What the jobs of a run will need of GPUs' and nodes' memory, and whether they ask for enough. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..base_folder import known_shape
from ..config import RunConfig
from ..memory_estimate import GIB, StageEstimate, estimate_memory
from ..model_shape import ModelShape
from ..validation import config_notes, reckoned_device
from .resources import stage_settings, world_size

_GPU_BYTES = 80e9
"""A large GPU of today: A100 and H100. Which ones a cluster gives, nobody knows here."""
_STAGES = ("distill", "finetune", "evaluate", "export")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 2**20}


def memory_lines(config: RunConfig, stages: tuple[str, ...]) -> Iterator[str]:
    """`validate`'s notes and estimates for these stages, each with its own number of GPUs, and a warning for each that
    will hardly fit.

    Raises:
        ModelError: the base model's folder cannot be read.
    """
    shape = known_shape(config)
    for note in config_notes(config, shape):
        yield f"note: {note}"
    if shape is None:
        yield f"note: model.base: {config.model.base} is on the hub, so what it needs of memory is not known here."
        return
    estimates = [_largest(config, shape, stage) for stage in _STAGES if stage in stages]
    found = [estimate for estimate in estimates if estimate is not None]
    if not found:
        return
    yield "memory of a process, estimated (hedgehog validate has the terms):"
    for estimate in found:
        size = world_size(config, estimate.stage)
        if estimate.where == "cuda":
            where = f"on each of {size} GPUs" if size > 1 else "on its GPU"
        else:
            where = f"of its node for each of {size} processes" if size > 1 else "of its node"
        yield f"  {estimate.stage:<22} {estimate.num_bytes / GIB:>6.1f} GiB {where}"
    for estimate in found:
        yield from _warnings(config, estimate)


def _largest(config: RunConfig, shape: ModelShape, stage: str) -> StageEstimate | None:
    """The estimate of this stage that is largest over the variants; None where no conversion runs it."""
    on_gpu = bool(stage_settings(config, stage)["gpus"]) and reckoned_device(config) == "cuda"
    estimates = estimate_memory(config, shape, world_size=world_size(config, stage), device="cuda" if on_gpu else "cpu")
    own = [estimate for estimate in estimates if estimate.stage == stage]
    return max(own, key=lambda estimate: estimate.num_bytes, default=None)


def _warnings(config: RunConfig, estimate: StageEstimate) -> Iterator[str]:
    stage, needed = estimate.stage, estimate.num_bytes
    if estimate.where == "cuda":
        if needed > _GPU_BYTES:
            yield (
                f"warning: {estimate.title} needs about {needed / 1e9:.0f} GB on each GPU, more than the 80 GB of an "
                f"A100 or H100. Lower it: {'; '.join(_keys(config, estimate))}."
            )
        return
    memory = stage_settings(config, stage)["memory"]
    asked = _memory_bytes(memory)
    if asked is not None and asked < needed * stage_settings(config, stage)["tasks_per_node"]:
        yield (
            f"warning: {estimate.title} needs about {needed / GIB:.0f} GiB of its node for each process, and "
            f"slurm.{stage}.memory is {memory}."
        )
    elif memory is None and needed > 8 * GIB:
        yield f"note: slurm.{stage}.memory is not set, and the site's default may be less than {needed / GIB:.0f} GiB."


def _keys(config: RunConfig, estimate: StageEstimate) -> Iterator[str]:
    """What lowers a stage's memory on a GPU, the most effective first."""
    stage = estimate.stage
    sizes = dict.fromkeys(("weights", "training", "activations", "overhead"), 0.0)
    for term in estimate.terms:
        sizes[term.kind] += term.num_bytes
    weights = []
    if stage in ("distill", "finetune"):
        if config.model.quantization is None:
            if config.engine.zero_stage != 3:
                weights.append("engine.zero_stage=3, which shards the weights over the GPUs")
            weights.append(f"more GPUs (slurm.{stage}.gpus, slurm.{stage}.nodes)")
        activations = [f"{stage}.micro_batch_size", "data.max_length_tokens"]
        if stage == "finetune" and not config.finetune.gradient_checkpointing:
            activations.insert(0, "finetune.gradient_checkpointing=true")
    else:
        activations = ["evaluate.batch_size", "evaluate.num_beams"] if stage == "evaluate" else []
    if stage == "export":
        weights.append("slurm.export.gpus=0 and engine.device=auto, which exports in the node's memory")
    elif config.model.quantization is None and config.engine.zero_stage != 3:
        weights.append("model.quantization=nf4")
    elif config.model.quantization is None and stage == "evaluate":
        weights.append(
            "model.quantization=nf4 engine.zero_stage=1 for this stage alone (submit --to finetune first, then with "
            "them --from evaluate --to evaluate)"
        )
    if sizes["weights"] > _GPU_BYTES:  # smaller batches would not help
        yield from weights
    else:
        yield from [*weights, *activations] if sizes["weights"] > sizes["activations"] else [*activations, *weights]


def _memory_bytes(memory: str | None) -> int | None:
    """What `--mem` asks for; None: the site's default, or all that the node has."""
    found = re.fullmatch(r"(\d+)([KMGT]?)", memory or "")
    return int(found[1]) * _UNITS[found[2]] or None if found else None

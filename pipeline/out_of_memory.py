"""What to say when memory ends: what was estimated, what there was, and the keys that lower the largest parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .errors import HedgehogError, ResourceError
from .formatting import format_bytes
from .memory_estimate import StageEstimate, TermKind, estimate_memory
from .model_shape import known_shape

if TYPE_CHECKING:
    from .config import RunConfig
    from .distributed import World

_CPU_ALLOCATOR = "DefaultCPUAllocator"
"""Names the refusal in the RuntimeError that torch raises on a CPU."""


@contextmanager
def out_of_memory_explained(title: str, stage: str, config: RunConfig, world: World) -> Iterator[None]:
    """Turn torch's error inside into one that helps.

    Args:
        title: names the stage for the user (`t2r/finetune`).
        config: the conversion's own, a variant's overrides applied.

    Raises:
        ResourceError: memory has ended.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        ended = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _CPU_ALLOCATOR in str(error)
        if not ended:
            raise
        raise ResourceError(explain(title, stage, config, world, str(error))) from error


def explain(title: str, stage: str, config: RunConfig, world: World, words: str) -> str:
    """The message: torch's own first line, the estimate beside the memory there is, and what to change."""
    on_gpu = world.device.type == "cuda"
    lines = [f"{title}: out of {'GPU ' if on_gpu else ''}memory ({(words.splitlines() or ['no more to be had'])[0]})."]
    estimate = _estimate(stage, config, world)
    kinds: list[TermKind] = ["activations", "training", "weights"]
    if estimate is not None:
        sums = {kind: sum(t.num_bytes for t in estimate.terms if t.kind == kind) for kind in kinds}
        kinds.sort(key=lambda kind: -sums[kind])
        parts = ", ".join(f"{kind} {format_bytes(sums[kind])}" for kind in kinds if sums[kind])
        lines.append(f"Estimated: {format_bytes(estimate.num_bytes)} ({parts}, the rest overhead).")
        if on_gpu and torch.cuda.is_initialized():
            lines.append(_beside_the_gpu(estimate.num_bytes, world.device))
    cures = [cure for kind in kinds for cure in _cures(kind, stage, config, world)]
    if cures:
        lines.append(f"What lowers it, the largest part first: {'; '.join(cures)}.")
    lines.append("`hedgehog validate` estimates it before the next attempt.")
    return " ".join(lines)


def _estimate(stage: str, config: RunConfig, world: World) -> StageEstimate | None:
    try:
        shape = known_shape(config)
    except HedgehogError:
        return None
    if shape is None:
        return None
    alone = config.model_copy(update={"variants": {}})
    estimates = estimate_memory(alone, shape, world_size=world.world_size, device=world.device.type)
    return next((estimate for estimate in estimates if estimate.stage == stage), None)


def _beside_the_gpu(estimated: float, device: torch.device) -> str:
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    others = total - free - torch.cuda.memory_reserved(device)
    found = f"This process had up to {format_bytes(peak)} of the GPU's {format_bytes(total)}"
    if others > 2 * 2**30:
        return f"{found}; other processes hold {format_bytes(others)} of it."
    if estimated < total:
        return f"{found}: the estimate is too low here, please report it with this message."
    return f"{found}."


def _cures(kind: TermKind, stage: str, config: RunConfig, world: World) -> Iterator[str]:
    """Keys that lower one kind of memory in a stage, with what they are now; none that is spent already."""
    engine, several = config.engine, world.world_size > 1
    trains = stage in ("distill", "finetune")
    if kind == "activations":
        section = {"distill": config.distill, "finetune": config.finetune}.get(stage)
        if section is not None and section.micro_batch_size > 1:
            yield f"{stage}.micro_batch_size (now {section.micro_batch_size})"
        if stage == "finetune" and not config.finetune.gradient_checkpointing:
            yield "finetune.gradient_checkpointing=true"
        if stage == "evaluate" and config.evaluate.batch_size > 1:
            yield f"evaluate.batch_size (now {config.evaluate.batch_size})"
        if stage == "evaluate" and config.evaluate.num_beams > 1:
            yield f"evaluate.num_beams (now {config.evaluate.num_beams})"
        if stage != "export":
            yield f"data.max_length_tokens (now {config.data.max_length_tokens})"
    elif kind == "training" and trains:
        if several and engine.zero_stage < 2:
            yield f"engine.zero_stage=2 (now {engine.zero_stage})"
        if not engine.offload_optimizer and world.device.type == "cuda":
            yield "engine.offload_optimizer=true"
        if stage == "distill":
            yield "fewer layers at a time (distill.layers, then merge)"
        elif config.finetune.optimizer == "adamw" and world.device.type == "cuda":
            yield "finetune.optimizer=adamw8bit"
    elif kind == "weights":
        if several and engine.zero_stage < 3 and trains and config.model.quantization is None:
            yield f"engine.zero_stage=3 (now {engine.zero_stage})"
        if config.model.quantization is None and engine.zero_stage < 3:
            yield "model.quantization=nf4"
        if engine.precision == "float32":
            yield "engine.precision=bfloat16"

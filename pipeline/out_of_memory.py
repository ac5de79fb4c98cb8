"""What to say when memory ends: what was estimated, what was found, and the keys that lower the largest parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .base_folder import known_shape
from .errors import HedgehogError, ResourceError
from .formatting import format_bytes
from .held_memory import held_bytes
from .memory_estimate import StageEstimate, TermKind, estimate_memory

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
    """The message: torch's own first line, what was estimated and found of each kind, and what to change."""
    on_gpu = world.device.type == "cuda"
    lines = [f"{title}: out of {'GPU ' if on_gpu else ''}memory ({(words.splitlines() or ['no more to be had'])[0]})."]
    estimate, wrong = _estimate(stage, config, world), None
    kinds: list[TermKind] = ["activations", "training", "weights"]
    if estimate is not None:
        estimated: dict[TermKind, float] = {
            kind: sum(t.num_bytes for t in estimate.terms if t.kind == kind) for kind in kinds
        }
        found = _found(world.device)
        wrong = _too_low(estimated, found)
        kinds.sort(key=lambda kind: (kind != wrong, -max(estimated[kind], found.get(kind, 0))))
        parts = ", ".join(f"{kind} {format_bytes(estimated[kind])}" for kind in kinds if estimated[kind])
        lines.append(f"Estimated: {format_bytes(estimate.num_bytes)} ({parts}, the rest overhead).")
        if found:
            lines.append(_beside_what_was_found(estimated, found, wrong))
    if on_gpu and torch.cuda.is_initialized():
        lines.append(_the_gpu(world.device))
    cures = [cure for kind in kinds for cure in _cures(kind, stage, config, world)]
    if cures:
        first = "the largest part first" if wrong is None else f"{wrong} first"
        lines.append(f"What lowers it, {first}: {'; '.join(cures)}.")
    lines.append("`hedgehog validate` estimates it before the next attempt.")
    return " ".join(lines)


def _found(device: torch.device) -> dict[TermKind, float]:
    """What this process holds by kind; on a GPU also activations, as all else of the peak. Empty: nothing to tell."""
    held = held_bytes(device)
    found: dict[TermKind, float] = {"weights": held["weights"], "training": held["training"]}
    if device.type == "cuda":
        if not torch.cuda.is_initialized():
            return {}
        found["activations"] = max(0, torch.cuda.max_memory_allocated(device) - sum(held.values()))
    return found


def _too_low(estimated: dict[TermKind, float], found: dict[TermKind, float]) -> TermKind | None:
    """The estimate that was too low, by more than a tenth of all that was estimated."""
    worst = max(found, key=lambda kind: found[kind] - estimated[kind], default=None)
    if worst is None or found[worst] - estimated[worst] <= 0.1 * sum(estimated.values()):
        return None
    return worst


def _beside_what_was_found(
    estimated: dict[TermKind, float], found: dict[TermKind, float], wrong: TermKind | None
) -> str:
    parts = ", ".join(
        f"{kind} {'up to ' if kind == 'activations' else ''}{format_bytes(found[kind])} "
        f"(estimated {format_bytes(estimated[kind])})"
        for kind in found
    )
    if wrong is None:
        return f"Found: {parts}; no estimate was too low."
    excess = format_bytes(found[wrong] - estimated[wrong])
    return f"Found: {parts}; the estimate of {wrong} is too low by {excess}, please report it."


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


def _the_gpu(device: torch.device) -> str:
    free, total = torch.cuda.mem_get_info(device)
    line = f"The GPU has {format_bytes(total)}"
    others = total - free - torch.cuda.memory_reserved(device)
    return f"{line}; other processes hold {format_bytes(others)} of it." if others > 2 * 2**30 else f"{line}."


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

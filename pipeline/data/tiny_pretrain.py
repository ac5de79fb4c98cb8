"""Pretraining of the small model of a tiny run, on one process, resumable bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..classification_head import class_logits
from ..config import ScheduleConfig, TinyConfig
from ..interrupts import asked_to_stop, stop_if_asked
from ..run_folder import atomic_write
from .batches import BatchPlan, LossOn
from .tokens import TokenizedSplit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..metrics import Reporter

SAVE_EVERY_STEPS = 25
_WARMUP_FRACTION = 0.05
_LAST_LEARNING_RATE_RATIO = 0.05


@dataclass(frozen=True)
class OneProcess:
    """The world of a loop that only the first process runs."""

    rank: int = 0
    world_size: int = 1


def make_model(tiny: TinyConfig, seed: int, label_names: Sequence[str] | None = None) -> PreTrainedModel:
    """A model of the tiny section's family and shape with seeded random weights, float32; an encoder with a head for
    these classes.

    The caller's RNG is left as it was.
    """
    from ..modeling.architecture import architecture

    family = architecture(tiny.architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = family.tiny_config(tiny)
        if label_names is not None:
            config.id2label = dict(enumerate(label_names))
            config.label2id = {name: number for number, name in enumerate(label_names)}
        return family.base_class(config)


def pretrain(
    model: PreTrainedModel,
    documents: TokenizedSplit,
    tiny: TinyConfig,
    seed: int,
    checkpoint: Path,
    fingerprint: str,
    reporter: Reporter,
) -> float:
    """Train `model` on `documents`, one a row, and return the last loss (nats a token; of rows to classify a row).

    Every SAVE_EVERY_STEPS steps the weights and AdamW's moments go to `checkpoint`; a later call with the same
    `fingerprint` goes on from there and ends with the same weights as a call that was never interrupted.

    Raises:
        Interrupted: a signal came; the step that was being done is saved.
    """
    steps = tiny.pretrain_steps
    schedule = ScheduleConfig(
        max_steps=steps,
        global_batch_size=tiny.pretrain_batch_size,
        micro_batch_size=tiny.pretrain_batch_size,
    )
    longest = int(documents.lengths.max())
    loss_on: LossOn = "all" if documents.labels is None else "row"
    plan = BatchPlan(documents, schedule, longest, pad_id=0, seed=seed, world=OneProcess(), loss_on=loss_on)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=tiny.pretrain_learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    start, loss_value = _resume(model, optimizer, checkpoint, fingerprint)
    if start:
        reporter.info(f"pretraining goes on at step {start} of {steps}")
    reporter.rewind(start)
    model.train()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = tiny.pretrain_learning_rate * _learning_rate_factor(step, steps)
        (batch,) = plan.step(step)
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_value = loss.item()
        reporter.step(
            step + 1, steps, tokens=batch["real_tokens_in_global_batch"], metrics={"pretrain_loss_nats": loss_value}
        )
        stopping = asked_to_stop()  # asked once: a signal after this line waits for the next step
        if (step + 1) % SAVE_EVERY_STEPS == 0 or step + 1 == steps or stopping:
            _save(model, optimizer, checkpoint, fingerprint, step + 1, loss_value)
        if stopping:
            stop_if_asked(f"pretraining is saved after step {step + 1} of {steps}")
    model.eval()
    return loss_value


def _loss(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    if "row_labels" in batch:
        return torch.nn.functional.cross_entropy(class_logits(model, batch), batch["row_labels"])
    # The padding is on the right, where causal attention does not look: no mask, and so the fast kernel.
    return model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss


def _learning_rate_factor(step: int, steps: int) -> float:
    warmup = max(1, int(_WARMUP_FRACTION * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return _LAST_LEARNING_RATE_RATIO + (1 - _LAST_LEARNING_RATE_RATIO) * cosine


def _save(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, file: Path, fingerprint: str, step: int, loss: float
) -> None:
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    metadata = {"fingerprint": fingerprint, "step": str(step), "loss": repr(loss)}
    atomic_write(file, save(tensors, metadata))


def _resume(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, file: Path, fingerprint: str
) -> tuple[int, float]:
    """Load a checkpoint into model and optimizer: (next step, last loss). (0, nan) where there is none of this run."""
    try:
        with safe_open(str(file), framework="pt") as saved:
            metadata: dict[str, Any] = saved.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                return 0, math.nan
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(saved.get_tensor(f"weight/{name}"))
                    optimizer.state[parameter] = {
                        key: saved.get_tensor(f"{key}/{name}").clone() for key in ("step", "exp_avg", "exp_avg_sq")
                    }
    except (FileNotFoundError, SafetensorError):
        return 0, math.nan
    return int(metadata["step"]), float(metadata["loss"])

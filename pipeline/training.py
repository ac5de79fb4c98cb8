"""The loop that both training stages share: resume, step, record, validate, save.

A step is a function of its number alone: its batch (BatchPlan), learning rate (`schedule.py`) and random numbers
(seeded anew each step) depend on nothing that went before but the weights and the optimizer's state. So a resumed run
repeats an uninterrupted one bit for bit on one process.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from .errors import Interrupted, LeaseError, NonFiniteLossError
from .interrupts import from_votes, votes
from .not_finite import watch_for_faults
from .run_folder import write_fault
from .schedule import learning_rate_factor

if TYPE_CHECKING:
    from .checkpoints import Checkpoint, Checkpoints
    from .config import ScheduleConfig
    from .data.batches import BatchPlan
    from .distributed import World
    from .engine import TrainingEngine
    from .metrics import Reporter


_VOTES = "votes to stop"


class TrainingTask(Protocol):
    """What a stage brings to the loop."""

    def loss(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One micro-batch through the engine: (its share of the global batch's loss, its shares of other figures).

        Shares add up: their sum over micro-batches and ranks is the global batch's figure.
        """
        ...

    def figures(self, totals: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """What to record of a step, from the summed shares."""
        ...

    def fault(self, totals: Mapping[str, torch.Tensor], first_fault: Callable[[], str | None]) -> str:
        """Where the figures are not finite, for the user ("layer 3, head 1").

        `first_fault` repeats the step and tells which module's output was the first. Collective.
        """
        ...

    def validate(self) -> dict[str, float]:
        """Figures on the validation split; the first is the one that decides which checkpoint is best. Collective."""
        ...


@dataclass(frozen=True)
class TrainingOutcome:
    """What came of a training."""

    num_steps: int
    num_tokens: int
    """Real tokens over all steps and ranks, earlier attempts included."""
    validation: dict[str, float]
    """After the last step."""
    best_step: int | None
    """Step of the saved checkpoint with the best validation figure."""


def train(
    task: TrainingTask,
    engine: TrainingEngine,
    plan: BatchPlan,
    schedule: ScheduleConfig,
    checkpoints: Checkpoints,
    *,
    resumed: Checkpoint | None,
    seed: int,
    world: World,
    reporter: Reporter,
    cure: str,
) -> TrainingOutcome:
    """Train from `resumed` (or the start) to the plan's last step.

    Args:
        cure: what a user may try when the loss is not finite.

    Raises:
        Interrupted: a signal came; a checkpoint of the step that was being done is saved.
        LeaseError: another attempt has taken the folder over.
        NonFiniteLossError: NaN or infinite loss or gradient; the last checkpoint is good, nothing is saved after it.
        ResourceError: a checkpoint cannot be written; earlier ones are untouched.
    """
    start, num_tokens = 0, 0
    if resumed is not None:
        start, num_tokens = resumed.step, int(resumed.metrics.get("num_tokens", 0))
        reporter.info(f"resumed from {resumed.folder.name}")
    validation: dict[str, float] | None = None
    best = math.inf
    saved_best = checkpoints.best()
    if saved_best is not None:
        best = checkpoints.value(saved_best)

    def validation_is_due(done: int) -> bool:
        return done == plan.num_steps or bool(schedule.eval_every_steps and done % schedule.eval_every_steps == 0)

    def save(done: int, unfinished_step: dict[str, Any] | None = None) -> None:
        checkpoints.save(
            done,
            engine.checkpoint_files(),
            layout=engine.layout(),
            metrics={"num_tokens": num_tokens, **(validation or {})},
            unfinished_step=unfinished_step,
        )

    def record(done: int, tokens: int, metrics: dict[str, float]) -> bool:
        """What ends a step: record it, save if that is due; whether it was saved."""
        nonlocal best
        reporter.step(done, plan.num_steps, tokens=tokens, metrics=metrics | (validation or {}))
        figure = next(iter(validation.values())) if validation else math.inf
        due = done == plan.num_steps or done % schedule.save_every_steps == 0 or figure < best
        best = min(best, figure)
        if due:
            save(done)
        return due

    stop = _agree_to_stop(world)
    if stop is not None:
        raise _stopped(stop, f"it stands where it was, after step {start} of {plan.num_steps}")
    engine.module.train()
    unfinished = resumed.unfinished_step if resumed is not None else None
    reporter.rewind(start if unfinished is None else start - 1)
    reporter.restart_clock()
    if unfinished is not None:
        validation = _validate(task, engine)
        record(start, unfinished["tokens"], unfinished["metrics"])
        reporter.restart_clock()
    for step in range(start, plan.num_steps):
        seed_step(seed, step, world.rank)
        totals, step_tokens, stop = _accumulate(task, engine, plan, step, world)
        if not all(math.isfinite(x) for total in totals.values() for x in total.flatten().tolist()):
            where = task.fault(totals, lambda step=step: _first_fault(task, engine, plan, seed, step, world, "forward"))
            raise _not_finite(where, step, checkpoints, cure)
        factor = learning_rate_factor(step, plan.num_steps, schedule)
        grad_norm = engine.step(factor)
        if not math.isfinite(grad_norm):
            where = _first_fault(task, engine, plan, seed, step, world, "backward")
            raise _not_finite(where or "the sum of the micro-batches' gradients", step, checkpoints, cure)
        done = step + 1
        num_tokens += step_tokens

        metrics = task.figures(totals)
        metrics |= {"grad_norm": grad_norm, "learning_rate": schedule.learning_rate * factor}
        validation = None
        where = f"saved after step {done} of {plan.num_steps}"
        if validation_is_due(done):
            if stop is not None:  # a validation may take longer than the grace period: it is made up for later
                save(done, {"tokens": step_tokens, "metrics": metrics})
                raise _stopped(stop, where)
            validation = _validate(task, engine)
            stop = _agree_to_stop(world)
        was_saved = record(done, step_tokens, metrics)
        if stop is not None and done < plan.num_steps:  # after the last step little remains to be done
            if not was_saved:
                save(done)
            raise _stopped(stop, where)
        reporter.restart_clock()
    if validation is None:  # resumed after the last step
        validation = _validate(task, engine)
    best_checkpoint = world.broadcast(checkpoints.best() if world.is_main else None)
    return TrainingOutcome(plan.num_steps, num_tokens, validation, best_checkpoint.step if best_checkpoint else None)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators (dropout uses them) from the run's seed, the step and the rank."""
    digest = hashlib.sha256(f"{seed}/step {step}/rank {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sum_over_ranks(shares: Mapping[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """The shares' sums over all ranks, fp64 on the CPU. One transfer and at most one all-reduce. Collective."""
    flat = torch.cat([share.detach().double().flatten() for share in shares.values()])
    if world.world_size > 1:
        torch.distributed.all_reduce(flat)
    flat = flat.cpu()
    sizes = [share.numel() for share in shares.values()]
    return {name: part.view(share.shape) for (name, share), part in zip(shares.items(), flat.split(sizes), strict=True)}


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on `device`; counts stay as they are."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def _accumulate(
    task: TrainingTask, engine: TrainingEngine, plan: BatchPlan, step: int, world: World
) -> tuple[dict[str, torch.Tensor], int, Interrupted | None]:
    """Forward and backward over this rank's micro-batches.

    Returns the global batch's figures and its number of real tokens; and, from the same all-reduce, whether any rank
    was asked to stop.
    """
    sums: dict[str, torch.Tensor] = {}
    num_tokens = 0
    for batch in plan.step(step):
        num_tokens = batch["real_tokens_in_global_batch"]
        loss, shares = task.loss(to_device(batch, world.device))
        engine.backward(loss)
        for name, share in shares.items():
            sums[name] = sums[name] + share.detach() if name in sums else share.detach()
    totals = sum_over_ranks({**sums, _VOTES: _votes(world)}, world)
    return totals, num_tokens, _decide(totals.pop(_VOTES))


def _first_fault(
    task: TrainingTask,
    engine: TrainingEngine,
    plan: BatchPlan,
    seed: int,
    step: int,
    world: World,
    passes: Literal["forward", "backward"],
) -> str | None:
    """Repeat a step's passes, forward or both, and look where they cease to be finite. No weight has changed since.

    Collective. None: every micro-batch by itself is finite.
    """
    seed_step(seed, step, world.rank)
    with watch_for_faults(engine.module, engine.parameters) as fault, torch.set_grad_enabled(passes == "backward"):
        for batch in plan.step(step):
            loss, _ = task.loss(to_device(batch, world.device))
            if passes == "backward":
                engine.backward(loss)
    return next((found for found in world.gather(fault.describe()) if found is not None), None)


def _agree_to_stop(world: World) -> Interrupted | None:
    """Whether any rank was asked to stop. Collective."""
    return _decide(sum_over_ranks({_VOTES: _votes(world)}, world)[_VOTES])


def _votes(world: World) -> torch.Tensor:
    """This rank's signals, and whether it has lost the folder to another attempt; rank 0 looks for all."""
    lost = world.is_main and write_fault() is not None
    return torch.tensor([*votes(), float(lost)], dtype=torch.float64, device=world.device)


def _decide(total: torch.Tensor) -> Interrupted | None:
    """
    Raises:
        LeaseError: rank 0 has lost the folder. On every rank, so that none waits for another.
    """
    *signals, lost = total.tolist()
    if lost:
        raise write_fault() or LeaseError("the first process has lost the folder to another attempt.")
    return from_votes(signals)


def _stopped(stop: Interrupted, saved: str) -> Interrupted:
    return Interrupted(saved, signals=stop.signals, requeue=stop.requeue)


def _validate(task: TrainingTask, engine: TrainingEngine) -> dict[str, float]:
    engine.module.eval()
    with torch.no_grad():
        figures = task.validate()
    engine.module.train()
    return figures


def _not_finite(where: str, step: int, checkpoints: Checkpoints, cure: str) -> NonFiniteLossError:
    newest = checkpoints.newest_folder()
    kept = f"The last good checkpoint is {newest}" if newest else "There was no checkpoint yet"
    return NonFiniteLossError(f"not finite at step {step + 1}: {where}. {kept}; nothing was saved after it. {cure}")

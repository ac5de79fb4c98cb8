"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import ScheduleConfig


def learning_rate_factor(step: int, num_steps: int, schedule: ScheduleConfig) -> float:
    """Learning rate of step `step` (from 0) over its peak, in (0, 1].

    Warm-up: (step + 1) / (warm-up steps + 1), so that the first step already moves. Then constant, or from 1 down to
    `min_lr_ratio` at the last step along a half cosine or a line.
    """
    warmup_steps = round(schedule.warmup_fraction * num_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule.lr_schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps))
    fall = (1 + math.cos(math.pi * progress)) / 2 if schedule.lr_schedule == "cosine" else 1 - progress
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * fall

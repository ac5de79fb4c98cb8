"""The learning rate's course."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hedgehog.pipeline.config import ScheduleConfig
from hedgehog.pipeline.schedule import learning_rate_factor


def course(num_steps: int, **settings: object) -> list[float]:
    schedule = ScheduleConfig.model_validate(settings)
    return [learning_rate_factor(step, num_steps, schedule) for step in range(num_steps)]


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_rises_then_falls_to_the_last_ratio(name: str) -> None:
    factors = course(100, lr_schedule=name, warmup_fraction=0.1, min_lr_ratio=0.2)
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[9] < factors[10] == 1
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert factors[-1] == pytest.approx(0.2)


def test_halfway() -> None:
    assert course(11, lr_schedule="cosine", warmup_fraction=0, min_lr_ratio=0)[5] == pytest.approx(0.5)
    assert course(11, lr_schedule="linear", warmup_fraction=0, min_lr_ratio=0)[2] == pytest.approx(0.8)


def test_constant_and_a_single_step() -> None:
    assert course(5, lr_schedule="constant", warmup_fraction=0) == [1] * 5
    assert course(1, lr_schedule="cosine", warmup_fraction=0.05) == [1]

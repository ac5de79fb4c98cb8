"""The bootstrap against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from hedgehog.pipeline.bootstrap import (
    Interval,
    difference_of_weighted_means,
    draw_bootstrap_weights,
    mean,
    ratio_of_means,
    weighted_mean,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_bootstrap_depends_on_the_seed_only():
    values = torch.rand(50, generator=generator(7))
    first = mean(values, draw_bootstrap_weights(50, 200, generator(1)))
    again = mean(values, draw_bootstrap_weights(50, 200, generator(1)))
    other = mean(values, draw_bootstrap_weights(50, 200, generator(2)))
    assert first == again
    assert first.value == other.value and first.low != other.low


def test_bootstrap_interval_is_the_normal_one_for_a_large_sample():
    values = torch.randn(400, generator=generator(3), dtype=torch.float64)
    interval = mean(values, draw_bootstrap_weights(400, 4000, generator(4)))
    assert interval.low is not None and interval.high is not None
    expected = 1.96 * values.std().item() / math.sqrt(400)
    assert interval.high - interval.value == pytest.approx(expected, rel=0.1)
    assert interval.value - interval.low == pytest.approx(expected, rel=0.1)
    assert interval.half_width == pytest.approx(expected, rel=0.1)


def test_every_resample_has_n_examples():
    weights = draw_bootstrap_weights(11, 20, generator())
    assert weights.sum(1).tolist() == [11.0] * 20


def test_without_resamples_there_is_no_interval():
    interval = mean(torch.tensor([1.0, 3.0]), draw_bootstrap_weights(2, 0, generator()))
    assert interval == Interval(2.0, None, None)
    assert interval.half_width is None
    assert interval.as_dict(100) == {"value": 200.0, "low": None, "high": None}


def test_paired_ratio_of_a_scaled_copy_has_no_spread():
    values = torch.rand(30, generator=generator(5), dtype=torch.float64)
    ratio = ratio_of_means(0.5 * values, values, draw_bootstrap_weights(30, 100, generator(6)))
    assert ratio is not None
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([0.5, 0.5, 0.5])


def test_ratio_to_nothing_is_none():
    weights = draw_bootstrap_weights(3, 10, generator())
    assert ratio_of_means(torch.ones(3), torch.zeros(3), weights) is None


def test_loss_is_weighted_by_tokens_and_its_gap_is_paired():
    loss, tokens = torch.tensor([10.0, 2.0]), torch.tensor([5, 2])
    weights = draw_bootstrap_weights(2, 50, generator())
    assert weighted_mean(loss, tokens, weights).value == pytest.approx(12 / 7)
    gap = difference_of_weighted_means(loss + 0.5 * tokens, loss, tokens, weights)
    assert [gap.value, gap.low, gap.high] == pytest.approx([0.5, 0.5, 0.5])

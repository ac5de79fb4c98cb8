"""Bootstrap intervals of figures over examples, paired between the variants of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INTERVAL_LEVEL = 0.95

POINTS = 100
"""Shares are reported in points, as papers do: x 100."""


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its 95 % percentile-bootstrap interval (None where nothing was resampled)."""

    value: float
    low: float | None = None
    high: float | None = None

    def as_dict(self, scale: float = 1.0) -> dict[str, float | None]:
        """`{value, low, high}`, each multiplied by `scale` (100 turns fractions into points)."""
        return {
            "value": self.value * scale,
            "low": None if self.low is None else self.low * scale,
            "high": None if self.high is None else self.high * scale,
        }

    @property
    def half_width(self) -> float | None:
        """Half the interval's width: the ± of a table."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def draw_bootstrap_weights(num_examples: int, num_samples: int, generator: torch.Generator) -> Tensor:
    """How often each of N examples was drawn in each of S resamples of size N: float64 (S, N), each row sums to N.

    One matrix serves every score and variant of an evaluation, which makes differences and ratios *paired*.
    """
    weights_SN = torch.zeros(num_samples, num_examples, dtype=torch.float64)
    for row_N in weights_SN:
        drawn = torch.randint(num_examples, (num_examples,), generator=generator)
        row_N += torch.bincount(drawn, minlength=num_examples)
    return weights_SN


def interval(value: float, samples_S: Tensor) -> Interval:
    """A figure and, from its values in the S resamples, its interval; none where a resample has no finite value."""
    if samples_S.numel() == 0 or not bool(torch.isfinite(samples_S).all()):
        return Interval(value)
    tail = (1 - INTERVAL_LEVEL) / 2
    low, high = torch.quantile(samples_S, torch.tensor([tail, 1 - tail], dtype=samples_S.dtype)).tolist()
    return Interval(value, low, high)


def weighted_mean(values_N: Tensor, sizes_N: Tensor, weights_SN: Tensor) -> Interval:
    """Σ values / Σ sizes: the mean per token when values are an example's summed loss and sizes its tokens."""
    values_N, sizes_N = values_N.double(), sizes_N.double()
    return interval(float(values_N.sum() / sizes_N.sum()), (weights_SN @ values_N) / (weights_SN @ sizes_N))


def mean(values_N: Tensor, weights_SN: Tensor) -> Interval:
    """Mean over examples, with its bootstrap interval."""
    return weighted_mean(values_N, torch.ones_like(values_N), weights_SN)


def ratio_of_means(values_N: Tensor, reference_N: Tensor, weights_SN: Tensor) -> Interval | None:
    """mean(values) / mean(reference) with a paired interval; None where the reference's mean is 0."""
    values_N, reference_N = values_N.double(), reference_N.double()
    if float(reference_N.sum()) == 0:
        return None
    value = float(values_N.sum() / reference_N.sum())
    return interval(value, (weights_SN @ values_N) / (weights_SN @ reference_N))


def difference_of_weighted_means(
    values_N: Tensor, reference_N: Tensor, sizes_N: Tensor, weights_SN: Tensor
) -> Interval:
    """Σ (values - reference) / Σ sizes with a paired interval: the gap in loss per token between two models."""
    return weighted_mean(values_N.double() - reference_N.double(), sizes_N, weights_SN)

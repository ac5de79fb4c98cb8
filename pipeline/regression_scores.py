"""Pearson and Spearman correlation of predicted scores, and their mean squared error, with paired bootstrap intervals.

With weights w_n, how often a resample has row n, and ⟨a⟩ = Σ_n w_n a_n / Σ_n w_n:

    Pearson  = ⟨(x − ⟨x⟩)(y − ⟨y⟩)⟩ / √(⟨(x − ⟨x⟩)²⟩ ⟨(y − ⟨y⟩)²⟩)
    Spearman = the same of the ranks, where rows that are equal share the mean of theirs
    error    = ⟨(x − y)²⟩

A correlation that has no value, because all labels are equal or all predictions are, is 0: the predictions then say
nothing of the rows. In a resample this holds of what was drawn, and so do the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .bootstrap import POINTS, difference_of_weighted_means, interval, mean

_NUMBERS_AT_ONCE = 1 << 22
"""Resamples are taken together as long as their rows are no more than this: 32 MiB a tensor."""

Correlation = Callable[[Tensor, Tensor, Tensor], Tensor]


def pearson(x_SN: Tensor, y_SN: Tensor, weights_SN: Tensor) -> Tensor:
    """Pearson correlation (S,) of each resample, from -1 to 1; 0 where it has no value.

    Args:
        x_SN, y_SN: float64 (S, N) or (N,). weights_SN: float64, how often each row was drawn.
    """
    x_SN, y_SN = x_SN.expand_as(weights_SN), y_SN.expand_as(weights_SN)
    x_is_one_S, y_is_one_S = _is_one_value(x_SN, weights_SN), _is_one_value(y_SN, weights_SN)
    num_S1 = weights_SN.sum(-1, keepdim=True)
    x_SN = x_SN - (weights_SN * x_SN).sum(-1, keepdim=True) / num_S1
    y_SN = y_SN - (weights_SN * y_SN).sum(-1, keepdim=True) / num_S1
    covariance_S = (weights_SN * x_SN * y_SN).sum(-1)
    spread_S = (weights_SN * x_SN.square()).sum(-1).sqrt() * (weights_SN * y_SN.square()).sum(-1).sqrt()
    has_value_S = ~(x_is_one_S | y_is_one_S) & (spread_S > 0)
    return torch.where(has_value_S, covariance_S / spread_S, 0.0).clamp(-1, 1)


def spearman(x_N: Tensor, y_N: Tensor, weights_SN: Tensor) -> Tensor:
    """Spearman's rank correlation (S,), as `pearson`."""
    return pearson(ranks(x_N, weights_SN), ranks(y_N, weights_SN), weights_SN)


def ranks(x_N: Tensor, weights_SN: Tensor) -> Tensor:
    """The rank (S, N), from 1, of each row's value among those drawn; equal ones share the mean of theirs."""
    values_V, value_of_N = x_N.unique(return_inverse=True)
    count_SV = torch.zeros(len(weights_SN), len(values_V), dtype=torch.float64).index_add_(1, value_of_N, weights_SN)
    rank_SV = count_SV.cumsum(1) - (count_SV - 1) / 2
    return rank_SV[:, value_of_N]


def _is_one_value(x_SN: Tensor, weights_SN: Tensor) -> Tensor:
    """Whether all rows that were drawn have the same value: bool (S,)."""
    drawn_SN = weights_SN > 0
    greatest_S = torch.where(drawn_SN, x_SN, -torch.inf).amax(-1)
    smallest_S = torch.where(drawn_SN, x_SN, torch.inf).amin(-1)
    return greatest_S == smallest_S


@dataclass(frozen=True)
class RegressionScores:
    """Everything measured about one variant, over the N test rows in their order."""

    label: str
    scores_N: Tensor
    """float64: the score of each row."""
    predictions_N: Tensor
    """float64: what the model gave."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the variant is: attention, feature map, mean KL …"""

    def entry(self) -> dict[str, Any]:
        """What rouge.json says of the variant beside its figures."""
        return {"label": self.label, **self.facts}

    def figures(self, against: RegressionScores | None, keep_N: Tensor, weights_SN: Tensor) -> dict[str, Any]:
        """The figures over the rows that are kept; correlations in points (x 100), errors in squares of the score.

        Args:
            against: the variant that Pearson correlation and error are compared with.
            keep_N: bool, which rows; weights_SN: of these, how often each resample has them.
        """
        error_N = self._squared_errors()[keep_N]
        whole, drawn_S = self._correlations(pearson, keep_N, weights_SN)
        figures = {
            "num_examples": int(keep_N.sum()),
            "pearson": interval(whole, drawn_S).as_dict(POINTS),
            "spearman": interval(*self._correlations(spearman, keep_N, weights_SN)).as_dict(POINTS),
            "mean_squared_error": mean(error_N, weights_SN).as_dict(),
        }
        if against is not None:
            other, other_S = against._correlations(pearson, keep_N, weights_SN)
            figures["pearson_difference"] = interval(whole - other, drawn_S - other_S).as_dict(POINTS)
            gap = difference_of_weighted_means(
                error_N, against._squared_errors()[keep_N], torch.ones_like(error_N), weights_SN
            )
            figures["mean_squared_error_gap"] = gap.as_dict()
        return figures

    def _squared_errors(self) -> Tensor:
        return (self.predictions_N - self.scores_N).square()

    def _correlations(self, of: Correlation, keep_N: Tensor, weights_SN: Tensor) -> tuple[float, Tensor]:
        """That of the rows, and (S,) of the resamples."""
        x_N, y_N = self.predictions_N[keep_N], self.scores_N[keep_N]
        whole = float(of(x_N, y_N, torch.ones(1, len(x_N), dtype=torch.float64)))
        at_once = max(1, _NUMBERS_AT_ONCE // len(x_N))
        drawn = [of(x_N, y_N, weights_SN[start : start + at_once]) for start in range(0, len(weights_SN), at_once)]
        return whole, torch.cat(drawn) if drawn else torch.zeros(0, dtype=torch.float64)

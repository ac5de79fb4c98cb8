"""Accuracy, F1 and Matthews correlation of predicted classes, with their paired bootstrap intervals.

With M the confusion matrix, M_kj the rows of class k that were taken for j, all three follow from its diagonal
h_k = M_kk and its sums a_k = Σ_j M_kj and p_k = Σ_j M_jk; n is the number of rows:

    accuracy = Σ_k h_k / n
    F1_k     = 2 h_k / (a_k + p_k), the harmonic mean of class k's precision h_k / p_k and recall h_k / a_k
    MCC      = (n Σ_k h_k − Σ_k a_k p_k) / √((n² − Σ_k a_k²) (n² − Σ_k p_k²))

MCC for any number of classes is Gorodkin's R_K (2004); for two it is Matthews' φ. F1 is that of class 1 where there
are two classes, as GLUE has it, otherwise the mean over the classes (macro).

Where these have no value: F1_k is 0 where no row of class k was found, also where there is none and none was
predicted. Of more than two classes those that are neither among the rows' nor among the predicted ones are left out of
the mean. MCC is 0 where all rows are of one class, or all were taken for one (of two classes: where a row or column of
M is all 0): the predictions then say nothing of the classes. In a resample all this holds of what was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .bootstrap import POINTS, Interval, difference_of_weighted_means, interval, mean


@dataclass(frozen=True)
class ConfusionSums:
    """What the scores need of confusion matrices, over any leading dimensions: float64 (…, C), whole numbers."""

    hits_C: Tensor
    """Rows of each class that were recognised."""
    actual_C: Tensor
    """Rows of each class."""
    predicted_C: Tensor
    """Rows that were taken for each class."""

    @classmethod
    def count(cls, labels_N: Tensor, predictions_N: Tensor, num_classes: int, weights_SN: Tensor) -> ConfusionSums:
        """The sums (S, C) of S resamples, which contain row n weights_SN[s, n] times.

        Args:
            labels_N, predictions_N: int64, classes from 0.
            weights_SN: float64; S may be 0.
        """
        labels_NC = F.one_hot(labels_N, num_classes).double()
        predictions_NC = F.one_hot(predictions_N, num_classes).double()
        return cls(
            hits_C=weights_SN @ (labels_NC * predictions_NC),
            actual_C=weights_SN @ labels_NC,
            predicted_C=weights_SN @ predictions_NC,
        )

    def f1(self) -> Tensor:
        """F1 (…), a fraction: of class 1 where there are two, else the mean over those that occur."""
        occurs_C = (self.actual_C + self.predicted_C) > 0
        f1_C = torch.where(occurs_C, 2 * self.hits_C / (self.actual_C + self.predicted_C), 0.0)
        return f1_C[..., 1] if f1_C.shape[-1] == 2 else f1_C.sum(-1) / occurs_C.sum(-1)

    def mcc(self) -> Tensor:
        """Matthews correlation (…), from -1 to 1; 0 where it has no value."""
        num_rows = self.actual_C.sum(-1)
        covariance = num_rows * self.hits_C.sum(-1) - (self.actual_C * self.predicted_C).sum(-1)
        # whole numbers far below 2^53: the differences are exactly 0 where one class is all there is
        spread = num_rows**2 - self.actual_C.square().sum(-1)
        predicted_spread = num_rows**2 - self.predicted_C.square().sum(-1)
        has_value = (spread > 0) & (predicted_spread > 0)
        return torch.where(has_value, covariance / (spread.sqrt() * predicted_spread.sqrt()), 0.0)


@dataclass(frozen=True)
class ClassificationScores:
    """Everything measured about one variant, over the N test rows in their order."""

    label: str
    labels_N: Tensor
    """int64: the class of each row."""
    predictions_N: Tensor
    """int64: the class that the model found most likely."""
    loss_N: Tensor
    """float64: -log of the probability that it gave to the row's class, nats."""
    num_classes: int
    facts: dict[str, Any] = field(default_factory=dict)
    """What the variant is: attention, feature map, mean KL …"""

    def entry(self) -> dict[str, Any]:
        """What rouge.json says of the variant beside its figures."""
        return {"label": self.label, **self.facts}

    def figures(self, against: ClassificationScores | None, keep_N: Tensor, weights_SN: Tensor) -> dict[str, Any]:
        """The figures over the rows that are kept; shares and correlation in points (x 100), losses in nats a row.

        Args:
            against: the variant that accuracy and loss are compared with.
            keep_N: bool, which rows; weights_SN: of these, how often each resample has them.
        """
        right_N, loss_N = self._right()[keep_N], self.loss_N[keep_N]
        ones_N = torch.ones_like(loss_N)
        f1, mcc = self._of_matrix(keep_N, weights_SN)
        figures = {
            "num_examples": int(keep_N.sum()),
            "accuracy": mean(right_N, weights_SN).as_dict(POINTS),
            "f1": f1.as_dict(POINTS),
            "mcc": mcc.as_dict(POINTS),
            "loss_nats_per_row": mean(loss_N, weights_SN).as_dict(),
        }
        if against is not None:
            accuracy = difference_of_weighted_means(right_N, against._right()[keep_N], ones_N, weights_SN)
            loss = difference_of_weighted_means(loss_N, against.loss_N[keep_N], ones_N, weights_SN)
            figures["accuracy_difference"] = accuracy.as_dict(POINTS)
            figures["loss_gap_nats_per_row"] = loss.as_dict()
        return figures

    def _right(self) -> Tensor:
        return (self.labels_N == self.predictions_N).double()

    def _of_matrix(self, keep_N: Tensor, weights_SN: Tensor) -> tuple[Interval, Interval]:
        """F1 and Matthews correlation."""
        labels_N, predictions_N = self.labels_N[keep_N], self.predictions_N[keep_N]
        once_1N = torch.ones(1, len(labels_N), dtype=torch.float64)
        whole = ConfusionSums.count(labels_N, predictions_N, self.num_classes, once_1N)
        drawn = ConfusionSums.count(labels_N, predictions_N, self.num_classes, weights_SN)
        return interval(float(whole.f1()), drawn.f1()), interval(float(whole.mcc()), drawn.mcc())

"""Accuracy, F1 and Matthews correlation against forms written out cell by cell, and where they have no value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hedgehog.pipeline.bootstrap import draw_bootstrap_weights
from hedgehog.pipeline.classification_scores import ClassificationScores, ConfusionSums
from hedgehog.pipeline.score_report import summarize_scores

SCORES = ("accuracy", "f1", "mcc")


def slow_scores(labels: list[int], predictions: list[int], num_classes: int) -> dict[str, float]:
    """From the definitions, row by row; the correlation from indicator vectors, with no confusion matrix at all."""
    pairs = list(zip(labels, predictions, strict=True))
    f1s = {}
    for k in range(num_classes):
        found = sum(label == k and prediction == k for label, prediction in pairs)
        wrong = sum(label != k and prediction == k for label, prediction in pairs)
        missed = sum(label == k and prediction != k for label, prediction in pairs)
        if found:
            precision, recall = found / (found + wrong), found / (found + missed)
            f1s[k] = 2 * precision * recall / (precision + recall)
        elif num_classes == 2 or wrong or missed:
            f1s[k] = 0.0

    def covariance(of: list[int], with_: list[int]) -> float:
        total = 0.0
        for k in range(num_classes):
            mean_of, mean_with = (sum(value == k for value in values) / len(values) for values in (of, with_))
            total += sum(((a == k) - mean_of) * ((b == k) - mean_with) for a, b in zip(of, with_, strict=True))
        return total

    spread = covariance(labels, labels) * covariance(predictions, predictions)
    return {
        "accuracy": 100 * sum(label == prediction for label, prediction in pairs) / len(pairs),
        "f1": 100 * (f1s[1] if num_classes == 2 else sum(f1s.values()) / len(f1s)),
        "mcc": 100 * covariance(labels, predictions) / math.sqrt(spread) if spread > 1e-12 else 0.0,
    }


def scores(labels: list[int], predictions: list[int], num_classes: int, **fields: Any) -> ClassificationScores:
    loss = fields.pop("loss", [0.5] * len(labels))
    return ClassificationScores(
        label=fields.pop("label", "x"),
        labels_N=torch.tensor(labels),
        predictions_N=torch.tensor(predictions),
        loss_N=torch.tensor(loss, dtype=torch.float64),
        num_classes=num_classes,
        facts=fields,
    )


def figures(one: ClassificationScores, samples: int = 0, against: ClassificationScores | None = None) -> dict[str, Any]:
    num = len(one.labels_N)
    weights = draw_bootstrap_weights(num, samples, torch.Generator().manual_seed(3))
    return one.figures(against, torch.ones(num, dtype=torch.bool), weights)


def drawn_classes(seed: int, num_rows: int, num_classes: int) -> tuple[list[int], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    guesses = torch.randint(num_classes, (num_rows,), generator=generator)
    right = torch.rand(num_rows, generator=generator) < 0.6
    return labels.tolist(), torch.where(right, labels, guesses).tolist()


@pytest.mark.parametrize("num_classes", [2, 3, 7])
@pytest.mark.parametrize("num_rows", [2, 5, 40])
def test_scores_are_those_of_the_definitions(num_classes, num_rows):
    for seed in range(10):
        labels, predictions = drawn_classes(seed, num_rows, num_classes)
        got = figures(scores(labels, predictions, num_classes))
        expected = slow_scores(labels, predictions, num_classes)
        assert {name: got[name]["value"] for name in SCORES} == pytest.approx(expected, abs=1e-9), (labels, predictions)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_intervals_are_those_of_resampled_rows(num_classes):
    """Every resample written out as rows; few rows, so that some resamples lack a class or have one alone."""
    labels, predictions = drawn_classes(1, 8, num_classes)
    weights = draw_bootstrap_weights(8, 60, torch.Generator().manual_seed(3)).long().tolist()
    resamples = [[row for row, times in enumerate(one) for _ in range(times)] for one in weights]
    each = [
        slow_scores([labels[row] for row in rows], [predictions[row] for row in rows], num_classes)
        for rows in resamples
    ]
    got = figures(scores(labels, predictions, num_classes), samples=60)
    for name in SCORES:
        values = torch.tensor([one[name] for one in each], dtype=torch.float64)
        ends = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        assert [got[name]["low"], got[name]["high"]] == pytest.approx(ends, abs=1e-9), name


def test_matthews_of_two_classes_is_phi():
    labels, predictions = [1] * 6 + [0] * 12, [1] * 4 + [0] * 2 + [1] * 3 + [0] * 9  # tp 4, fn 2, fp 3, tn 9
    got = figures(scores(labels, predictions, 2))
    assert got["mcc"]["value"] == pytest.approx(100 * (4 * 9 - 3 * 2) / math.sqrt(7 * 6 * 12 * 11))
    assert got["f1"]["value"] == pytest.approx(100 * 2 * 4 / (2 * 4 + 3 + 2))
    assert got["accuracy"]["value"] == pytest.approx(100 * 13 / 18)


@pytest.mark.parametrize(
    ("labels", "predictions", "num_classes", "expected"),
    [
        ([1, 1, 0], [1, 1, 1], 2, (200 / 3, 80, 0)),  # all were taken for one class
        ([1, 1, 1], [1, 0, 1], 2, (200 / 3, 80, 0)),  # all are of one
        ([0, 0], [0, 0], 2, (100, 0, 0)),  # right, but the class that F1 is of does not occur
        ([1], [1], 2, (100, 100, 0)),
        ([1], [0], 2, (0, 0, 0)),
        ([0, 1], [1, 0], 2, (0, 0, -100)),
        ([0, 1], [0, 1], 2, (100, 100, 100)),
        ([0, 1, 0, 1], [0, 1, 0, 1], 3, (100, 100, 100)),  # class 2 neither occurs nor is predicted
        ([0, 1, 0, 1], [0, 1, 0, 2], 3, (75, 500 / 9, 100 * 6 / math.sqrt(8 * 10))),  # it is predicted only
        ([2], [2], 5, (100, 100, 0)),
        ([0, 0], [0, 0], 1, (100, 100, 0)),
    ],
)
def test_cases_without_a_value(labels, predictions, num_classes, expected):
    got = figures(scores(labels, predictions, num_classes), samples=20)
    assert tuple(got[name]["value"] for name in SCORES) == pytest.approx(expected)
    assert all(math.isfinite(end) for name in SCORES for end in got[name].values())


def test_without_resamples_there_are_no_intervals():
    got = figures(scores([0, 1, 1], [0, 1, 0], 2), against=scores([0, 1, 1], [0, 1, 1], 2))
    kinds = (*SCORES, "loss_nats_per_row", "accuracy_difference", "loss_gap_nats_per_row")
    assert set(got) == {"num_examples", *kinds}
    assert all(got[name]["low"] is None and got[name]["high"] is None for name in kinds)


def test_sums_of_one_row_counted_twice():
    sums = ConfusionSums.count(
        torch.tensor([0, 1]), torch.tensor([1, 1]), 2, torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]]).double()
    )
    assert sums.hits_C.tolist() == [[0, 1], [0, 0], [0, 2]]
    assert sums.actual_C.tolist() == [[1, 1], [2, 0], [0, 2]]
    assert sums.predicted_C.tolist() == [[0, 2], [0, 2], [0, 2]]


def test_differences_are_paired():
    """The same rows right in both: the difference has no spread, though either accuracy has."""
    labels, predictions = drawn_classes(2, 60, 2)
    one = scores(labels, predictions, 2, loss=[0.7] * 30 + [0.2] * 30)
    other = scores(labels, predictions, 2, loss=[0.4] * 30 + [-0.1] * 30)
    got = figures(one, samples=100, against=other)
    assert got["accuracy"]["low"] < got["accuracy"]["value"] < got["accuracy"]["high"]
    assert list(got["accuracy_difference"].values()) == [0, 0, 0]
    assert list(got["loss_gap_nats_per_row"].values()) == pytest.approx([0.3, 0.3, 0.3])
    better = scores(labels, labels, 2)
    gap = figures(one, samples=100, against=better)["accuracy_difference"]
    assert gap["value"] == pytest.approx(got["accuracy"]["value"] - 100) and gap["low"] < gap["value"] < gap["high"]


def test_subsets_and_reference():
    seen = torch.tensor([False, True, False])
    variants = {
        "main": scores([0, 1, 1], [0, 0, 1], 2, label="hedgehog", kl_mean_nats=0.5, loss=[0.1, 0.9, 0.2]),
        "softmax": scores([0, 1, 1], [1, 1, 1], 2, label="softmax + LoRA", loss=[0.4, 0.4, 0.4]),
    }

    def summarize(seen_in_train: torch.Tensor) -> dict[str, Any]:
        generators = {subset: torch.Generator().manual_seed(1) for subset in ("all", "unseen")}
        return summarize_scores(
            variants, seen_in_train_N=seen_in_train, reference="softmax", bootstrap_samples=30, generators=generators
        )

    got = summarize(seen)
    assert list(got["main"]) == ["label", "kl_mean_nats", "all", "unseen"]
    assert got["main"]["all"]["accuracy"]["value"] == pytest.approx(200 / 3)
    assert got["main"]["all"]["accuracy_difference"]["value"] == pytest.approx(0)
    assert got["main"]["unseen"]["accuracy"]["value"] == 100 and got["main"]["unseen"]["num_examples"] == 2
    assert got["main"]["unseen"]["loss_nats_per_row"]["value"] == pytest.approx(0.15)
    assert got["main"]["unseen"]["loss_gap_nats_per_row"]["value"] == pytest.approx(-0.25)
    assert "accuracy_difference" not in got["softmax"]["all"]
    assert summarize(torch.ones(3, dtype=torch.bool))["main"]["unseen"] is None
    assert got == summarize(seen)

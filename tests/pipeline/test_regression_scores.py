"""Correlations against the textbook's formulae, resample by resample."""

from __future__ import annotations

import math
import random

import pytest
import torch

from hedgehog.pipeline.bootstrap import draw_bootstrap_weights
from hedgehog.pipeline.regression_scores import RegressionScores, pearson, spearman
from hedgehog.pipeline.score_report import summarize_scores
from hedgehog.pipeline.score_table import comparison_lines, table_columns, table_rows


def by_hand(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    spread = math.fsum((a - mean_x) ** 2 for a in x) * math.fsum((b - mean_y) ** 2 for b in y)
    return covariance / math.sqrt(spread) if len(set(x)) > 1 and len(set(y)) > 1 else 0.0


def ranks_by_hand(x: list[float]) -> list[float]:
    return [sum(b < a for b in x) + (x.count(a) + 1) / 2 for a in x]


@pytest.mark.parametrize("seed", range(40))
def test_every_resample_is_what_its_rows_give(seed: int) -> None:
    """Rows written out as often as they were drawn; few different values, so that many ranks are shared."""
    rng = random.Random(seed)
    num = rng.randint(1, 12)
    x = [rng.choice([0.0, 1.0, 2.5, 2.5, rng.random()]) for _ in range(num)]
    y = [rng.choice([0.1 * a, 0.3, rng.random()]) for a in x]
    weights_SN = draw_bootstrap_weights(num, 7, torch.Generator().manual_seed(seed))
    x_N, y_N = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    for of, ranked in ((pearson, list), (spearman, ranks_by_hand)):
        found_S = of(x_N, y_N, weights_SN)
        for found, weights_N in zip(found_S.tolist(), weights_SN.tolist(), strict=True):
            drawn = [n for n, weight in enumerate(weights_N) for _ in range(int(weight))]
            drawn_x, drawn_y = ([values[n] for n in drawn] for values in (x, y))
            assert found == pytest.approx(by_hand(ranked(drawn_x), ranked(drawn_y)), abs=1e-12)


def test_far_from_zero_and_constant_predictions() -> None:
    weights = torch.ones(1, 4, dtype=torch.float64)
    far = 1e6 + torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    assert float(pearson(far, -far, weights)) == pytest.approx(-1)
    assert float(pearson(torch.full_like(far, 0.1), far, weights)) == 0, "they say nothing of the rows"
    assert float(spearman(far, torch.full_like(far, 0.1), weights)) == 0


def scores(label: str, predictions: list[float], truth: list[float]) -> RegressionScores:
    return RegressionScores(
        label, torch.tensor(truth).double(), torch.tensor(predictions).double(), {"kl_mean_nats": 0.5}
    )


def test_figures_and_their_table() -> None:
    truth = [0.0, 1.0, 2.0, 3.0, 5.0]
    variants = {"main": scores("ours", [0.5, 1.0, 2.0, 2.0, 4.0], truth), "soft": scores("theirs", truth, truth)}
    figures = summarize_scores(
        variants,
        seen_in_train_N=torch.tensor([True, False, False, False, False]),
        reference="soft",
        bootstrap_samples=50,
        generators={name: torch.Generator().manual_seed(0) for name in ("all", "unseen")},
    )
    every, unseen = figures["main"]["all"], figures["main"]["unseen"]
    assert every["mean_squared_error"]["value"] == pytest.approx((0.25 + 1 + 1) / 5)
    assert every["mean_squared_error_gap"]["value"] == pytest.approx(0.45)
    assert unseen["num_examples"] == 4 and unseen["mean_squared_error"]["value"] == pytest.approx(0.5)
    expected = 100 * by_hand([0.5, 1.0, 2.0, 2.0, 4.0], truth)
    assert every["pearson"]["value"] == pytest.approx(expected)
    assert every["pearson_difference"]["value"] == pytest.approx(expected - 100)
    assert every["pearson"]["low"] <= every["pearson"]["value"] <= every["pearson"]["high"] <= 100
    assert table_columns(figures)[0][1:4] == ("Pearson", "Spearman", "sq. error")
    training = {name: {"minutes": 1.0, "peak_memory_bytes": None} for name in variants}
    row = table_rows(figures, training)[0]
    assert len(row) == len(table_columns(figures)[0]) and row[0] == "ours" and row[3] == "0.4500"
    (line,) = comparison_lines(figures, "soft")
    assert line.startswith("ours: Pearson correlation is -") and "against theirs, squared error +0.4500 (" in line


def test_many_rows_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from hedgehog.pipeline import regression_scores

    torch.manual_seed(1)
    truth = torch.rand(30).double()
    one = RegressionScores("one", truth, truth + torch.rand(30).double())
    weights = draw_bootstrap_weights(30, 20, torch.Generator().manual_seed(0))
    keep = torch.ones(30, dtype=torch.bool)
    whole = one.figures(None, keep, weights)
    monkeypatch.setattr(regression_scores, "_NUMBERS_AT_ONCE", 70)
    assert one.figures(None, keep, weights) == whole

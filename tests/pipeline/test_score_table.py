"""The table and the sentences, from figures made by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from hedgehog.pipeline.score_table import comparison_lines, markdown_report, table_columns, table_rows


def figure(value: float, half_width: float | None = None) -> dict[str, float | None]:
    if half_width is None:
        return {"value": value, "low": None, "high": None}
    return {"value": value, "low": value - half_width, "high": value + half_width}


def variant(label: str, kl: float | None = None, **figures: Any) -> dict[str, Any]:
    rouge = {"rouge1": figure(37.5, 12.5), "rouge2": figure(25.0), "rougeL": figure(37.5)}
    return {"label": label, "kl_mean_nats": kl, "all": {**rouge, **figures}}


FIGURES = {
    "main": variant(
        "hedgehog",
        0.5,
        loss_nats_per_token=figure(2.0),
        perplexity=figure(7.389),
        rouge1_ratio=figure(0.375, 0.125),
        loss_gap_nats_per_token=figure(0.5, 0.25),
    ),
    "softmax": variant("softmax + LoRA", loss_nats_per_token=figure(1.5), perplexity=figure(4.48)),
    "plain": variant("plain", rouge1_ratio=figure(0.0)),
}


def test_table_and_sentences():
    training = {
        "main": {"minutes": 2.25, "peak_memory_bytes": 3 << 20},
        "softmax": {"minutes": 1.0, "peak_memory_bytes": 1 << 20},
        "plain": {"minutes": None, "peak_memory_bytes": None},
    }
    rows = table_rows(FIGURES, training)
    assert rows[0] == [
        "hedgehog", "37.50 ± 12.50", "25.00", "37.50", "2.0000", "7.39", "0.5000", "2.2", "3.0 MiB",
    ]  # fmt: skip
    assert rows[2][4:] == ["–", "–", "–", "–", "–"]
    assert all(len(row) == len(table_columns(FIGURES)[0]) for row in rows)
    lines = comparison_lines(FIGURES, "softmax")
    assert lines == [
        "hedgehog: ROUGE-1 is 37.5% of softmax + LoRA's (95 % interval 25.0% to 50.0%), "
        "loss +0.5000 nats a token (+0.2500 to +0.7500)",
        "plain: ROUGE-1 is 0.0% of softmax + LoRA's",
    ]
    report = markdown_report("title", table_columns(FIGURES)[0], rows, lines, ["note"])
    assert report.startswith("# title\n\n| variant | ROUGE-1 |") and report.endswith("note\n")
    assert report.count("\n| ") == 4


@pytest.mark.parametrize(
    ("value", "cell"),
    [(9_999_999.0, "9999999.00"), (1e7, "1.000e+07"), (1e300, "1.000e+300"), (math.inf, "inf"), (math.nan, "nan")],
)
def test_no_perplexity_makes_a_table_wide(value, cell):
    figures = {"main": variant("x", 1e300, loss_nats_per_token=figure(690.8), perplexity=figure(value))}
    row = table_rows(figures, {"main": {"minutes": None, "peak_memory_bytes": None}})[0]
    assert row[4:7] == ["690.8000", cell, "1.000e+300"]


def classified(label: str, accuracy: float, **figures: Any) -> dict[str, Any]:
    scores = {"accuracy": figure(accuracy, 1.5), "f1": figure(88.0), "mcc": figure(-3.25)}
    return {"label": label, "kl_mean_nats": None, "all": {**scores, "loss_nats_per_row": figure(0.25), **figures}}


CLASSIFIED = {
    "main": classified(
        "hedge | hog",
        90.5,
        accuracy_difference=figure(0.3, 0.8),
        loss_gap_nats_per_row=figure(-0.0125, 0.005),
    ),
    "softmax": classified("softmax + LoRA", 90.2),
    "plain": classified("plain", 50.0, accuracy_difference=figure(-40.2), loss_gap_nats_per_row=figure(0.5)),
}


def test_classes_have_columns_and_sentences_of_their_own():
    columns, narrow = table_columns(CLASSIFIED)
    assert columns == ("variant", "accuracy", "F1", "MCC", "loss", "mean KL", "train min", "peak memory")
    assert narrow == ("variant", "accuracy", "F1", "MCC", "loss", "KL", "min", "memory")
    training = {name: {"minutes": 1.0, "peak_memory_bytes": 1 << 20} for name in CLASSIFIED}
    rows = table_rows(CLASSIFIED, training)
    assert rows[0] == ["hedge | hog", "90.50 ± 1.50", "88.00", "-3.25", "0.2500", "–", "1.0", "1.0 MiB"]
    lines = comparison_lines(CLASSIFIED, "softmax")
    assert lines == [
        "hedge | hog: accuracy is +0.3 points (-0.5 to +1.1) against softmax + LoRA, "
        "loss -0.0125 nats a row (-0.0175 to -0.0075)",
        "plain: accuracy is -40.2 points against softmax + LoRA, loss +0.5000 nats a row",
    ]
    report = markdown_report("title", columns, rows, lines, ["note"])
    assert "| hedge \\| hog | 90.50 ± 1.50 |" in report and comparison_lines(CLASSIFIED, None) == []


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0.0"), (-0.04, "0.0"), (0.05, "+0.1"), (-0.06, "-0.1")])
def test_a_difference_of_nothing_has_no_sign(value, shown):
    figures = CLASSIFIED | {"plain": classified("plain", 50.0, accuracy_difference=figure(value))}
    assert comparison_lines(figures, "softmax")[1].startswith(f"plain: accuracy is {shown} points against")


def test_login_nodes_may_show_scores():
    code = "import sys, hedgehog.pipeline.score_table; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"

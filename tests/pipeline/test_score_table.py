"""The table and the sentences, from figures made by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from hedgehog.pipeline.score_table import TABLE_COLUMNS, comparison_lines, markdown_report, table_rows


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
    assert all(len(row) == len(TABLE_COLUMNS) for row in rows)
    lines = comparison_lines(FIGURES, "softmax")
    assert lines == [
        "hedgehog: ROUGE-1 is 37.5% of softmax + LoRA's (95 % interval 25.0% to 50.0%), "
        "loss +0.5000 nats a token (+0.2500 to +0.7500)",
        "plain: ROUGE-1 is 0.0% of softmax + LoRA's",
    ]
    report = markdown_report("title", TABLE_COLUMNS, rows, lines, ["note"])
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


def test_login_nodes_may_show_scores():
    code = "import sys, hedgehog.pipeline.score_table; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"

"""Tokens a second, counted from what steps record."""

from __future__ import annotations

import math

from hedgehog.pipeline.report.cost import tokens_per_s


def test_tokens_over_the_time_of_the_same_steps():
    records = [{"tokens": 100, "step_s": 1.0}, {"tokens": 300, "step_s": 1.0}, {"tokens": 500}, {"step_s": 9.0}]
    assert tokens_per_s(records) == 200
    assert tokens_per_s([*records, {"tokens": math.nan, "step_s": 1.0}, {"tokens": "x", "step_s": 1.0}]) == 200


def test_evaluate_counts_what_it_generates():
    records = [
        {"tokens": 100, "step_s": 1.0, "new_tokens_per_summary": 9.0},
        {"tokens": 9000, "step_s": 1.0, "loss_nats": 2.0},
    ]
    assert tokens_per_s(records, generating=True) == 100


def test_nothing_recorded():
    assert tokens_per_s([]) is None and tokens_per_s([{"tokens": 0, "step_s": 0.0}]) is None

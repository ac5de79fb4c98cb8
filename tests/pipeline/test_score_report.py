"""rouge.json's figures, from scores made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hedgehog.pipeline.config import FinetuneConfig, ModelConfig, RunConfig
from hedgehog.pipeline.rouge import score_rouge
from hedgehog.pipeline.score_report import VariantScores, summarize_scores
from hedgehog.pipeline.score_table import comparison_lines
from hedgehog.pipeline.variants import softmax_reference

REFERENCES = ["ann eats pizza", "bob runs home", "cem sings songs", "dee sleeps late"]
SEEN = torch.tensor([False, True, False, False])


def scores(label: str, predictions: list[str], loss: list[float] | None) -> VariantScores:
    return VariantScores(
        label=label,
        rouge=score_rouge(predictions, REFERENCES),
        loss_N=None if loss is None else torch.tensor(loss, dtype=torch.float64),
        num_tokens_N=None if loss is None else torch.tensor([4, 4, 2, 2]),
        generation={"num_truncated": 0},
        facts={"kl_mean_nats": 0.5 if label == "hedgehog" else None},
    )


def summarize(samples: int = 100, seen: torch.Tensor = SEEN, reference: str | None = "softmax") -> dict:
    variants = {
        "main": scores("hedgehog", ["ann eats pizza", "", "cem", "x"], [8.0, 8.0, 6.0, 2.0]),
        "softmax": scores("softmax + LoRA", REFERENCES, [4.0, 8.0, 4.0, 2.0]),
        "plain": scores("plain", ["", "", "", ""], None),
    }
    generators = {subset: torch.Generator().manual_seed(1) for subset in ("all", "unseen")}
    return summarize_scores(
        variants, seen_in_train_N=seen, reference=reference, bootstrap_samples=samples, generators=generators
    )


def test_figures_counted_by_hand():
    figures = summarize()
    main = figures["main"]["all"]
    # F1: 1, 0, 2 * 1 * (1/3) / (4/3) = 1/2, 0
    assert main["rouge1"]["value"] == pytest.approx(100 * 1.5 / 4)
    assert main["rouge1"]["recall"] == pytest.approx(100 * (1 + 1 / 3) / 4)
    assert main["rouge1_ratio"]["value"] == pytest.approx(1.5 / 4)
    assert main["loss_nats_per_token"]["value"] == pytest.approx(24 / 12)
    assert main["perplexity"]["value"] == pytest.approx(math.exp(2))
    assert main["loss_gap_nats_per_token"]["value"] == pytest.approx((24 - 18) / 12)
    assert main["num_reference_tokens"] == 12
    assert main["rouge1"]["low"] < main["rouge1"]["value"] < main["rouge1"]["high"]


def test_rows_seen_in_train_are_left_out_of_unseen():
    figures = summarize()
    assert figures["main"]["unseen"]["num_examples"] == 3
    assert figures["main"]["unseen"]["rouge1"]["value"] == pytest.approx(100 * 1.5 / 3)
    assert figures["main"]["unseen"]["loss_nats_per_token"]["value"] == pytest.approx(16 / 8)
    everything_seen = summarize(seen=torch.ones(4, dtype=torch.bool))
    assert everything_seen["main"]["unseen"] is None


def test_intervals_are_the_same_when_drawn_again_and_absent_without_resamples():
    assert summarize() == summarize()
    assert summarize(samples=0)["main"]["all"]["rouge1"]["low"] is None


def test_the_baseline_is_not_compared_with_itself_nor_anything_without_one():
    assert "rouge1_ratio" not in summarize()["softmax"]["all"]
    assert "rouge1_ratio" not in summarize(reference=None)["main"]["all"]
    assert comparison_lines(summarize(reference=None), None) == []


def test_softmax_reference_is_the_finetuned_softmax_variant():
    linear = RunConfig(name="r")
    softmax = RunConfig(name="r", model=ModelConfig(attention="softmax"))
    zero_shot = softmax.model_copy(update={"finetune": FinetuneConfig(enabled=False)})
    assert softmax_reference({"main": linear, "zero": zero_shot, "soft": softmax}) == "soft"
    assert softmax_reference({"main": linear, "zero": zero_shot}) is None

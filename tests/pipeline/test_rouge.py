"""ROUGE against rouge_score itself and against cases counted by hand; the bootstrap against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from rouge_score import rouge_scorer

from hedgehog.pipeline.rouge import (
    ROUGE_TYPES,
    Interval,
    difference_of_weighted_means,
    draw_bootstrap_weights,
    mean,
    num_unscorable,
    ratio_of_means,
    score_rouge,
    split_sentences,
    weighted_mean,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Anna is late. Bob waits!", ["Anna is late.", "Bob waits!"]),
        ('She said "no." Then she left.', ['She said "no."', "Then she left."]),
        ("One line\nand another\n\n", ["One line", "and another"]),
        ("At 5.30 they meet", ["At 5.30 they meet"]),
        ("Really?! Yes… fine", ["Really?!", "Yes…", "fine"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences_end_where_the_rule_says(text, sentences):
    assert split_sentences(text) == sentences


def test_scores_are_those_of_rouge_score():
    predictions = ["Anna was meeting Bob. They were eating pizza.", "Bob is late", "x"]
    references = ["Anna meets Bob at 5. They eat pizza together.", "Bob is late", "Anna is late"]
    scores = score_rouge(predictions, references)
    direct = rouge_scorer.RougeScorer(list(ROUGE_TYPES), use_stemmer=True)
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        expected = direct.score(reference.replace(". ", ".\n"), prediction.replace(". ", ".\n"))
        for name in ROUGE_TYPES:
            assert scores.f1_N[name][index].item() == expected[name].fmeasure
            assert scores.precision_N[name][index].item() == expected[name].precision
            assert scores.recall_N[name][index].item() == expected[name].recall


def test_case_counted_by_hand():
    # reference: the cat sat on the mat (6 words), prediction: the cat sat (3 words)
    scores = score_rouge(["the cat sat"], ["The cat sat on the mat."])
    assert scores.precision_N["rouge1"].item() == 1.0
    assert scores.recall_N["rouge1"].item() == 0.5
    assert scores.f1_N["rouge1"].item() == pytest.approx(2 / 3)
    assert scores.f1_N["rouge2"].item() == pytest.approx(2 * 1 * (2 / 5) / (1 + 2 / 5))
    assert scores.f1_N["rougeL"].item() == pytest.approx(2 / 3)


def test_lsum_differs_from_l_when_sentences_are_swapped():
    scores = score_rouge(["Bob waits. Anna sings."], ["Anna sings. Bob waits."])
    assert scores.f1_N["rougeL"].item() == pytest.approx(0.5)
    assert scores.f1_N["rougeLsum"].item() == pytest.approx(1.0)


def test_stemming_counts_inflections():
    assert score_rouge(["meeting"], ["meetings"]).f1_N["rouge1"].item() == 1.0


def test_empty_and_unicode():
    scores = score_rouge(["", "Zoë café", "привет мир", "😀"], ["Anna", "Zoë café", "привет мир", "😀 ok"])
    # rouge-score keeps [a-z0-9] only: Cyrillic and emoji leave no token, accents split words, alike on both sides
    assert scores.f1_N["rouge1"].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert all(len(scores.f1_N[name]) == 4 for name in ROUGE_TYPES)
    assert score_rouge([], []).f1_N["rouge1"].numel() == 0


def test_references_that_rouge_cannot_score_are_counted():
    references = ["Zoë café", "привет мир", "😀", "", "İ", "Anna", "７", "7"]
    without = [not score_rouge([text], [text]).f1_N["rouge1"].item() for text in references]
    assert num_unscorable(references) == sum(without) == 4
    assert [num_unscorable([text]) for text in references] == [int(none) for none in without]


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        score_rouge(["a", "b"], ["a"])


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

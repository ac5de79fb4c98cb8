"""ROUGE against rouge_score itself and against cases counted by hand."""

from __future__ import annotations

import pytest
from rouge_score import rouge_scorer

from hedgehog.pipeline.rouge import (
    ROUGE_TYPES,
    num_unscorable,
    score_rouge,
    split_sentences,
)


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

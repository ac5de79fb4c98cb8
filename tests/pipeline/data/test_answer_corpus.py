"""The questions of the built-in BERT: what a guess would score, which README and the module tell."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from hedgehog.pipeline.data import dialogue_words as words
from hedgehog.pipeline.data.answer_corpus import ANSWERS, GeneratedQuestion, generate_questions

QUESTIONS = generate_questions(3000, 5)


def named(row: GeneratedQuestion) -> list[str]:
    """Days or times, as the answer is, in the order in which each was named last."""
    kind = words.DAYS if row.answer in words.DAYS else words.TIMES
    ends = {slot: [m.start() for m in re.finditer(rf"\b{slot}\b", row.dialogue)] for slot in kind}
    return sorted((slot for slot in kind if ends[slot]), key=lambda slot: ends[slot][-1])


def test_seeded_distinct_and_a_longer_list_begins_with_the_shorter():
    assert generate_questions(40, 5) == QUESTIONS[:40]
    assert generate_questions(40, 6) != QUESTIONS[:40]
    assert len({row.dialogue for row in QUESTIONS}) == len(QUESTIONS)


def test_every_class_is_an_answer_and_none_is_frequent():
    counts = Counter(row.answer for row in QUESTIONS)
    assert set(counts) == set(ANSWERS)
    assert max(counts.values()) < 0.13 * len(QUESTIONS)


def test_a_guess_is_right_in_85_of_100_and_the_last_one_named_in_99():
    guessed = sum(row.answer in named(row) and 1 / len(named(row)) for row in QUESTIONS) / len(QUESTIONS)
    assert guessed == pytest.approx(0.85, abs=0.01)
    assert sum(named(row)[-1:] == [row.answer] for row in QUESTIONS) / len(QUESTIONS) == pytest.approx(0.99, abs=0.006)

"""A generated corpus for classification: a dialogue and a question about it; the class is the answer, a day or a time.

Many dialogues name several days and times, and what they agree on is often not what was proposed first: a model that
only sees which words occur is wrong where one that reads is right.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from . import dialogue_words as words
from .dialogue_corpus import play_dialogues

ANSWERS = words.DAYS + words.TIMES
"""Names of the classes, by their number."""


@dataclass(frozen=True)
class GeneratedQuestion:
    """A dialogue, one line a turn; a question about it; and its answer, one of ANSWERS."""

    dialogue: str
    question: str
    answer: str


def generate_questions(count: int, seed: int) -> list[GeneratedQuestion]:
    """`count` different dialogues with a question each. The first n of a longer list are the list of n."""
    return list(islice(_questions(seed), count))


def _questions(seed: int) -> Iterator[GeneratedQuestion]:
    rng = random.Random(seed + 2)
    for dialogue in play_dialogues(seed):
        known = [pair for pair in dialogue.questions if pair[1] in ANSWERS]
        if known:
            question, answer = rng.choice(known)
            yield GeneratedQuestion(dialogue.text, question, answer)

from __future__ import annotations

import re
from collections import Counter

from hedgehog.pipeline.data import dialogue_words as words
from hedgehog.pipeline.data.dialogue_corpus import SCENES, generate_dialogues, pretraining_texts

DIALOGUES = generate_dialogues(1500, 5)


def test_seeded_distinct_and_a_longer_list_begins_with_the_shorter():
    assert generate_dialogues(40, 5) == DIALOGUES[:40]
    assert generate_dialogues(40, 6) != DIALOGUES[:40]
    assert len({d.text for d in DIALOGUES}) == len(DIALOGUES)


def test_every_name_in_a_summary_or_answer_can_be_read_in_the_dialogue():
    names = set(words.HER_NAMES + words.HIS_NAMES)
    for dialogue in DIALOGUES:
        told = [dialogue.summary, dialogue.story, *(answer for _, answer in dialogue.questions)]
        for text in told:
            for name in set(re.findall(r"\w+", text)) & names:
                assert name in dialogue.text, (name, dialogue)
        assert "{" not in dialogue.text + "".join(told)


def test_summaries_take_reading():
    # No outcome is so frequent that it could be guessed: neither whole summaries nor their skeletons.
    assert max(Counter(d.summary for d in DIALOGUES).values()) <= 8
    skeletons = Counter(re.sub(r"\b[A-Z]\w+|\b(at|on) \w+", "_", d.summary) for d in DIALOGUES)
    assert max(skeletons.values()) < 0.08 * len(DIALOGUES)
    # Summaries are not a line of the dialogue.
    assert not any(d.summary in d.text for d in DIALOGUES)
    # Times, places and days that were proposed and dropped, or chatted about, stand beside the agreed ones.
    distracted = 0
    for dialogue in DIALOGUES:
        said, told = dialogue.text.lower(), dialogue.summary.lower()
        slots = [slot for slot in words.TIMES + words.PLACES + words.DAYS if re.search(rf"\b{slot}\b", said)]
        distracted += any(not re.search(rf"\b{slot}\b", told) for slot in slots)
    assert distracted > 0.3 * len(DIALOGUES)


def test_lengths_and_scenes_vary():
    turns = Counter(len(d.text.split("\n")) for d in DIALOGUES)
    assert min(turns) >= 3
    assert sum(count for length, count in turns.items() if length <= 9) > 0.8 * len(DIALOGUES)
    assert len(SCENES) >= 8
    assert sum(bool(re.search(r"\bcan't\b|\bbut\b|because", d.summary)) for d in DIALOGUES) > 0.15 * len(DIALOGUES)


def test_every_line_has_a_speaker():
    for dialogue in DIALOGUES:
        assert all(re.match(r"^[A-Z]\w+: \S.*$", line) for line in dialogue.text.split("\n"))


def test_pretraining_knows_no_summary():
    summaries = {d.summary for d in generate_dialogues(300, 5)}
    texts = list(pretraining_texts(300, 5))
    assert len(texts) == 300
    assert list(pretraining_texts(300, 5)) == texts
    assert not any(summary in text for summary in summaries for text in texts)
    assert not any("Summar" in text for text in texts)

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hedgehog.pipeline.config import DataConfig
from hedgehog.pipeline.data import dialogue_words as words
from hedgehog.pipeline.data.answer_corpus import ANSWERS, generate_questions
from hedgehog.pipeline.data.dialogue_corpus import generate_dialogues
from hedgehog.pipeline.data.examples import LabelledExample
from hedgehog.pipeline.data.tiny_tokenizer import make_tokenizer
from hedgehog.pipeline.data.tokenize import choose_pad_id, load_tokenizer
from hedgehog.pipeline.data.tokenize_labelled import RowEncoder, tokenize_rows
from hedgehog.pipeline.data.tokens import TokenizedSplit
from hedgehog.pipeline.errors import ModelError

SIZE = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    make_tokenizer("bert", texts(), SIZE, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder), generates=False)


def texts() -> list[str]:
    return [text for one in generate_questions(300, 3) for text in (one.dialogue, one.question)]


def example(i: int, text: str, second: str | None = None) -> LabelledExample:
    return LabelledExample(str(i), text, second, i % 3)


def settings(**fields: Any) -> DataConfig:
    return DataConfig(kind="classification", **fields)


def test_equal_texts_give_an_equal_tokenizer(folder: Path, tmp_path: Path) -> None:
    """Its library hands out ids in an order that differs each time, unless all characters are named."""
    for i in range(4):
        (tmp_path / str(i)).mkdir()
        make_tokenizer("bert", texts(), SIZE, tmp_path / str(i))
        assert (tmp_path / str(i) / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_tiny_tokenizer_is_a_berts(tokenizer: Any, tmp_path: Path) -> None:
    assert type(tokenizer).__name__ == "BertTokenizer"
    assert [tokenizer.convert_tokens_to_ids(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2, 3]
    assert len(tokenizer) == 1 + max(tokenizer.get_vocab().values()) == SIZE
    assert choose_pad_id(tokenizer) == (0, "the tokenizer's pad token")
    read = tokenizer("\n".join(texts()), verbose=False).input_ids
    assert tokenizer.unk_token_id not in read
    make_tokenizer("bert", texts()[:4], SIZE, tmp_path)
    few = load_tokenizer(str(tmp_path), generates=False)
    assert len(few) == SIZE and "[unused0]" in few.get_vocab()
    with pytest.raises(ModelError, match="no EOS token"):
        load_tokenizer(str(tmp_path))


def test_rows_are_what_the_tokenizer_makes_of_them(tokenizer: Any) -> None:
    asked = generate_questions(30, 0)
    for second in (True, False):
        examples = [example(i, one.dialogue, one.question if second else None) for i, one in enumerate(asked)]
        found = tokenize_rows(tokenizer, examples, settings())
        assert found.examples == examples and found.dropped_overlong == found.truncated == 0
        assert found.split.labels is not None and found.split.labels.tolist() == [i % 3 for i in range(30)]
        for i, one in enumerate(asked):
            expected = tokenizer(one.dialogue, one.question) if second else tokenizer(one.dialogue)
            ids, border = found.split[i]
            assert ids.tolist() == expected["input_ids"]
            assert border == expected["token_type_ids"].count(0)
            assert ids[0] == tokenizer.cls_token_id and ids[border - 1] == ids[-1] == tokenizer.sep_token_id


def test_special_tokens_in_a_text_are_characters(tokenizer: Any) -> None:
    (row,) = RowEncoder(tokenizer).rows(["Ann [SEP] Ben"], ["[CLS] [PAD]"])
    special = {tokenizer.sep_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id}
    assert [token for token in row[0] if token in special] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert [token for token in row[1] if token in special] == [tokenizer.sep_token_id]


def test_overlong_rows_are_dropped_or_cut_where_they_are_longer(tokenizer: Any) -> None:
    short, long = "at noon", " ".join(["today"] * 40)
    rows = [example(0, short, short), example(1, long, short), example(2, short, long), example(3, long, long)]
    dropped = tokenize_rows(tokenizer, rows, settings(max_length_tokens=20))
    assert [one.id for one in dropped.examples] == ["0"] and dropped.dropped_overlong == 3
    assert dropped.split.labels is not None and dropped.split.labels.tolist() == [0]
    cut = tokenize_rows(tokenizer, rows, settings(max_length_tokens=20, overlong="truncate"))
    assert cut.truncated == 3 and cut.dropped_overlong == 0 and cut.examples == rows
    assert cut.split.lengths.tolist()[1:] == [20, 20, 20]
    whole = tokenize_rows(tokenizer, rows, settings()).split
    for i, (first, second) in enumerate(((None, 3), (4, None), (None, None)), start=1):
        (ids, border), (all_ids, all_border) = cut.split[i], whole[i]
        assert first in (None, border) and second in (None, 20 - border)
        assert ids[: border - 1].tolist() == all_ids[: border - 1].tolist()
        assert ids[border:-1].tolist() == all_ids[all_border : all_border + 19 - border].tolist()
        assert ids[border - 1] == ids[-1] == tokenizer.sep_token_id
    assert abs(int(cut.split.prompt_lengths[3]) - 10) <= 1
    single = tokenize_rows(tokenizer, [example(0, long)], settings(max_length_tokens=20, overlong="truncate")).split
    assert single[0][0].tolist() == [*whole[1][0][:19].tolist(), tokenizer.sep_token_id]
    assert len(tokenize_rows(tokenizer, rows, settings()).split) == 4, "cutting leaves no trace in the tokenizer"


def test_no_rows(tokenizer: Any) -> None:
    found = tokenize_rows(tokenizer, [], settings())
    assert len(found.split) == 0 and isinstance(found.split, TokenizedSplit)


def test_another_familys_tokenizer_is_refused(tmp_path: Path) -> None:
    make_tokenizer("gpt2", texts(), 300, tmp_path)
    with pytest.raises(ModelError, match=r"does not put \[CLS\] and \[SEP\] around a text.*model\.tokenizer"):
        RowEncoder(load_tokenizer(str(tmp_path)))


def test_the_questions_of_the_tiny_corpus() -> None:
    asked = generate_questions(3000, 5)
    assert generate_questions(40, 5) == asked[:40]
    assert len({one.dialogue for one in asked}) == 3000
    assert {one.answer for one in asked} == set(ANSWERS) and len(ANSWERS) == len(set(ANSWERS)) == 15
    assert all(one.answer in one.dialogue for one in asked)
    # it takes the question, and where several answers of its kind are named their order
    several = [one for one in asked if sum(answer in one.dialogue for answer in ANSWERS) > 1]
    last = [one for one in several if max(ANSWERS, key=one.dialogue.rfind) == one.answer]
    assert len(several) > 0.5 * len(asked) and 0.3 < len(last) / len(several) < 0.8
    kinds = [words.DAYS if one.answer in words.DAYS else words.TIMES for one in asked]
    guesses = [1 / sum(answer in one.dialogue for answer in kind) for one, kind in zip(asked, kinds, strict=True)]
    assert 0.8 < sum(guesses) / len(asked) < 0.9
    assert generate_dialogues(20, 5) == generate_dialogues(50, 5)[:20]

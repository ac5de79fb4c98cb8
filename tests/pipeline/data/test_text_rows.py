"""Running text becomes rows: nothing lost, nothing twice, EOS where a text ends, a message for what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hedgehog.pipeline.config import DataConfig
from hedgehog.pipeline.data import json_rows, text_rows
from hedgehog.pipeline.data.text_rows import describe_counts, read_text_splits
from hedgehog.pipeline.data.tiny_tokenizer import make_tokenizer
from hedgehog.pipeline.data.tokenize import load_tokenizer
from hedgehog.pipeline.data.tokenizer_fit import check_text_rows
from hedgehog.pipeline.errors import DataError, ModelError

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs", "that", "ran", "to", "park", "Friday", "\n"]


def text(num_words: int, seed: int = 0) -> str:
    picks = torch.randint(0, len(WORDS), (num_words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in picks) + "\n"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def tokenizer(request, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    make_tokenizer(request.param, [text(2000), "Zoë's café 😀"], 320, folder)
    return load_tokenizer(str(folder))


@pytest.fixture
def files(tmp_path) -> Path:
    (tmp_path / "train.txt").write_text(text(3000), encoding="utf-8")
    (tmp_path / "test.txt").write_text(text(400, seed=1), encoding="utf-8")
    return tmp_path


def splits(tokenizer: Any, folder: Path, **data: Any) -> dict[str, Any]:
    values = {"kind": "text", "dataset": str(folder), "max_length_tokens": 32, "num_validation_examples": 3, **data}
    return read_text_splits(tokenizer, DataConfig.model_validate(values), lambda name: torch.Generator().manual_seed(1))


def stream(split: Any, bos: int | None) -> list[int]:
    """All tokens in order, the BOS that begins each row aside."""
    rows = [split.rows[i][0].tolist() for i in range(len(split.rows))]
    assert bos is None or all(row[0] == bos for row in rows)
    return [token for row in rows for token in (row if bos is None else row[1:])]


def test_a_plain_file_is_one_text_cut_into_equal_rows(tokenizer, files):
    found = splits(tokenizer, files)["test"]
    assert found.rows.lengths[:-1].unique().tolist() == [32] and 16 <= found.rows.lengths[-1] <= 32
    assert found.rows.prompt_lengths.tolist() == [1] * len(found.rows)
    ids = stream(found, tokenizer.bos_token_id)
    written = (files / "test.txt").read_text(encoding="utf-8")
    expected = [*tokenizer(written, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert ids == expected[: len(ids)] and len(expected) - len(ids) < 16, "no more than a short rest is dropped"
    assert ids.count(tokenizer.eos_token_id) <= 1


def test_parts_of_a_long_file_are_put_together_again(tokenizer, files, monkeypatch):
    """Lines are read some pages at a time, and tokenized so: tokens may differ at those borders only."""
    whole = tokenizer.decode(stream(splits(tokenizer, files)["test"], tokenizer.bos_token_id))
    monkeypatch.setattr(json_rows, "_TEXT_BYTES", 100)
    monkeypatch.setattr(text_rows, "_CHARACTERS_AT_ONCE", 250)
    monkeypatch.setattr(text_rows, "_LONGEST_PIECE", 60)
    in_parts = tokenizer.decode(stream(splits(tokenizer, files)["test"], tokenizer.bos_token_id))
    assert in_parts[:900] == whole[:900], "sentencepiece would begin each part with a space of its own"


@pytest.mark.parametrize("text_end", ["eos", "nothing"])
def test_each_text_of_a_json_file_ends(tokenizer, files, text_end):
    texts = [text(30, seed=seed).replace("\n", "\r\n") for seed in range(12)]
    lines = [json.dumps({"text": t}) for t in [*texts, "", None]]
    (files / "test.txt").unlink()
    (files / "test.jsonl").write_text("\n".join(lines))
    found = splits(tokenizer, files, text_end=text_end)["test"]
    ids = stream(found, tokenizer.bos_token_id)
    eos = tokenizer.eos_token_id
    expected: list[int] = []
    read = [one.replace("\r\n", "\n") for one in texts]
    for one in read if text_end == "eos" else ["".join(read)]:
        expected += tokenizer(one, add_special_tokens=False).input_ids
        expected += [eos] * (text_end == "eos")
    head = 0 if tokenizer.bos_token_id is None else 1
    rest = len(expected) % (32 - head)
    kept = len(expected) - (rest if rest + head < 16 else 0)
    assert ids == expected[:kept], "nothing but a short rest is dropped"
    assert found.counts.used == len(found.rows)


@pytest.mark.parametrize("at_once", [1, 50, 1 << 20])
def test_a_plain_file_ends_wherever_its_last_part_falls(tokenizer, files, at_once, monkeypatch):
    """Also where that part fills a batch by itself."""
    monkeypatch.setattr(text_rows, "_CHARACTERS_AT_ONCE", at_once)
    found = splits(
        tokenizer, files, max_length_tokens=4096, num_validation_examples=1, validation_file=str(files / "test.txt")
    )
    ids = stream(found["test"], tokenizer.bos_token_id)
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("text", ["", "word", "a b " * 50, "x" * 205, "one\ntwo " * 40, " " * 130], ids=len)
def test_pieces_are_the_text(text, monkeypatch):
    monkeypatch.setattr(text_rows, "_LONGEST_PIECE", 64)
    pieces = text_rows._pieces(text)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 64
    if "b" in text:  # words stay whole
        assert all(piece.startswith(" ") for piece in pieces[1:])


@pytest.mark.parametrize("name", ["a.ndjson", "a.JSONL", "a.json", "a.jsonlines", "a.jl"])
def test_rows_of_json_are_not_taken_for_text(tokenizer, files, name):
    (files / name).write_text(json.dumps({"text": text(60)}))
    ids = stream(splits(tokenizer, files, test_file=str(files / name))["test"], tokenizer.bos_token_id)
    assert '"text"' not in tokenizer.decode(ids) and "{" not in tokenizer.decode(ids)


def test_end_tokens_inside_a_text_are_plain_characters(tokenizer, files):
    (files / "test.txt").write_text(f"{text(100)}{tokenizer.eos_token}{text(100)}")
    ids = stream(splits(tokenizer, files)["test"], tokenizer.bos_token_id)
    assert tokenizer.eos_token_id not in ids[:-1]


def test_rows_are_held_out_sampled_and_counted(tokenizer, files):
    whole = splits(tokenizer, files)
    rows = {
        tuple(whole[name].rows[i][0].tolist()) for name in ("train", "validation") for i in range(len(whole[name].rows))
    }
    total = whole["train"].counts.rows
    assert len(whole["validation"].rows) == 3 and len(whole["train"].rows) == total - 3
    assert whole["train"].counts.held_out == 3 and len(rows) == total, "no row is lost, none is in both"
    less = splits(tokenizer, files, max_train_examples=5, max_test_examples=2)
    assert [len(less[name].rows) for name in ("train", "validation", "test")] == [5, 3, 2]
    assert less["test"].rows[1][0].tolist() == whole["test"].rows[1][0].tolist()
    figures = describe_counts(less)
    assert figures["train"]["left_out"] == total - 8 and figures["train"]["used"] == 5
    assert figures["test"]["tokens"] == 64
    (files / "validation.txt").write_text(text(300, seed=3))
    own = splits(tokenizer, files)
    assert own["train"].counts.held_out == 0 and len(own["validation"].rows) == 3
    again = splits(tokenizer, files)
    assert all(torch.equal(again[name].rows.input_ids, own[name].rows.input_ids) for name in own)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "test.jsonl",
            b'{"story": "x"}',
            r"test\.jsonl:1: no field 'text' \(fields found: story\); set data\.text_field",
        ),
        ("test.jsonl", b'{"text": 3}', r"test\.jsonl:1: field 'text' must be text, not int"),
        (
            "test.jsonl",
            b'{"text": "half \\ud83d"}',
            r"test\.jsonl:1: field 'text' is no text at character 6",
        ),
        ("test.jsonl", b'["words"]', r"a row must be an object with named fields, not a string"),
        (
            "test.jsonl",
            b'{"text": " "}\n' * 90,
            r"less text than a row of 16 tokens \(90 texts, 90 empty\)",
        ),
        ("test.txt", b"good line\n\xff\xfe bad\n", r"test\.txt:2: not UTF-8 text"),
        ("test.txt", b"short", r"test\.txt: less text than a row of 16 tokens"),
        ("test.txt", b"", r"test\.txt: less text than a row"),
        (None, b"", r"has no test split; set data\.test_file to a \.txt or \.json or \.jsonl file"),
    ],
)
def test_what_cannot_be_used_is_told(tokenizer, files, name, content, message):
    (files / "test.txt").unlink()
    if name is not None:
        (files / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        splits(tokenizer, files)


def test_too_few_rows_to_hold_some_out(tokenizer, files):
    with pytest.raises(DataError, match=r"are too few to hold 5000 out for validation; lower data\.num_validation"):
        splits(tokenizer, files, num_validation_examples=5000)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_lines_of_one_text_are_the_tokens_of_the_whole(tokenizer, files, suffix, monkeypatch):
    """However it is read, empty lines included."""
    monkeypatch.setattr(json_rows, "_TEXT_BYTES", 64)
    whole = "".join(text(9, seed) + "\n" * (seed % 3) for seed in range(40))
    (files / "test.txt").unlink()
    (files / f"test.{suffix}").write_text(
        whole if suffix == "txt" else "".join(json.dumps({"text": line}) + "\n" for line in whole.splitlines(True))
    )
    found = splits(tokenizer, files, text_end="nothing")["test"]
    ids = stream(found, tokenizer.bos_token_id)
    expected = tokenizer(whole, add_special_tokens=False).input_ids
    same = [number for number, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b]
    if tokenizer.bos_token_id != tokenizer.eos_token_id:  # a byte-level BPE joins line ends, which are cut here
        assert not same, f"token {same[0]} of {len(ids)}"
    assert tokenizer.decode(ids) == whole[: len(tokenizer.decode(ids))]


def test_rows_that_stand_in_train_are_counted(tokenizer, files):
    (files / "test.txt").write_text((files / "train.txt").read_text())
    found = splits(tokenizer, files)
    counts = found["test"].counts
    assert counts.used - found["validation"].counts.used <= counts.seen_in_train <= counts.used
    (files / "test.txt").write_text(text(400, seed=5))
    assert splits(tokenizer, files)["test"].counts.seen_in_train == 0


def test_names_of_ends_and_unknown_words_are_told_of(tokenizer, files):
    (files / "train.txt").write_text("<|endoftext|>\n".join(text(30, seed) for seed in range(60)))
    (doubt,) = check_text_rows(tokenizer, splits(tokenizer, files)["train"].rows)
    assert "hold <|endoftext|> " in doubt and "JSONL" in doubt
    if tokenizer.unk_token_id != tokenizer.eos_token_id:  # GPT-2 has one token for both
        rows = splits(tokenizer, files)["test"].rows
        assert check_text_rows(tokenizer, rows) == []
        rows.input_ids[::20] = tokenizer.unk_token_id
        (doubt,) = check_text_rows(tokenizer, rows)
        assert "are unknown to the tokenizer" in doubt
        rows.input_ids[: 3 * len(rows.input_ids) // 4] = tokenizer.unk_token_id
        with pytest.raises(ModelError, match="made for other text"):
            check_text_rows(tokenizer, rows)

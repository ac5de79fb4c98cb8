from __future__ import annotations

import json
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hedgehog.pipeline.config import DataConfig
from hedgehog.pipeline.data.sources import resolve_splits
from hedgehog.pipeline.errors import DataError


def seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(len(name))


def row(i: int, dialogue: str | None = None, summary: str | None = None) -> dict:
    return {"id": str(i), "dialogue": dialogue or f"A: line {i}", "summary": summary or f"Summary {i}."}


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=1))
    return str(path)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def resolve(**fields):
    return resolve_splits(DataConfig(num_validation_examples=fields.pop("num_validation", 2), **fields), seeded)


@pytest.fixture
def folder(tmp_path):
    write_json(tmp_path / "train.json", [row(i) for i in range(10)])
    write_jsonl(tmp_path / "val.jsonl", [row(i) for i in range(20, 25)])
    write_json(tmp_path / "test.json", [row(3), row(30)])
    return tmp_path


def test_a_folder_of_json_and_jsonl(folder):
    splits = resolve(dataset=str(folder))
    assert [e.id for e in splits["train"].examples] == [str(i) for i in range(10)]
    assert len(splits["validation"].examples) == 2
    assert splits["validation"].counts.left_out == 3
    assert [(e.id, e.seen_in_train) for e in splits["test"].examples] == [("3", True), ("30", False)]
    assert splits["test"].counts.seen_in_train == 1


def test_a_file_replaces_a_split_of_the_folder(folder):
    other = write_jsonl(folder / "other.jsonl", [row(99)])
    splits = resolve(dataset=str(folder), test_file=other)
    assert [e.id for e in splits["test"].examples] == ["99"]
    assert len(splits["train"].examples) == 10


def test_the_content_tells_list_from_lines_not_the_name(folder):
    lines = write_jsonl(folder / "lines.json", [row(50), row(51)])
    listed = write_json(folder / "listed.jsonl", [row(60)])
    splits = resolve(dataset=str(folder), test_file=lines, validation_file=listed)
    assert [e.id for e in splits["test"].examples] == ["50", "51"]
    assert [e.id for e in splits["validation"].examples] == ["60"]


def test_line_ends_blank_lines_and_byte_order_marks(folder):
    rows = [row(1, "A: hi\r\nB: yo\rC: hey\r\n"), row(2)]
    path = folder / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(json.dumps(r) for r in rows).encode())
    splits = resolve(dataset=str(folder), test_file=str(path))
    assert [e.dialogue for e in splits["test"].examples] == ["A: hi\nB: yo\nC: hey", "A: line 2"]


def test_rows_without_text_are_dropped_and_counted_and_rows_without_id_numbered(folder):
    rows = [
        {"dialogue": "", "summary": "x"},
        {"dialogue": None, "summary": "x"},
        {"dialogue": "A: a", "summary": "  "},
        {"dialogue": "A: b"},
        {"dialogue": "A: c", "summary": "c", "id": 7},
        {"dialogue": "A: d", "summary": "d"},
    ]
    split = resolve(dataset=str(folder), test_file=write_json(folder / "gaps.json", rows))["test"]
    assert [e.id for e in split.examples] == ["7", "test-6"]
    counts = split.counts
    assert (counts.rows, counts.dropped_empty, counts.dropped_no_summary, counts.used) == (6, 2, 2, 2)


def test_duplicates_in_train_are_dropped_unless_kept(folder):
    rows = [row(1), row(2), row(1), row(1, summary="Another."), *(row(i) for i in range(3, 9))]
    train = write_json(folder / "twice.json", rows)
    dropped = resolve(dataset=str(folder), train_file=train)["train"]
    assert (len(dropped.examples), dropped.counts.dropped_duplicates) == (9, 1)
    kept = resolve(dataset=str(folder), train_file=train, drop_train_duplicates=False)["train"]
    assert (len(kept.examples), kept.counts.dropped_duplicates) == (10, 0)


@pytest.mark.parametrize("drop", [True, False])
def test_held_out_dialogues_never_stay_in_train(folder, drop):
    rows = [row(i % 12, summary=f"Version {i}.") for i in range(36)]
    (folder / "val.jsonl").unlink()
    splits = resolve(
        dataset=str(folder),
        train_file=write_json(folder / "many.json", rows),
        num_validation=4,
        drop_train_duplicates=drop,
    )
    train = {e.dialogue for e in splits["train"].examples}
    validation = [e.dialogue for e in splits["validation"].examples]
    assert len(validation) == len(set(validation)) == 4
    assert not train & set(validation)
    assert len(train) == 8
    assert splits["train"].counts.held_out == 12
    assert not any(e.seen_in_train for e in splits["validation"].examples)


def test_samples_are_seeded_and_test_takes_the_first(folder):
    train = write_json(folder / "many.json", [row(i) for i in range(100)])
    options = {"dataset": str(folder), "train_file": train, "max_train_examples": 7, "max_test_examples": 1}
    one, two = resolve(**options), resolve(**options)
    assert one["train"].examples == two["train"].examples
    assert (len(one["train"].examples), one["train"].counts.left_out) == (7, 93)
    assert (
        one["train"].examples != resolve(**{**options, "train_file": train, "max_train_examples": 8})["train"].examples
    )
    assert [e.id for e in one["test"].examples] == ["3"]
    other_seed = resolve_splits(DataConfig(**options), lambda name: torch.Generator().manual_seed(99))
    assert other_seed["train"].examples != one["train"].examples


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"dialogue": "a", "summary": "b"}\n\n{"dialogue": "a", "summ', r"bad\.json:3: bad JSON"),
        ('[\n{"dialogue": "a", "summary": "b"},\n{"dialogue": }\n]', r"bad\.json:3: bad JSON"),
        ('{"dialogue": "a", "summary": "b"}\n"text"\n', r"bad\.json:2: a row must be an object .* not a string"),
        ('[{"dialogue": "a", "summary": "b"}, 5]', r"bad\.json:1 \(row 2\): a row must be an object .* not a number"),
        ('[\n{"dialogue": "a\\n",\n "summary": "b"}\n ,7]', r"bad\.json:4 \(row 2\): a row must be"),
        (
            '[{"text": "a", "summary": "b"}]',
            r"bad\.json:1 \(row 1\): no field 'dialogue' \(fields found: summary, text\)",
        ),
        (
            '{"dialogue": "a", "gist": "b"}\n',
            r"no field 'summary' \(fields found: dialogue, gist\); set data.summary_f",
        ),
        ('{"dialogue": ["a"], "summary": "b"}\n', r"bad\.json:1: field 'dialogue' must be text, not list"),
        ('{"dialogue": "a", "summary": 3}\n', r"bad\.json:1: field 'summary' must be text, not int"),
        ("", r"bad\.json: no usable test rows: rows 0"),
        ('{"dialogue": "", "summary": "b"}', r"no usable test rows: rows 1, dropped empty 1"),
        ("[" * 200_000, r"bad\.json:1: JSON nested too deeply|bad\.json:1: bad JSON"),
    ],
)
def test_bad_files_are_named_with_line_and_cure(folder, content, message):
    path = folder / "bad.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        resolve(dataset=str(folder), test_file=str(path))


def test_a_file_that_is_not_utf8(folder):
    path = folder / "latin.jsonl"
    path.write_bytes(json.dumps(row(1)).encode() + b'\n{"dialogue": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: not UTF-8"):
        resolve(dataset=str(folder), test_file=str(path))


def test_missing_sources(folder, tmp_path_factory):
    with pytest.raises(DataError, match="there is no folder /nowhere"):
        resolve(dataset="/nowhere")
    with pytest.raises(DataError, match=r"data\.test_file: there is no file gone\.json"):
        resolve(dataset=str(folder), test_file="gone.json")
    with pytest.raises(DataError, match=r"give it as data\.train_file"):
        resolve(dataset=str(folder / "train.json"))
    with pytest.raises(DataError, match="holds no train, validation"):
        resolve(dataset=str(tmp_path_factory.mktemp("empty")))
    (folder / "test.json").unlink()
    with pytest.raises(DataError, match=r"has no test split; set data\.test_file"):
        resolve(dataset=str(folder))
    write_json(folder / "train.jsonl", [row(1)])
    with pytest.raises(DataError, match=r"train\.json and train\.jsonl could both"):
        resolve(dataset=str(folder))


def test_too_few_rows_to_hold_out(folder):
    (folder / "val.jsonl").unlink()
    with pytest.raises(DataError, match="10 different dialogues are too few to hold 6 out"):
        resolve(dataset=str(folder), num_validation=6)


def test_a_hub_dataset_without_network_names_the_cure(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(name):
        raise ConnectionError("cannot reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"someone/samsum .* cannot reach the hub.*data\.train_file"):
        resolve(dataset="someone/samsum")


def test_a_hub_dataset(monkeypatch):
    datasets = pytest.importorskip("datasets")
    loaded = {name: [row(i + 100 * k) for i in range(8)] for k, name in enumerate(("train", "validation", "test"))}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded if name == "someone/samsum" else None)
    splits = resolve(dataset="someone/samsum")
    assert len(splits["train"].examples) == 8
    assert splits["test"].examples[0].id == "200"
    loaded["test"][3] = {"dialogue": 4, "summary": "x"}
    with pytest.raises(DataError, match=r"someone/samsum \(test\) row 4: field 'dialogue' must be text, not int"):
        resolve(dataset="someone/samsum")

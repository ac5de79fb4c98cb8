from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hedgehog.pipeline.config import DataConfig
from hedgehog.pipeline.data.labelled_rows import base_names, check_some_classes, number_labels
from hedgehog.pipeline.data.sources import resolve_splits
from hedgehog.pipeline.errors import DataError


def seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(len(name))


def row(i: int, label: Any, **more: Any) -> dict[str, Any]:
    return {"id": str(i), "text": f"text {i}", "label": label, **more}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def resolve(**fields: Any) -> Any:
    settings = {"kind": "classification", "num_validation_examples": 2, **fields}
    return resolve_splits(DataConfig(**settings), seeded)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", [row(i, i % 2) for i in range(10)])
    write(tmp_path / "val.jsonl", [row(i, i % 2) for i in range(20, 25)])
    write(tmp_path / "test.jsonl", [row(3, 1), row(30, 0)])
    return tmp_path


def test_single_texts_with_numbers(folder: Path) -> None:
    splits = resolve(dataset=str(folder))
    train = splits["train"]
    assert [(e.id, e.text, e.second_text, e.label) for e in train.examples[:2]] == [
        ("0", "text 0", None, 0),
        ("1", "text 1", None, 1),
    ]
    assert splits["validation"].counts.left_out == 3
    assert [e.seen_in_train for e in splits["test"].examples] == [True, False]
    assert number_labels(splits, None) == (["0", "1"], None)


def test_pairs_are_held_apart_by_both_texts(tmp_path: Path) -> None:
    pairs = [{"a": f"premise {i % 3}", "b": f"hypothesis {i}", "gold": "yes" if i % 2 else "no"} for i in range(12)]
    again = [{**pairs[0], "gold": "yes"}, pairs[1]]  # another opinion, and a repetition
    train = write(tmp_path / "train.jsonl", [*pairs, *again])
    test = write(tmp_path / "test.jsonl", [pairs[4], {**pairs[4], "b": "hypothesis 5"}])
    fields = {"text_field": "a", "second_text_field": "b", "label_field": "gold"}
    splits = resolve(train_file=train, test_file=test, num_validation_examples=4, **fields)
    assert splits["train"].counts.dropped_duplicates == 1
    held_out = {example.read for example in splits["validation"].examples}
    assert len(held_out) == 4 and not held_out & {example.read for example in splits["train"].examples}
    assert splits["train"].counts.held_out + len(splits["train"].examples) == 13
    seen = {example.read for example in splits["train"].examples}
    assert [e.seen_in_train for e in splits["test"].examples] == [("premise 1", "hypothesis 4") in seen, False]
    kept = resolve(train_file=train, test_file=test, validation_file=test, drop_train_duplicates=False, **fields)
    assert len(kept["train"].examples) == 14
    assert [e.seen_in_train for e in kept["test"].examples] == [True, False]


def test_a_table_as_glue_has_it(tmp_path: Path) -> None:
    """Quotation marks are characters, a carriage return within a line too; dev is validation."""
    train = 'index\ttext\tlabel\r\n0\t"quoted\t1\r\n\n1\tit\'s "so\rso"\t0\n2\tseveral  words\t1\n3\t\t0\n'
    (tmp_path / "train.tsv").write_bytes(b"\xef\xbb\xbf" + train.encode())
    (tmp_path / "dev.tsv").write_text("index\ttext\tlabel\n0\tdev text\t1\n")
    (tmp_path / "test.tsv").write_text("text\tlabel\nlast\t0")
    splits = resolve(dataset=str(tmp_path), id_field="index")
    assert [(e.id, e.text, e.label) for e in splits["train"].examples] == [
        ("0", '"quoted', 1),
        ("1", 'it\'s "so\nso"', 0),
        ("2", "several  words", 1),
    ]
    assert splits["train"].counts.dropped_empty == 1
    assert splits["validation"].source.endswith("dev.tsv")
    assert [(e.id, e.text) for e in splits["test"].examples] == [("test-1", "last")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text\tlabel\n", r"bad\.tsv: no usable test rows: rows 0"),
        (b"", r"bad\.tsv:1: is empty; the first line of a \.tsv names its columns"),
        (b"text\tlabel\na\t1\nb\n", r"bad\.tsv:3: 1 fields, but the first line names 2 columns"),
        (b"text\tlabel\na\t1\tmore\n", r"bad\.tsv:2: 3 fields, but the first line names 2 columns"),
        (b"text\tlabel\ttext\na\t1\tb\n", r"bad\.tsv:1: two columns are called 'text'"),
        (b"a line of CoLA\t1\n*\t0\n", r"bad\.tsv:1: names none of the columns text, label, but"),
        (b"text\tlabel\na\t\n", r"bad\.tsv:2: field 'label' has no label; label the row, or remove it"),
        (b"text\tlabel\na\t3.8\n", r"bad\.tsv:2: field 'label' is 3\.8, but a class is text or a whole number"),
        (b"text\tlabel\na\t1\n\xe4\t0\n", r"bad\.tsv:3: not UTF-8 text"),
        (b"index\ttext\n0\ta\n", r"bad\.tsv:2: no field 'label' .*or take a split that has labels"),
    ],
)
def test_bad_tables_are_named_with_line_and_cure(folder: Path, content: bytes, message: str) -> None:
    (folder / "bad.tsv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        resolve(dataset=str(folder), test_file=str(folder / "bad.tsv"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(1, None), "3: field 'label' has no label"),
        (row(1, "  "), "3: field 'label' has no label"),
        (row(1, 1.0), r"3: field 'label' is 1\.0, but a class is text or a whole number; to learn scores"),
        (row(1, math.nan), "3: field 'label' is nan"),
        (row(1, [1]), "3: field 'label' must be text or a whole number, not list"),
        (row(1, "1"), r"3: its label is '1', that of .*rows\.jsonl:1 0: take numbers or text, not both"),
        (row(1, True), "3: its label is 'true', that of .* 0: take numbers or text"),
        (
            row(1, -1),
            "3: its label is -1, .*as data.test_file, or of a dataset with data.test_split=validation",
        ),
        (row(1, 1, text=5), "3: field 'text' must be text, not int"),
        (row(1, 1, text="half \ud800"), r"3: field 'text' is no text at character 6 \(half of a surrogate pair\)"),
        ({"id": "1", "text": "x"}, r"3: no field 'label' \(fields found: id, text\); set data\.label_field"),
        ({"id": "1", "label": 1}, r"3: no field 'text' .*set data\.text_field"),
        ([1, 2], "3: a row must be an object with named fields, not a list"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_rows_are_named_with_line_and_cure(folder: Path, split: str, bad: Any, message: str) -> None:
    file = write(folder / "rows.jsonl", [row(0, 0), row(7, 1), bad, row(2, 1.5)])
    with pytest.raises(DataError, match=rf"rows\.jsonl:{message}"):
        resolve(dataset=str(folder), **{f"{split}_file": file})


def test_numbers_that_stand_as_text_are_numbers(folder: Path) -> None:
    """In a table, or in JSON; and labels of which only some are numbers are text."""
    texts = [row(i, str(label)) for i, label in enumerate((10, 9, 2, 10, 9, 2))]
    numbers = write(folder / "numbers.jsonl", [row(7, 9), row(8, 2)])
    table = ["text,label", *(f"{one['text']},{one['label']}" for one in texts)]
    (folder / "rows.csv").write_text("\n".join(table))
    for train in (write(folder / "texts.jsonl", texts), str(folder / "rows.csv")):
        splits = resolve(train_file=train, validation_file=train, test_file=numbers)
        assert number_labels(splits, None)[0] == ["2", "9", "10"]
        assert [example.label for example in splits["test"].examples] == [1, 0]
    (folder / "rows.csv").write_text("text,label\na,1\nb,2\nc,3+\nd,1\n")
    file = str(folder / "rows.csv")
    splits = resolve(train_file=file, validation_file=file, test_file=file)
    assert number_labels(splits, None)[0] == ["1", "2", "3+"]


def test_a_row_without_text_makes_no_class(folder: Path) -> None:
    file = write(folder / "rows.jsonl", [row(0, 0), row(1, 1), row(2, 7, text=" "), row(3, 0)])
    splits = resolve(train_file=file, test_file=file, validation_file=file)
    assert number_labels(splits, None)[0] == ["0", "1"] and splits["train"].counts.dropped_empty == 1


def test_what_is_scored_does_not_choose_the_weights(folder: Path) -> None:
    """A folder's validation rows scored, for want of labelled test rows: validation is held out of train then."""
    folder.joinpath("test.jsonl").unlink()
    validation = str(folder / "val.jsonl")
    for asked in ({"test_split": "validation"}, {"test_file": validation}):
        splits = resolve(dataset=str(folder), num_validation_examples=3, **asked)
        assert splits["test"].source == validation
        assert splits["validation"].source.endswith("train.jsonl (held out)")
    splits = resolve(dataset=str(folder), test_file=validation, validation_file=validation)
    assert splits["validation"].source == validation, "asked for by name"
    folder.joinpath("val.jsonl").rename(folder / "extra.jsonl")
    splits = resolve(dataset=str(folder), num_validation_examples=3, test_split="extra")
    assert splits["test"].source.endswith("extra.jsonl")
    with pytest.raises(DataError, match=r"data\.test_split: .* holds no dev\.tsv or dev\.csv or dev\.json or dev\."):
        resolve(dataset=str(folder), num_validation_examples=3, test_split="dev")


def test_a_csv_is_read_as_spreadsheets_write_it(folder: Path) -> None:
    lines = ["text,label,note", '"Yes, ""we"" are\nthere",1,', "no,0,x", "", "é,1,y"]
    for end in ("\n", "\r\n"):
        (folder / "rows.csv").write_bytes(b"\xef\xbb\xbf" + end.join(lines).encode())
        file = str(folder / "rows.csv")
        train = resolve(train_file=file, test_file=file, validation_file=file)["train"]
        assert [(one.text, one.label) for one in train.examples] == [('Yes, "we" are\nthere', 1), ("no", 0), ("é", 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.csv", 'text,label\na,1\n"b,0\n', r"bad\.csv:3: a row that begins here is no CSV"),
        ("bad.csv", "text,label\na,1\nb\n", r"bad\.csv:3: 1 fields, but the first line names 2 columns; commas"),
        ("bad.csv", "", r"bad\.csv:1: is empty; the first line of a \.csv"),
        ("bad.csv", "text;label\na;1\n", r"bad\.csv:1: names none of the columns text, label, but 'text;label'\."),
        ("bad.tsv", "text\t label\na\t1\n", r"bad\.tsv:2: no field 'label' \(fields found: ' label', text\)"),
        ("bad.tsv", "gj04\t1\t\tOur friends\n", r"bad\.tsv:1: names none .* but 'gj04', '1', '', 'Our friends'\. If"),
    ],
)
def test_a_table_that_is_none(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        resolve(dataset=str(folder), test_file=str(folder / name))


def test_a_table_without_rows_says_so(folder: Path) -> None:
    (folder / "none.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"none\.csv: no usable train rows: rows 0"):
        resolve(train_file=str(folder / "none.csv"), test_file=str(folder / "train.jsonl"))


def test_a_pair_without_its_second_text(folder: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:1: no field 'other' .*set data\.second_text_field"):
        resolve(dataset=str(folder), second_text_field="other")
    rows = [row(0, 0, other="x"), row(1, 1, other=None), row(2, 1, other="y"), row(3, 0, other=" ")]
    file = write(folder / "rows.jsonl", rows)
    split = resolve(train_file=file, test_file=file, validation_file=file, second_text_field="other")["train"]
    assert [example.id for example in split.examples] == ["0", "2"] and split.counts.dropped_empty == 2


def test_labels_that_train_lacks_are_named(folder: Path) -> None:
    file = write(folder / "more.jsonl", [row(50, 0), row(51, 2), row(52, 3)])
    for split in ("test", "validation"):
        message = rf"more\.jsonl:2: the {split} label 2 does not occur in train \(0, 1\)"
        with pytest.raises(DataError, match=message):
            resolve(dataset=str(folder), **{f"{split}_file": file})


def test_one_class_is_nothing_to_tell_apart(folder: Path) -> None:
    file = write(folder / "one.jsonl", [row(i, "yes") for i in range(9)])
    with pytest.raises(DataError, match=r"one\.jsonl: every label is 'yes': there is nothing to tell apart"):
        resolve(train_file=file, test_file=file)
    two = str(folder / "train.jsonl")
    with pytest.raises(DataError, match=r"train\.jsonl: every label of the rows used is '[01]'"):
        resolve(train_file=two, test_file=two, max_train_examples=1)
    with pytest.raises(DataError, match=r"every label of the rows used is 'a'.*max_train_examples"):
        check_some_classes("x", {"a": 5, "b": 0})
    check_some_classes("x", {"a": 5, "b": 1, "c": 0})


def test_a_field_that_is_no_class_is_noticed(folder: Path) -> None:
    file = write(folder / "ids.jsonl", [row(i, i) for i in range(60)])
    with pytest.raises(DataError, match=r"60 different labels in 60 rows: set data\.label_field"):
        resolve(train_file=file, test_file=file)
    many = write(folder / "many.jsonl", [row(i, i % 60) for i in range(120)])
    assert len(number_labels(resolve(train_file=many, test_file=many), None)[0]) == 60


def test_the_hub_names_its_classes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive", "neutral"])}
    )

    def split(labels: list[int]) -> Any:
        return datasets.Dataset.from_dict(
            {"text": [f"t{len(labels)} {i}" for i in range(len(labels))], "label": labels}, features=features
        )

    loaded = datasets.DatasetDict({"train": split([1, 0, 1, 0, 1]), "validation": split([0]), "test": split([-1, -1])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded)
    with pytest.raises(DataError, match=r"someone/feelings \(test\) row 1: its label is -1"):
        resolve(dataset="someone/feelings")
    splits = resolve(dataset="someone/feelings", test_split="validation", num_validation_examples=1)
    assert splits["test"].source == "someone/feelings (validation)"
    assert splits["validation"].source == "someone/feelings (train) (held out)"
    splits = resolve(dataset="someone/feelings", test_split="validation", validation_split="train")
    assert splits["validation"].source == "someone/feelings (train)" and len(splits["train"].examples) == 5
    with pytest.raises(
        DataError, match=r"data\.test_split: someone/feelings has no split dev; it has train, validation, test"
    ):
        resolve(dataset="someone/feelings", test_split="dev")
    local = write(folder / "local.jsonl", [row(1, "positive")])
    splits = resolve(dataset="someone/feelings", test_file=local)
    assert number_labels(splits, None) == (["negative", "positive", "neutral"], None)
    assert [example.label for example in splits["train"].examples] == [1, 0, 1, 0, 1]
    assert [example.label for example in splits["test"].examples] == [1]
    loaded["train"] = split([1, -1, 0, 1, -1, 0, 1])  # as SNLI has some
    train = resolve(dataset="someone/feelings", test_file=local)["train"]
    assert [example.label for example in train.examples] == ["positive", "negative", "positive", "negative", "positive"]
    assert (train.counts.rows, train.counts.dropped_no_label) == (7, 2)
    loaded["train"] = split([1, 0, 1, 0, 1])
    numbered = write(folder / "numbered.jsonl", [row(1, 0)])
    splits = resolve(dataset="someone/feelings", test_file=numbered)
    number_labels(splits, None)
    assert [example.label for example in splits["test"].examples] == [0], "the hub's numbers"
    splits = resolve(dataset="someone/feelings", train_file=str(folder / "train.jsonl"), test_file=local)
    assert number_labels(splits, None)[0] == ["negative", "positive", "neutral"], "the hub's, for validation's sake"
    splits = resolve(dataset="someone/feelings", test_split="validation", test_file=local)
    assert splits["validation"].source == "someone/feelings (validation)", "the file is scored, not the split"
    loaded["train"] = loaded["train"].cast_column("label", datasets.Value("int64"))
    loaded["train"] = loaded["train"].map(lambda one: {"label": one["label"] + 2})
    del loaded["test"]
    with pytest.raises(DataError, match=r"label 'positive' does not occur in train \(3, 2\)"):
        resolve(dataset="someone/feelings", test_file=local, validation_file=local)


def labelled(*labels: int | str) -> dict[str, Any]:
    rows = {"train": labels, "validation": labels[:1], "test": labels[:1]}

    def split(values: tuple[int | str, ...]) -> Any:
        from hedgehog.pipeline.data.examples import LabelledExample, Split

        examples = [LabelledExample(str(i), f"t{i}", None, label) for i, label in enumerate(values)]
        return Split(examples, "here", labels=dict.fromkeys(values, "here:1"))

    return {name: split(values) for name, values in rows.items()}


@pytest.mark.parametrize(
    ("labels", "base", "names", "numbers"),
    [
        ((10, 9, 2), None, ["2", "9", "10"], [2, 1, 0]),
        ((1, 0), ("bad", "good"), ["bad", "good"], [1, 0]),
        ((2, 1), ("bad", "good"), ["bad", "good"], [1, 0]),
        ((2, 0), ("bad", "so", "good"), ["0", "2"], [1, 0]),  # of another task, maybe
        ((2, 0, 1), ("bad", "so", "good"), ["bad", "so", "good"], [2, 0, 1]),
        (("b", "a"), None, ["a", "b"], [1, 0]),
        (("b", "a"), ("b", "a"), ["b", "a"], [0, 1]),
        (("good", "bad"), ("BAD", "SO", "GOOD"), ["BAD", "SO", "GOOD"], [2, 0]),
        (("good", "worse"), ("bad", "good"), ["good", "worse"], [0, 1]),
        (("A", "a"), ("a", "b"), ["A", "a"], [0, 1]),
        ((1, 0), ("1", "0"), ["1", "0"], [0, 1]),
        ((10, 2), ("1", "10", "2"), ["1", "10", "2"], [1, 2]),  # some of those that it knows
        (("10", "a", "2"), None, ["10", "2", "a"], [0, 2, 1]),
    ],
)
def test_classes_are_in_the_base_models_order_where_it_names_them(labels, base, names, numbers) -> None:
    splits = labelled(*labels)
    found, doubt = number_labels(splits, base)
    assert found == names
    assert [example.label for example in splits["train"].examples] == numbers
    taken_by_rank = base is not None and set(labels) == {1, 2}
    assert (doubt is not None) == ((base is not None and list(base) != names) or taken_by_rank)


def test_the_hubs_names_in_the_base_models_order() -> None:
    splits = labelled("no", "yes")
    splits["train"].label_names = ("yes", "no")
    assert number_labels(splits, ("no", "yes"))[0] == ["no", "yes"]
    splits = labelled("no", "yes")
    splits["train"].label_names = ("yes", "no")
    names, doubt = number_labels(splits, ("maybe", "never"))
    assert names == ["yes", "no"] and [e.label for e in splits["train"].examples] == [1, 0]
    assert doubt == "the base model's classes are 'maybe', 'never', those of the rows 'yes', 'no'"


def test_generic_names_are_none() -> None:
    assert base_names(SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})) is None
    assert base_names(SimpleNamespace(id2label={0: "yes", 1: "yes"})) is None
    assert base_names(SimpleNamespace(id2label={1: "yes", 2: "no"})) is None
    assert base_names(SimpleNamespace()) is None
    assert base_names(SimpleNamespace(id2label={1: "yes", 0: "no"})) == ("no", "yes")


def test_too_few_texts_to_hold_out(folder: Path) -> None:
    file = str(folder / "test.jsonl")
    with pytest.raises(DataError, match=r"2 different texts are too few to hold 2 out"):
        resolve(train_file=file, test_file=file)

"""Labelled rows: a text, or a pair, and its class or score; and which number each class gets.

hub's names of its classes │ whole numbers │ text ──▶ one order of the classes, the base model's where it names them
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..config import DataConfig
from ..errors import DataError
from .examples import LabelledExample, Source, Split, check_encodable, missing_field, text_field
from .json_rows import Row
from .scored_rows import score_of

Label = int | str | float
_SECRET = -1
"""The hub's label of a row that has none."""
_MANY_CLASSES = 50
"""More of them than this, on fewer than two rows each, are no classes."""
_WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
_SHOWN = 5
"""Labels that a message names."""


def labelled_examples(source: Source, data: DataConfig, name: str) -> Split[LabelledExample]:
    """The rows of a source that have a text (of a pair both), as examples with the source's own labels.

    Raises:
        DataError: the first row that lacks a field, has something else than text where text belongs, or has no label
            that could be a class, or a score; classes that are numbers in one row and text in another; the hub has no
            label of any row. (Where it has none of some, those are counted.)
    """
    split: Split[LabelledExample] = Split([], source.name, label_names=source.label_names)
    names = [("text_field", data.text_field)]
    if data.second_text_field is not None:
        names.append(("second_text_field", data.second_text_field))
    secret: Row | None = None
    for number, row in enumerate(source.read(), start=1):
        split.counts.rows += 1
        if source.label_names is not None and row.fields.get(data.label_field) == _SECRET:
            split.counts.dropped_no_label += 1
            secret = secret or row
            continue
        texts = []
        for key, field in names:
            if field not in row.fields:
                raise DataError(missing_field(row.place, key, field, row.fields))
            texts.append(text_field(row, field).strip())
            if texts[-1]:
                check_encodable(row, field)
        label: Label
        if data.kind == "regression":
            label = score_of(row, data.label_field)
        else:
            label = _label_of(row, data.label_field, source.label_names)
            _check_alike(label, row.place, split)
        if not all(texts):
            split.counts.dropped_empty += 1
            continue
        split.labels.setdefault(label, row.place)
        text, second_text = (*texts, None)[:2]
        identifier = row.fields.get(data.id_field)
        if isinstance(identifier, str):
            check_encodable(row, data.id_field)
        example_id = f"{name}-{number}" if identifier is None else str(identifier)
        split.examples.append(LabelledExample(example_id, str(text), second_text, label))
    if secret is not None and not split.examples:
        raise _is_secret(secret)
    return split


def _label_of(row: Row, name: str, label_names: Sequence[str] | None) -> Label:
    if name not in row.fields:
        fault = missing_field(row.place, "label_field", name, row.fields)
        raise DataError(f"{fault}, or take a split that has labels")
    label: Any = row.fields[name]
    if isinstance(label, str):
        check_encodable(row, name)
        label = label.strip()
    if isinstance(label, bool):
        label = str(label).lower()
    if label is None or label == "":
        raise DataError(f"{row.place}: field '{name}' has no label; label the row, or remove it")
    if isinstance(label, float):
        raise DataError(
            f"{row.place}: field '{name}' is {label}, but a class is text or a whole number; to learn scores set "
            "data.kind=regression"
        )
    if not isinstance(label, (int, str)):
        raise DataError(f"{row.place}: field '{name}' must be text or a whole number, not {type(label).__name__}")
    if label == _SECRET:
        raise _is_secret(row)
    if isinstance(label, int) and label_names is not None:
        if not 0 <= label < len(label_names):
            raise DataError(f"{row.place}: label {label}, but there are {len(label_names)} classes, from 0 on")
        return label_names[label]
    return label


def _is_secret(row: Row) -> DataError:
    return DataError(
        f"{row.place}: its label is -1, which stands for one that is kept secret; take rows with labels, as "
        "data.test_file, or of a dataset with data.test_split=validation. (A class of its own is written as text, or "
        "with numbers from 0 on.)"
    )


def _check_alike(label: Label, place: str, split: Split[LabelledExample]) -> None:
    for other, where in split.labels.items():
        if isinstance(other, str) != isinstance(label, str):
            raise DataError(
                f"{place}: its label is {show_label(label)}, that of {where} {show_label(other)}: take numbers or "
                "text, not both"
            )
        return  # the others are of one type with it


def check_labels(splits: Mapping[str, Split[LabelledExample]]) -> None:
    """Numbers that stand as text in every split become numbers.

    Raises:
        DataError: train has labels of one class only, or another split has a label that train lacks.
    """
    _read_numbers(splits)
    train = splits["train"]
    if train.examples and len(train.labels) < 2:
        only = next(iter(train.labels))
        raise DataError(f"{train.source}: every label is {show_label(only)}: there is nothing to tell apart")
    if len(train.labels) > max(_MANY_CLASSES, len(train.examples) // 2):
        raise DataError(
            f"{train.source}: {len(train.labels)} different labels in {len(train.examples)} rows: set data.label_field "
            "to the field that holds the class"
        )
    for name, split in splits.items():
        for label, place in split.labels.items():
            if train.labels and label not in train.labels:
                raise DataError(
                    f"{place}: the {name} label {show_label(label)} does not occur in train "
                    f"({_some(train.labels)}); mend it, or remove such rows"
                )


def _read_numbers(splits: Mapping[str, Split[LabelledExample]]) -> None:
    """A table's labels, and a JSON file's "0" and "1", are the numbers 0 and 1, unless one label of the run is none."""
    labels = {label for split in splits.values() for label in split.labels}
    if any(split.label_names for split in splits.values()) or all(isinstance(label, int) for label in labels):
        return
    if not all(_WHOLE_NUMBER.fullmatch(str(label)) for label in labels):
        return
    for split in splits.values():
        split.labels = {int(label): place for label, place in split.labels.items()}
        split.examples = [replace(example, label=int(example.label)) for example in split.examples]


def check_some_classes(source: str, label_counts: Mapping[str, int]) -> None:
    """
    Raises:
        DataError: all training rows that are used have one label.
    """
    if sum(count > 0 for count in label_counts.values()) < 2:
        only = next(label for label, count in label_counts.items() if count)
        raise DataError(
            f"{source}: every label of the rows used is '{only}': there is nothing to tell apart; raise "
            "data.max_train_examples, or set data.overlong=truncate"
        )


def show_label(label: Label) -> str:
    """A label as a message names it."""
    return f"'{label}'" if isinstance(label, str) else str(label)


def base_names(base_config: Any) -> tuple[str, ...] | None:
    """What a base model calls its classes 0, 1, …; None where its config names none, or only as LABEL_0, LABEL_1, ….

    Args:
        base_config: its transformers configuration.
    """
    named = getattr(base_config, "id2label", None) or {}
    names = tuple(str(named[number]) for number in sorted(named))
    whole = sorted(named) == list(range(len(named))) and len(set(names)) == len(names)
    generic = all(name == f"LABEL_{number}" for number, name in enumerate(names))
    return names if whole and not generic else None


def number_labels(
    splits: Mapping[str, Split[LabelledExample]], named_by_base: Sequence[str] | None
) -> tuple[list[str], str | None]:
    """Make every example's label the number of its class: (names of the classes, what deserves a warning).

    The order is the base model's where it names its classes and knows all labels by name, so that its head fits them;
    else the hub's, the numbers' or the alphabet's. Numbers have the base's names where there are as many.
    """
    train = splits["train"]
    names, numbers = _numbered(train.labels, train.label_names, named_by_base)
    for split in splits.values():
        split.examples = [replace(example, label=numbers[example.label]) for example in split.examples]
    doubt = None
    if named_by_base is not None and names != list(named_by_base):
        doubt = f"the base model's classes are {_some(named_by_base)}, those of the rows {_some(names)}"
    elif named_by_base is not None:
        not_by_name = {label: n for label, n in numbers.items() if str(label).casefold() != names[n].casefold()}
        if any(int(label) != number for label, number in not_by_name.items()):
            doubt = f"the labels {_some(numbers)} are taken for the base model's classes {_some(names)}, in this order"
    return names, doubt


def _numbered(
    labels: Collection[Label], hub_names: Sequence[str] | None, named_by_base: Sequence[str] | None
) -> tuple[list[str], dict[Label, int]]:
    of_base = list(named_by_base or ())
    texts = {label: str(label) for label in labels}
    known = {name.casefold(): number for number, name in enumerate(of_base)}
    alike = len(known) == len(of_base) and len({text.casefold() for text in texts.values()}) == len(texts)
    if alike and all(text.casefold() in known for text in texts.values()):  # numbers that are names, too
        return of_base, {label: known[text.casefold()] for label, text in texts.items()}
    if all(isinstance(label, int) for label in labels):
        ordered = sorted(labels)
        names = of_base if len(of_base) == len(ordered) else [str(label) for label in ordered]
        return names, {label: number for number, label in enumerate(ordered)}
    names = list(hub_names) if hub_names and set(hub_names) >= set(texts.values()) else sorted(texts.values())
    return names, {name: number for number, name in enumerate(names)}


def unnamed_doubt(base_config: Any, train: Split[LabelledExample], label_names: Sequence[str]) -> str | None:
    """Why the head of a base that does not name its classes may mean others by their numbers; None where it cannot."""
    has_head = any("ForSequenceClassification" in name for name in getattr(base_config, "architectures", None) or ())
    if not has_head or base_names(base_config) is not None or train.label_names is not None:
        return None
    if len(label_names) != base_config.num_labels or all(map(_WHOLE_NUMBER.fullmatch, label_names)):
        return None
    return (
        f"the base model calls its classes LABEL_0, LABEL_1, …; the rows' are numbered by the alphabet: "
        f"{_some(label_names)}. If its head learned another order, name them in id2label of its config.json"
    )


def _some(labels: Collection[Label]) -> str:
    shown = ", ".join(show_label(label) for label in list(labels)[:_SHOWN])
    return shown + (f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else "")


__all__ = [
    "base_names",
    "check_labels",
    "check_some_classes",
    "labelled_examples",
    "number_labels",
    "show_label",
    "unnamed_doubt",
]

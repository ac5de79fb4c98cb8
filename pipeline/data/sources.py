"""Where the rows come from: a hub id, a folder, or single files; and which of them are used.

train       ──▶ without empty rows and duplicates ──▶ without held-out rows ──▶ seeded sample
validation  ──▶ its own file, or dialogues (labelled texts) held out of train
test        ──▶ its own file; a row says whether its dialogue (text) also stands in train
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import LABELLED_KINDS, DataConfig
from ..config_checks import Problem
from ..errors import DataError
from . import table_rows
from .examples import Example, Source, Split, SplitCounts, check_encodable, missing_field, text_field
from .json_rows import Row, read_rows, read_text
from .labelled_rows import check_labels, check_some_classes, labelled_examples
from .scored_rows import check_scores, check_some_scores

if TYPE_CHECKING:
    import torch

SPLITS = ("train", "validation", "test")
_FILE_STEMS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
_GLUE_STEMS = _FILE_STEMS | {"validation": ("validation", "val", "valid", "dev")}
_FILE_SUFFIXES = (".json", ".jsonl")
_JSON_SUFFIXES = (*_FILE_SUFFIXES, ".ndjson", ".jsonlines", ".jl")
"""Of files that are named themselves, where `data.kind` is text; dialogues are JSON whatever their file is called."""


_LABELLED_KEYS = ("data.id_field", "data.text_field", "data.second_text_field", "data.label_field")
_FIELD_KEYS = {
    "dialogues": ("data.id_field", "data.dialogue_field", "data.summary_field"),
    **dict.fromkeys(LABELLED_KINDS, (*_LABELLED_KEYS, "data.kind")),
}
"""What a fault in a row may come from, beside its file."""


def resolve_splits(data: DataConfig, generator: Callable[[str], torch.Generator]) -> dict[str, Split[Any]]:
    """Read, clean and sample train, validation and test.

    Args:
        generator: gives a seeded generator for a name (`StageContext.rng`).

    Raises:
        DataError: no such folder, file or hub dataset; a split without a source or without rows; bad JSON; a row
            that is not an object, lacks a field or has one of the wrong type; labels that are not those of train. The
            message names file and line, and of every split the first fault.
    """
    splits, problems = read_splits(data)
    if problems:
        raise DataError("\n".join(str(problem) for problem in problems))
    return select_examples(splits, data, generator)


def read_splits(data: DataConfig) -> tuple[dict[str, Split[Any]], list[Problem]]:
    """The cleaned rows of every split that has a source, and what is wrong with the others.

    A dataset on the hub is fetched.
    """
    sources, problems = find_sources(data)
    if on_hub(data):
        try:
            sources = _named_alike(_hub_sources(data) | sources)
        except DataError as error:
            problems.append(Problem(("data.dataset",), str(error)))
    problems += missing_splits(data, sources, problems)
    splits, unreadable = read_sources(sources, data)
    return splits, problems + unreadable


def _named_alike(sources: dict[str, Source]) -> dict[str, Source]:
    """A file beside the hub's splits may give its classes by the hub's numbers."""
    names = next((source.label_names for source in sources.values() if source.label_names), None)
    return {split: replace(source, label_names=source.label_names or names) for split, source in sources.items()}


def read_sources(sources: Mapping[str, Source], data: DataConfig) -> tuple[dict[str, Split[Any]], list[Problem]]:
    """The cleaned rows of these splits, and the first fault of each that has one."""
    splits, problems = {}, []
    for name in SPLITS:
        if name in sources:
            try:
                splits[name] = _clean(sources[name], data, name)
            except DataError as error:
                problems.append(Problem((sources[name].key, *_FIELD_KEYS[data.kind]), str(error)))
    return splits, problems


def read_sources_of(data: DataConfig) -> dict[str, Source]:
    """The source of every split that has one, in the order of SPLITS; a dataset on the hub is fetched.

    Raises:
        DataError: train or test has none, or what is named cannot be one.
    """
    sources, problems = find_sources(data)
    if on_hub(data):
        sources = _hub_sources(data) | sources
    problems += missing_splits(data, sources, problems)
    if problems:
        raise DataError("\n".join(str(problem) for problem in problems))
    return {name: sources[name] for name in SPLITS if name in sources}


def missing_splits(data: DataConfig, sources: Mapping[str, Source], problems: Iterable[Problem]) -> list[Problem]:
    """Splits that a run needs and nothing gives, apart from those that `problems` are about."""
    told = {problem.keys[0] for problem in problems}
    found = []
    for split in ("train", "test"):
        if split not in sources and not told & {f"data.{split}_file", "data.dataset"}:
            where = f"{data.dataset} has no {split} split" if data.dataset else f"there is no {split} split"
            suffixes = file_suffixes(data)
            stem, *others = [_FILE_STEMS[split][0] + suffixes[0], *suffixes[1:]]
            message = (
                f"{where}; set data.{split}_file to a {' or '.join(suffixes)} file, or data.dataset to a folder "
                f"that holds {' or '.join([stem, *others])}"
            )
            found.append(Problem((f"data.{split}_file", "data.dataset"), message))
    return found


def select_examples(
    splits: dict[str, Split[Any]], data: DataConfig, generator: Callable[[str], torch.Generator]
) -> dict[str, Split[Any]]:
    """What is used of the rows that were read; the splits are changed in place.

    Raises:
        DataError: too few rows to hold some out, or nothing is left of a split; labels that are not those of train, or
            all of them one.
    """
    train = splits["train"]
    if data.kind == "classification":
        check_labels(splits)
    if data.kind == "regression":
        check_scores(splits)
    if data.drop_train_duplicates:
        _drop_duplicates(train)
    if "validation" in splits:
        _keep_sample(splits["validation"], data.num_validation_examples, generator("validation sample"))
    else:
        splits["validation"] = _hold_out(train, data, generator("validation held out"))
    if data.max_train_examples is not None:
        _keep_sample(train, data.max_train_examples, generator("train sample"))
    test = splits["test"]
    if data.max_test_examples is not None:
        test.counts.left_out += max(0, len(test.examples) - data.max_test_examples)
        test.examples = test.examples[: data.max_test_examples]

    in_train = {example.read for example in train.examples}
    for name in ("validation", "test"):
        split = splits[name]
        split.examples = [replace(example, seen_in_train=example.read in in_train) for example in split.examples]
        split.counts.seen_in_train = sum(example.seen_in_train for example in split.examples)
    for name in SPLITS:
        split = splits[name]
        split.counts.used = len(split.examples)
        if not split.examples:
            raise DataError(f"{split.source}: no usable {name} rows: {split.counts.described()}")
    if data.kind == "classification":
        check_some_classes(train.source, Counter(str(example.label) for example in train.examples))
    if data.kind == "regression":
        check_some_scores(train.source, [example.label for example in train.examples])
    return splits


def on_hub(data: DataConfig) -> bool:
    """Whether `data.dataset` is taken for a hub id: no folder or file here, and nothing that looks like one's path."""
    name = data.dataset
    if name is None or Path(name).expanduser().exists():
        return False
    return not (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1)


def find_sources(data: DataConfig) -> tuple[dict[str, Source], list[Problem]]:
    """The local source of every split that has one, and what cannot be one. A `*_file` replaces that of `dataset`.

    A folder's file that is scored is not taken for validation too: what chooses the weights is not what scores them.
    """
    sources: dict[str, Source] = {}
    problems: list[Problem] = []
    if data.dataset is not None and not on_hub(data):
        folder = Path(data.dataset).expanduser()
        if folder.is_dir():
            sources, problems = _folder_sources(folder, data)
        elif folder.exists():
            message = f"{data.dataset} is a file; give it as data.train_file, or name the folder that holds it"
            problems.append(Problem(("data.dataset",), message))
        else:
            problems.append(Problem(("data.dataset",), f"there is no folder {data.dataset}"))
    for split in SPLITS:
        file = getattr(data, f"{split}_file")
        if file is not None:
            path, key = Path(file).expanduser(), f"data.{split}_file"
            if path.is_file():
                sources[split] = _file_source(path, data, key)
            else:
                sources.pop(split, None)
                problems.append(Problem((key,), f"{file} is a folder" if path.is_dir() else f"there is no file {file}"))
    is_asked_for = data.validation_file is not None or data.validation_split is not None
    if not is_asked_for and {"validation", "test"} <= sources.keys():
        validation, test = (Path(sources[split].name) for split in ("validation", "test"))
        if validation.resolve() == test.resolve():
            del sources["validation"]
    return sources, problems


def file_suffixes(data: DataConfig) -> tuple[str, ...]:
    """Endings of the files that `data.dataset` may hold as a folder."""
    more = (".txt",) if data.kind == "text" else table_rows.SUFFIXES if data.is_labelled else ()
    return (*more, *_FILE_SUFFIXES)


def _file_source(path: Path, data: DataConfig, key: str = "data.dataset") -> Source:
    """JSON rows, or by what it is called a file of running text, or a table of labelled rows."""
    if data.kind == "text" and path.suffix.lower() not in _JSON_SUFFIXES:
        return Source(str(path), partial(read_text, path, data.text_field), key, is_one_text=True)
    if data.is_labelled and path.suffix.lower() in table_rows.SUFFIXES:
        names = [name for name in (data.text_field, data.second_text_field, data.label_field) if name is not None]
        return Source(str(path), partial(table_rows.read_table, path, names), key)
    return Source(str(path), partial(read_rows, path), key)


def _folder_sources(folder: Path, data: DataConfig) -> tuple[dict[str, Source], list[Problem]]:
    sources: dict[str, Source] = {}
    problems = []
    all_stems = _GLUE_STEMS if data.is_labelled else _FILE_STEMS
    for split in SPLITS:
        if getattr(data, f"{split}_file") is not None:
            continue
        own = getattr(data, f"{split}_split", None)
        stems = all_stems.get(own or split, (own,))
        names = [f"{stem}{suffix}" for stem in stems for suffix in file_suffixes(data)]
        found = [folder / name for name in names if (folder / name).is_file()]
        if len(found) > 1:
            message = (
                f"{folder}: {' and '.join(path.name for path in found)} could both be the {split} split; "
                f"name one as data.{split}_file and move the other away"
            )
            problems.append(Problem((f"data.{split}_file", "data.dataset"), message))
        elif found:
            sources[split] = _file_source(found[0], data)
        elif own is not None:
            key = f"data.{split}_split"
            problems.append(Problem((key, "data.dataset"), f"{folder}: holds no {' or '.join(names)}"))
    if not sources and not problems and any(getattr(data, f"{split}_file") is None for split in ("train", "test")):
        also = " or ".join(all_stems["validation"][1:])
        message = f"{folder}: holds no train, validation ({also}) or test file ending in "
        message += " or ".join(file_suffixes(data))
        problems.append(Problem(("data.dataset",), message))
    return sources, problems


def _hub_sources(data: DataConfig) -> dict[str, Source]:
    import datasets

    name, config, suffixes = str(data.dataset), data.dataset_config, file_suffixes(data)
    loaded: Any
    try:
        loaded = datasets.load_dataset(name) if config is None else datasets.load_dataset(name, config)
    except Exception as error:  # the hub's client has a family of errors of its own, and network ones besides
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name} is no local folder and could not be fetched from the hub ({type(error).__name__}: "
            f"{reason}). Without a network, give local files: data.dataset=FOLDER holding train, validation and test "
            f"{' or '.join(suffixes)}, or data.train_file, data.validation_file, data.test_file"
        ) from None

    def source(split: str) -> Source:
        place = f"{name} ({split})"
        features = getattr(loaded[split], "features", None) or {}
        names = getattr(features.get(data.label_field), "names", None) if data.kind == "classification" else None
        return Source(
            place,
            lambda: (Row(dict(row), f"{place} row {i + 1}") for i, row in enumerate(loaded[split])),
            label_names=None if names is None else tuple(names),
        )

    named = {"validation": data.validation_split, "test": data.test_split}
    for key, own in named.items():
        if own is not None and own not in loaded:
            raise DataError(f"data.{key}_split: {name} has no split {own}; it has {', '.join(map(str, loaded))}")
    splits = {split: named.get(split) or split for split in SPLITS}
    if data.validation_split is None and data.test_file is None and splits["test"] == splits["validation"]:
        del splits["validation"]  # held out of train instead: what chooses the weights is not what scores them
    return {split: source(own) for split, own in splits.items() if own in loaded}


def _clean(source: Source, data: DataConfig, name: str) -> Split[Any]:
    """The rows that something can be learned from, as examples. Others are counted."""
    return labelled_examples(source, data, name) if data.is_labelled else _dialogues(source, data, name)


def _dialogues(source: Source, data: DataConfig, name: str) -> Split[Example]:
    """Rows with a dialogue and a summary."""
    split: Split[Example] = Split([], source.name)
    fields_found: set[str] = set()
    any_summary_field = False
    for number, row in enumerate(source.read(), start=1):
        split.counts.rows += 1
        fields_found.update(row.fields)
        if data.dialogue_field not in row.fields:
            raise DataError(missing_field(row.place, "dialogue_field", data.dialogue_field, row.fields))
        any_summary_field |= data.summary_field in row.fields
        dialogue = text_field(row, data.dialogue_field).strip()
        summary = text_field(row, data.summary_field).strip()
        if not dialogue:
            split.counts.dropped_empty += 1
        elif not summary:
            split.counts.dropped_no_summary += 1
        else:
            for field in (data.dialogue_field, data.summary_field):
                check_encodable(row, field)
            identifier = row.fields.get(data.id_field)
            if isinstance(identifier, str):
                check_encodable(row, data.id_field)
            example_id = f"{name}-{number}" if identifier is None else str(identifier)
            split.examples.append(Example(example_id, dialogue, summary))
    if split.counts.rows and not any_summary_field:
        raise DataError(missing_field(source.name, "summary_field", data.summary_field, fields_found))
    return split


def text_of(row: Row, data: DataConfig) -> str:
    """A row's text where `data.kind` is text, lines ending in \\n; null is none.

    Raises:
        DataError: no such field, or no text in it.
    """
    name = data.text_field
    if name not in row.fields:
        raise DataError(missing_field(row.place, "text_field", name, row.fields))
    text = text_field(row, name)
    if text:
        check_encodable(row, name)
    return text


def first_text_faults(sources: Mapping[str, Source], data: DataConfig) -> list[Problem]:
    """What is wrong with the beginning of each split's text: seen without its tokens, in little time."""
    problems = []
    for source in sources.values():
        try:
            row = next(iter(source.read()), None)
            if row is None:
                raise DataError(f"{source.name}: is empty")
            text_of(row, data)
        except DataError as error:
            problems.append(Problem((source.key, "data.text_field", "data.kind"), str(error)))
    return problems


def _drop_duplicates(train: Split[Any]) -> None:
    first: dict[tuple[Any, ...], Any] = {}
    for example in train.examples:
        first.setdefault(example.whole, example)
    train.counts.dropped_duplicates = len(train.examples) - len(first)
    train.examples = list(first.values())


def sample(count: int, size: int, generator: torch.Generator) -> list[int]:
    """`size` of the numbers below `count`, without repetition, ascending."""
    import torch

    return sorted(torch.randperm(count, generator=generator)[:size].tolist())


def _keep_sample(split: Split[Any], size: int, generator: torch.Generator) -> None:
    if len(split.examples) > size:
        split.counts.left_out += len(split.examples) - size
        split.examples = [split.examples[i] for i in sample(len(split.examples), size, generator)]


def _hold_out(train: Split[Any], data: DataConfig, generator: torch.Generator) -> Split[Any]:
    """Move dialogues (labelled texts) from train to validation, and drop from train every row that repeats one."""
    size = data.num_validation_examples
    different = list(dict.fromkeys(example.read for example in train.examples))
    if not different:
        raise DataError(f"{train.source}: no usable train rows: {train.counts.described()}")
    if size * 2 > len(different):
        raise DataError(
            f"{train.source}: {len(different)} different {'texts' if data.is_labelled else 'dialogues'} "
            f"are too few to hold {size} out for validation; lower data.num_validation_examples or give "
            "data.validation_file"
        )
    chosen = {different[i] for i in sample(len(different), size, generator)}
    first: dict[Any, Any] = {}
    kept = []
    for example in train.examples:
        if example.read in chosen:
            first.setdefault(example.read, example)
        else:
            kept.append(example)
    train.counts.held_out = len(train.examples) - len(kept)
    train.examples = kept
    return Split(list(first.values()), f"{train.source} (held out)", SplitCounts(rows=len(first)))

"""Where the rows come from: a hub id, a folder, or single files; and which of them are used.

train       ──▶ without empty rows and duplicates ──▶ without held-out rows ──▶ seeded sample
validation  ──▶ its own file, or dialogues held out of train
test        ──▶ its own file; a row says whether its dialogue also stands in train
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from ..config import DataConfig
from ..errors import DataError
from .json_rows import Row, read_rows

SPLITS = ("train", "validation", "test")
_FILE_STEMS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_FILE_SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True)
class Example:
    """A dialogue and its reference summary; lines end in \\n."""

    id: str
    dialogue: str
    summary: str
    seen_in_train: bool = False
    """The dialogue stands word for word in the training rows (validation and test only)."""


@dataclass
class SplitCounts:
    """What became of the rows that were read. `rows` is the sum of the dropped, left-out and used ones."""

    rows: int = 0
    dropped_empty: int = 0
    """Rows without a dialogue."""
    dropped_no_summary: int = 0
    """Rows without a summary."""
    dropped_duplicates: int = 0
    """Training rows that repeat an earlier one."""
    held_out: int = 0
    """Training rows given to validation, and those that repeat their dialogues."""
    left_out: int = 0
    """Rows beyond max_train_examples, num_validation_examples or max_test_examples."""
    used: int = 0
    seen_in_train: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass
class Split:
    """The rows of one split, in order, with the place they came from."""

    examples: list[Example]
    source: str
    counts: SplitCounts = field(default_factory=SplitCounts)


def resolve_splits(data: DataConfig, generator: Callable[[str], torch.Generator]) -> dict[str, Split]:
    """Read, clean and sample train, validation and test.

    Args:
        generator: gives a seeded generator for a name (`StageContext.rng`).

    Raises:
        DataError: no such folder, file or hub dataset; a split without a source or without rows; bad JSON; a row
            that is not an object, lacks a field or has one of the wrong type. The message names file and line.
    """
    sources = _find_sources(data)
    for split in ("train", "test"):
        if split not in sources:
            where = f"{data.dataset} has no {split} split" if data.dataset else f"there is no {split} split"
            raise DataError(
                f"{where}; set data.{split}_file to a .json or .jsonl file, or data.dataset to a folder that holds "
                f"{_FILE_STEMS[split][0]}.json or .jsonl"
            )
    splits = {name: _clean(sources[name], data, name) for name in SPLITS if name in sources}

    train = splits["train"]
    if data.drop_train_duplicates:
        _drop_duplicates(train)
    if "validation" in splits:
        _keep_sample(splits["validation"], data.num_validation_examples, generator("validation sample"))
    else:
        splits["validation"] = _hold_out(train, data.num_validation_examples, generator("validation held out"))
    if data.max_train_examples is not None:
        _keep_sample(train, data.max_train_examples, generator("train sample"))
    test = splits["test"]
    if data.max_test_examples is not None:
        test.counts.left_out += max(0, len(test.examples) - data.max_test_examples)
        test.examples = test.examples[: data.max_test_examples]

    in_train = {example.dialogue for example in train.examples}
    for name in ("validation", "test"):
        split = splits[name]
        split.examples = [replace(example, seen_in_train=example.dialogue in in_train) for example in split.examples]
        split.counts.seen_in_train = sum(example.seen_in_train for example in split.examples)
    for name in SPLITS:
        split = splits[name]
        split.counts.used = len(split.examples)
        if not split.examples:
            raise DataError(f"{split.source}: no usable {name} rows: {_describe(split.counts)}")
    return splits


@dataclass(frozen=True)
class _Source:
    name: str
    read: Callable[[], Iterable[Row]]


def _find_sources(data: DataConfig) -> dict[str, _Source]:
    """The source of every split that has one. A `*_file` replaces that split of `dataset`."""
    sources = {}
    if data.dataset is not None:
        folder = Path(data.dataset).expanduser()
        if folder.is_dir():
            sources = _folder_sources(folder)
        elif folder.exists():
            raise DataError(
                f"data.dataset: {data.dataset} is a file; give it as data.train_file, or name the folder that holds it"
            )
        elif folder.is_absolute() or data.dataset.startswith((".", "~")) or data.dataset.count("/") > 1:
            raise DataError(f"data.dataset: there is no folder {data.dataset}")
        else:
            sources = _hub_sources(data.dataset)
    for split in SPLITS:
        file = getattr(data, f"{split}_file")
        if file is not None:
            path = Path(file).expanduser()
            if not path.is_file():
                raise DataError(f"data.{split}_file: there is no file {file}")
            sources[split] = _file_source(path)
    return sources


def _file_source(path: Path) -> _Source:
    return _Source(str(path), lambda: read_rows(path))


def _folder_sources(folder: Path) -> dict[str, _Source]:
    sources = {}
    for split, stems in _FILE_STEMS.items():
        names = [stem + suffix for stem in stems for suffix in _FILE_SUFFIXES]
        found = [folder / name for name in names if (folder / name).is_file()]
        if len(found) > 1:
            raise DataError(
                f"{folder}: {' and '.join(path.name for path in found)} could both be the {split} split; "
                f"name one as data.{split}_file and move the other away"
            )
        if found:
            sources[split] = _file_source(found[0])
    if not sources:
        raise DataError(f"{folder}: holds no train, validation (val) or test file ending in .json or .jsonl")
    return sources


def _hub_sources(name: str) -> dict[str, _Source]:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub's client has a family of errors of its own, and network ones besides
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"data.dataset: {name} is no local folder and could not be fetched from the hub ({type(error).__name__}: "
            f"{reason}). Without a network, give local files: data.dataset=FOLDER holding train, validation and test "
            ".json or .jsonl, or data.train_file, data.validation_file, data.test_file"
        ) from None

    def source(split: str) -> _Source:
        place = f"{name} ({split})"
        return _Source(place, lambda: (Row(dict(row), f"{place} row {i + 1}") for i, row in enumerate(loaded[split])))

    return {split: source(split) for split in SPLITS if split in loaded}


def _clean(source: _Source, data: DataConfig, name: str) -> Split:
    """Rows with a dialogue and a summary, as examples. Empty ones are counted."""
    split = Split([], source.name)
    fields_found: set[str] = set()
    any_summary_field = False
    for number, row in enumerate(source.read(), start=1):
        split.counts.rows += 1
        fields_found.update(row.fields)
        if data.dialogue_field not in row.fields:
            raise DataError(_missing_field(row.place, "dialogue_field", data.dialogue_field, row.fields))
        any_summary_field |= data.summary_field in row.fields
        dialogue = _text(row, data.dialogue_field)
        summary = _text(row, data.summary_field)
        if not dialogue:
            split.counts.dropped_empty += 1
        elif not summary:
            split.counts.dropped_no_summary += 1
        else:
            identifier = row.fields.get(data.id_field)
            example_id = f"{name}-{number}" if identifier is None else str(identifier)
            split.examples.append(Example(example_id, dialogue, summary))
    if split.counts.rows and not any_summary_field:
        raise DataError(_missing_field(source.name, "summary_field", data.summary_field, fields_found))
    return split


def _missing_field(place: str, key: str, name: str, found: Iterable[str]) -> str:
    fields = ", ".join(sorted(map(str, found))) or "none"
    return f"{place}: no field '{name}' (fields found: {fields}); set data.{key} to the right one"


def _text(row: Row, name: str) -> str:
    value = row.fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{row.place}: field '{name}' must be text, not {type(value).__name__}")
    return value.replace("\r\n", "\n").replace("\r", "\n").strip()


def _drop_duplicates(train: Split) -> None:
    first: dict[tuple[str, str], Example] = {}
    for example in train.examples:
        first.setdefault((example.dialogue, example.summary), example)
    train.counts.dropped_duplicates = len(train.examples) - len(first)
    train.examples = list(first.values())


def _sample(count: int, size: int, generator: torch.Generator) -> Iterator[int]:
    """`size` of the numbers below `count`, without repetition, ascending."""
    return iter(sorted(torch.randperm(count, generator=generator)[:size].tolist()))


def _keep_sample(split: Split, size: int, generator: torch.Generator) -> None:
    if len(split.examples) > size:
        split.counts.left_out += len(split.examples) - size
        split.examples = [split.examples[i] for i in _sample(len(split.examples), size, generator)]


def _hold_out(train: Split, size: int, generator: torch.Generator) -> Split:
    """Move `size` dialogues from train to validation, and drop from train every row that repeats one of them."""
    dialogues = list(dict.fromkeys(example.dialogue for example in train.examples))
    if size * 2 > len(dialogues):
        raise DataError(
            f"{train.source}: {len(dialogues)} different dialogues are too few to hold {size} out for validation; "
            "lower data.num_validation_examples or give data.validation_file"
        )
    chosen = {dialogues[i] for i in _sample(len(dialogues), size, generator)}
    first: dict[str, Example] = {}
    kept = []
    for example in train.examples:
        if example.dialogue in chosen:
            first.setdefault(example.dialogue, example)
        else:
            kept.append(example)
    train.counts.held_out = len(train.examples) - len(kept)
    train.examples = kept
    return Split(list(first.values()), f"{train.source} (held out)", SplitCounts(rows=len(first)))


def _describe(counts: SplitCounts) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counts.as_dict().items())

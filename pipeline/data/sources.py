"""Where the rows come from: a hub id, a folder, or single files; and which of them are used.

train       ──▶ without empty rows and duplicates ──▶ without held-out rows ──▶ seeded sample
validation  ──▶ its own file, or dialogues held out of train
test        ──▶ its own file; a row says whether its dialogue also stands in train
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import DataConfig
from ..config_checks import Problem
from ..errors import DataError
from .json_rows import Row, read_rows, read_text

if TYPE_CHECKING:
    import torch

SPLITS = ("train", "validation", "test")
_FILE_STEMS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_FILE_SUFFIXES = (".json", ".jsonl")
_JSON_SUFFIXES = (*_FILE_SUFFIXES, ".ndjson")
"""Of files that are named themselves, where `data.kind` is text; dialogues are JSON whatever their file is called."""


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
            that is not an object, lacks a field or has one of the wrong type. The message names file and line, and of
            every split the first fault.
    """
    splits, problems = read_splits(data)
    if problems:
        raise DataError("\n".join(str(problem) for problem in problems))
    return select_examples(splits, data, generator)


def read_splits(data: DataConfig) -> tuple[dict[str, Split], list[Problem]]:
    """The cleaned rows of every split that has a source, and what is wrong with the others.

    A dataset on the hub is fetched.
    """
    sources, problems = find_sources(data)
    if on_hub(data):
        try:
            sources = _hub_sources(data) | sources
        except DataError as error:
            problems.append(Problem(("data.dataset",), str(error)))
    problems += missing_splits(data, sources, problems)
    splits, unreadable = read_sources(sources, data)
    return splits, problems + unreadable


def read_sources(sources: Mapping[str, Source], data: DataConfig) -> tuple[dict[str, Split], list[Problem]]:
    """The cleaned rows of these splits, and the first fault of each that has one."""
    splits, problems = {}, []
    for name in SPLITS:
        if name in sources:
            try:
                splits[name] = _clean(sources[name], data, name)
            except DataError as error:
                keys = (sources[name].key, "data.id_field", "data.dialogue_field", "data.summary_field")
                problems.append(Problem(keys, str(error)))
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
            stem, *others = [_FILE_STEMS[split][0] + _suffixes(data)[0], *_suffixes(data)[1:]]
            message = (
                f"{where}; set data.{split}_file to a {' or '.join(_suffixes(data))} file, or data.dataset to a folder "
                f"that holds {' or '.join([stem, *others])}"
            )
            found.append(Problem((f"data.{split}_file", "data.dataset"), message))
    return found


def select_examples(
    splits: dict[str, Split], data: DataConfig, generator: Callable[[str], torch.Generator]
) -> dict[str, Split]:
    """What is used of the rows that were read; the splits are changed in place.

    Raises:
        DataError: too few rows to hold some out, or nothing is left of a split.
    """
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
class Source:
    """Where a split's rows can be read."""

    name: str
    read: Callable[[], Iterable[Row]]
    key: str = "data.dataset"
    """The config's key that names it."""
    is_one_text: bool = False
    """Whether its rows are the lines of one text."""


def on_hub(data: DataConfig) -> bool:
    """Whether `data.dataset` is taken for a hub id: no folder or file here, and nothing that looks like one's path."""
    name = data.dataset
    if name is None or Path(name).expanduser().exists():
        return False
    return not (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1)


def find_sources(data: DataConfig) -> tuple[dict[str, Source], list[Problem]]:
    """The local source of every split that has one, and what cannot be one. A `*_file` replaces that of `dataset`."""
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
    return sources, problems


def _suffixes(data: DataConfig) -> tuple[str, ...]:
    return (".txt", *_FILE_SUFFIXES) if data.kind == "text" else _FILE_SUFFIXES


def _file_source(path: Path, data: DataConfig, key: str = "data.dataset") -> Source:
    """JSON rows, or of running text also a file of it, by what it is called."""
    if data.kind == "text" and path.suffix.lower() not in _JSON_SUFFIXES:
        return Source(str(path), partial(read_text, path, data.text_field), key, is_one_text=True)
    return Source(str(path), partial(read_rows, path), key)


def _folder_sources(folder: Path, data: DataConfig) -> tuple[dict[str, Source], list[Problem]]:
    sources: dict[str, Source] = {}
    problems = []
    for split, stems in _FILE_STEMS.items():
        if getattr(data, f"{split}_file") is not None:
            continue
        names = [stem + suffix for stem in stems for suffix in _suffixes(data)]
        found = [folder / name for name in names if (folder / name).is_file()]
        if len(found) > 1:
            message = (
                f"{folder}: {' and '.join(path.name for path in found)} could both be the {split} split; "
                f"name one as data.{split}_file and move the other away"
            )
            problems.append(Problem((f"data.{split}_file", "data.dataset"), message))
        elif found:
            sources[split] = _file_source(found[0], data)
    if not sources and not problems and any(getattr(data, f"{split}_file") is None for split in ("train", "test")):
        message = f"{folder}: holds no train, validation (val) or test file ending in {' or '.join(_suffixes(data))}"
        problems.append(Problem(("data.dataset",), message))
    return sources, problems


def _hub_sources(data: DataConfig) -> dict[str, Source]:
    import datasets

    name, config, suffixes = str(data.dataset), data.dataset_config, _suffixes(data)
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
        return Source(place, lambda: (Row(dict(row), f"{place} row {i + 1}") for i, row in enumerate(loaded[split])))

    return {split: source(split) for split in SPLITS if split in loaded}


def _clean(source: Source, data: DataConfig, name: str) -> Split:
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


def text_of(row: Row, data: DataConfig) -> str:
    """A row's text where `data.kind` is text, lines ending in \\n; null is none.

    Raises:
        DataError: no such field, or no text in it.
    """
    name = data.text_field
    if name not in row.fields:
        raise DataError(_missing_field(row.place, "text_field", name, row.fields))
    text = row.fields[name]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{row.place}: field '{name}' must be text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.place}: field '{name}' is no text at character {error.start + 1} (half of a surrogate pair); mend "
            "or remove it"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


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


def _drop_duplicates(train: Split) -> None:
    first: dict[tuple[str, str], Example] = {}
    for example in train.examples:
        first.setdefault((example.dialogue, example.summary), example)
    train.counts.dropped_duplicates = len(train.examples) - len(first)
    train.examples = list(first.values())


def sample(count: int, size: int, generator: torch.Generator) -> list[int]:
    """`size` of the numbers below `count`, without repetition, ascending."""
    import torch

    return sorted(torch.randperm(count, generator=generator)[:size].tolist())


def _keep_sample(split: Split, size: int, generator: torch.Generator) -> None:
    if len(split.examples) > size:
        split.counts.left_out += len(split.examples) - size
        split.examples = [split.examples[i] for i in sample(len(split.examples), size, generator)]


def _hold_out(train: Split, size: int, generator: torch.Generator) -> Split:
    """Move `size` dialogues from train to validation, and drop from train every row that repeats one of them."""
    dialogues = list(dict.fromkeys(example.dialogue for example in train.examples))
    if size * 2 > len(dialogues):
        raise DataError(
            f"{train.source}: {len(dialogues)} different dialogues are too few to hold {size} out for validation; "
            "lower data.num_validation_examples or give data.validation_file"
        )
    chosen = {dialogues[i] for i in sample(len(dialogues), size, generator)}
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

"""What a split is made of: its rows as examples, the place they came from, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from ..errors import DataError
from .json_rows import Row


@dataclass(frozen=True)
class Example:
    """A dialogue and its reference summary; lines end in \\n."""

    id: str
    dialogue: str
    summary: str
    seen_in_train: bool = False
    """The dialogue stands word for word in the training rows (validation and test only)."""

    @property
    def read(self) -> str:
        """What a model is given: rows that share it are never divided between train and validation."""
        return self.dialogue

    @property
    def whole(self) -> tuple[Any, ...]:
        """All that is learned from: rows that share it are duplicates."""
        return self.dialogue, self.summary


@dataclass(frozen=True)
class LabelledExample:
    """A text, or a pair of them, and its label, a class or a score; lines end in \\n."""

    id: str
    text: str
    second_text: str | None
    label: int | str | float
    """A class as the source has it, until `number_labels` has made it the class's number; or a score, a float."""
    seen_in_train: bool = False
    """The text (of a pair both) stands word for word in the training rows (validation and test only)."""

    @property
    def read(self) -> tuple[str, str | None]:
        """As that of an Example."""
        return self.text, self.second_text

    @property
    def whole(self) -> tuple[Any, ...]:
        """As that of an Example."""
        return self.text, self.second_text, self.label


ExampleT = TypeVar("ExampleT", Example, LabelledExample)


@dataclass
class SplitCounts:
    """What became of the rows that were read. `rows` is the sum of the dropped, left-out and used ones."""

    rows: int = 0
    dropped_empty: int = 0
    """Rows without a dialogue, or without a text that the label is of."""
    dropped_no_summary: int = 0
    """Rows without a summary."""
    dropped_no_label: int = 0
    """Rows to classify, of the hub, whose label is -1: nobody agreed on one (SNLI), or it is kept secret."""
    dropped_duplicates: int = 0
    """Training rows that repeat an earlier one."""
    held_out: int = 0
    """Training rows given to validation, and those that repeat their dialogues or texts."""
    left_out: int = 0
    """Rows beyond max_train_examples, num_validation_examples or max_test_examples."""
    used: int = 0
    seen_in_train: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def described(self) -> str:
        """For a message: how many rows were read, and what became of them."""
        shown = {name: value for name, value in asdict(self).items() if value or name == "rows"}
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())


@dataclass
class Split(Generic[ExampleT]):
    """The rows of one split, in order, with the place they came from."""

    examples: list[ExampleT]
    source: str
    counts: SplitCounts = field(default_factory=SplitCounts)
    labels: dict[int | str | float, str] = field(default_factory=dict)
    """Each label that was read, and the place of the first row that has it."""
    label_names: tuple[str, ...] | None = None
    """What the source calls its labels 0, 1, … (the hub's), where it says so."""


@dataclass(frozen=True)
class Source:
    """Where a split's rows can be read."""

    name: str
    read: Callable[[], Iterable[Row]]
    key: str = "data.dataset"
    """The config's key that names it."""
    is_one_text: bool = False
    """Whether its rows are the lines of one text."""
    label_names: tuple[str, ...] | None = None
    """What it calls the labels 0, 1, …, where it says so."""


def missing_field(place: str, key: str, name: str, found: Iterable[str]) -> str:
    """The message about a field that is not there; `key` is the one of `data` that names it."""
    names = sorted(map(str, found))
    fields = ", ".join(one if one and one == one.strip() else f"'{one}'" for one in names) or "none"
    return f"{place}: no field '{name}' (fields found: {fields}); set data.{key} to the right one"


def text_field(row: Row, name: str) -> str:
    """A row's text, lines ending in \\n; "" where there is none, or null.

    Raises:
        DataError: something else than text.
    """
    value = row.fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{row.place}: field '{name}' must be text, not {type(value).__name__}")
    return value.replace("\r\n", "\n").replace("\r", "\n")


def check_encodable(row: Row, name: str) -> None:
    """
    Raises:
        DataError: the field, which is text, holds half of a surrogate pair, as JSON can.
    """
    try:
        row.fields[name].encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.place}: field '{name}' is no text at character {error.start + 1} (half of a surrogate pair); mend "
            "or remove it"
        ) from None


__all__ = [
    "Example",
    "ExampleT",
    "LabelledExample",
    "Source",
    "Split",
    "SplitCounts",
    "check_encodable",
    "missing_field",
    "text_field",
]

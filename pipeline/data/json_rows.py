"""Rows of a JSON file, either one list of objects or one object a line, told apart by the content; and plain text."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

_JSON_TYPE_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


_TEXT_BYTES = 1 << 16
"""About as much of a text file is one row."""
_BETWEEN_ROWS = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Row:
    """One object and where it stands ("train.jsonl:17" or "train.json:52 (row 17)"), for messages."""

    fields: dict[str, Any]
    place: str


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON list or JSONL file; empty lines of JSONL are skipped.

    Raises:
        DataError: the file cannot be read, is not UTF-8 or not JSON, or a row is not an object; with file and line.
    """
    text = read_utf8(path)
    if text.lstrip()[:1] == "[":
        yield from _list_rows(path, text)
    else:
        yield from _line_rows(path, text)


def read_utf8(path: Path, *, newline: str | None = None) -> str:
    """The whole file, without a byte order mark.

    Args:
        newline: as of `open`; None makes every end of a line \\n.

    Raises:
        DataError: it cannot be read, or is not UTF-8; with file and line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read_text(path: Path, field: str) -> Iterator[Row]:
    """Yield a file of plain text in parts of some pages that end with a line, each as `field` of a row.

    Raises:
        DataError: the file cannot be read, or is not UTF-8; with file and line.
    """
    number = 1
    try:
        with open(path, "rb") as file:
            while lines := file.readlines(_TEXT_BYTES):
                part = b"".join(lines)
                try:
                    text = part.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    line = number + error.object[: error.start].count(b"\n")
                    raise DataError(
                        f"{path}:{line}: not UTF-8 text ({error.reason}); convert the file to UTF-8"
                    ) from None
                yield Row({field: text}, f"{path}:{number}")
                number += len(lines)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _list_rows(path: Path, text: str) -> Iterator[Row]:
    _parse(path, text, first_line=1)  # bad JSON anywhere is told before the first row is used
    decode = json.JSONDecoder().raw_decode  # one row after the other, for their lines
    place, line = text.index("[") + 1, 1
    line += text.count("\n", 0, place)
    for number in itertools.count(1):
        between = _BETWEEN_ROWS.match(text, place)
        assert between is not None
        line += between.group().count("\n")
        if text[between.end()] == "]":
            return
        value, place = decode(text, between.end())
        where = f"{path}:{line} (row {number})"
        yield Row(_object(value, where), where)
        line += text.count("\n", between.end(), place)


def _line_rows(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and its like, which are no line ends here.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Row(_object(_parse(path, line, number), f"{path}:{number}"), f"{path}:{number}")


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}:{line}: bad JSON ({error.msg}, column {error.colno}); the file must be one list of objects, or "
            "one object a line"
        ) from None
    except RecursionError:
        raise DataError(f"{path}:{first_line}: JSON nested too deeply to be a row") from None


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = _JSON_TYPE_NAMES.get(type(value), "a number")
        raise DataError(f"{place}: a row must be an object with named fields, not {kind}")
    return value

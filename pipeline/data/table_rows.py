"""Rows of a table: a line of column names, then one row a line. GLUE's .tsv, which quotes nothing, and .csv."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .json_rows import Row, read_utf8

SUFFIXES = (".tsv", ".csv")
_SCORE = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?")
_LONGEST_FIELD = 1 << 30
_SHOWN = 40


def read_table(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a table; empty lines are skipped. All is text, but for scores and -1 in the last of `fields`,
    the label: those are numbers.

    A .tsv has a tab between fields, quotation marks are characters, and only a line feed ends a row; a .csv is read as
    spreadsheets write it, with commas and quoting.

    Raises:
        DataError: the file cannot be read, is not UTF-8, has no first line that names columns or names one twice, a
            row has more or fewer fields than columns, or a quotation mark is not closed; with file and line.
    """
    is_csv = path.suffix.lower() == ".csv"
    lines = (_csv_lines if is_csv else _tsv_lines)(path)
    _, columns = next(lines, (1, []))
    _check_columns(path, columns, fields)
    for number, found in lines:
        if len(found) != len(columns):
            between = "commas separate them" if is_csv else "tabs separate them, and quotation marks protect none"
            raise DataError(
                f"{path}:{number}: {len(found)} fields, but the first line names {len(columns)} columns; {between}"
            )
        row: dict[str, Any] = dict(zip(columns, found, strict=True))
        if fields[-1] in row:
            row[fields[-1]] = _label(row[fields[-1]])
        yield Row(row, f"{path}:{number}")


def _check_columns(path: Path, columns: Sequence[str], fields: Sequence[str]) -> None:
    kind = path.suffix.lower()
    if not any(name.strip() for name in columns):
        raise DataError(f"{path}:1: is empty; the first line of a {kind} names its columns")
    if not set(fields) & set(columns):
        found = ", ".join(f"'{name}'" if len(name) <= _SHOWN else f"'{name[:_SHOWN]}…'" for name in columns)
        raise DataError(
            f"{path}:1: names none of the columns {', '.join(fields)}, but {found}. If this is a row already, as in "
            "CoLA's own download, put a line of names before it; else set data.text_field and data.label_field"
        )
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: two columns are called '{twice[0]}'; the first line of a {kind} names its columns")


def _tsv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number of each line, and its fields. Not by the csv module, which would end a row at a carriage return too."""
    for number, line in enumerate(read_utf8(path, newline="\n").split("\n"), start=1):
        if line.strip() or number == 1:
            yield number, line.removesuffix("\r").split("\t")


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number of the line that each row begins on, and its fields."""
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(read_utf8(path, newline=""), newline=""), strict=True)
    number = 1
    while True:
        try:
            found = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{number}: a row that begins here is no CSV ({error})") from None
        if any(cell.strip() for cell in found) or number == 1:
            yield number, found
        number = reader.line_num + 1


def _label(text: str) -> int | float | str:
    text = text.strip()
    if text == "-1":
        return -1
    return float(text) if _SCORE.fullmatch(text) else text


__all__ = ["SUFFIXES", "read_table"]

"""Rows of a .tsv as GLUE's own downloads have them: a line of column names, then one row a line, no quoting."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .json_rows import Row, read_utf8

_WHOLE_NUMBER = re.compile(r"-?(0|[1-9]\d*)")
_NUMBER = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?")


def read_table(path: Path, label_field: str) -> Iterator[Row]:
    """Yield the rows of a table; empty lines are skipped. Numbers in the column `label_field` are numbers, all else is
    text.

    Not by the csv module: quotation marks are characters here, and only a line feed ends a row.

    Raises:
        DataError: the file cannot be read, is not UTF-8, has no first line, names a column twice, or a row has more or
            fewer fields than columns; with file and line.
    """
    lines = read_utf8(path, newline="\n").split("\n")
    columns = _fields(lines[0])
    if not lines[0].strip():
        raise DataError(f"{path}:1: is empty; the first line of a .tsv names its columns")
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: two columns are called '{twice[0]}'; the first line of a .tsv names its columns")
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        found = _fields(line)
        if len(found) != len(columns):
            raise DataError(
                f"{path}:{number}: {len(found)} fields, but the first line names {len(columns)} columns; tabs separate "
                "them, and quotation marks protect none"
            )
        fields: dict[str, Any] = dict(zip(columns, found, strict=True))
        if label_field in fields:
            fields[label_field] = _label(fields[label_field])
        yield Row(fields, f"{path}:{number}")


def _fields(line: str) -> list[str]:
    return line.removesuffix("\r").split("\t")


def _label(text: str) -> int | float | str:
    text = text.strip()
    if _WHOLE_NUMBER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


__all__ = ["read_table"]

"""Durations, sizes and long lines for people. Imports nothing heavy, so that light commands may use it."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from typing import TextIO

_UNBROKEN = "\x00"
"""Stands for a blank inside `backticks`: a command is copied whole or not at all."""


def format_duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, second = divmod(int(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def wrapped(text: str, width: int, indent: str = "    ") -> list[str]:
    """The lines of a text, those that are longer than a terminal's columns broken at blanks and the rest indented.

    Paths and commands in `backticks` stay whole, and so pass the last column where they must: the terminal breaks them.
    """
    lines = []
    for line in text.split("\n"):
        own = line[: len(line) - len(line.lstrip())]
        kept = re.sub(r"`[^`]*`", lambda found: found[0].replace(" ", _UNBROKEN), line)
        broken = textwrap.wrap(
            kept,
            max(width, 2 * len(indent + own) + 20),
            subsequent_indent=own + indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [part.replace(_UNBROKEN, " ") for part in broken] if len(line) > width else [line]
    return lines


def for_stream(text: str, stream: TextIO) -> str:
    """A message as `stream` should get it: wrapped where that is a terminal, else as it is."""
    return "\n".join(wrapped(text, shutil.get_terminal_size().columns)) if stream.isatty() else text


_BYTES = r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?))?B"


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `5GB`, `500MB`, `1.5GiB`; a unit with i counts in 1024s. ValueError for other text."""
    found = re.fullmatch(_BYTES, text, re.ASCII)
    num_bytes = 0
    if found is not None:
        number, prefix, binary = found.groups()
        num_bytes = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix) + 1 if prefix else 0))
    if num_bytes < 1:
        raise ValueError("expected a size such as 5GB, 500MB or 1.5GiB")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


_LONGEST_NAME = 80


def code_span(text: str) -> str:
    """Text of a user's data within a line of Markdown, where none of its signs means anything.

    What a line cannot hold (line breaks, blanks at an end, nothing at all) is written as JSON has it; long text is cut.
    """
    if len(text) > _LONGEST_NAME:
        text = text[: _LONGEST_NAME - 1] + "…"
    if not text.isprintable() or text != text.strip() or not text:
        text = json.dumps(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    blank = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{blank}{text}{blank}{fence}"

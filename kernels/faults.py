"""What an operator, a compiler or a driver said, short enough for a line of a log."""

from __future__ import annotations

LONGEST = 200


def first_line(error: BaseException) -> str:
    """The message's first line, or the error's kind where there is none; cut at 200 characters."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"

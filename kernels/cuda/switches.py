"""Environment variables that ask for one kernel of several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator


def asked_for(switch: str, names: Collection[str]) -> str:
    """What `$switch` asks for, "" for nothing. Raises ValueError for a name that is not one of `names`."""
    wanted = os.environ.get(switch, "")
    if wanted and wanted not in names:
        raise ValueError(f"{switch}={wanted}: there are {', '.join(names)}")
    return wanted


@contextlib.contextmanager
def switched(switch: str, name: str) -> Iterator[None]:
    """`name` for a while, whatever the environment asks for: for tests and benchmarks."""
    before = os.environ.get(switch)
    os.environ[switch] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before

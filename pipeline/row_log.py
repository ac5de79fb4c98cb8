"""Results of single examples, one JSON object a line, written while they are made and complete after any kill.

Rank 0 appends to `<name>.jsonl`, rank r to `<name>.rank<r>.jsonl`. Rank 0 joins the files whenever a log is opened
or closed, so any number of processes may go on with what another number began.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from .interrupts import stopping_together
from .run_folder import atomic_write, check_may_write

if TYPE_CHECKING:
    from .distributed import World


def read_complete_rows(path: Path) -> list[dict[str, Any]]:
    """The rows up to the first torn line (no line break at its end, or no JSON object with an `index`).

    A file that does not exist has no rows.
    """
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or "index" not in row:
            break
        rows.append(row)
    return rows


class RowLog:
    """The rows of one variant, keyed by the example's `index`, shared by all processes.

    Opening it (as a context manager) is collective: rank 0 joins what earlier attempts left and tells every rank
    which examples are `done`. Leaving it without an error joins the ranks' rows, sorted by index.
    """

    def __init__(self, path: Path, world: World) -> None:
        self.path = path
        self.done: frozenset[int] = frozenset()
        """Indices of the examples that earlier attempts finished."""
        self._world = world
        self._file: IO[str] | None = None

    def _rank_file(self, rank: int) -> Path:
        return self.path if rank == 0 else self.path.with_name(f"{self.path.stem}.rank{rank}.jsonl")

    def _part_files(self) -> list[Path]:
        """Files of ranks 1, 2, … of this attempt or an earlier one."""
        prefix = f"{self.path.stem}.rank"
        return sorted(
            file
            for file in self.path.parent.glob("*.jsonl")
            if file.name.startswith(prefix) and file.name[len(prefix) : -len(".jsonl")].isdigit()
        )

    def _join(self) -> frozenset[int]:
        parts = self._part_files()
        rows = {row["index"]: row for file in (self.path, *parts) for row in read_complete_rows(file)}
        lines = [json.dumps(rows[index], ensure_ascii=False) + "\n" for index in sorted(rows)]
        atomic_write(self.path, "".join(lines))
        for part in parts:
            part.unlink()
        return frozenset(rows)

    def __enter__(self) -> RowLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with stopping_together(self._world):  # rank 0 may find that another attempt has taken the folder over
            if self._world.is_main:
                self.done = self._join()
        self.done = self._world.broadcast(self.done)
        self._file = open(self._rank_file(self._world.rank), "a", encoding="utf-8")
        return self

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows (each with its `index`) and hand them to the operating system: a kill loses none of them.

        Raises:
            LeaseError: another attempt has taken the folder over.
        """
        assert self._file is not None
        check_may_write(self.path)
        for row in rows:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()
        if kind is None:
            self._world.barrier()
            with stopping_together(self._world):
                if self._world.is_main:
                    self._join()

"""Rows of hidden states on disk: append-only files that any number of processes share without locks.

    <name>.index     a line of JSON (what the states are), then a record of fixed size a row
    <name>.states    the rows' states end to end, without padding

Every process of every attempt writes a pair of its own, under a name that no other has, and reads all of them. A row's
states are written before its record, so a record whose states are cut off, and a record that is itself cut off or
damaged, is the torn end of a file whose process was killed: it and what follows are left out. Every read verifies the
states' checksum.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import torch

from .run_folder import fsync_directory

_RECORD = struct.Struct("<QQII")
"""Row, offset in bytes, tokens, CRC-32 of the states; a CRC-32 of these follows."""
_CHECKSUM = struct.Struct("<I")
_RECORD_BYTES = _RECORD.size + _CHECKSUM.size


@dataclass(eq=False)
class _Pair:
    """A pair of files as far as it was read. `states` grows; the map is made anew when a row lies behind its end."""

    index: Path
    read_bytes: int = 0
    map: mmap.mmap | None = None

    @property
    def states(self) -> Path:
        return self.index.with_suffix(".states")


@dataclass(frozen=True)
class _Place:
    """Where a row's states lie."""

    pair: _Pair
    offset: int
    tokens: int
    crc32: int


@dataclass
class _Writer:
    """This process's own pair, open for appending."""

    pair: _Pair
    index: FileIO
    states: FileIO
    end: int = 0


class HiddenStateFiles:
    """The states (tokens, `hidden_size`) of rows, by row number.

    Args:
        folder: made where there is none.
        fingerprint: of everything that the states depend on; a pair with another one is never read.
        damaged: told of a row whose checksum is wrong, once a row.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        hidden_size: int,
        dtype: torch.dtype,
        damaged: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self._header = (json.dumps({"format": 1, "fingerprint": fingerprint}) + "\n").encode()
        self._token_bytes = hidden_size * dtype.itemsize
        self._damaged = damaged
        self._pairs: dict[str, _Pair] = {}
        self._places: dict[int, list[_Place]] = {}
        self._writer: _Writer | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, row: int) -> bool:
        return bool(self._places.get(row))

    @property
    def num_bytes(self) -> int:
        """Size of the rows that are known here, each counted once."""
        return sum(places[0].tokens * self._token_bytes for places in self._places.values() if places)

    def remove_foreign(self) -> int:
        """Remove the files of another fingerprint, and what is no cache at all; returns how many pairs there were."""
        removed = 0
        for index in sorted(self.folder.glob("*.index")):
            with open(index, "rb") as file:
                if file.read(len(self._header)) == self._header:
                    continue
            index.unlink()
            removed += 1
        for states in self.folder.glob("*.states"):
            if not states.with_suffix(".index").exists():
                states.unlink()
        return removed

    def refresh(self) -> None:
        """Take up what other processes have written since. What cannot be read now is left for the next time."""
        # Listing and opening anew: a shared file system shows what is there now, which an open file may not.
        for name in sorted(os.listdir(self.folder)):
            if not name.endswith(".index"):
                continue
            pair = self._pairs.setdefault(name, _Pair(self.folder / name))
            try:
                with open(pair.index, "rb") as file:
                    if file.read(len(self._header)) != self._header:
                        continue
                    file.seek(max(pair.read_bytes, len(self._header)))
                    records = file.read()
                with open(pair.states, "rb") as file:
                    num_bytes = os.fstat(file.fileno()).st_size
            except OSError:
                continue
            pair.read_bytes = max(pair.read_bytes, len(self._header))
            for place, row in self._read_records(pair, records, num_bytes):
                self._places.setdefault(row, []).append(place)
                pair.read_bytes += _RECORD_BYTES

    def _read_records(self, pair: _Pair, records: bytes, num_bytes: int) -> list[tuple[_Place, int]]:
        """The places up to the first record that is torn, or whose states are not all there."""
        found = []
        for start in range(0, len(records) - _RECORD_BYTES + 1, _RECORD_BYTES):
            record = records[start : start + _RECORD.size]
            (checksum,) = _CHECKSUM.unpack_from(records, start + _RECORD.size)
            row, offset, tokens, crc32 = _RECORD.unpack(record)
            if zlib.crc32(record) != checksum or offset + tokens * self._token_bytes > num_bytes:
                break
            found.append((_Place(pair, offset, tokens, crc32), row))
        return found

    def read(self, row: int, out_LE: torch.Tensor) -> bool:
        """Copy a row's states into `out_LE`, a contiguous CPU tensor (tokens, hidden_size) of the files' dtype.

        False where no file has the row whole: then what `out_LE` holds is undefined.
        """
        places = self._places.get(row, [])
        target = out_LE.view(torch.uint8).numpy().reshape(-1)
        while places:
            place = places[0]
            if place.tokens == len(out_LE) and self._copy(place, target) and zlib.crc32(target.data) == place.crc32:
                return True
            places.pop(0)
            self._damaged(f"{place.pair.states.name}: the hidden states of row {row} are damaged")
        return False

    def _copy(self, place: _Place, target: np.ndarray) -> bool:
        pair, end = place.pair, place.offset + len(target)
        try:
            if pair.map is None or len(pair.map) < end:
                if pair.map is not None:
                    pair.map.close()
                    pair.map = None
                with open(pair.states, "rb") as file:
                    pair.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # gone, or empty
            return False
        if len(pair.map) < end:
            return False
        target[:] = np.frombuffer(pair.map, np.uint8, len(target), place.offset)
        return True

    def append(self, row: int, states_LE: torch.Tensor) -> None:
        """Write a row's states (tokens, hidden_size), a contiguous CPU tensor, to this process's file.

        Handed to the operating system, not flushed to disk: a killed process loses nothing of it.

        Raises:
            OSError: the disk is full, or refuses. What was written before stays readable.
        """
        if self._writer is None:
            self._writer = self._open_writer()
        writer, content = self._writer, states_LE.view(torch.uint8).numpy().reshape(-1)
        assert content.nbytes == len(states_LE) * self._token_bytes
        place = _Place(writer.pair, writer.end, len(states_LE), zlib.crc32(content.data))
        record = _RECORD.pack(row, place.offset, place.tokens, place.crc32)
        _write_all(writer.states, content.data)
        writer.end += content.nbytes
        _write_all(writer.index, memoryview(record + _CHECKSUM.pack(zlib.crc32(record))))
        self._places.setdefault(row, []).append(place)
        writer.pair.read_bytes += _RECORD_BYTES

    def _open_writer(self) -> _Writer:
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        pair = self._pairs[f"{name}.index"] = _Pair(self.folder / f"{name}.index", len(self._header))
        index = FileIO(pair.index, "x")
        _write_all(index, memoryview(self._header))
        return _Writer(pair, index, FileIO(pair.states, "x"))

    def sync(self) -> None:
        """Flush this process's files to disk, so that other machines see them.

        Raises:
            OSError: a shared file system may say only here that it is full.
        """
        if self._writer is not None:
            os.fsync(self._writer.states.fileno())
            os.fsync(self._writer.index.fileno())
            fsync_directory(self.folder)

    def stop_writing(self) -> None:
        """Close this process's own files; they stay readable."""
        if self._writer is not None:
            self._writer.states.close()
            self._writer.index.close()
            self._writer = None

    def close(self) -> None:
        """Close everything and forget the rows."""
        self.stop_writing()
        for pair in {id(place.pair): place.pair for places in self._places.values() for place in places}.values():
            if pair.map is not None:
                pair.map.close()
                pair.map = None
        self._places.clear()
        self._pairs.clear()


def _write_all(file: FileIO, content: memoryview) -> None:
    """A single write may be cut short, at 2 GiB or where the disk ends."""
    while len(content):
        content = content[file.write(content) :]

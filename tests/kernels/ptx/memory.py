"""Memory as a kernel sees it: pieces at addresses, beyond which an access is a fault, as is one that is not aligned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(RuntimeError):
    """What a GPU would stop for, or what has no defined result there."""


class Memory:
    """Pieces of bytes, each at an address; sorted, none over another."""

    def __init__(self, pieces: Sequence[tuple[int, np.ndarray]]) -> None:
        ordered = sorted(pieces, key=lambda piece: piece[0])
        self._starts = np.array([start for start, _ in ordered], dtype=np.int64)
        self._ends = np.array([start + len(held) for start, held in ordered], dtype=np.int64)
        self._held = [held for _, held in ordered]

    def load(self, address_N: np.ndarray, width: int) -> np.ndarray:
        """`width` bytes at each address, as unsigned integers."""
        found_N = np.empty(len(address_N), dtype=RAW[width])
        for piece, which, offset in self._pieces(address_N, width):
            found_N[which] = self._held[piece].view(RAW[width])[offset // width]
        return found_N

    def store(self, address_N: np.ndarray, value_N: np.ndarray) -> None:
        """Of two threads at one address the later one wins; the order of threads is not defined."""
        width = value_N.itemsize
        for piece, which, offset in self._pieces(address_N, width):
            self._held[piece].view(RAW[width])[offset // width] = value_N[which]

    def _pieces(self, address_N: np.ndarray, width: int):
        address_N = address_N.astype(np.int64)
        if len(address_N) == 0:
            return
        if (address_N % width).any():
            raise Fault(f"{width} bytes at {int(address_N[address_N % width != 0][0]):#x}, which is not aligned")
        piece_N = np.searchsorted(self._starts, address_N, side="right") - 1
        outside_N = (piece_N < 0) | (address_N + width > self._ends[piece_N])
        if outside_N.any():
            raise Fault(f"{width} bytes at {int(address_N[outside_N][0]):#x}, where nothing is")
        first = int(piece_N[0])
        if (piece_N == first).all():
            yield first, slice(None), address_N - self._starts[first]
            return
        for piece in np.unique(piece_N):
            which = np.nonzero(piece_N == piece)[0]
            yield int(piece), which, address_N[which] - self._starts[piece]

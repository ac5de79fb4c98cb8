"""Rows joined into sequences of a given length: best fit. Imports no torch, for `status` counts sequences with it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence


def best_fit(lengths: Sequence[int], order: Iterable[int], capacity: int) -> list[list[int]]:
    """Row numbers of each sequence; rows are taken in `order`, each into the fullest sequence that has room for it.

    How many sequences come out depends on the lengths in that order alone. No row may be longer than `capacity`.
    """
    sequences: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, sequence), sorted
    for row in order:
        slot = bisect_left(free, (lengths[row], -1))
        if slot < len(free):
            left, sequence = free.pop(slot)
        else:
            left, sequence = capacity, len(sequences)
            sequences.append([])
        sequences[sequence].append(row)
        if left > lengths[row]:
            insort(free, (left - lengths[row], sequence))
    return sequences


def num_sequences(lengths: Sequence[int], capacity: int) -> int:
    """How many sequences rows are packed into, longest rows first."""
    return len(best_fit(lengths, sorted(range(len(lengths)), key=lambda row: -lengths[row]), capacity))

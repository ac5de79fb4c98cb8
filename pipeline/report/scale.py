"""From values to pixels, and round numbers for an axis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_LARGEST = 1e100
"""A finite value beyond it is no figure of a training, and would overflow the arithmetic of an axis."""
_SAME = 1e-9
"""Values that differ by a smaller part of themselves are one value to an axis."""
_MANTISSAS = (1.0, 2.0, 2.5, 5.0)
_PLAIN_BELOW = 1e7
_PLAIN_DECIMALS = 6


def is_drawable(value: Any) -> bool:
    """Whether a value from a file is a number that has a place on an axis."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


@dataclass(frozen=True)
class Scale:
    """A straight line from values to pixels: `low` is at pixel `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value, to a hundredth."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)


def ticks_covering(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, evenly spaced; the first is at or below `low`, the last at or above `high`.

    Where the two are one value, there is room on both sides of it.

    Args:
        most: how many at most; 3 or more, since a range may lie on both sides of zero.
    """
    if high - low <= _SAME * max(abs(low), abs(high)):
        room = 0.1 * abs(low) or 1.0
        low, high = low - room, high + room
    for step in _round_steps((high - low) / most):
        first, last = math.floor(low / step + _SAME), math.ceil(high / step - _SAME)
        if last - first < most:
            return [_clean(number * step, step) for number in range(first, last + 1)]
    raise AssertionError("steps grow without end")


def ticks_within(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """At most `most` round numbers from `low` to `high`, which differ; integers where `whole`."""
    for step in _round_steps((high - low) / most):
        if whole and step != int(step):
            continue
        first, last = math.ceil(low / step - _SAME), math.floor(high / step + _SAME)
        if last - first < most:
            return [_clean(number * step, step) for number in range(first, last + 1)]
    raise AssertionError("steps grow without end")


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks in as many digits as tell them apart: `0.25`, `1,500`, `2e+09`."""
    if not ticks:
        return []
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) or 1.0
    largest = max(abs(tick) for tick in ticks)
    decimals = _decimals(step)
    if largest < _PLAIN_BELOW and decimals <= _PLAIN_DECIMALS:
        return [f"{tick:,.{decimals}f}" for tick in ticks]
    digits = 2 + max(0, math.ceil(math.log10(largest / step)))
    return [f"{tick:.{digits}g}" for tick in ticks]


def _round_steps(at_least: float) -> Iterator[float]:
    """1, 2, 2.5 and 5 times powers of ten, from about `at_least` on."""
    power = math.floor(math.log10(at_least))
    while True:
        yield from (mantissa * 10.0**power for mantissa in _MANTISSAS if mantissa * 10.0**power >= at_least / 2)
        power += 1


def _decimals(step: float) -> int:
    power = -math.floor(math.log10(step) + _SAME)
    for decimals in range(max(0, power), max(0, power) + 2):
        if abs(round(step, decimals) - step) < 1e-6 * step:
            return decimals
    return max(0, power) + 1


def _clean(tick: float, step: float) -> float:
    """0.30000000000000004 is 0.3."""
    return round(tick, _decimals(step) + 1)

"""What instructions do to the registers of one thread, for many threads at once (PTX ISA, chapters 9.7.1 to 9.7.9).

Registers hold raw bits: unsigned integers of their width, booleans for predicates.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

TYPES = {
    "pred": np.bool_,
    "u8": np.uint8,
    "s8": np.int8,
    "b8": np.uint8,
    "u16": np.uint16,
    "s16": np.int16,
    "b16": np.uint16,
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "f32": np.float32,
    "u64": np.uint64,
    "s64": np.int64,
    "b64": np.uint64,
    "f64": np.float64,
}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_DOUBLE = {"u16": np.uint32, "s16": np.int32, "u32": np.uint64, "s32": np.int64}


def raw(values: np.ndarray) -> np.ndarray:
    """The bits of values of any type."""
    return values if values.dtype == np.bool_ else values.view(_UNSIGNED[values.itemsize])


def bf16_of(value: np.ndarray) -> np.ndarray:
    """float32 → bits of bfloat16, to nearest even; NaN becomes 0x7fff."""
    bits = value.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded)


def flushed(value: np.ndarray) -> np.ndarray:
    """Subnormals to zero of their sign."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, np.ones_like(b), b)  # of threads that stand elsewhere; not defined on a GPU either
    if a.dtype.kind == "u":
        return a // b
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _divide(a, b) * b


def _shift_left(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * a.itemsize
    by = by.astype(a.dtype)
    return np.where(by >= bits, np.zeros_like(a), a << np.minimum(by, bits - 1).astype(a.dtype))


def _shift_right(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * a.itemsize
    least = np.minimum(by.astype(np.uint64), bits - 1).astype(a.dtype)
    if a.dtype.kind == "i":
        return a >> least
    return np.where(by >= bits, np.zeros_like(a), a >> least)


def insert_bits(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfi: the low `length` bits of a over those of b from `position` on."""
    one, position, length = np.uint64(1), position.astype(np.uint64), length.astype(np.uint64)
    mask = ((one << length) - one) << position
    return (((a.astype(np.uint64) << position) & mask) | (b.astype(np.uint64) & ~mask)).astype(a.dtype)


def extract_bits(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: `length` bits of a from `position` on, with the uppermost as sign where a is signed."""
    bits = 8 * a.itemsize
    length = length.astype(np.int64)
    up = np.clip(bits - position.astype(np.int64) - length, 0, bits - 1)
    shifted = a << up.astype(a.dtype)
    return np.where(length == 0, np.zeros_like(a), shifted >> np.clip(bits - length, 0, bits - 1).astype(a.dtype))


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: four bytes, each one of a's (0 to 3) or b's (4 to 7), by the selector's nibbles."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(both)
    for i in range(4):
        nibble = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        result |= np.where(nibble >= 8, sign, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


BINARY: dict[str, Callable] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "div": _divide,
    "rem": _remainder,
    "shl": _shift_left,
    "shr": _shift_right,
    "copysign": lambda sign, value: np.copysign(value, sign),
}


def smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min: of a number and a NaN, the number."""
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


def larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """max: of a number and a NaN, the number."""
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


BINARY |= {"min": smaller, "max": larger}

UNARY: dict[str, Callable] = {
    "neg": operator.neg,
    "abs": np.abs,
    "not": operator.invert,
    "mov": lambda a: a,
    "ex2": lambda a: flushed(np.exp2(flushed(a).astype(np.float64)).astype(np.float32)),
    "lg2": lambda a: np.log2(flushed(a).astype(np.float64)).astype(np.float32),
    "rcp": lambda a: (1 / a.astype(np.float64)).astype(np.float32),
    "sqrt": np.sqrt,
    "rsqrt": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(np.float32),
}


def multiply_wide(kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mul.wide: twice as many bits."""
    return a.astype(_DOUBLE[kind]) * b.astype(_DOUBLE[kind])


def multiply_high(kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mul.hi: the upper half of the product."""
    if kind in _DOUBLE:
        wide = multiply_wide(kind, a, b)
        return (wide >> (8 * a.itemsize)).astype(TYPES[kind])
    products = [(int(x) * int(y)) >> 64 for x, y in np.broadcast(a, b)]
    return np.array(products, dtype=TYPES[kind])


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fma.rn: one rounding."""
    if a.dtype != np.float32:
        return a * b + c
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


_COMPARISONS: dict[str, Callable] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}


def compare(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """setp: with a NaN false, or true where the name ends in u; `ne` of floats is false with a NaN, unlike numpy's."""
    if a.dtype.kind != "f":
        return _COMPARISONS[name](a, b)
    nan = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return nan == (name == "nan")
    unordered = name.endswith("u")
    ordered_result = _COMPARISONS[name[:2]](a, b) & ~nan
    return ordered_result | nan if unordered else ordered_result


def convert(modifiers: tuple[str, ...], to: str, source: str, value: np.ndarray) -> np.ndarray:
    """cvt between numbers of one kind or two."""
    wanted = TYPES[to]
    if source == "f32" and np.dtype(wanted).kind in "iu":
        whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[modifiers[0]](value)
        limits = np.iinfo(wanted)
        return np.clip(np.nan_to_num(whole.astype(np.float64)), limits.min, limits.max).astype(wanted)
    return value.astype(wanted)

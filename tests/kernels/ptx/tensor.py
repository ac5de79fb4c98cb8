"""Matrix instructions (PTX ISA, 9.7.14 and 9.7.15), for several warps or warpgroups at once, from the manual's tables.

W warps; a warp's registers are (W, 32), lane l in group g = l / 4 with t = l % 4. Fragments hold two bf16 a register,
the lower column in the lower half.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_LANE = np.arange(32)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4


def floats_of_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _halves(register: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return register & np.uint32(0xFFFF), register >> np.uint32(16)


def _places(num_registers: int, shape: tuple[int, int], place: Callable) -> np.ndarray:
    """Which half of which lane's registers, (register, lane, half) as one number, each element of a matrix is; `place`
    gives the rows and columns of all lanes, by register and half."""
    found = np.full(shape, -1)
    numbers = np.arange(num_registers * 64).reshape(num_registers, 32, 2)
    for register in range(num_registers):
        for half in range(2):
            found[place(register, half)] = numbers[register, :, half]
    assert sorted(found.ravel()) == list(range(num_registers * 64)), "each element once"
    return found


_A_PLACES = _places(4, (16, 16), lambda i, j: (_GROUP + 8 * (i % 2), 2 * _IN_GROUP + 8 * (i // 2) + j))
_B_PLACES = _places(2, (16, 8), lambda i, j: (2 * _IN_GROUP + 8 * i + j, _GROUP))


def _gathered(registers: list[np.ndarray], places: np.ndarray) -> np.ndarray:
    """The matrices (W, …) whose elements are in these places."""
    halves = np.stack(registers, axis=1).view("<u2").reshape(len(registers[0]), -1)  # the lower half comes first
    return floats_of_bf16(halves[:, places])


def a_matrix(registers: list[np.ndarray]) -> np.ndarray:
    """The 16×16 matrix A (W, 16, 16) of mma and wgmma from four registers: rows g and g + 8, columns 2t and 2t + 8."""
    return _gathered(registers, _A_PLACES)


def multiply_16_8_16(a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]) -> list[np.ndarray]:
    """mma.m16n8k16: d = a b + c; a in 4, b in 2 registers of bf16, c and d in 4 of float32."""
    with np.errstate(all="ignore"):
        product = np.matmul(a_matrix(a).astype(np.float64), _gathered(b, _B_PLACES).astype(np.float64))
    d = []
    for i, before in enumerate(c):
        row, column = _GROUP + 8 * (i // 2), 2 * _IN_GROUP + i % 2
        d.append((product[:, row, column] + before.view(np.float32)).astype(np.float32).view(np.uint32))
    return d


def matrix_from_rows(rows: np.ndarray, transposed: bool) -> np.ndarray:
    """ldmatrix, one 8×8 matrix: what each lane gets of rows (W, 8, 8) of 16-bit numbers, as (W, 32)."""
    first, second = (_GROUP, 2 * _IN_GROUP), (_GROUP, 2 * _IN_GROUP + 1)
    if transposed:
        first, second = first[::-1], second[::-1]
    low, high = (rows[:, at[0], at[1]].astype(np.uint32) for at in (first, second))
    return low | (high << np.uint32(16))


def rows_from_matrix(register: np.ndarray, transposed: bool) -> np.ndarray:
    """stmatrix, one 8×8 matrix: rows (W, 8, 8) of 16-bit numbers of a register (W, 32)."""
    rows = np.zeros((register.shape[0], 8, 8), np.uint16)
    for j, half in enumerate(_halves(register)):
        at = (_GROUP, 2 * _IN_GROUP + j)
        at = at[::-1] if transposed else at
        rows[:, at[0], at[1]] = half
    return rows


def operand_addresses(descriptor: int, num_rows: int, transposed: bool) -> np.ndarray:
    """Where wgmma's operand in shared memory lies: (rows, 16), the sixteen being k. Not transposed: k is contiguous.

    PTX ISA, 9.7.15.5.1: matrix descriptor and the canonical layouts with a swizzle of 128, 64 or 32 bytes.
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    if descriptor >> 62 == 0 or descriptor >> 49 & 7:
        raise ValueError(f"descriptor {descriptor:#x}: only swizzles without base offset are known here")
    wide = 256 >> (descriptor >> 62)  # bytes of a row: 128, 64, 32
    row, k = np.arange(num_rows)[:, None], np.arange(16)[None, :]
    if transposed:  # as many rows as fit are contiguous, k steps by their bytes
        linear = row % (wide // 2) * 2 + row // (wide // 2) * leading + k % 8 * wide + k // 8 * stride
    else:
        linear = row % 8 * wide + row // 8 * stride + k * 2
    address = start + linear
    return address ^ ((address >> 7 & (wide // 16 - 1)) << 4)


def warpgroup_product(a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """wgmma's a (64, 16) times b (N, 16)ᵀ as it lies in registers: N / 2 of them, each (128,) float64."""
    product = a.astype(np.float64) @ b.astype(np.float64).T
    thread = np.arange(128)
    row, column = thread // 32 * 16 + thread % 32 // 4, 2 * (thread % 4)
    return [product[row + 8 * (i // 2), column + 8 * n + i % 2] for n in range(b.shape[0] // 8) for i in range(4)]

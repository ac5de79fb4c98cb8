"""Every launch of the emulated kernels, run a second time: the PTX that nvcc makes of the same kernel, on copies."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hedgehog.kernels.cuda.build import FOLDER, HOPPER_UNITS, NVCC_FLAGS, UNITS, find_nvcc
from hedgehog.kernels.cuda.library import Library, SeenLaunch

from ..ptx.machine import Machine
from ..ptx.memory import Memory
from ..ptx.program import Program, read_programs


@dataclass(frozen=True)
class Difference:
    """Of memory that launches changed: ‖PTX − emulation‖ / ‖emulation‖; infinite where only one has a NaN."""

    kernel: str
    """The last that changed it."""
    dtype: torch.dtype
    num_changed: int
    relative: float


@dataclass
class _Shadow:
    """A tensor's memory as the emulation has it, and as the PTX leaves it."""

    here: torch.Tensor
    dtype: torch.dtype
    there: np.ndarray
    changed_N: np.ndarray
    last_seen: np.ndarray
    kernel: str = ""


class _Symbol(ctypes.Structure):
    """Dl_info"""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def kernel_name(address: int) -> str:
    """The mangled name of a function of a loaded library."""
    found = _Symbol()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(found)) or not found.name:
        raise LookupError(f"no symbol at {address:#x}")
    return found.name.decode()


def ptx_of_all() -> dict[str, str]:
    """{source file: nvcc's PTX of it}, for sm_80, or sm_90a where one needs that; compiled side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a compiler of its own
        return dict(zip(_SOURCES, pool.map(_compiled, _SOURCES), strict=True))


def _compiled(unit: str) -> str:
    hopper = unit in HOPPER_UNITS
    flags = [*NVCC_FLAGS, f"-arch=compute_{'90a' if hopper else '80'}", *(["-DHEDGEHOG_SM_90A"] if hopper else [])]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "kernels.ptx")
        command = [str(find_nvcc()), *flags, "-ptx", str(FOLDER / unit), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return target.read_text(encoding="utf-8")


_SOURCES = (*UNITS, *HOPPER_UNITS)
PTX: dict[str, str] = {}
"""What `ptx_of_all` gave, to whichever worker of xdist made it; test_ptx.py fills it in."""


@functools.cache
def _programs_of(unit: str) -> dict[str, Program]:
    return read_programs(PTX[unit])


def _unit_of(name: str) -> str:
    for stem, unit in _UNITS:
        if stem in name and (unit in HOPPER_UNITS) == ("hopper" in name or name.endswith(_WGMMA)):
            return unit
    raise LookupError(f"no source is known for {name}")


_WGMMA = "ELi2EEEvNS_18BackwardParametersE"
_UNITS = (
    ("linear_attention_forward_hopper", "forward_hopper.cu"),
    ("linear_attention_forward", "forward.cu"),
    ("segment_prefix", "forward.cu"),
    ("linear_attention_decode", "decode.cu"),
    ("query_gradients", "backward_queries.cu"),
    ("query_gradients", "backward_queries_hopper.cu"),
    ("key_gradients", "backward_keys.cu"),
    ("key_gradients", "backward_keys_hopper.cu"),
    ("segment_suffix", "backward_keys.cu"),
    ("input_gradients", "backward_inputs.cu"),
)


@functools.cache
def machine_of(name: str) -> Machine:
    """The kernel of this mangled name, wherever it is."""
    return Machine(_programs_of(_unit_of(name))[name])


def edited(name: str, edit: Callable[[str], str]) -> Machine:
    """The same with another text in the place of its PTX."""
    return Machine(read_programs(edit(PTX[_unit_of(name)]))[name])


class _Twin:
    """Watches launches. What the PTX of one leaves, that of the next finds."""

    def __init__(self, machine: Callable[[str], Machine], seed: int) -> None:
        self._machine = machine
        self._order = np.random.default_rng(seed)
        self.kernels: list[str] = []
        self.error: BaseException | None = None
        self._shadows: dict[int, _Shadow] = {}
        self._now: list[_Shadow] = []

    def __call__(self, seen: SeenLaunch, ended: bool) -> None:
        try:
            if self.error is None:
                self._note(seen) if ended else self._run(seen)
        except BaseException as error:  # it cannot pass through C
            self.error = error

    def _run(self, seen: SeenLaunch) -> None:
        parameters = ctypes.string_at(seen.arguments, seen.argument_bytes)
        self._now = [self._shadow_of(*found) for found in _mentioned(parameters)]
        before = [shadow.there.copy() for shadow in self._now]
        memory = Memory([(shadow.here.data_ptr(), shadow.there) for shadow in self._now])
        name = kernel_name(seen.kernel)
        grid = (seen.grid[0], seen.grid[1], seen.grid[2])
        self._machine(name).run(grid, seen.num_threads, seen.shared_bytes, parameters, memory, self._order)
        self.kernels.append(name)
        for shadow, old in zip(self._now, before, strict=True):
            shadow.changed_N |= shadow.there != old

    def _shadow_of(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> _Shadow:
        """That of earlier launches, unless the memory was written since by others."""
        here = torch.tensor([], dtype=torch.uint8).set_(storage)
        shadow = self._shadows.get(storage.data_ptr())
        if shadow is None or not np.array_equal(shadow.last_seen, here.numpy()):
            now = here.numpy().copy()
            shadow = _Shadow(here, dtype, now, np.zeros(len(now), np.bool_), now.copy())
            self._shadows[storage.data_ptr()] = shadow
        return shadow

    def _note(self, seen: SeenLaunch) -> None:
        for shadow in self._now:
            now = shadow.here.numpy().copy()
            changed_N = now != shadow.last_seen
            if changed_N.any():
                shadow.kernel = kernel_name(seen.kernel)
            shadow.changed_N |= changed_N
            shadow.last_seen = now

    def differences(self) -> list[Difference]:
        return [_difference(shadow) for shadow in self._shadows.values() if shadow.changed_N.any()]


def _difference(shadow: _Shadow) -> Difference:
    # scratch is float32 to whoever asked for bytes
    dtype = torch.float32 if shadow.dtype == torch.uint8 and len(shadow.there) % 4 == 0 else shadow.dtype
    changed = torch.from_numpy(shadow.changed_N).view(-1, dtype.itemsize).any(1)
    here, there = (torch.from_numpy(x).view(dtype)[changed].double() for x in (shadow.last_seen, shadow.there))
    both_nan = here.isnan() & there.isnan()
    error = (here - there).masked_fill(both_nan, 0).norm() / here.masked_fill(both_nan, 0).norm().clamp_min(1e-30)
    relative = error.item() if bool(error.isfinite()) else float("inf")
    return Difference(shadow.kernel, dtype, len(here), relative)


def _mentioned(parameters: bytes) -> list[tuple[torch.UntypedStorage, torch.dtype]]:
    """The memory that a launch was given: that of tensors into which a word of its parameters points."""
    words = np.frombuffer(parameters[: len(parameters) // 8 * 8], np.uint64)
    found: dict[int, tuple[torch.UntypedStorage, torch.dtype]] = {}
    for thing in gc.get_objects():
        # no FakeTensor that a compiled model of another test left: it has no bytes to be asked for
        if type(thing) not in (torch.Tensor, torch.nn.Parameter) or thing.device.type != "cpu":
            continue
        storage = thing.untyped_storage()
        start = storage.data_ptr()
        if ((words >= start) & (words < start + storage.nbytes())).any():
            found[start] = (storage, thing.dtype)
    return list(found.values())


@dataclass
class Twin:
    """What came of running everything twice."""

    kernels: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()


@contextlib.contextmanager
def twin_of(library: Library, machine: Callable[[str], Machine] = machine_of, *, seed: int = 0) -> Iterator[Twin]:
    """Within it each launch runs twice; filled in at its end. `seed`: the order of warpgroups.

    Raises Fault if the PTX ran into one.
    """
    twin, result = _Twin(machine, seed), Twin()
    library.observe_launches(twin)
    try:
        yield result
    finally:
        library.observe_launches(None)
    if twin.error is not None:
        raise twin.error
    result.kernels, result.differences = tuple(twin.kernels), tuple(twin.differences())

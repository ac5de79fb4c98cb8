"""The kernels as C functions: structures as in interface.h, the library loaded with ctypes, errors as exceptions.

No torch headers are involved: addresses, strides, sizes and a stream go over as plain numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_uint32, c_void_p
from functools import cache

import torch
from torch import Tensor

from .build import build_cuda_library, build_emulated_library
from .limits import FEATURE_MAP_NUMBERS


class KernelError(RuntimeError):
    """A launch was refused, or an emulated block could not go on."""


class Strides(ctypes.Structure):
    """HedgehogStrides"""

    _fields_ = [("batch", c_int64), ("head", c_int64), ("token", c_int64)]


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, c_void_p) for name in names]


class ForwardArguments(ctypes.Structure):
    """HedgehogForwardArguments"""

    _fields_ = [
        *_pointers("q", "k", "v", "weight_q", "weight_k", "mask", "runs", "initial_kv", "initial_k_sum"),
        *_pointers("out", "denominator", "final_kv", "final_k_sum", "scratch", "stream"),
        *((name, Strides) for name in ("q_stride", "k_stride", "v_stride", "out_stride")),
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "length")),
        *((name, c_int32) for name in ("head_dim", "features", "feature_map", "segments")),
        ("eps", c_float),
        ("kernel", c_int32),
    ]
    held: tuple[Tensor | None, ...] = ()
    """Tensors that must live as long as these arguments: copies of which nobody else knows."""


class BackwardArguments(ctypes.Structure):
    """HedgehogBackwardArguments"""

    _fields_ = [
        ("forward", ForwardArguments),
        *_pointers("grad_out", "grad_final_kv", "grad_final_k_sum", "grad_q", "grad_k", "grad_v"),
        *_pointers("grad_weight_q", "grad_weight_k", "grad_initial_kv", "grad_initial_k_sum", "grad_denominator"),
        *((f"{name}_stride", Strides) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
        ("kernel", c_int32),
        ("reserved", c_int32),
    ]


class DecodeArguments(ctypes.Structure):
    """HedgehogDecodeArguments"""

    _fields_ = [
        *_pointers("q", "k", "v", "weight_q", "weight_k", "mask", "kv_state", "k_sum", "out", "arrivals", "stream"),
        *((f"{name}_{axis}_stride", c_int64) for name in "qkv" for axis in ("batch", "head")),
        *((name, c_int64) for name in ("batch", "heads", "kv_heads")),
        *((name, c_int32) for name in ("head_dim", "features", "feature_map", "splits")),
        ("eps", c_float),
        ("reserved", c_int32),
    ]


class SeenLaunch(ctypes.Structure):
    """emulation::SeenLaunch: what a kernel is launched with"""

    _fields_ = [
        ("kernel", c_void_p),
        ("grid", c_uint32 * 3),
        ("num_threads", c_int32),
        ("shared_bytes", c_int64),
        ("arguments", c_void_p),
        ("argument_bytes", c_int64),
    ]


_LAUNCH_OBSERVER = ctypes.CFUNCTYPE(None, ctypes.POINTER(SeenLaunch), c_int32)


class Library:
    """A loaded build. Methods raise KernelError where the C function returns an error."""

    def __init__(self, path: str) -> None:
        self._c = ctypes.CDLL(path)
        self._c.hedgehog_error_string.restype = ctypes.c_char_p
        self._c.hedgehog_scratch_bytes.restype = c_int64
        self._c.hedgehog_backward_scratch_bytes.restype = c_int64
        self._c.hedgehog_num_segments.argtypes = [c_int64, c_int32]
        for which, structure in enumerate((ForwardArguments, DecodeArguments, BackwardArguments)):
            there, here = self._c.hedgehog_struct_bytes(which), ctypes.sizeof(structure)
            if there != here:
                raise KernelError(f"{structure.__name__} has {here} bytes here and {there} in {path}")

    def scratch_bytes(self, arguments: ForwardArguments) -> int:
        """What `forward` wants at `scratch`."""
        return self._c.hedgehog_scratch_bytes(ctypes.byref(arguments))

    def has_backward(self, arguments: ForwardArguments, kernel: int) -> bool:
        """Whether this build has these backward kernels, and they serve the shape."""
        return bool(self._c.hedgehog_has_backward(ctypes.byref(arguments), kernel))

    def backward_scratch_bytes(self, arguments: ForwardArguments, kernel: int) -> int:
        """What `backward` wants at its forward arguments' `scratch`. `kernel`: as in BackwardArguments."""
        return self._c.hedgehog_backward_scratch_bytes(ctypes.byref(arguments), kernel)

    def num_slices(self, head_dim: int, features: int, kernel: int) -> int:
        """Slices of the values that `backward` takes one after the other."""
        return self._c.hedgehog_num_slices(head_dim, features, kernel)

    def backward_shared_bytes(self, head_dim: int, features: int, feature_map: str, kernel: int) -> int:
        """Shared memory that a block of the larger backward kernel takes."""
        number = FEATURE_MAP_NUMBERS[feature_map]
        return self._c.hedgehog_backward_shared_bytes(head_dim, features, number, kernel)

    def num_segments(self, length: int, requested: int) -> int:
        """The segments that really run."""
        return self._c.hedgehog_num_segments(length, requested)

    def shared_bytes(self, head_dim: int, features: int, feature_map: str) -> int:
        """Shared memory that a block of the forward kernel takes."""
        return self._c.hedgehog_shared_bytes(head_dim, features, FEATURE_MAP_NUMBERS[feature_map])

    def has_wgmma(self, head_dim: int, features: int, feature_map: str) -> bool:
        """Whether this build has the wgmma forward kernel for the shape."""
        return bool(self._c.hedgehog_has_wgmma(head_dim, features, FEATURE_MAP_NUMBERS[feature_map]))

    def forward(self, arguments: ForwardArguments) -> None:
        self._check(self._c.hedgehog_forward(ctypes.byref(arguments)))

    def backward(self, arguments: BackwardArguments) -> None:
        self._check(self._c.hedgehog_backward(ctypes.byref(arguments)))

    def decode(self, arguments: DecodeArguments) -> None:
        self._check(self._c.hedgehog_decode(ctypes.byref(arguments)))

    def seed_emulation(self, seed: int) -> None:
        """The order of fibers from here on; emulated builds only."""
        self._c.hedgehog_emulation_seed(ctypes.c_uint64(seed))

    def forget_places(self) -> None:
        """`emulated_places` begins anew, and none is left out; emulated builds only."""
        self._c.hedgehog_emulation_forget_places()

    def emulated_places(self) -> list[str]:
        """Where threads have waited or fenced so far, as "file:line"; emulated builds only."""
        self._c.hedgehog_emulation_place.restype = ctypes.c_char_p
        return [self._c.hedgehog_emulation_place(i).decode() for i in range(self._c.hedgehog_emulation_num_places())]

    def leave_out(self, place: str | None) -> None:
        """From here on threads do not wait at this place; None: they wait everywhere. Emulated builds only."""
        self._c.hedgehog_emulation_leave_out(-1 if place is None else self.emulated_places().index(place))

    def emulated_work(self) -> tuple[int, int, int]:
        """ldmatrix's accesses of 128 bytes, mma, and slow results since the last call; emulated builds only."""
        counts = (c_int64 * 3)()
        self._c.hedgehog_emulation_work(counts)
        return counts[0], counts[1], counts[2]

    def observe_launches(self, observer: Callable[[SeenLaunch, bool], None] | None) -> None:
        """Calls `observer` before each launch and, with True, after it; emulated builds only."""
        seen = _LAUNCH_OBSERVER() if observer is None else _LAUNCH_OBSERVER(lambda at, end: observer(at[0], bool(end)))
        self._c.hedgehog_emulation_observe(seen)
        self._observer = seen  # ctypes keeps no callback alive

    def _check(self, error: int) -> None:
        if error:
            raise KernelError(self._c.hedgehog_error_string(error).decode())


@cache
def cuda_library(capability: tuple[int, int]) -> Library:
    """The kernels for this compute capability, built if need be. Raises BuildError."""
    return Library(str(build_cuda_library(capability)))


@cache
def emulated_library() -> Library:
    """The kernels on this CPU, for tests. Raises BuildError."""
    return Library(str(build_emulated_library()))


def library_for(device: torch.device) -> Library:
    """The kernels for tensors on `device`: a CPU gets the emulation."""
    if device.type == "cuda":
        return cuda_library(torch.cuda.get_device_capability(device))
    if device.type == "cpu":
        return emulated_library()
    raise ValueError(f"the kernels run on cuda, and emulated on cpu, not on {device.type}")


def current_stream(device: torch.device) -> int | None:
    """The stream that torch queues work on, as a number."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's elements begin; None for no tensor."""
    return None if tensor is None else tensor.data_ptr()

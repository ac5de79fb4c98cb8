"""Puts the stand-in under torch in every Python process that has this folder on its PYTHONPATH.

Python runs a module of this name at its start. Nothing is imported then: torch gets its device when it is imported, and
the project's kernels their stand-ins when they are.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

DRESSED = (
    "torch",
    "bitsandbytes.cuda_specs",
    "hedgehog.kernels.cuda.library",
    "hedgehog.kernels.distill_triton",
    "hedgehog.pipeline.drift",
)
"""`torch_cuda.AFTER` has what follows the import of each."""


def _before_torch(origin: str) -> None:
    """libtorch_cpu first, then the device: torch asks once, early, whether there is CUDA."""
    ctypes.CDLL(str(Path(origin).parent / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(os.environ["STAND_IN_GPU"], mode=ctypes.RTLD_GLOBAL)


def _after(name: str) -> None:
    import torch_cuda

    torch_cuda.AFTER[name]()


class _Loader(importlib.abc.Loader):
    def __init__(self, name: str, inner: importlib.abc.Loader) -> None:
        self._name, self._inner = name, inner

    def create_module(self, spec):
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if self._name == "torch":
            assert module.__spec__ is not None and module.__spec__.origin is not None
            _before_torch(module.__spec__.origin)
        self._inner.exec_module(module)
        _after(self._name)

    def __getattr__(self, name: str):
        return getattr(self._inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._waiting = set(DRESSED)

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self._waiting:
            return None
        self._waiting.remove(fullname)  # the next question is for the finders behind this one
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(fullname, spec.loader)
        return spec


if "STAND_IN_GPU" in os.environ:
    sys.meta_path.insert(0, _Finder())

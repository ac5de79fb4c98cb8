"""Compiles the kernels: with nvcc for a GPU, with g++ for the emulation. Each build is made once and kept.

The name of a build holds a hash of sources, flags and compiler version, so that an old one is never taken for a new.
Builds lie in `$HEDGEHOG_KERNEL_CACHE`, or in `$XDG_CACHE_HOME` or `~/.cache` under `hedgehog-llama/kernels`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
UNITS = ("forward.cu", "decode.cu", "backward.cu", "backward_queries.cu", "backward_keys.cu")
HOPPER_UNITS = ("forward_hopper.cu",)
"""Only for compute capability 9.0, and the emulation: wgmma needs the target sm_90a."""
NVCC_FLAGS = ("-std=c++17", "-O3")
GXX_FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off")
COMPILE_LIMIT_S = 900


class BuildError(RuntimeError):
    """No compiler, or it failed; the message says which and why."""


def find_nvcc() -> str | None:
    """The nvcc on the path, else that of `$CUDA_HOME` or of CUDA's usual folder."""
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.is_file() else None)


def build_cuda_library(capability: tuple[int, int]) -> Path:
    """The shared library for GPUs of this compute capability. Raises BuildError."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc was not found (on the path, in $CUDA_HOME or in /usr/local/cuda)")
    hopper = capability == (9, 0)
    number = "90a" if hopper else f"{capability[0]}{capability[1]}"
    flags = (*NVCC_FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}", "--cudart=static")
    flags = (*flags, "-DHEDGEHOG_SM_90A") if hopper else flags
    units = UNITS + HOPPER_UNITS if hopper else UNITS
    return _build([nvcc, *flags, "--shared", "-Xcompiler=-fPIC"], f"cuda-sm{number}", units)


def build_emulated_library() -> Path:
    """The same sources for this CPU, as a shared library. Raises BuildError."""
    return _build([_gxx(), *GXX_FLAGS, "-shared", "-fPIC", "-x", "c++"], "emulated", UNITS + HOPPER_UNITS)


def build_program(main: Path, *, with_kernels: bool, sanitize: bool) -> Path:
    """`main` (C++) on the emulation as a program, if asked under AddressSanitizer. Raises BuildError."""
    # not optimised: compiling takes longer than running
    sanitizer = ("-O0", "-g", "-fsanitize=address", "-fno-omit-frame-pointer") if sanitize else ()
    command = [_gxx(), *GXX_FLAGS, *sanitizer, f"-I{FOLDER}", "-x", "c++"]
    units = UNITS + HOPPER_UNITS if with_kernels else ()
    return _build(command, main.stem, units, more_sources=(main,))


def _gxx() -> str:
    gxx = shutil.which("g++")
    if gxx is None:
        raise BuildError("g++ was not found on the path")
    return gxx


def source_files() -> list[Path]:
    """Everything a build depends on."""
    return sorted(file for file in FOLDER.rglob("*") if file.suffix in (".cu", ".cuh", ".h"))


def _build(command: list[str], label: str, units: tuple[str, ...] = UNITS, more_sources: tuple[Path, ...] = ()) -> Path:
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256("\0".join([*command, version]).encode())
    for file in [*source_files(), *more_sources]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    folder = _cache_folder()
    target = folder / f"{label}-{digest.hexdigest()[:20]}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                _compile(command, [*(FOLDER / unit for unit in units), *more_sources], target)
    except OSError as error:
        raise BuildError(f"the kernels cannot be built in {folder}: {error}") from error
    return target


def _compile(command: list[str], sources: list[Path], target: Path) -> None:
    """Beside the target first: a build that is cut off leaves nothing that looks finished."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch, target.name)
        whole = [*command, *map(str, sources), "-o", str(output)]
        try:
            done = subprocess.run(whole, capture_output=True, text=True, timeout=COMPILE_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{Path(command[0]).name} took longer than {COMPILE_LIMIT_S} s") from error
        if done.returncode:
            raise BuildError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
        os.replace(output, target)


def _cache_folder() -> Path:
    chosen = os.environ.get("HEDGEHOG_KERNEL_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hedgehog-llama", "kernels")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The ranks of a node start together: one builds, the others wait for it."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

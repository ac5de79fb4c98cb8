"""Compiles the kernels: with nvcc for a GPU, with g++ for the emulation. Each build is made once and kept.

A build's name holds a hash of sources and flags and one of the compiler's version (not of where it lies), so that
an old one is never taken for a new, and one made elsewhere is found: a GPU machine without nvcc takes any compiler's.
Builds lie in `$HEDGEHOG_KERNEL_CACHE`, or in `$XDG_CACHE_HOME` or `~/.cache` under `hedgehog-llama/kernels`.
Sources are compiled side by side, then linked.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
UNITS = ("forward.cu", "decode.cu", "backward.cu", "backward_queries.cu", "backward_keys.cu", "backward_inputs.cu")
HOPPER_UNITS = ("forward_hopper.cu", "backward_queries_hopper.cu", "backward_keys_hopper.cu")
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


@dataclass(frozen=True)
class Compiler:
    """A program, the flags of both steps, and those that only one of them takes."""

    program: str
    flags: tuple[str, ...]
    compiling: tuple[str, ...] = ()
    linking: tuple[str, ...] = ()

    def options(self) -> tuple[str, ...]:
        """What a build depends on: no paths."""
        return *self.flags, "-c", *self.compiling, "-o", *self.linking

    def version(self) -> str:
        return subprocess.run([self.program, "--version"], capture_output=True, text=True).stdout


def build_cuda_library(capability: tuple[int, int]) -> Path:
    """The shared library for GPUs of this compute capability. Raises BuildError."""
    hopper = capability == (9, 0)
    number = "90a" if hopper else f"{capability[0]}{capability[1]}"
    flags = (*NVCC_FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}")
    flags = (*flags, "-DHEDGEHOG_SM_90A") if hopper else flags
    units = UNITS + HOPPER_UNITS if hopper else UNITS
    nvcc = find_nvcc()
    compiler = Compiler(nvcc or "nvcc", flags, ("-Xcompiler=-fPIC",), ("--shared", "--cudart=static"))
    label = f"cuda-sm{number}"
    if nvcc is not None:
        return _build(compiler, label, units)
    made_before = _cache_folder().glob(f"{label}-{_digest_of_sources(compiler)}-*.so")
    newest = max(made_before, key=lambda file: file.stat().st_mtime, default=None)
    if newest is None:
        raise BuildError(
            "nvcc was not found (on the path, in $CUDA_HOME or in /usr/local/cuda), nor a build of these sources in "
            f"{_cache_folder()}"
        )
    return newest


def build_emulated_library() -> Path:
    """The same sources for this CPU, as a shared library. Raises BuildError."""
    compiler = Compiler(_gxx(), (*GXX_FLAGS, "-fPIC"), ("-x", "c++"), ("-shared",))
    return _build(compiler, "emulated", UNITS + HOPPER_UNITS)


def build_program(main: Path, *, with_kernels: bool, sanitize: bool) -> Path:
    """`main` (C++) on the emulation as a program, if asked under AddressSanitizer. Raises BuildError."""
    # not optimised: compiling takes longer than running
    sanitizer = ("-O0", "-g", "-fsanitize=address", "-fno-omit-frame-pointer") if sanitize else ()
    compiler = Compiler(_gxx(), (*GXX_FLAGS, *sanitizer), ("-x", "c++"))
    return _build(compiler, main.stem, UNITS + HOPPER_UNITS if with_kernels else (), more_sources=(main,))


def _gxx() -> str:
    gxx = shutil.which("g++")
    if gxx is None:
        raise BuildError("g++ was not found on the path")
    return gxx


def source_files() -> list[Path]:
    """Everything a build depends on."""
    return sorted(file for file in FOLDER.rglob("*") if file.suffix in (".cu", ".cuh", ".h"))


def _digest_of_sources(compiler: Compiler, more_sources: tuple[Path, ...] = ()) -> str:
    digest = hashlib.sha256("\0".join(compiler.options()).encode())
    for file in [*source_files(), *more_sources]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:20]


def _build(compiler: Compiler, label: str, units: tuple[str, ...] = UNITS, more_sources: tuple[Path, ...] = ()) -> Path:
    version = hashlib.sha256(compiler.version().encode()).hexdigest()[:12]
    folder = _cache_folder()
    target = folder / f"{label}-{_digest_of_sources(compiler, more_sources)}-{version}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                _compile(compiler, [*(FOLDER / unit for unit in units), *more_sources], target)
    except OSError as error:
        raise BuildError(f"the kernels cannot be built in {folder}: {error}") from error
    return target


def _compile(compiler: Compiler, sources: list[Path], target: Path) -> None:
    """Beside the target first: a build that is cut off leaves nothing that looks finished."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch, f"{source.stem}.o") for source in sources]

        def compile_one(source: Path, built: Path) -> None:
            # the folder, for a main program that lies elsewhere
            _run(compiler, *compiler.compiling, f"-I{FOLDER}", "-c", str(source), "-o", str(built))

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a compiler of its own
            list(pool.map(compile_one, sources, objects))
        output = Path(scratch, target.name)
        _run(compiler, *compiler.linking, *map(str, objects), "-o", str(output))
        os.replace(output, target)


def _run(compiler: Compiler, *arguments: str) -> None:
    name = Path(compiler.program).name
    command = [compiler.program, *compiler.flags, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{name} took longer than {COMPILE_LIMIT_S} s") from error
    if done.returncode:
        raise BuildError(f"{name} failed: {(done.stderr or done.stdout).strip()[-2000:]}")


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

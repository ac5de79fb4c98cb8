"""Builds are found by what they were made from: not by where the compiler lies, and without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from hedgehog.kernels.cuda import build

COMPILER = """#!/bin/sh
case "$*" in
    --version) echo "release {release}" ;;
    *" -c "*) date +%s.%N >> {log}; sleep {seconds}; date +%s.%N >> {log} ;;
esac
while [ $# -gt 0 ]; do case "$1" in -o) echo built > "$2" ;; esac; shift; done
"""


@pytest.fixture(autouse=True)
def emulation():
    """Not needed here, nor is g++."""


@pytest.fixture
def new_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`new_nvcc("a", "13.0")`: from here on nvcc is this one, which compiles nothing and takes its time."""
    monkeypatch.setenv("HEDGEHOG_KERNEL_CACHE", str(tmp_path / "cache"))

    def make(folder: str, release: str, seconds: float = 0) -> Path:
        program = tmp_path / folder / "nvcc"
        program.parent.mkdir(exist_ok=True)
        program.write_text(COMPILER.format(release=release, log=tmp_path / "log", seconds=seconds))
        program.chmod(0o755)
        monkeypatch.setattr(build, "find_nvcc", lambda: str(program))
        return program

    return make


def test_a_build_is_found_again_wherever_the_compiler_lies(new_nvcc, monkeypatch):
    new_nvcc("here", "13.0")
    first = build.build_cuda_library((9, 0))
    new_nvcc("there", "13.0")
    monkeypatch.setattr(build, "_compile", None)
    assert build.build_cuda_library((9, 0)) == first


def test_another_compiler_or_gpu_builds_anew(new_nvcc):
    new_nvcc("here", "13.0")
    builds = {build.build_cuda_library((9, 0)), build.build_cuda_library((8, 0))}
    new_nvcc("here", "12.8")
    assert build.build_cuda_library((9, 0)) not in builds and len(builds) == 2


def test_without_a_compiler_a_build_of_the_same_sources_serves(new_nvcc, monkeypatch):
    new_nvcc("here", "13.0")
    made = build.build_cuda_library((9, 0))
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.build_cuda_library((9, 0)) == made
    with pytest.raises(build.BuildError, match=r"nvcc was not found .* nor a build of these sources in"):
        build.build_cuda_library((8, 0))
    monkeypatch.setattr(build, "NVCC_FLAGS", ("-std=c++17", "-O1"))
    with pytest.raises(build.BuildError, match="nor a build"):
        build.build_cuda_library((9, 0))


def test_sources_are_compiled_side_by_side(new_nvcc, tmp_path, monkeypatch):
    monkeypatch.setattr(build.os, "cpu_count", lambda: len(build.UNITS))
    new_nvcc("here", "13.0", seconds=0.5)
    build.build_cuda_library((8, 0))
    times = sorted(float(line) for line in (tmp_path / "log").read_text().split())
    assert len(times) == 2 * len(build.UNITS)
    assert times[-1] - times[0] < 0.5 * len(build.UNITS), "one after the other would take as long"


def test_a_failure_gives_the_compilers_words(new_nvcc, tmp_path):
    program = new_nvcc("here", "13.0")
    program.write_text("#!/bin/sh\necho 'forward.cu(1): error' >&2\nexit 1\n")
    with pytest.raises(build.BuildError, match=r"nvcc failed: forward.cu\(1\): error"):
        build.build_cuda_library((9, 0))
    assert not list((tmp_path / "cache").glob("*.so"))

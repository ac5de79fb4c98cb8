"""The emulation against the PTX manual's tables (instructions_check.cpp), and the kernels under AddressSanitizer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hedgehog.kernels.cuda.build import build_program

HERE = Path(__file__).parent
CHECKS = [
    "mma",
    "one_product",
    "ldmatrix",
    "addresses",
    "rounding",
    "shuffle",
    "copies",
    "missing_barrier",
    "stuck",
    "seed",
    "descriptors",
    "products",
    "misuse",
    "stmatrix",
    "named_barriers",
]


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # a block that ends in a failure leaves its fibers' strings behind
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "sanitized"])
def checks(request) -> Path:
    return build_program(HERE / "instructions_check.cpp", with_kernels=False, sanitize=request.param)


def test_instructions(checks: Path) -> None:
    names = run(checks).stdout.split()
    assert [name for name in names if name != "overrun"] == CHECKS
    for name in CHECKS:
        done = run(checks, name)
        assert done.returncode == 0, f"{name}: {done.stderr}"


def test_sanitizer_sees_a_write_beyond_shared_memory() -> None:
    program = build_program(HERE / "instructions_check.cpp", with_kernels=False, sanitize=True)
    done = run(program, "overrun")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)  # nearly all of it g++
def test_kernels_stay_inside_their_arrays() -> None:
    done = run(build_program(HERE / "memory_check.cpp", with_kernels=True, sanitize=True))
    assert done.returncode == 0, done.stderr

"""Our matrix descriptors are those that another compiler makes for the same layouts: a second reader of the manual."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from hedgehog.kernels.cuda.build import FOLDER

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="Triton brings its assembler for Linux only")
HERE = Path(__file__).parent
LEADING_OFFSET = 0x3FFF << 16
OURS = """
#include <cstdio>
#include "primitives_hopper.cuh"
using namespace hedgehog;
int main() {
    for (int k = 0; k < 64; k += 16)
        std::printf("%llu %llu %llu %llu\\n",
                    (unsigned long long)k_major(Panels<64, 64>{0}, k),
                    (unsigned long long)mn_major(Panels<64, 64>{0}, k, 0),
                    (unsigned long long)k_major(Panels<128, 64>{0}, k),
                    (unsigned long long)mn_major(Panels<64, 128>{0}, k, 0));
}
"""


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> list[dict[str, int]]:
    """By step of sixteen: a's two forms (64 × 64), and b's (64 × 128)."""
    folder: Path = tmp_path_factory.mktemp("descriptors")
    (folder / "ours.cpp").write_text(OURS, encoding="utf-8")
    program = folder / "ours"
    flags = "-std=c++17", "-Wno-unknown-pragmas", f"-I{FOLDER}"
    subprocess.run(["g++", *flags, str(folder / "ours.cpp"), "-o", str(program)], check=True)
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    names = "a by rows", "a by k", "b by rows", "b by k"
    return [dict(zip(names, map(int, line.split()), strict=True)) for line in lines]


@pytest.fixture(scope="module")
def theirs() -> list[list[list[dict[str, int]]]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "triton_descriptors.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("a_rows_are_k", [False, True])
@pytest.mark.parametrize("b_rows_are_k", [False, True])
def test_the_same_as_tritons(a_rows_are_k, b_rows_are_k, ours, theirs):
    products = theirs[a_rows_are_k][b_rows_are_k]
    assert len(products) == len(ours) == 4
    for step, product in zip(ours, products, strict=True):
        assert (product["transpose_a"], product["transpose_b"]) == (a_rows_are_k, b_rows_are_k)
        # a K-major operand and one of a single panel have no leading offset to speak of
        a = step["a by k" if a_rows_are_k else "a by rows"] & ~LEADING_OFFSET
        b = step["b by k"] if b_rows_are_k else step["b by rows"] & ~LEADING_OFFSET
        assert (hex(product["a"]), hex(product["b"])) == (hex(a), hex(b))

"""The kernels compile for GPUs that are not here, fit their shared memory, and keep their tiles in registers.

The whole of it runs in `make compiles`; one kernel in `make test`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="Triton brings its assembler for Linux only")

SCRIPT = Path(__file__).with_name("compile_distill_tiles.py")
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # most of one block, by compute capability
INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async"}
# Of at most 255 registers of 4 bytes a thread, once a program: before and after a loop. None inside, where tiles pass.
MAX_SPILL_BYTES_ONCE = 384
# In the loop without masks, which is the shortest of a kernel; for 8 warps and a tile of `pinned_tiles`, by Triton 3.7.
MAX_INSTRUCTIONS = {
    90: {"sweep": 640, "log_sums": 470, "keys_gradient": 190, "weight_gradient": 1100},
    80: {"sweep": 800, "log_sums": 280, "keys_gradient": 270, "weight_gradient": 760},
}

# 3.8 makes the sweep a fifth longer and spills three registers in it: these figures are for the pinned version alone.
PINNED = triton.__version__.startswith("3.7.")


def compiled(*arguments: object) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_fits(kernel: dict, capability: int) -> None:
    assert kernel["shared_bytes"] <= SHARED_BYTES[capability], kernel
    assert kernel["tensor_cores"] == ([] if kernel["kernel"] == "carry_tails" else [INSTRUCTION[capability]]), kernel
    if not PINNED:
        return
    assert kernel["registers"] <= 255 and 0 <= kernel["spill_store_bytes"] <= MAX_SPILL_BYTES_ONCE, kernel
    assert all(loop["local"] == 0 for loop in kernel["loops"]), kernel
    most = MAX_INSTRUCTIONS.get(capability, {}).get(kernel["kernel"])
    if most is not None:
        assert 0 < min(loop["instructions"] for loop in kernel["loops"]) <= most, kernel


@pytest.mark.compiles
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_bfloat16_kernels_fit_at_llama_2s_shape(capability):
    only = () if capability != 86 else ("sweep", "keys_gradient", "weight_gradient")
    report = compiled(capability, "bf16", 128, 128, *only)
    # the sweep thrice: with gradient, for grouped queries, and for the loss alone
    assert len(report) == (8 if only else 16)
    for kernel in report:
        assert_fits(kernel, capability)


@pytest.mark.compiles
def test_float16_and_smaller_heads_compile():
    for kernel in compiled(90, "fp16", 64, 64):
        assert_fits(kernel, 90)


def test_the_product_of_g_compiles_without_a_gpu():
    """The cheapest of them, in every run of the tests."""
    (kernel,) = compiled(90, "bf16", 128, 128, "keys_gradient")
    assert_fits(kernel, 90)

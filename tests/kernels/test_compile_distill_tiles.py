"""The kernels compile for GPUs that are not here, fit their shared memory, and keep their tiles in registers.

The whole of it runs in `make cuda`; one kernel in `make test`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="Triton brings its assembler for Linux only")

SCRIPT = Path(__file__).with_name("compile_distill_tiles.py")
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # most of one block, by compute capability
INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async"}
# Of at most 255 registers of 4 bytes a thread: a few scalars in a sweep, whose tiles pass thousands of times; more in
# the kernels that see each token once.
MAX_SPILL_BYTES = {"sweep_queries": 160, "sweep_keys": 160}
MAX_SPILL_BYTES_ONCE = 256


def compiled(*arguments: object) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.compiles
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_bfloat16_kernels_fit_at_llama_2s_shape(capability):
    only = () if capability != 86 else ("sweep_queries", "weight_gradient")
    report = compiled(capability, "bf16", 128, 128, *only)
    # the sweeps twice: with rows that weigh nothing, and without
    assert len(report) == (3 if only else 7)
    for kernel in report:
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability], kernel
        # a sampled sweep passes few tiles, and may be skipped over inside its loop
        spill = (
            MAX_SPILL_BYTES_ONCE if kernel["sampled"] else MAX_SPILL_BYTES.get(kernel["kernel"], MAX_SPILL_BYTES_ONCE)
        )
        assert kernel["registers"] <= 255 and 0 <= kernel["spill_store_bytes"] <= spill, kernel
        assert kernel["spill_load_bytes"] <= 2 * spill, kernel
        assert INSTRUCTION[capability] in kernel["tensor_cores"], kernel


def test_float16_and_smaller_heads_compile():
    report = compiled(90, "fp16", 64, 64, "sweep_queries")
    assert all(kernel["spill_store_bytes"] <= MAX_SPILL_BYTES_ONCE for kernel in report), report

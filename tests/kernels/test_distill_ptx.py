"""What Triton makes of the distillation loss gives what float64 gives: in bfloat16, by its PTX, run on this CPU.

Triton's interpreter cannot multiply bfloat16 and knows no instruction; here the compiled kernels run, tensor cores and
asynchronous copies included, in ptx/machine.py. Runs in `make compiles`; needs no nvcc.
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
pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(platform.system() != "Linux", reason="Triton brings its assembler for Linux only"),
]

SCRIPT = Path(__file__).with_name("run_distill_ptx.py")
MOST_OF_LOSS, MOST_OF_GRADIENT = 2e-5, 5e-3
"""Relative. bfloat16 operands cost 0.2 to 0.3 % of the gradient."""
KERNELS = ["carry_tails", "keys_gradient", "log_sums", "map_features", "row_sums", "sweep", "weight_gradient"]


@pytest.mark.parametrize(
    ("capability", "feature_map", "length", "head_dim", "feature_dim"),
    [
        (80, "hedgehog_softmax", 200, 128, 128),
        (90, "hedgehog_softmax", 200, 128, 128),
        (90, "hedgehog_exp", 130, 64, 64),
        (86, "hedgehog_joint", 70, 64, 32),
        (90, "hedgehog_softmax", 70, 32, 16),
    ],
)
def test_bfloat16_by_its_instructions(capability, feature_map, length, head_dim, feature_dim):
    """Llama-2's shape and narrower ones, each map, tiles of each GPU; padded left and right, packed, grouped heads."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *map(str, (capability, feature_map, length, head_dim, feature_dim))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["kernels"] == KERNELS
    assert report["loss_error"] <= MOST_OF_LOSS and report["kl_error"] <= MOST_OF_LOSS, report
    assert all(0 < error <= MOST_OF_GRADIENT for error in report["gradient_errors"]), report

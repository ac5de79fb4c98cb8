"""Peak memory grows with the length, not with its square. Each figure is the peak of a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")

CHILD = """
import sys, torch
from hedgehog.kernels.distill_loss import attention_distillation_loss, output_mse_loss
from hedgehog.kernels.feature_maps import make_feature_map
from hedgehog.kernels.linear_attention import (
    chunked_linear_attention, noncausal_linear_attention, quadratic_linear_attention
)
from hedgehog.kernels.mapped_attention import mapped_linear_attention

torch.set_num_threads(1)

def attention(form):
    def run(length):
        phi_q, phi_k, v = (torch.rand(1, 1, length, 16).requires_grad_() for _ in range(3))
        out = form(phi_q, phi_k, v)
        torch.autograd.grad(out.sum(), (phi_q, phi_k, v))
    return run

def loss(function):
    def run(length):
        q, k, v = (torch.randn(1, 1, length, 8) for _ in range(3))
        maps = [make_feature_map("hedgehog_softmax", num_heads=1, head_dim=8, side=s) for s in ("query", "key")]
        torch.autograd.grad(function(q, k, v, *maps).loss, [m.weight for m in maps])
    return run

def mapped(length):
    q, k, v = (torch.randn(1, 1, length, 16).requires_grad_() for _ in range(3))
    maps = [make_feature_map("hedgehog_softmax", num_heads=1, head_dim=16, side=s) for s in ("query", "key")]
    out = mapped_linear_attention(q, k, v, *maps)[0]
    torch.autograd.grad(out.sum(), (q, k, v, *(m.weight for m in maps)))

work = {
    "mapped": mapped,
    "chunked": attention(lambda *x: chunked_linear_attention(*x)[0]),
    "quadratic": attention(quadratic_linear_attention),
    "distillation": loss(lambda q, k, v, *maps: attention_distillation_loss(q, k, *maps, block_size=16)),
    "output": loss(output_mse_loss),
    "bidirectional": attention(noncausal_linear_attention),
    "bidirectional distillation": loss(
        lambda q, k, v, *maps: attention_distillation_loss(q, k, *maps, block_size=16, causal=False)
    ),
    "bidirectional output": loss(lambda *x: output_mse_loss(*x, causal=False)),
}[sys.argv[1]]

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

work(32)
for length in map(int, sys.argv[2:]):
    before = status("VmRSS")
    work(length)
    print(status("VmHWM") - before)
"""


def peaks_kb(workload: str, *lengths: int) -> list[int]:
    """Peak memory at ascending lengths, over what the process held before each."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", CHILD, workload, *map(str, lengths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize(
    ("workload", "length"),
    [
        ("chunked", 16384),
        ("mapped", 16384),
        ("distillation", 2048),
        ("output", 2048),
        ("bidirectional", 16384),
        ("bidirectional distillation", 2048),
        ("bidirectional output", 2048),
    ],
)
def test_peak_memory_is_linear_in_length(workload, length):
    """What earlier work left to the process in freed pages, some hundred KiB, is not in its peak: hence the slack."""
    short, long = peaks_kb(workload, length, 4 * length)
    assert long <= 5.5 * short, "four times the length takes about four times the memory; squared it would be sixteen"


def test_the_measurement_sees_quadratic_memory():
    short, long = peaks_kb("quadratic", 512, 2048)
    assert long > 8 * short

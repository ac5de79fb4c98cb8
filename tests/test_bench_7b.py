"""`make bench-7b` runs without a GPU, and `hedgehog validate` estimates what its steps allocate."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hedgehog.pipeline.allocation_peak import allocation_peak
from hedgehog.pipeline.model_shape import ModelShape

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_7b.py"
GROUPED = ModelShape(
    hidden_size=256,
    num_layers=3,
    num_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=688,
    vocab_size=16000,
    max_length_tokens=4096,
)
"""A vocabulary so large that the logits decide the peak, and grouped keys."""


@pytest.fixture(scope="module")
def bench_7b() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_7b", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_7b"] = module  # its annotations are looked up there
    spec.loader.exec_module(module)
    return module


def test_the_peak_of_a_block_is_what_it_held_at_once():
    kept = torch.ones(1 << 20)
    with allocation_peak("cpu") as peak:
        first = kept + 1
        del first
        second = kept.exp()
        third = second + kept
        del second, third
    assert 8 * 2**20 <= peak.num_bytes < 8.1 * 2**20, "two of four MiB at once, though three were made"


@pytest.mark.slow
def test_all_sections_without_a_gpu(tmp_path: Path):
    out = tmp_path / "bench.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    losses = [(row["loss"], row["length"]) for row in result["distill"]]
    assert losses == [("tiled", 256), ("tiled", 512), ("materialised", 256), ("materialised", 512)]
    peaks = {key: row["peak_bytes"] for key, row in zip(losses, result["distill"], strict=True)}
    assert peaks["tiled", 512] < 2.1 * peaks["tiled", 256], "linear in the length"
    assert peaks["tiled", 512] < peaks["materialised", 512] / 5
    assert [(row["attention"], row["length"]) for row in result["finetune"]] == [
        ("linear", 256), ("linear", 512), ("softmax", 256), ("softmax", 512),
    ]  # fmt: skip
    linear = [row["cache_bytes"] for row in result["generate"] if row["attention"] == "linear" and row["batch"] == 1]
    assert len(linear) == 2 and linear[0] == linear[1]
    ratios = [row["estimate"]["ratio"] for name in ("distill", "finetune", "generate") for row in result[name]
              if "estimate" in row]  # fmt: skip
    assert len(ratios) == 14
    assert ratios == pytest.approx([1.0] * 14, abs=0.11), "generation of very small models is 10 % off"


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_the_estimate_of_training_is_within_a_tenth(bench_7b: ModuleType, gradient_checkpointing: bool):
    bench = bench_7b.Bench(GROUPED, torch.device("cpu"), 1e9, gradient_checkpointing=gradient_checkpointing)
    bench.peak_flops_per_s = 1.0
    bench.seconds = lambda step, least_s=1.0: 1.0
    rows = bench_7b.finetune_rows(bench, [384])
    if gradient_checkpointing:
        rows += bench_7b.distill_rows(bench, [384])
    weights = 4 * GROUPED.num_weights
    for row in rows:
        if "estimate" not in row:
            continue
        estimate = row["estimate"]
        # without the weights, which are easy to count
        assert estimate["estimated_bytes"] - weights == pytest.approx(estimate["allocated_bytes"] - weights, rel=0.1)

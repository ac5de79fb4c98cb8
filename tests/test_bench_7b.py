"""`make bench-7b` runs without a GPU, and `hedgehog validate` estimates what its steps allocate."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
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
def test_all_sections_without_a_gpu(run_forked: Callable[..., tuple[int, str]], tmp_path: Path):
    out = tmp_path / "bench.json"
    status, said = run_forked(SCRIPT, ["--quick", "--out", str(out)], os.environ)
    assert status == 0, said
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


def test_a_first_step_without_memory_is_a_row(bench_7b: ModuleType, monkeypatch: pytest.MonkeyPatch):
    def backward(engine, loss):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_7b.TrainingEngine, "backward", backward)
    bench = bench_7b.Bench(GROUPED, torch.device("cpu"), 1e9)
    assert bench_7b.distill_rows(bench, [64, 128]) == [
        {"length": 64, "loss": loss, "out_of_memory": True} for loss in ("tiled", "materialised")
    ]


def test_plot(tmp_path: Path):
    pytest.importorskip("matplotlib")
    measured = {"seconds": 1.5, "peak_bytes": 2e9}
    report = {
        "device": "a GPU",
        "dtype": "torch.bfloat16",
        "distill": [
            {"length": 1024, "loss": "tiled", "teacher_seconds": 0.5, **measured},
            {"length": 2048, "loss": "materialised", "out_of_memory": True},
        ],
        "generate": [{"position": 64, "attention": "linear", "batch": 16, "ms_per_token": 20.0}],
    }
    file = tmp_path / "bench_7b.json"
    file.write_text(json.dumps(report))
    script = SCRIPT.with_name("plot_7b.py")
    done = subprocess.run([sys.executable, str(script), str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bench_7b.png").stat().st_size > 5_000
    file.write_text(json.dumps({"device": "a GPU", "dtype": "torch.bfloat16"}))
    done = subprocess.run([sys.executable, str(script), str(file)], capture_output=True, text=True)
    assert done.returncode == 1 and "nothing to plot" in done.stderr

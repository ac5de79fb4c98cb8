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
from typing import Any

import pytest
import torch

from hedgehog.pipeline.allocation_peak import allocation_peak
from hedgehog.pipeline.llama.shape import LlamaShape

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # its modules find each other
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_7b.py"
MATERIALISED = "materialised, float32"
GROUPED = LlamaShape(
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
    assert losses == [("tiled", 256), ("tiled", 512), (MATERIALISED, 256), (MATERIALISED, 512)]
    peaks = {key: row["peak_bytes"] for key, row in zip(losses, result["distill"], strict=True)}
    assert peaks["tiled", 512] < 2.1 * peaks["tiled", 256], "linear in the length"
    assert peaks["tiled", 512] < peaks[MATERIALISED, 512] / 5
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
    rows = [*bench_7b.finetune_rows(bench, [384])]
    if gradient_checkpointing:
        rows += bench_7b.distill_rows(bench, [384])
    weights = 4 * GROUPED.num_weights
    for row in rows:
        if "estimate" not in row:
            continue
        estimate = row["estimate"]
        # without the weights, which are easy to count
        assert estimate["estimated_bytes"] - weights == pytest.approx(estimate["allocated_bytes"] - weights, rel=0.1)


@pytest.fixture
def plain(bench_7b: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Without DeepSpeed and pydantic."""
    monkeypatch.setattr(bench_7b, "HAS_DEEPSPEED", False)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    for name in [name for name in sys.modules if name.startswith("hedgehog.pipeline.config")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "hedgehog.pipeline.memory_estimate", raising=False)
    return bench_7b


def small(module: ModuleType) -> Any:
    bench = module.Bench(GROUPED, torch.device("cpu"), 1e9)
    bench.peak_flops_per_s, bench.quick = 1.0, True
    return bench


def test_without_deepspeed_and_pydantic(
    plain: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The same steps; estimates are added elsewhere."""
    out = tmp_path / "bench.json"
    sections = ["--sections", "distill,finetune"]
    monkeypatch.setattr(sys, "argv", ["bench_7b.py", "--quick", "--lengths", "64", "--out", str(out), *sections])
    assert plain.main() == 0
    report = json.loads(out.read_text())
    assert report["engine"] == "torch's AdamW; DeepSpeed is not installed"
    rows = [*report["distill"], *report["finetune"]]
    assert [row.get("loss", row.get("attention")) for row in rows] == ["tiled", MATERIALISED, "linear", "softmax"]
    assert all(row["backend"] for row in rows)
    assert rows[0]["backend"] == "distillation loss: torch (no kernel for cpu)"
    assert all("missing" in row["estimate"] for row in rows if "estimate" in row)
    assert (tmp_path / "bench.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    monkeypatch.undo()
    plain.add_estimates(out)
    rows = json.loads(out.read_text())["distill"]
    assert rows[0]["estimate"]["ratio"] == pytest.approx(1, abs=0.5) and "missing" not in rows[0]["estimate"]


def test_the_settings_are_those_of_the_config(bench_7b: ModuleType):
    config = small(bench_7b).config(64)
    for section, values in bench_7b.SETTINGS.items():
        assert {name: getattr(getattr(config, section), name) for name in values} == values


def test_a_fallback_on_a_gpu_is_no_figure_of_the_kernels(bench_7b: ModuleType):
    bench = small(bench_7b)
    bench.device, bench.allow_fallback = torch.device("cuda"), False
    for kernels in ("distillation loss: triton (sm_90)", "linear attention: cuda (compiled; φ inside the kernel)"):
        bench.refuse_fallback(kernels)
    assert not bench.fell_back
    for other in (
        "distillation loss: torch (the kernel fails here)",
        "linear attention: torch (no compiled kernel: nvcc was not found)",
        "linear attention: cuda (compiled; φ outside the kernel: a block needs more)",
        "linear attention: cuda (compiled; φ inside the kernel; gradients by PyTorch: they fail here)",
    ):
        with pytest.raises(bench_7b.FellBack):
            bench.refuse_fallback(other)
    bench.allow_fallback = True
    bench.refuse_fallback("linear attention: torch (it needs a CUDA GPU)")
    assert bench.fell_back


def test_a_median_is_one_and_rows_that_would_end_late_are_left_out(
    bench_7b: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    bench = bench_7b.Bench(GROUPED, torch.device("cpu"), 100.0)
    clock = [0.0, 1.0, 1.0, 4.0, 4.0, 6.0]  # steps of 1, 3 and 2 seconds
    with monkeypatch.context() as patch:
        patch.setattr(bench_7b.time, "perf_counter", lambda: clock.pop(0))
        assert bench.seconds(lambda: None) == 2
    bench._forecast.note("key", 1024, 20.0)
    assert not bench.out_of_time("key", 2048) and bench.out_of_time("key", 4096)


def test_a_first_step_without_memory_is_a_row(plain: ModuleType, monkeypatch: pytest.MonkeyPatch):
    def backward(engine, loss):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(plain.PlainEngine, "backward", backward)
    assert list(plain.distill_rows(small(plain), [64, 128])) == [
        {"length": 64, "loss": loss, "out_of_memory": True} for loss in ("tiled", MATERIALISED)
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

"""`make bench-gpu` without a GPU: every line but CUDA's own events, graphs and backends runs, on the emulation.

A typo found here does not cost the first minutes on a GPU. What it measures on a CPU means nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # its modules find each other by being scripts of one folder

import bench_gpu  # noqa: E402
import gpu_circumstances  # noqa: E402
import gpu_decoding  # noqa: E402
import gpu_environment  # noqa: E402
import gpu_methods  # noqa: E402
import gpu_problems  # noqa: E402
import gpu_report  # noqa: E402
import gpu_sanitizer  # noqa: E402
import gpu_timing  # noqa: E402
import gpu_work  # noqa: E402

from hedgehog.kernels.cuda import library  # noqa: E402

CPU = torch.device("cpu")
CASE = gpu_problems.Case(64, 128, "hedgehog_softmax", 70)
needs_emulation = pytest.mark.skipif(
    not shutil.which("g++") or sys.platform != "linux", reason="the emulation needs g++ on Linux"
)


CHECKS = dict(gpu_circumstances.ANYWHERE)


@pytest.fixture(autouse=True)
def few_checks(monkeypatch):
    """The checks beside the matrix take as long as the rest; one test runs them."""
    monkeypatch.setattr(gpu_circumstances, "ANYWHERE", {})


def run_bench(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    out = tmp_path / "deep" / "bench.json"
    code = bench_gpu.main(["--device", "cpu", "--out", str(out), *arguments])
    return code, json.loads(out.read_text())


def test_work_is_that_of_the_notes():
    ceilings = gpu_work.Ceilings(bytes_per_s=4.3e12, flop_per_s=790e12)
    for features, flop, forward_ps, backward_ps in ((128, 131_072, 239, 718), (256, 245_760, 311, 933)):
        forward, backward = gpu_work.linear_attention_work("forward+backward", 1, 1, 128, features)
        assert forward.flop == flop and forward.num_bytes == 1028
        assert 1e12 * gpu_work.limit_s([forward], ceilings) == pytest.approx(forward_ps, abs=1)
        assert 1e12 * gpu_work.limit_s([backward], ceilings) == pytest.approx(backward_ps, abs=1)
    assert gpu_work.total_flop(gpu_work.softmax_work("forward", 1, 1000, 128)) == 256 * 1000**2
    state = 32 * 256 * 129 * 4  # bytes of one layer
    (token,) = gpu_work.decoding_work(64, 32, 128, 256)
    assert token.num_bytes == pytest.approx(64 * 2 * state, rel=0.01)


@needs_emulation
def test_every_section_runs_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_circumstances, "ANYWHERE", CHECKS)
    code, report = run_bench(tmp_path, "--quick")
    assert code == 0 and report["quick"] and report["left_out"] == [] and report["correctness"]["wrong"] == []
    assert {"python", "torch", "cuda", "triton"} <= report["versions"].keys() and "commit" in report
    assert {row["method"] for row in report["times"]} == {*gpu_methods.METHODS}
    assert len(report["times"]) == (3 + 2) * len(gpu_methods.METHODS), "two lengths, backward alone at the first"
    assert report["correctness"]["checks"] == {"run again": 1, "offsets beyond 2³¹": 1, "NaN": 1}
    assert len(report["decoding"]) == 2 * 2 * 5, "two batches, as called and in a graph"
    assert report["fla"]["skipped"].startswith("flash-linear-attention: ModuleNotFoundError")
    for row in [*report["times"], *report["decoding"]]:
        if row["method"] in ("fla", "kernel, wgmma", "kernel, slices"):
            assert "skipped" in row, "not installed; not for head dim 64"
        elif row["method"] == "softmax, cudnn":
            assert "failed" in row, "one failure does not stop the rest"
        else:
            assert row["seconds"] > 0 and row["fraction_of_limit"] > 0, row
    assert all(row["extra_bytes"] >= 0 for row in report["times"] if "seconds" in row)

    pytest.importorskip("matplotlib")
    printed = capsys.readouterr().out
    assert "wrong; sanitizer: not run" in printed and f"plot: {tmp_path / 'deep' / 'bench.png'}" in printed
    assert (tmp_path / "deep" / "bench.png").stat().st_size > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    gpu_report.main([str(tmp_path / "deep" / "bench.json")])
    printed = capsys.readouterr().out
    assert "no plot: import of matplotlib" in printed
    for part in (
        "| backward, 2 heads, ms | 70 |",
        "| forward+backward, 2 heads, ms | 40 | 70 |",
        "| softmax, cudnn | failed | failed |",
        "| fla, F=128, in a graph | – | – |",
    ):
        assert part in printed


@needs_emulation
def test_the_few_cases_of_a_cpu_are_right(tmp_path):
    code, report = run_bench(tmp_path)
    correctness = report["correctness"]
    assert code == 0 and correctness["num_results"] == 2 * (len(gpu_problems.few_cases()) + 1), (
        "one has two kinds of backward"
    )
    errors = correctness["worst"][0]["errors"]
    leaves = ("q", "k", "v", "weight_q", "weight_k", "initial_kv", "initial_k_sum")
    assert {f"gradient {name}" for name in leaves} | {"forward relative", "decoding absolute"} <= errors.keys()
    assert report["times"] == []


@needs_emulation
def test_each_method_runs_the_kernels_of_its_name(monkeypatch):
    ran = []
    forward, backward = library.Library.forward, library.Library.backward
    monkeypatch.setattr(library.Library, "forward", lambda *a: (ran.append(("forward", a[1].kernel)), forward(*a)))
    monkeypatch.setattr(library.Library, "backward", lambda *a: (ran.append(("backward", a[1].kernel)), backward(*a)))
    monkeypatch.setattr(gpu_methods, "wgmma_obstacle", lambda: None)
    meter, ceilings = gpu_timing.HostMeter(), gpu_work.Ceilings(1.0, 1.0)
    sets = gpu_methods.make_sets(gpu_methods.Cell(1, 65, 256), torch.device("cpu"))
    for method, kernels in (("kernel", (0, 1)), ("kernel, wgmma", (1, 2)), ("kernel, slices", (0, 0))):
        ran.clear()
        assert gpu_methods.measure(method, sets, "forward+backward", meter, ceilings)["seconds"] > 0
        assert set(ran) == {("forward", kernels[0]), ("backward", kernels[1])}
    with pytest.raises(gpu_timing.NotAvailable, match="forward pass is kernel's"):
        gpu_methods.measure("kernel, slices", sets, "forward", meter, ceilings)


def test_the_full_matrix():
    cases = gpu_problems.all_cases()
    assert len(cases) == len(set(cases)) == 2 * 2 * 4 * 6 * 6


@needs_emulation
def test_without_time_the_rest_is_listed(tmp_path):
    code, report = run_bench(tmp_path, "--quick", "--budget-s", "0")
    assert code == 0 and report["times"] == [] and report["decoding"] == []
    assert len(report["left_out"]) == (3 + 2) * len(gpu_methods.METHODS) + 2 * 2 * 5


@needs_emulation
@pytest.mark.parametrize("which", ["forward", "gradient", "raises"])
def test_wrong_kernels_are_named_and_not_timed(which, tmp_path, monkeypatch, capsys):
    right = gpu_problems.Problem.kernel

    def wrong(self, segments, return_state):
        if which == "raises":
            raise RuntimeError("no kernel image is available")
        out, *others = right(self, segments, return_state)
        if which == "forward":
            return (out * 1.01, *others)
        return (out + 0.02 * (out - out.detach()), *others)

    monkeypatch.setattr(gpu_problems.Problem, "kernel", wrong)
    code, report = run_bench(tmp_path, "--quick")
    assert code == 1 and report["times"] == [] and report["ceilings"] == {}
    faults = report["correctness"]["wrong"][0]["faults"]
    expected = {"forward": "forward relative", "gradient": "gradient q", "raises": "RuntimeError: no kernel image"}
    assert any(fault.startswith(expected[which]) for fault in faults)
    assert ("forward relative" in faults) == (which == "forward")
    assert "WRONG" in capsys.readouterr().err


def test_not_a_number_is_a_fault_and_unwritten_memory_is_not_a_number():
    errors = {"gradient q": math.nan, "forward relative": 3e-3, "forward repeated": 1e-9}
    assert gpu_problems.faults(errors) == ["gradient q", "forward repeated"]
    one = {"feature_map": "given", "head_dim": 64, "features": 128, "kind": "plain"}
    rows = [{**one, "errors": {"gradient q": error}} for error in (0.1, 0.3, math.nan, 0.2)]
    assert gpu_problems.worst(rows[:2]) == [rows[1]]
    assert math.isnan(gpu_problems.worst(rows)[0]["errors"]["gradient q"])
    with gpu_problems.poisoned_memory():
        assert torch.empty(3).isnan().all() and torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@needs_emulation
def test_the_long_problem_agrees_with_the_short_ones():
    for row in gpu_problems.check_long(CASE, CPU, (1, 2)):
        assert row["faults"] == [] and row["errors"]["forward repeated"] == 0 and len(row["errors"]) == 8


def fake_program(folder: Path, script: str) -> None:
    program = folder / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@needs_emulation
def test_what_a_gpu_adds_to_correctness(tmp_path, monkeypatch):
    fake_program(tmp_path, 'echo "========= ERROR SUMMARY: 0 errors"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu_problems, "LONG", 130)
    few = SimpleNamespace(shared_memory_per_block_optin=1 << 17)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: few)
    run = bench_gpu.Run(CPU, bench_gpu.QUICK, gpu_timing.Budget(60), tmp_path / "out.json", False)
    run.on_gpu = True
    run.check([CASE])
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["verdict"] for row in report["sanitizer"]] == ["clean", "clean"]
    assert {row["length"] for row in report["correctness"]["wrong"]} == set()
    assert report["correctness"]["num_results"] == 2 + 2 * 2, "two maps, one and two segments"
    few.shared_memory_per_block_optin = 1000
    run.check([CASE])
    assert "bytes of shared memory" in run.report["correctness"]["skipped"][0]["why"]


def differing(case, device):
    return gpu_circumstances.unlike({"o": torch.ones(3)}, {"o": torch.tensor([1.0, 1.0, 1.0 + 1e-6])})


def lost(case, device):
    return {"NaN in q": 1.0}


def raising(case, device):
    raise RuntimeError("an illegal memory access")


def full(case, device):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "check,faults,skipped",
    [
        (differing, ["o repeated"], None),
        (lost, ["NaN in q"], None),
        (raising, ["RuntimeError: an illegal memory access"], None),
        (full, [], "out of memory"),
    ],
)
def test_what_the_other_checks_say(check, faults, skipped, monkeypatch):
    monkeypatch.setattr(gpu_circumstances, "ANYWHERE", {"one": check})
    (row,) = gpu_circumstances.check_all(CPU, True, lambda case: True)
    assert (row["faults"], row.get("skipped")) == (faults, skipped)
    assert gpu_circumstances.check_all(CPU, True, lambda case: False) == []


def test_a_gpu_gets_every_check_in_every_shape(monkeypatch):
    monkeypatch.setattr(gpu_circumstances, "ANYWHERE", CHECKS)
    found = gpu_circumstances.jobs(torch.device("cuda"), quick=False)
    assert len({name for name, *_ in found}) == 5 and len(found) == 5 * 4 * 4


@needs_emulation
def test_a_sanitizer_without_a_verdict_does_not_pass(tmp_path, monkeypatch, capsys):
    row = {"tool": "racecheck", "verdict": "no verdict", "why": "stopped after 120 s"}
    check = bench_gpu.Run.check

    def with_sanitizer(self, cases):
        check(self, cases)
        self.report["sanitizer"] = [{"tool": "memcheck", "verdict": "clean"}, row]

    monkeypatch.setattr(bench_gpu.Run, "check", with_sanitizer)
    code, report = run_bench(tmp_path, "--quick", "--only-correctness")
    said = capsys.readouterr()
    assert code == 1 and report["times"] == []
    assert "0 wrong; sanitizer: memcheck CLEAN, racecheck NO VERDICT" in said.out and "NO VERDICT" in said.err


@needs_emulation
def test_the_program_under_the_sanitizer_runs():
    gpu_sanitizer.run_target(CPU, gpu_sanitizer.CASES[:1])


@pytest.mark.parametrize(
    "script,verdict",
    [
        ('echo "========= ERROR SUMMARY: 0 errors"', "clean"),
        ('echo "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)"; exit 77', "errors"),
        ('echo "========= Internal Sanitizer Error"; exit 1', "no verdict"),
        ("sleep 30", "no verdict"),
    ],
)
def test_verdicts_of_the_sanitizer(script, verdict, tmp_path, monkeypatch):
    fake_program(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    started = time.monotonic()
    rows = gpu_sanitizer.collect(gpu_sanitizer.start(BENCHMARKS / "bench_gpu.py"), limit_s=2)
    assert [row["verdict"] for row in rows] == [verdict] * 2 and time.monotonic() - started < 10
    assert [row["tool"] for row in rows] == ["memcheck", "racecheck"]


def test_without_the_sanitizer_it_says_so(monkeypatch):
    monkeypatch.setattr(gpu_sanitizer, "find_sanitizer", lambda: None)
    rows = gpu_sanitizer.collect(gpu_sanitizer.start(BENCHMARKS / "bench_gpu.py"))
    assert all(row["verdict"] == "skipped" and "not found" in row["why"] for row in rows)


class FakeEvent:
    """Every timed call takes `milliseconds`."""

    milliseconds = 2.0

    def __init__(self, enable_timing: bool) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, stop: FakeEvent) -> float:
        return self.milliseconds


@pytest.mark.parametrize("milliseconds,rounds", [(0.01, 30), (10, 15), (400, 3), (1500, 1)])
def test_rounds_of_the_cuda_clock(milliseconds, rounds, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(FakeEvent, "milliseconds", milliseconds)
    called = []
    meter = gpu_timing.CudaMeter(CPU, flush_bytes=16, settle_bytes=16)
    found = meter.seconds([lambda: called.append(0), lambda: called.append(1)])
    assert found["seconds"] == found["fastest_s"] == milliseconds / 1000 and found["rounds"] == rounds
    assert len(called) == 2 + rounds and abs(called.count(0) - called.count(1)) <= 1


def test_written_lines_leave_the_cache_before_the_clock_starts(monkeypatch):
    happened, add = [], torch.sum
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(FakeEvent, "record", lambda self: happened.append("clock"))
    monkeypatch.setattr(torch, "sum", lambda *given, **more: (happened.append("read"), add(*given, **more)))
    meter = gpu_timing.CudaMeter(CPU, flush_bytes=16, settle_bytes=32)
    meter._flush.fill_(7)
    meter.seconds([lambda: happened.append("call")])
    assert happened[1:5] == ["read", "clock", "call", "clock"] and not meter._flush.any()
    assert gpu_timing.SETTLE_BYTES >= 4 * 60e6, "an H200 has 60 MB of L2"


def test_a_rows_time_is_foretold():
    forecast = gpu_timing.Forecast()
    assert forecast.seconds("softmax", 4096) == 0
    forecast.note("softmax", 4096, 2.0)
    forecast.note("softmax", 1024, 1.0)  # a shorter length that came later
    assert forecast.seconds("softmax", 32768) == 128 and forecast.seconds("softmax", 2048) == 2
    assert forecast.seconds("kernel", 32768) == 0


def test_a_graph_holds_all_calls(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: "replayed"))
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    called = []
    replay = gpu_timing.CudaMeter(CPU, flush_bytes=16, settle_bytes=16).graph(
        [lambda: called.append(0), lambda: called.append(1)]
    )
    assert replay() == "replayed" and called == [0, 1, 0, 1], "once to warm up, once to capture"


def test_what_is_said_of_a_gpu(monkeypatch):
    properties = SimpleNamespace(name="A GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = gpu_environment.environment(torch.device("cuda", 0))
    assert found["device"] == "A GPU" and found["multiprocessors"] == 132 and "driver" in found["versions"]


def test_failures_are_rows():
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")

    def skipped():
        raise gpu_timing.NotAvailable("it is not here")

    def broken():
        raise KeyError("BLOCK_K\nsecond line")

    assert gpu_timing.attempt(out_of_memory) == {"failed": "out of memory"}
    assert gpu_timing.attempt(skipped) == {"skipped": "it is not here"}
    assert gpu_timing.attempt(broken)["failed"].startswith("KeyError: ")
    assert gpu_timing.attempt(lambda: {"seconds": 1.0}) == {"seconds": 1.0}


class FakeHedgehogMap(torch.nn.Module):
    """fla.modules.feature_map.HedgehogFeatureMap, as its release 0.6.0 documents it."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(head_dim, head_dim)

    def forward(self, x):
        y = 2 * self.layer(x)
        return torch.cat([y, -y], dim=-1).softmax(-1)


def fake_chunk_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True):
    """(B, T, H, ·) in and out, and a state."""
    assert normalize
    scores = torch.einsum("bthf,bshf->bhts", q.float(), k.float()).tril()
    out = torch.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdim=True), v.float())
    return out.to(v.dtype), None


def fake_recurrent_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=False):
    kv_state, k_sum = initial_state
    batch, length, heads, features = q.shape
    assert kv_state.shape == (batch, heads, features, v.shape[-1]) and k_sum.shape == (batch, 1, heads, features)
    assert normalize and length == 1
    return torch.zeros_like(v), (kv_state, k_sum)


@needs_emulation
@pytest.mark.parametrize("features", [64, 128])
def test_flash_linear_attention_is_called_as_it_asks(features, monkeypatch):
    maps, operators = ModuleType("fla.modules.feature_map"), ModuleType("fla.ops.linear_attn")
    maps.HedgehogFeatureMap = FakeHedgehogMap
    operators.chunk_linear_attn = fake_chunk_linear_attn
    operators.fused_recurrent_linear_attn = fake_recurrent_linear_attn
    monkeypatch.setitem(sys.modules, "fla.modules.feature_map", maps)
    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", operators)
    meter, ceilings = gpu_timing.HostMeter(), gpu_work.Ceilings(1e9, 1e9)
    inputs = gpu_methods.Inputs(gpu_methods.Cell(2, 70, features, 64), CPU)
    for passes in gpu_work.PASSES:
        assert gpu_methods.measure("fla", [inputs], passes, meter, ceilings)["seconds"] > 0
    token = gpu_decoding.Token(2, features, heads=2, head_dim=64)
    assert gpu_decoding.measure("fla", token, True, meter, ceilings)["seconds"] > 0
    if features == 128:  # as few as the kernels have
        cell = gpu_methods.Cell(2, 70, features, 64)
        assert gpu_methods.fla_difference(CPU, cell)["difference_from_kernel"] < 0.01


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_what_there_is_instead(capsys):
    assert bench_gpu.main([]) == 1
    assert "--device cpu" in capsys.readouterr().err


def test_from_a_checkout_without_an_installation(tmp_path):
    """Another `hedgehog` on the path, and none of the training's packages: what lies beside the script is meant."""
    for name in ("hedgehog", "deepspeed", "pydantic", "peft", "typer", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not to be imported')\n")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_gpu.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("no CUDA device"), done.stderr

"""`make bench` runs and reports; its figures are not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_quick_bench_writes_every_section_with_its_bounds(tmp_path):
    out = tmp_path / "deep" / "bench.json"
    command = [
        sys.executable,
        str(BENCH),
        "--quick",
        "--sections",
        "attention,distillation,decoding",
        "--out",
        str(out),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {"command", "cpu", "torch", "python", "threads", "quick", "seconds"} <= report.keys()
    assert {name: len(section["checks"]) for name, section in report["sections"].items()} == {
        "attention": 2,
        "distillation": 3,
        "decoding": 2,
    }
    assert all(section["rows"] for section in report["sections"].values())
    assert "gradient error" in done.stdout and "bounds held" in done.stdout


def test_the_step_section_compares_two_forms_of_the_same_step(monkeypatch):
    """In this process, which has imported what the section's own processes would."""
    monkeypatch.syspath_prepend(BENCH.parent)
    import bench

    losses = [bench.WORKLOADS[f"{form} one-layer stage-one step"](64)() for form in ("tiled", "materialised")]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)
    monkeypatch.setattr(bench, "peaks_bytes", lambda workloads, length: [10**6, 10**7])
    section = bench.step_section(quick=True)
    assert [(row["loss"], row["peak MB"]) for row in section.rows] == [("tiled", 1.0), ("materialised", 10.0)]
    assert [check["held"] for check in section.checks][1] and len(section.checks) == 2


def test_the_generate_section_times_every_token_at_both_positions(monkeypatch):
    monkeypatch.syspath_prepend(BENCH.parent)
    import bench

    section = bench.generate_section(quick=True)
    assert [row["position"] for row in section.rows] == [10, 100]
    (check,) = section.checks
    slow, fast = section.rows[1]["ms/token"], section.rows[0]["ms/token"]
    assert fast > 0 and check["value"] == pytest.approx(slow / fast, abs=1e-3)


def test_unknown_section_is_named(tmp_path):
    command = [sys.executable, str(BENCH), "--sections", "decodign"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "unknown section decodign; known: attention" in done.stderr

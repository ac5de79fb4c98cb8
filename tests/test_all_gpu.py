"""`benchmarks/all_gpu.py` runs what is right, leaves out what needs something wrong, and stops what does not end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import all_gpu
from all_gpu import Part

SCRIPT = """
import sys, time
print("so many seconds:", sys.argv[sys.argv.index("--budget-s") + 1])
open(sys.argv[sys.argv.index("--out") + 1], "w").write("{}")
if "--hang" in sys.argv: time.sleep(60)
sys.exit("--wrong" in sys.argv)
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`parts(*parts)` runs these in place of the real ones; returns what was printed's exit code."""
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(all_gpu, "HERE", tmp_path)
    monkeypatch.setattr(all_gpu, "BUILD", "")
    monkeypatch.setattr(all_gpu, "GRACE_S", 0.5)

    def run(*chosen: Part, budget_s: float = 100) -> int:
        monkeypatch.setattr(all_gpu, "PARTS", chosen)
        return all_gpu.main(["--out", str(tmp_path / "out"), "--budget-s", str(budget_s)])

    return run


def test_all_right(parts, tmp_path, capsys):
    first = Part("distill", "script.py", (), "a.json", 0.25)
    assert parts(first, Part("kernels", "script.py", (), "b.json", 1.0, needs="distill")) == 0
    assert (tmp_path / "out" / "a.json").exists() and (tmp_path / "out" / "b.json").exists()
    assert (tmp_path / "out" / "distill.log").read_text() == "so many seconds: 25\n"
    assert "kernels  right" in capsys.readouterr().out


def test_what_needs_something_wrong_is_left_out(parts, tmp_path, capsys):
    wrong = Part("distill", "script.py", ("--wrong",), "a.json", 0.25)
    after = Part("kernels", "script.py", (), "c.json", 1.0)
    assert parts(wrong, Part("loss", "script.py", (), "b.json", 1.0, needs="distill"), after) == 1
    assert not (tmp_path / "out" / "b.json").exists() and (tmp_path / "out" / "c.json").exists()
    assert "not run: distill is not right" in capsys.readouterr().out


def test_what_does_not_end_is_stopped(parts, capsys):
    assert parts(Part("kernels", "script.py", ("--hang",), "a.json", 0.5), budget_s=4) == 1
    assert "stopped: it went on beyond its time" in capsys.readouterr().out


def test_the_real_parts_are_scripts_with_these_options():
    for part in all_gpu.PARTS:
        source = (Path(all_gpu.__file__).parent / part.script).read_text()
        assert all(f'"{option}"' in source for option in ("--out", "--budget-s", *part.arguments))

"""Everything for a machine with a GPU, in one command under eight minutes: what is right first, then how fast.

    python benchmarks/all_gpu.py [--out FOLDER] [--budget-s 470]

Nothing has to be installed but torch, Triton, transformers and (for stage two) peft; no network is needed. In this
order, each a process of its own with a part of the time, each with a log and a JSON that it writes as it goes:

    build      the CUDA kernels, beside the next
    distill    the Triton kernel of the distillation loss: is it right?       distill_check.json
    kernels    the CUDA kernels: are they right, sanitizer, times              bench_gpu.json, .png
    loss       times of the distillation loss                                  distill_times.json
    model      both stages and generation at Llama-2 7B's size                 bench_7b.json, .png

What is wrong is not timed; the rest goes on. Exit code 1 where anything was wrong, fell back or did not end.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import checkout, torch
from hedgehog.kernels.cuda.library import cuda_library
cuda_library(torch.cuda.get_device_capability())
"""
GRACE_S = 20.0
"""What a part may take beyond its budget, for the row it is at, before it is stopped."""
INTERRUPTED_S = 10.0


@dataclass(frozen=True)
class Part:
    """A script, its arguments, and its share of the time that is left when it begins."""

    name: str
    script: str
    arguments: tuple[str, ...]
    output: str
    share: float
    needs: str | None = None
    """A part that must have found everything right."""


PARTS = (
    Part("distill", "distill_kernel.py", ("--check",), "distill_check.json", 0.25),
    Part("kernels", "bench_gpu.py", (), "bench_gpu.json", 0.6),
    Part("loss", "distill_kernel.py", ("--no-check",), "distill_times.json", 0.3, needs="distill"),
    Part("model", "bench_7b.py", (), "bench_7b.json", 1.0, needs="distill"),
)


def run(part: Part, out: Path, budget_s: float) -> str:
    """ "right", or what came of it."""
    command = [sys.executable, str(HERE / part.script), *part.arguments, "--out", str(out / part.output)]
    command += ["--budget-s", f"{budget_s:.0f}"]
    with open(out / f"{part.name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(budget_s + GRACE_S)
        except subprocess.TimeoutExpired:
            _stop(process)
            return "stopped: it went on beyond its time"
        except BaseException:
            _stop(process)
            raise
    return "right" if code == 0 else f"exit code {code}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """With what it started, so that nothing works on the GPU while the next part is timed."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(INTERRUPTED_S)
    except subprocess.TimeoutExpired:  # it waits for a kernel
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for JSON, plots and logs")
    parser.add_argument("--budget-s", type=float, default=470.0)
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with open(chosen.out / "build.log", "w", encoding="utf-8") as log:
        building = subprocess.Popen([sys.executable, "-c", BUILD], stdout=log, stderr=subprocess.STDOUT)
        verdicts: dict[str, str] = {}
        for part in PARTS:
            if part.name == "kernels":
                verdicts["build"] = "right" if building.wait() == 0 else f"exit code {building.returncode}"
            left_s = chosen.budget_s - (time.monotonic() - began)
            if part.needs and verdicts[part.needs] != "right":
                verdicts[part.name] = f"not run: {part.needs} is not right"
            elif left_s < GRACE_S:
                verdicts[part.name] = "not run: no time was left"
            else:
                print(f"{part.name}: up to {part.share * left_s:.0f} s", flush=True)
                started = time.monotonic()
                verdicts[part.name] = run(part, chosen.out, part.share * left_s)
                print(f"{part.name}: {verdicts[part.name]}, {time.monotonic() - started:.0f} s", flush=True)
                print(_end_of(chosen.out / f"{part.name}.log"), flush=True)
    for name, said in verdicts.items():
        print(f"{name:8} {said}; {chosen.out / name}.log")
    return 0 if set(verdicts.values()) == {"right"} else 1


def _end_of(log: Path, num_lines: int = 12) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line[:200]}" for line in lines[-num_lines:])


if __name__ == "__main__":
    sys.exit(main())

"""The kernels on small shapes under NVIDIA's compute-sanitizer: memcheck and racecheck, side by side.

Each tool runs `bench_gpu.py --sanitizer-target` in a process of its own, without torch's caching allocator, which
would hide a step over the end of a tensor, and looks at our kernels alone.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from gpu_problems import Case, Oracle, make_problem

TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}  # torch makes failing calls of its own
ERROR_EXIT = 77
LIMIT_S = 120.0
CASES = [
    Case(64, 128, "hedgehog_softmax", 130, "everything"),
    Case(64, 128, "given", 130, "everything"),
    Case(128, 256, "hedgehog_exp", 70, "grouped"),
    Case(128, 256, "hedgehog_softmax", 70, "resumed"),
]


def run_target(device: torch.device, cases: list[Case] = CASES) -> None:
    """What the tools look at: forward, backward and decoding, one segment and several."""
    for case in cases:
        oracle = Oracle(make_problem(case, device))
        for segments, splits in ((1, 1), (3, 4)):
            oracle.kernel_errors(segments)
            oracle.decoding_errors(segments, splits)


@dataclass
class Running:
    """A tool at work."""

    tool: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    started: float


def find_sanitizer() -> str | None:
    """On the path, else in `$CUDA_HOME` or CUDA's usual folder."""
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(usual) if usual.is_file() else None)


def start(script: Path, *, device: str = "cuda") -> list[Running]:
    """Both tools at once, beside whatever else runs; nothing where there is no compute-sanitizer."""
    program = find_sanitizer()
    if program is None:
        return []
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    target = [sys.executable, str(script), "--sanitizer-target", "--device", device]
    running = []
    timeout = shutil.which("timeout")  # ends the tools even where this program could not
    bounded = [timeout, "--signal=KILL", f"{LIMIT_S:.0f}"] if timeout else []
    for tool, options in TOOLS.items():
        ours = ("--kernel-name", "kernel_substring=hedgehog", "--error-exitcode", str(ERROR_EXIT))
        output = tempfile.TemporaryFile()  # noqa: SIM115  `collect` closes it
        process = subprocess.Popen(
            [*bounded, program, "--tool", tool, *options, *ours, *target],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # to be stopped together with the program under it
        )
        running.append(Running(tool, process, output, time.monotonic()))
    return running


def stop(running: list[Running]) -> None:
    """The tools and what runs under them."""
    for one in running:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()


def verdict(returncode: int, output: str) -> str:
    """ "clean", "errors", or "no verdict" where the tool or the program under it did not come to its end."""
    counts = [int(count) for count in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)]
    if any(counts) or returncode == ERROR_EXIT:
        return "errors"
    return "clean" if counts and returncode == 0 else "no verdict"


def collect(running: list[Running], limit_s: float = LIMIT_S) -> list[dict[str, Any]]:
    """A row a tool, waiting until `limit_s` after its start; a tool that takes longer is stopped."""
    if not running:
        return [{"tool": tool, "verdict": "skipped", "why": "compute-sanitizer was not found"} for tool in TOOLS]
    rows = []
    for one in running:
        row: dict[str, Any] = {"tool": one.tool}
        try:
            one.process.wait(timeout=max(0.0, limit_s - (time.monotonic() - one.started)))
        except subprocess.TimeoutExpired:
            stop([one])
            row["why"] = f"stopped after {limit_s:.0f} s"
        one.output.seek(0)
        text = one.output.read().decode(errors="replace")
        one.output.close()
        row["verdict"] = verdict(one.process.returncode, text)
        if row["verdict"] != "clean":
            row["output"] = text.strip()[-2000:]
        rows.append(row)
    return rows

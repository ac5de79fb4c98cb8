"""Speed and memory of hedgehog.kernels on this machine, against the bounds the project sets itself: `make bench`.

    python benchmarks/bench.py [--sections attention,distillation,step,decoding,generate,cli] [--quick] [--out FILE]

Prints a table and a verdict per bound, and writes both as JSON. Times are the best of several rounds, the lengths taken
in turn within a round, so that a slow spell of the machine hits all alike. Each memory figure is the peak resident set
of a process of its own. A section is a function in SECTIONS; add one there.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from generated_tokens import seconds_a_token
from stage_one_step import SHAPE, stage_one_step

from hedgehog.kernels.distill_loss import attention_distillation_loss, materialised_distillation_loss
from hedgehog.kernels.feature_maps import make_feature_map
from hedgehog.kernels.linear_attention import (
    LinearAttentionState,
    chunked_linear_attention,
    recurrent_linear_attention_step,
)
from hedgehog.kernels.mapped_attention import mapped_linear_attention

RESULTS = Path(__file__).parent / "results"
FEATURE_MAP = "hedgehog_softmax"
HEAD_DIM = 64


@dataclass
class Section:
    """What one section found: rows for the table, and the bounds it checked."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, name: str, value: float, at_most: float) -> None:
        self.checks.append({"name": name, "value": round(value, 4), "at_most": at_most, "held": value <= at_most})


def best_times_s(tasks: dict[Any, Callable[[], Any]], rounds: int, min_round_s: float = 0.05) -> dict[Any, float]:
    """Seconds per call of each task: the best over rounds of the mean over as many calls as fill `min_round_s`."""
    best = dict.fromkeys(tasks, float("inf"))
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            calls, start = 0, time.perf_counter()
            while calls == 0 or time.perf_counter() - start < min_round_s:
                task()
                calls += 1
            best[name] = min(best[name], (time.perf_counter() - start) / calls)
    return best


def memory_status_bytes(key: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def peak_memory_bytes(workload: str, length: int) -> int | None:
    """Peak memory that one run of `workload` adds to a process of its own. None where /proc is missing."""
    return peaks_bytes([workload], length)[0]


def peaks_bytes(workloads: list[str], length: int) -> list[int | None]:
    """The same for several, each in a process of its own, forked from one that has imported what they need."""
    if not Path("/proc/self/status").exists():
        return [None] * len(workloads)
    command = [sys.executable, __file__, "--measure-memory", ",".join(workloads), "--length", str(length)]
    # large blocks straight from the system, so that what is freed does not linger in the figure
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [int(line) for line in done.stdout.split()]


def measure_memory(workloads: list[str], length: int) -> None:
    """The child of `peaks_bytes`: one process after the other warms up on a short problem, then runs the long one."""
    torch.set_num_threads(1)
    if any(workload in STEPS for workload in workloads):
        import hedgehog.pipeline.distillation  # noqa: F401  (before the fork, so that it is done once)
    for workload in workloads:
        pid = os.fork()
        if pid:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status:
                sys.exit(f"{workload}: the process that measured it ended with {status}")
            continue
        WORKLOADS[workload](64)()
        task = WORKLOADS[workload](length) if workload in STEPS else None
        before = memory_status_bytes("VmRSS")
        (task or WORKLOADS[workload](length))()
        print(max(memory_status_bytes("VmHWM") - before, 0), flush=True)
        os._exit(0)


# -- chunked linear attention ------------------------------------------------------------------------------------------

ATTENTION_HEADS, NUM_FEATURES, VALUE_DIM = 4, 128, 64


def attention_inputs(length: int) -> list[torch.Tensor]:
    """φ(q), φ(k), v, all asking for gradients, and the gradient of the output."""
    shape = (1, ATTENTION_HEADS, length)
    phi_q, phi_k = torch.rand(*shape, NUM_FEATURES), torch.rand(*shape, NUM_FEATURES)
    v, grad_out = torch.randn(*shape, VALUE_DIM), torch.randn(*shape, VALUE_DIM)
    return [phi_q.requires_grad_(), phi_k.requires_grad_(), v.requires_grad_(), grad_out]


def linear_attention_workload(length: int) -> Callable[[], Any]:
    *inputs, grad_out = attention_inputs(length)
    return lambda: torch.autograd.grad(chunked_linear_attention(*inputs)[0], inputs, grad_out)


def sdpa_workload(length: int) -> Callable[[], Any]:
    shape = (1, ATTENTION_HEADS, length, HEAD_DIM)
    q, k, v = (torch.randn(shape).requires_grad_() for _ in range(3))
    grad_out = torch.randn(shape)
    return lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), grad_out)


def attention_section(quick: bool) -> Section:
    section = Section()
    lengths = [128, 256] if quick else [2**n for n in range(10, 17)]
    rounds = 1 if quick else 5
    linear = best_times_s({n: linear_attention_workload(n) for n in lengths}, rounds)
    softmax = best_times_s({n: sdpa_workload(n) for n in lengths if n <= 8192}, min(rounds, 3))
    memory_lengths = {lengths[-1]} if quick else {1024, 4096, 16384, 65536}
    for length in lengths:
        row: dict[str, Any] = {"tokens": length, "linear µs/token": 1e6 * linear[length] / length}
        row["SDPA µs/token"] = 1e6 * softmax[length] / length if length in softmax else None
        peak = peak_memory_bytes("attention", length) if length in memory_lengths else None
        # φ(q), φ(k), v and o, and a gradient of each
        needed = 4 * 2 * ATTENTION_HEADS * length * (2 * NUM_FEATURES + 2 * VALUE_DIM)
        row["peak MB"] = None if peak is None else peak / 1e6
        row["peak / needed"] = None if peak is None else peak / needed
        section.rows.append(row)
    per_token = [row["linear µs/token"] for row in section.rows]
    section.check("attention: slowest time per token over fastest", max(per_token) / min(per_token), 1.3)
    ratios = [row["peak / needed"] for row in section.rows if row["peak / needed"] is not None]
    if ratios:
        section.check("attention: peak memory over q, k, v, o and gradients", max(ratios), 1.2)
    else:
        section.notes.append("no memory figures: this system has no /proc/self/status")
    wins = [length for length in softmax if all(linear[n] < softmax[n] for n in softmax if n >= length)]
    where = f"from {min(wins)} tokens on" if wins else f"nowhere up to {max(softmax)} tokens"
    section.notes.append(
        f"forward + backward, {ATTENTION_HEADS} heads, F = {NUM_FEATURES}, V = {VALUE_DIM}, float32; faster than SDPA "
        f"(D = {HEAD_DIM}) {where} (of the lengths measured)"
    )
    return section


# -- with feature maps ------------------------------------------------------------------------------------------------


def mapped_workload(length: int, features_first: bool = False) -> Callable[[], Any]:
    """Forward and backward from q, k, v and learning maps."""
    shape = (1, ATTENTION_HEADS, length, HEAD_DIM)
    q, k, v = (torch.randn(shape).requires_grad_() for _ in range(3))
    sides = ("query", "key")
    maps = [make_feature_map(FEATURE_MAP, num_heads=ATTENTION_HEADS, head_dim=HEAD_DIM, side=side) for side in sides]
    leaves, grad_out = [q, k, v, *(parameter for m in maps for parameter in m.parameters())], torch.randn(shape)

    def run() -> Any:
        if features_first:
            out, _ = chunked_linear_attention(maps[0](q), maps[1](k), v)
        else:
            out, _ = mapped_linear_attention(q, k, v, *maps)
        return torch.autograd.grad(out, leaves, grad_out)

    return run


def mapped_section(quick: bool) -> Section:
    section = Section()
    lengths = [128, 256] if quick else [1024, 4096, 16384]
    rounds = 1 if quick else 4
    along = best_times_s({n: mapped_workload(n) for n in lengths}, rounds)
    first = best_times_s({n: mapped_workload(n, features_first=True) for n in lengths}, rounds)
    for length in lengths:
        row: dict[str, Any] = {"tokens": length, "φ along the way ms": 1e3 * along[length]}
        row |= {"φ first ms": 1e3 * first[length], "time ratio": along[length] / first[length]}
        peaks = peaks_bytes(["mapped attention", "attention of features"], length)
        for name, peak in zip(("along the way", "first"), peaks, strict=True):
            row[f"peak MB, {name}"] = None if peak is None else peak / 1e6
        section.rows.append(row)
    section.check("φ along the way: time over φ first", max(row["time ratio"] for row in section.rows), 1.35)
    last = section.rows[-1]
    if last["peak MB, first"]:
        ratio = last["peak MB, along the way"] / last["peak MB, first"]
        section.check(f"φ along the way: peak memory over φ first, at {last['tokens']} tokens", ratio, 0.5)
    section.notes.append(
        f"forward + backward from q, k, v, {ATTENTION_HEADS} heads of {HEAD_DIM}, {FEATURE_MAP}, F = {2 * HEAD_DIM}, "
        "float32; q, k, v and their gradients count in the peak"
    )
    return section


# -- the distillation loss ---------------------------------------------------------------------------------------------

DISTILLATION_HEADS = 2


def distillation_workload(length: int, loss_function: Callable = attention_distillation_loss) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, DISTILLATION_HEADS, length, HEAD_DIM, generator=generator) for _ in range(2))
    sides = ("query", "key")
    maps = [make_feature_map(FEATURE_MAP, num_heads=DISTILLATION_HEADS, head_dim=HEAD_DIM, side=s) for s in sides]
    weights = [parameter for m in maps for parameter in m.parameters()]
    return lambda: torch.autograd.grad(loss_function(q, k, *maps).loss, weights)


def distillation_section(quick: bool) -> Section:
    section = Section()
    lengths = [128, 256] if quick else [1024, 2048, 4096, 8192, 16384]
    both = [length for length in lengths if length <= 4096]
    tiled_tasks = {length: distillation_workload(length) for length in lengths}
    reference_tasks = {length: distillation_workload(length, materialised_distillation_loss) for length in both}
    tiled = best_times_s(tiled_tasks, 1 if quick else 2)
    reference = best_times_s(reference_tasks, 1 if quick else 3)
    for length in lengths:
        row: dict[str, Any] = {"tokens": length, "tiled ms": 1e3 * tiled[length]}
        if length in both:
            row["materialised ms"] = 1e3 * reference[length]
            row["time ratio"] = tiled[length] / reference[length]
            pairs = zip(tiled_tasks[length](), reference_tasks[length](), strict=True)
            row["gradient error"] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        else:
            row |= {"materialised ms": None, "time ratio": None, "gradient error": None}
        peak = peak_memory_bytes("distillation", length)
        row["tiled peak MB"] = None if peak is None else peak / 1e6
        fits = length in both and length <= 2048 and not quick
        peak_reference = peak_memory_bytes("materialised distillation", length) if fits else None
        row["materialised peak MB"] = None if peak_reference is None else peak_reference / 1e6
        section.rows.append(row)
    section.check(
        "distillation: time over the materialised loss's",
        max(section.rows[i]["time ratio"] for i in range(len(both))),
        1.5,
    )
    section.check(
        "distillation: gradient error", max(section.rows[i]["gradient error"] for i in range(len(both))), 1e-4
    )
    peaks = [row["tiled peak MB"] for row in section.rows]
    if None in peaks:
        section.notes.append("no memory figures: this system has no /proc/self/status")
    else:
        growth = max(b / a for a, b in itertools.pairwise(peaks))
        section.check("distillation: peak memory's growth where the length doubles", growth, 2.2)
    section.notes.append(f"loss and dW, {DISTILLATION_HEADS} heads of {HEAD_DIM}, {FEATURE_MAP}, float32")
    return section


# -- a whole step of stage one -----------------------------------------------------------------------------------------


def step_section(quick: bool) -> Section:
    section = Section()
    length = 64 if quick else 2048
    forms, num_layers = ("tiled", "materialised"), 1 if quick else SHAPE["num_hidden_layers"]
    tasks = {form: stage_one_step(length, materialised=form == forms[1], num_layers=num_layers) for form in forms}
    seconds = best_times_s(tasks, 1 if quick else 3)
    peaks = peaks_bytes([f"{form} {'one-layer ' if quick else ''}stage-one step" for form in forms], length)
    for form, peak in zip(forms, peaks, strict=True):
        row: dict[str, Any] = {"loss": form, "tokens": length, "s/step": seconds[form]}
        section.rows.append(row | {"peak MB": None if peak is None else peak / 1e6})
    section.check(
        "stage-one step: time over the materialised loss's", seconds["tiled"] / seconds["materialised"], 1 / 1.5
    )
    tiled, materialised = (row["peak MB"] for row in section.rows)
    if tiled is None or materialised is None:
        section.notes.append("no memory figures: this system has no /proc/self/status")
    else:
        section.check("stage-one step: peak memory over the materialised loss's", tiled / materialised, 1 / 5)
    shape = f"{num_layers} layers, {SHAPE['num_attention_heads']} heads of {SHAPE['head_dim']}"
    section.notes.append(f"teacher, losses, AdamW; {shape}, random weights, batch 1, float32; memory beyond the model")
    return section


# -- decoding ----------------------------------------------------------------------------------------------------------


def decoding_section(quick: bool) -> Section:
    section = Section()
    heads, head_dim = (2, 16) if quick else (32, 128)
    positions = (10, 100) if quick else (100, 10_000)
    map_q, map_k = (make_feature_map(FEATURE_MAP, num_heads=heads, head_dim=head_dim, side=s) for s in ("query", "key"))
    token = torch.randn(1, heads, 1, head_dim)
    states: dict[int, LinearAttentionState] = {}
    with torch.no_grad():
        for position in positions:
            state = LinearAttentionState.zeros(1, heads, map_q.num_features, head_dim)
            for start in range(0, position, 500):
                x = torch.randn(1, heads, min(500, position - start), head_dim)
                _, new_state = chunked_linear_attention(map_q(x), map_k(x), x, initial_state=state, return_state=True)
                assert new_state is not None
                state = new_state
            states[position] = state

        def step(state: LinearAttentionState) -> None:
            phi_q, phi_k = map_q(token)[:, :, 0], map_k(token)[:, :, 0]
            recurrent_linear_attention_step(phi_q, phi_k, token[:, :, 0], state)

        tasks = {position: (lambda state=state: step(state)) for position, state in states.items()}
        seconds = best_times_s(tasks, 2 if quick else 20)
    for position in positions:
        section.rows.append(
            {
                "position": position,
                "ms/token and layer": 1e3 * seconds[position],
                "state bytes": states[position].num_bytes(),
            }
        )
    first, last = (seconds[position] for position in positions)
    section.check(f"decoding: time at position {positions[1]} over {positions[0]}", last / first, 1.1)
    first, last = (states[position].num_bytes() for position in positions)
    section.check(f"decoding: state bytes at position {positions[1]} over {positions[0]}", last / first, 1.0)
    section.notes.append(f"one layer, {heads} heads of {head_dim}, F = {map_q.num_features}, φ included")
    return section


def generate_section(quick: bool) -> Section:
    section = Section()
    positions = (10, 100) if quick else (100, 10_000)
    seconds = seconds_a_token(positions, num_tokens=4 if quick else 64, rounds=1 if quick else 8)
    for position in positions:
        section.rows.append({"position": position, "ms/token": 1e3 * seconds[position]})
    first, last = (seconds[position] for position in positions)
    section.check(f"generate: time at position {positions[1]} over {positions[0]}", last / first, 1.1)
    section.notes.append("generate() itself, greedy, batch 1: configs/tiny.yaml's model with random weights, float32")
    return section


# -- command line ------------------------------------------------------------------------------------------------------


def cli_section(quick: bool) -> Section:
    section = Section()
    beside_python = Path(sys.executable).with_name("hedgehog")
    command = str(beside_python) if beside_python.exists() else shutil.which("hedgehog")
    if command is None:
        section.notes.append("skipped: the hedgehog command is not installed")
        return section
    seconds = []
    for _ in range(2 if quick else 6):
        start = time.perf_counter()
        done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        if done.returncode != 0:
            section.notes.append(f"skipped: `hedgehog --help` failed: {done.stderr.strip().splitlines()[-1:]}")
            return section
    median = statistics.median(seconds[1:])  # the first run fills the file cache
    section.rows.append({"command": "hedgehog --help", "median s": median})
    section.check("cli: seconds of `hedgehog --help`", median, 0.5)
    return section


SECTIONS: dict[str, Callable[[bool], Section]] = {
    "attention": attention_section,
    "mapped": mapped_section,
    "distillation": distillation_section,
    "step": step_section,
    "decoding": decoding_section,
    "generate": generate_section,
    "cli": cli_section,
}
WORKLOADS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "attention": linear_attention_workload,
    "mapped attention": mapped_workload,
    "attention of features": lambda length: mapped_workload(length, features_first=True),
    "distillation": distillation_workload,
    "materialised distillation": lambda length: distillation_workload(length, materialised_distillation_loss),
}
STEPS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "tiled stage-one step": lambda length: stage_one_step(length, materialised=False),
    "materialised stage-one step": lambda length: stage_one_step(length, materialised=True),
    "tiled one-layer stage-one step": lambda length: stage_one_step(length, materialised=False, num_layers=1),
    "materialised one-layer stage-one step": lambda length: stage_one_step(length, materialised=True, num_layers=1),
}
"""Here what the model itself takes is not counted."""
WORKLOADS |= STEPS


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def shown(value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def print_section(name: str, section: Section) -> None:
    print(f"\n{name}")
    if section.rows:
        columns = list(section.rows[0])
        cells = [columns, *([shown(row[column]) for column in columns] for row in section.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        for line in cells:
            print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    for note in section.notes:
        print(f"  {note}")
    for check in section.checks:
        verdict = "held  " if check["held"] else "MISSED"
        print(f"  {verdict} {check['name']}: {shown(check['value'])} (at most {shown(check['at_most'])})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of the kernels on this machine.")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, one round: shows that it runs, measures nothing"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "bench.json", help="JSON file to write (%(default)s)")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_memory:
        measure_memory(arguments.measure_memory.split(","), arguments.length)
        return
    names = arguments.sections.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}; known: {', '.join(SECTIONS)}")

    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/bench.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "quick": arguments.quick,
        "sections": {},
    }
    print(
        f"{report['cpu']}, {report['threads']} threads, torch {report['torch']}, "
        f"load {report['load_average_at_start']:.1f}"
    )
    start = time.perf_counter()
    for name in names:
        section = SECTIONS[name](arguments.quick)
        report["sections"][name] = asdict(section)
        print_section(name, section)
    report["seconds"] = round(time.perf_counter() - start, 1)
    report["load_average_at_end"] = os.getloadavg()[0]
    checks = [check for section in report["sections"].values() for check in section["checks"]]
    print(f"\n{sum(check['held'] for check in checks)} of {len(checks)} bounds held; {report['seconds']:.0f} s")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()

"""The CUDA kernels on a GPU, correctness first, then times: `make bench-gpu`, under eight minutes.

    python benchmarks/bench_gpu.py [--out FILE.json] [--budget-s 480] [--even-if-wrong]
    python benchmarks/bench_gpu.py --quick            # tiny sizes: shows that it runs, measures nothing
    python benchmarks/bench_gpu.py --device cpu       # a few correctness cases through the emulation; no GPU needed
    python benchmarks/gpu_report.py FILE.json         # tables and plots from what a run wrote

In this order, as long as time is left: the kernels against float64 (gpu_problems.py) beside compute-sanitizer
(gpu_sanitizer.py); the GPU's ceilings; forward, backward and both at 4k and 32k tokens, each way to do it
(gpu_methods.py); decoding (gpu_decoding.py); the other lengths; a plot, where there is matplotlib. Where a result is
off, exit code 1 and no times: times of a wrong kernel mean nothing. A sanitizer without a verdict is exit code 1 too,
with times. The JSON is written again after every shape, with what failed, what was skipped and
what was left out for want of time.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  before all that imports hedgehog
import gpu_circumstances
import gpu_decoding
import gpu_methods
import gpu_problems
import gpu_sanitizer
import torch
from gpu_decoding import Token
from gpu_environment import environment
from gpu_methods import Cell
from gpu_problems import Case
from gpu_report import plot_beside, tables
from gpu_timing import Budget, CudaMeter, Forecast, HostMeter, attempt, free_memory, measure_ceilings
from gpu_work import PASSES, Ceilings

from hedgehog.kernels.cuda.attention import OLDEST_CAPABILITY, num_segments
from hedgehog.kernels.cuda.backward_choice import SWITCH
from hedgehog.kernels.cuda.build import BuildError
from hedgehog.kernels.cuda.gradients import backward_obstacle, whole_obstacle
from hedgehog.kernels.cuda.library import KernelError, library_for
from hedgehog.kernels.cuda.switches import switched

HERE = Path(__file__).resolve()
RESULTS = HERE.parent / "results"
RESERVE_S = 40.0
"""Nothing begins with less than this left: compiling a competitor's kernels, or softmax at 128k tokens, may take it."""


@dataclass(frozen=True)
class Sizes:
    """What is measured. `headline` lengths come first, with every method; `lengths` are the others."""

    heads: tuple[int, ...] = (32, 128)
    features: tuple[int, ...] = (256, 128)
    headline: tuple[int, ...] = (4096, 32768)
    lengths: tuple[int, ...] = (1024, 16384, 65536, 8192, 2048, 131072)
    head_dim: int = 128
    batches: tuple[int, ...] = (1, 4, 16, 64)
    positions: tuple[int, ...] = (1024, 8192, 32768)
    copy_bytes: int = 2**30
    matrix_size: int = 8192


QUICK = Sizes((2,), (128,), (70,), (40,), 64, (1, 2), (16,), 4096, 64)


class Run:
    """What is measured on and with, and the report, which is written again after every shape."""

    def __init__(self, device: torch.device, sizes: Sizes, budget: Budget, out: Path, quick: bool) -> None:
        self.device, self.sizes, self.budget, self.out, self.quick = device, sizes, budget, out, quick
        self.on_gpu = device.type == "cuda"
        self.ceilings = Ceilings(1.0, 1.0)
        self.meter: CudaMeter | None = None
        self._forecast = Forecast()
        self.report: dict[str, Any] = {
            **environment(device),
            "command": " ".join(sys.argv),
            "quick": quick,
            "correctness": {},
            "sanitizer": [],
            "ceilings": {},
            "fla": {},
            "times": [],
            "decoding": [],
            "left_out": [],
            "seconds": {},
        }

    def save(self, section: str) -> None:
        """Whole or not at all: a run that is cut off leaves what it had."""
        self.report["seconds"][section] = round(self.budget.spent_s(), 1)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.out.with_suffix(".part")
        unfinished.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.out)

    def may_begin(self, what: dict[str, Any], predicted_s: float = 0.0) -> bool:
        if self.budget.left_s() >= max(RESERVE_S, 1.2 * predicted_s):
            return True
        self.report["left_out"].append(what)
        return False

    def check(self, cases: list[Case]) -> None:
        """Correctness, with compute-sanitizer at work beside it."""
        sanitizers = gpu_sanitizer.start(HERE) if self.on_gpu else []
        try:
            self.report["correctness"] = self._correctness(cases)
        except BaseException:  # Ctrl-C too: they have a session of their own
            gpu_sanitizer.stop(sanitizers)
            raise
        self.report["sanitizer"] = gpu_sanitizer.collect(sanitizers) if self.on_gpu else []
        self.save("correctness")

    def _correctness(self, cases: list[Case]) -> dict[str, Any]:
        library, rows, skipped = library_for(self.device), [], []
        most_shared = None
        if self.on_gpu:
            most_shared = torch.cuda.get_device_properties(self.device).shared_memory_per_block_optin
        if self.on_gpu and not self.quick:
            maps = product(("hedgehog_softmax", "hedgehog_exp"), self.sizes.features)
            cases = [*cases, *(Case(128, features, name, gpu_problems.LONG) for name, features in maps)]

        def lacks(case: Case) -> str | None:
            needed = library.shared_bytes(case.head_dim, case.features, case.feature_map)
            too_many = most_shared is not None and needed > most_shared
            return f"a block needs {needed} bytes of shared memory" if too_many else None

        group = None
        for case in cases:
            if group != (group := (case.head_dim, case.features, case.feature_map)):
                print(f"head dim {case.head_dim}, F={case.features}, {case.feature_map}", flush=True)  # where it hangs
            if why := lacks(case):
                skipped.append({**asdict(case), "why": why})
                continue
            rows += self._checked(case)
        print("the same again, other streams, graphs, offsets beyond 2³¹, NaN", flush=True)
        small = self.quick or not self.on_gpu
        others = gpu_circumstances.check_all(self.device, small, lambda case: lacks(case) is None)
        skipped += [row for row in others if "skipped" in row]
        rows += others
        return {
            "limits": gpu_problems.LIMITS,
            "num_results": len(rows),
            "wrong": [row for row in rows if row["faults"]],
            "skipped": skipped,
            "worst": gpu_problems.worst([row for row in rows if "check" not in row]),
            "checks": dict(Counter(row["check"] for row in others)),
            "gradients_by": self._who_differentiates(cases),
        }

    def _who_differentiates(self, cases: list[Case]) -> dict[str, str]:
        """Which kernels, or PyTorch and why: times of a backward pass are of the one or the other."""

        def who(head_dim: int, features: int, name: str) -> str:
            if obstacle := backward_obstacle(self.device, features, head_dim, name):
                return obstacle
            in_slices = whole_obstacle(self.device, features, head_dim, name, False)
            return f"the kernels ({in_slices or 'which take the values whole'})"

        shapes = sorted({(case.head_dim, case.features, case.feature_map) for case in cases})
        return {f"head dim {shape[0]}, F={shape[1]}, {shape[2]}": who(*shape) for shape in shapes}

    def _checked(self, case: Case) -> list[dict[str, Any]]:
        try:
            if case.length == gpu_problems.LONG:
                return gpu_problems.check_long(case, self.device, (1, num_segments(self.device, 1, 2)))
            rows = gpu_problems.check(case, self.device)
            if self._taken_whole(case):
                with switched(SWITCH, "slices"):
                    rows += [{**row, "backward": "slices"} for row in gpu_problems.check(case, self.device)]
            return rows
        except Exception as error:  # a kernel that fails is a wrong one; the other cases tell where it is right
            return [{**asdict(case), "faults": [f"{type(error).__name__}: {error}"]}]

    def _taken_whole(self, case: Case) -> bool:
        """Whether there are two kinds of backward kernels for it, of which the other one is not chosen."""
        shape = case.features, case.head_dim, case.feature_map
        return whole_obstacle(self.device, *shape, gpu_problems.shares_key_heads(case)) is None

    def wrong(self) -> list[Any]:
        """Everything that is off, the times' own failures included."""
        found = [*self.report["correctness"]["wrong"]]
        found += [row for row in self.report["sanitizer"] if row["verdict"] == "errors"]
        for row in [*self.report["times"], *self.report["decoding"]]:
            if row["method"].startswith("kernel") and row.get("failed", "out of memory") != "out of memory":
                found.append(row)
        return found

    def unsettled(self) -> list[Any]:
        """Sanitizers that came to no verdict: nothing is wrong, and nothing is shown to be right."""
        return [row for row in self.report["sanitizer"] if row["verdict"] == "no verdict"]

    def correctness_line(self) -> str:
        """The summary of what was checked."""
        sanitizers = ", ".join(f"{row['tool']} {row['verdict'].upper()}" for row in self.report["sanitizer"])
        results = self.report["correctness"]["num_results"]
        return f"correctness: {results} results, {len(self.wrong())} wrong; sanitizer: {sanitizers or 'not run'}"

    def measure_ceilings(self) -> None:
        self.meter = CudaMeter(self.device) if self.on_gpu else HostMeter()
        self.ceilings = measure_ceilings(self.meter, self.sizes.copy_bytes, self.sizes.matrix_size)
        self.report["ceilings"] = asdict(self.ceilings)
        self.save("ceilings")

    def time_cell(self, cell: Cell, methods: list[str]) -> None:
        """Each method, forward and forward + backward, on the same inputs."""
        assert self.meter is not None
        sets: list[gpu_methods.Inputs] = []
        meter = self.meter
        # backward alone where the others are compared at length
        wanted = PASSES if cell.length in self.sizes.headline else ("forward", "forward+backward")
        for method, passes in product(methods, wanted):
            row: dict[str, Any] = {"method": method, "pass": passes, **asdict(cell)}
            key = method, passes, cell.heads, cell.features
            if not self.may_begin(row, self._forecast.seconds(key, cell.length)):
                continue
            began = time.monotonic()

            def one(method: str = method, passes: str = passes) -> dict[str, Any]:
                if not sets:
                    sets.extend(gpu_methods.make_sets(cell, self.device))
                return gpu_methods.measure(method, sets, passes, meter, self.ceilings)

            row |= attempt(one)
            self._forecast.note(key, cell.length, time.monotonic() - began)
            self.report["times"].append(row)
            show(row)
        del sets[:]
        free_memory()
        self.save("times")

    def time_decoding(self, token: Token, methods: list[str]) -> None:
        """Each method, as called and in a graph."""
        assert self.meter is not None
        meter = self.meter
        for method, in_graph in product(methods, (False, True)):
            row: dict[str, Any] = {"method": method, "graph": in_graph, **asdict(token)}
            if not self.may_begin(row):
                continue

            def one(method: str = method, in_graph: bool = in_graph) -> dict[str, Any]:
                return gpu_decoding.measure(method, token, in_graph, meter, self.ceilings)

            row |= attempt(one)
            self.report["decoding"].append(row)
            show(row)
        self.save("decoding")

    def compare_fla(self) -> None:
        cell = Cell(self.sizes.heads[0], self.sizes.headline[0], self.sizes.features[0], self.sizes.head_dim)
        self.report["fla"] = attempt(lambda: gpu_methods.fla_difference(self.device, cell))
        self.save("fla")

    def time_everything(self) -> None:
        """The most telling first. Compiling flash-linear-attention's kernels takes long, so it comes by itself."""
        ours = [name for name in gpu_methods.LINEAR if name != "fla"]
        for cell in self._linear_cells(self.sizes.headline):
            self.time_cell(cell, ours)
        for cell in self._softmax_cells(self.sizes.headline):
            self.time_cell(cell, list(gpu_methods.SOFTMAX))
        for token in self._tokens():
            methods = gpu_decoding.SOFTMAX if token.features is None else gpu_decoding.LINEAR
            self.time_decoding(token, [name for name in methods if name != "fla"])
        self.compare_fla()
        for cell in self._linear_cells(self.sizes.headline):
            self.time_cell(cell, ["fla"])
        for length in self.sizes.lengths:
            for cell in self._linear_cells((length,)):
                self.time_cell(cell, list(gpu_methods.LINEAR))
            for cell in self._softmax_cells((length,)):
                self.time_cell(cell, list(gpu_methods.SOFTMAX))
        for token in self._tokens():
            if token.features is not None:
                self.time_decoding(token, ["fla"])

    def _linear_cells(self, lengths: tuple[int, ...]) -> Iterator[Cell]:
        for length, heads, features in product(lengths, self.sizes.heads, self.sizes.features):
            yield Cell(heads, length, features, self.sizes.head_dim)

    def _softmax_cells(self, lengths: tuple[int, ...]) -> Iterator[Cell]:
        for length, heads in product(lengths, self.sizes.heads):
            yield Cell(heads, length, None, self.sizes.head_dim)

    def _tokens(self) -> Iterator[Token]:
        heads, head_dim = self.sizes.heads[0], self.sizes.head_dim
        for batch in self.sizes.batches:
            for features in self.sizes.features:
                yield Token(batch, features=features, heads=heads, head_dim=head_dim)
        for batch, positions in product(self.sizes.batches, self.sizes.positions):
            yield Token(batch, positions=positions, heads=heads, head_dim=head_dim)


def show(row: dict[str, Any]) -> None:
    """One line, as soon as it is there."""
    words = [f"{name} {value}" for name, value in row.items() if isinstance(value, (str, int)) and name != "rounds"]
    if "seconds" in row:
        words += [f"{1000 * row['seconds']:.4g} ms", f"{row['fraction_of_limit']:.1%} of the limit"]
    print("  ".join(words), flush=True)


def obstacle(device: torch.device) -> str | None:
    """Why nothing can run, or None; builds the kernels."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device: --device cpu runs a few correctness cases through the emulation"
        capability = torch.cuda.get_device_capability()
        if capability < OLDEST_CAPABILITY:
            return f"the kernels need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    print("building the kernels, unless they are there ...", flush=True)
    try:
        library_for(device)
    except (BuildError, KernelError, OSError) as error:
        return str(error)
    return None


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a result is off or nothing can run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="JSON to write; by default results/bench_gpu_DEVICE.json beside this")
    parser.add_argument("--budget-s", type=float, default=480.0, help=f"nothing begins in the last {RESERVE_S:.0f} s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes of everything: shows that it runs")
    parser.add_argument("--even-if-wrong", action="store_true", help="times of kernels that are wrong, too")
    parser.add_argument("--only-correctness", action="store_true", help="no times")
    parser.add_argument("--commit", help="for the report, where the files lie without their repository")
    parser.add_argument("--sanitizer-target", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    budget = Budget(chosen.budget_s)
    device = torch.device(chosen.device)
    why = obstacle(device)
    if why:
        print(why, file=sys.stderr)
        return 1
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if chosen.sanitizer_target:
        gpu_sanitizer.run_target(device)
        return 0
    out = chosen.out or RESULTS / f"bench_gpu_{chosen.device}.json"
    run = Run(device, QUICK if chosen.quick else Sizes(), budget, out, chosen.quick)
    run.report["commit"] = chosen.commit or run.report["commit"]
    run.save("build")
    few = gpu_problems.few_cases()
    run.check(few[:1] if chosen.quick else few if device.type == "cpu" else gpu_problems.all_cases())
    wrong = run.wrong()
    print(f"{run.correctness_line()} ({budget.spent_s():.0f} of {budget.limit_s:.0f} s)", flush=True)
    timed = (device.type == "cuda" or chosen.quick) and not chosen.only_correctness
    if timed and (chosen.even_if_wrong or not wrong):
        run.measure_ceilings()
        run.time_everything()
        print(tables(run.report))
        print(plot_beside(run.report, out))
        print(run.correctness_line())
    for row in run.wrong():
        print(f"WRONG {row}", file=sys.stderr)
    for row in run.unsettled():
        print(f"NO VERDICT {row}", file=sys.stderr)
    print(f"written to {out}; {len(run.report['left_out'])} measurements left out for want of time")
    return 1 if run.wrong() or run.unsettled() else 0


if __name__ == "__main__":
    sys.exit(main())

"""What distill's array gains over one job: each element alone on one core, so the longest is the array's time.

    python benchmarks/slurm_array.py CONFIG [section.key=value …] [--groups 1,2,4] [--out FILE.json]

    python benchmarks/slurm_array.py configs/tiny.yaml tiny.num_layers=8 tiny.pretrain_steps=50 distill.max_steps=60

Prepares the run in a temporary folder, distills it in one job, then in the groups of layers that `hedgehog submit`
would choose for each number of elements, one after the other, so that a machine with one free core measures an array.
Predicted is what `submit --dry-run` would say; measured is each job's CPU time, with its start and without.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hedgehog.pipeline.base_folder import known_shape
from hedgehog.pipeline.config_loading import load_config
from hedgehog.pipeline.manifest import read_manifest
from hedgehog.pipeline.slurm.layer_groups import balanced_groups, distill_cost, layers_text

RESULTS = Path(__file__).parent / "results"


def hedgehog(stage: str, config: str, overrides: list[str]) -> float:
    """Run one stage on one core; the seconds of CPU it took, start included. Other work does not count in them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "hedgehog.pipeline.cli", stage, config, *overrides, "engine.cpu_threads=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(config_file: str, overrides: list[str], group_counts: list[int]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        overrides = [*overrides, f"output_dir={scratch}"]
        config = load_config(config_file, overrides)
        run = Path(scratch) / config.name
        hedgehog("prepare", config_file, overrides)
        shape = known_shape(config)
        prepared = read_manifest(run / "prepare")
        assert shape is not None and prepared is not None
        train = prepared.summary["splits"]["train"]
        cost = distill_cost(config, shape, train["tokens"] / train["used"])
        everything = cost.of(range(shape.num_layers))
        # one step, thrown away, is what starting a job costs
        start_s = hedgehog("distill", config_file, [*overrides, "distill.max_steps=1"])
        (run / "distill").rename(Path(scratch) / "start")
        rows = []
        for count in group_counts:
            elements = []
            for group in balanced_groups(range(shape.num_layers), count, cost):
                layers = layers_text(group)
                whole = len(group) == shape.num_layers
                cpu_s = hedgehog("distill", config_file, [*overrides, *([] if whole else [f"distill.layers={layers}"])])
                folder = run / "distill" if whole else run / "distill" / f"layers-{layers}"
                share = cost.of(group) / everything
                elements.append({"layers": layers, "predicted": round(share, 3), "cpu_s": round(cpu_s, 2)})
                # the next count's groups are measured from the beginning
                folder.rename(Path(scratch) / f"{count}-{layers}")
            rows.append({"elements": elements, "asked": count})
    return {"rows": rows, "trained_layer_cost": cost.own / cost.forward, "start_cpu_s": start_s}


def describe(result: dict[str, Any]) -> None:
    print(
        "| elements | layers | share of one job | job, CPU s | speed-up: predicted | whole jobs | without their start |"
    )
    print("|--:|:--|:--|:--|--:|--:|--:|")
    start_s = result["start_cpu_s"]
    one = result["rows"][0]["elements"][0]
    for row in result["rows"]:
        elements = row["elements"]
        predicted, cpu_s = (max(element[key] for element in elements) for key in ("predicted", "cpu_s"))
        cells = [" ".join(str(element["layers"]) for element in elements)]
        cells.append(", ".join(f"{element['predicted']:.0%}" for element in elements))
        cells.append(", ".join(f"{element['cpu_s']:.1f}" for element in elements))
        gains = 1 / predicted, one["cpu_s"] / cpu_s, (one["cpu_s"] - start_s) / (cpu_s - start_s)
        cells += [f"{gain:.2f}×" for gain in gains]
        print(f"| {len(elements)} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--groups", default="1,2,4", help="numbers of elements to try, the first of them 1")
    parser.add_argument("--out", type=Path, default=RESULTS / "slurm_array.json")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.groups.split(",")]
    if counts[0] != 1:
        parser.error("--groups begins with 1: the speed-up is over one job")
    result = measure(arguments.config, arguments.overrides, counts)
    result |= {"command": " ".join(sys.argv), "python": platform.python_version(), "load": os.getloadavg()}
    describe(result)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()

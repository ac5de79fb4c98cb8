"""What distill.cache_hidden_states saves: the same subset of layers trained without it and with it, on one core.

    python benchmarks/hidden_state_cache.py CONFIG [section.key=value …] [--rounds 3]

    python benchmarks/hidden_state_cache.py configs/tiny.yaml tiny.num_layers=8 tiny.pretrain_steps=20 \
        tiny.num_train_dialogues=400 distill.layers=6-7 distill.epochs=3 distill.max_steps=null

Prepares the run in a temporary folder, then distills by turns; of several rounds the fastest counts. Losses are
compared on the way.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

from slurm_array import hedgehog

from hedgehog.pipeline.config_loading import load_config
from hedgehog.pipeline.run_folder import RunFolder


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_intermixed_args()
    best: dict[str, tuple[float, float]] = {}
    seen: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        overrides = [*arguments.overrides, f"output_dir={scratch}"]
        config = load_config(arguments.config, overrides)
        folder = RunFolder.of(config).stage("distill", layers=config.distill.layers)
        hedgehog("prepare", arguments.config, overrides)
        for _ in range(arguments.rounds):
            for cached in ("false", "true"):
                cpu_s = hedgehog("distill", arguments.config, [*overrides, f"distill.cache_hidden_states={cached}"])
                steps = records(folder)
                # the first step warms up, the last one validates
                figures = (sum(step["step_s"] for step in steps[1:-1]), cpu_s)
                best[cached] = min(best.get(cached, figures), figures)
                seen[cached] = [step["loss_nats"] for step in steps]
                shutil.rmtree(folder)
    worst = max(abs(one / other - 1) for one, other in zip(seen["true"], seen["false"], strict=True))
    print(f"layers {config.distill.layers}, {len(seen['true'])} steps; losses differ by {worst:.1e} at most")
    print("| cache_hidden_states | steps, s | CPU time of the job, s |\n|:--|--:|--:|")
    for cached, (steps_s, cpu_s) in best.items():
        print(f"| {cached} | {steps_s:.1f} | {cpu_s:.1f} |")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()

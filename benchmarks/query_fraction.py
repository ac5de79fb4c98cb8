"""What `distill.query_fraction` saves of the loss's time, and what it does to the gradient.

    python benchmarks/query_fraction.py [--lengths 512,2048,4096] [--out FILE.json]

One layer of dialogue-llama-20m's shape (6 heads of 64, 256 projected features), random q and k, one thread. Each
fraction is drawn at eight evenly spread places: their mean gradient is to be that of all rows (the sample is unbiased),
and the mean distance of a single draw from it is the noise that a step gets. Times are CPU time.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hedgehog.kernels.distill_loss import attention_distillation_loss
from hedgehog.kernels.feature_maps import make_feature_map
from hedgehog.kernels.map_training import sampled_row_weights

HEADS, HEAD_DIM, FEATURE_DIM = 6, 64, 256
FRACTIONS = (1.0, 0.5, 0.25, 0.125)
PLACES = 8
RESULTS = Path(__file__).parent / "results"


def measure(length: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    q, k = (torch.randn(1, HEADS, length, HEAD_DIM) for _ in range(2))
    shape = {"num_heads": HEADS, "head_dim": HEAD_DIM, "feature_dim": FEATURE_DIM}
    map_q, map_k = (
        make_feature_map("hedgehog_exp", side="query", **shape),
        make_feature_map("hedgehog_exp", side="key", **shape),
    )
    weights = [*map_q.parameters(), *map_k.parameters()]
    mask = torch.ones(1, length, dtype=torch.bool)

    def step(row_weights: Tensor | None) -> tuple[float, Tensor]:
        started = time.process_time()
        loss = attention_distillation_loss(q, k, map_q, map_k, row_weights_BL=row_weights).loss
        grads = torch.autograd.grad(loss, weights)
        return time.process_time() - started, torch.cat([grad.flatten() for grad in grads])

    step(None)  # warm
    rows = []
    whole: Tensor | None = None
    whole_s = 0.0
    for fraction in FRACTIONS:
        block = 64 if length < 1024 else 128  # as pipeline/distillation.py has it
        draws = [
            step(None if fraction == 1 else sampled_row_weights(mask, fraction, block, (i + 0.5) / PLACES))
            for i in range(PLACES)
        ]
        seconds = statistics.median(s for s, _ in draws)
        grads = torch.stack([grad for _, grad in draws])
        if whole is None:
            whole, whole_s = grads[0], seconds
        size = whole.norm()
        rows.append(
            {
                "length": length,
                "fraction": fraction,
                "cpu_ms": 1e3 * seconds,
                "speed_up": whole_s / seconds,
                "bias": float((grads.mean(dim=0) - whole).norm() / size),
                "noise": float((grads - whole).norm(dim=1).mean() / size),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,2048,4096")
    parser.add_argument("--out", type=Path, default=RESULTS / "query_fraction.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for length in arguments.lengths.split(",") for row in measure(int(length))]
    print("| tokens | fraction | CPU ms | speed-up | mean of the draws, off by | one draw, off by |")
    print("|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        print("| {length} | {fraction} | {cpu_ms:.0f} | {speed_up:.2f}× | {bias:.0e} | {noise:.0%} |".format(**row))
    report = {"command": " ".join(sys.argv), "torch": torch.__version__, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()

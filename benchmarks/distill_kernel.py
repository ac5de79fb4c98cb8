"""The Triton kernel of the distillation loss on a GPU: first whether it is right, then how fast.

    python benchmarks/distill_kernel.py [--check | --no-check] [--lengths 1024,4096,…] [--budget-s 150] [--out FILE]

Right: within 1e-2 of the float64 PyTorch form (gradients), over tails, padding, packing, grouped and sampled queries,
several blocks of keys (9000 tokens), and the same bits when run again. Fast: loss and gradient of one layer of Llama-2
7B (32 heads of 128, F = 256, bfloat16), median of several runs, against the PyTorch forms where they fit (the
materialised one with products in float32, TF32 and bfloat16), and as a share of the arithmetic of one pass over the
tiles, (d + 3F)·T FLOP a token and head. With --check only the first. Exit code 1 where something is wrong, or where
another form than the kernel was chosen and --allow-fallback is not given. The JSON is written again after each row.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  before all that imports hedgehog
import torch
from gpu_environment import environment
from gpu_timing import Budget, Forecast
from matrix_products import products_in

from hedgehog.kernels.distill_backends import select_distill_backend
from hedgehog.kernels.distill_loss import attention_distillation_loss, materialised_distillation_loss
from hedgehog.kernels.feature_maps import FeatureMap, make_feature_map
from hedgehog.kernels.map_training import sampled_row_weights
from hedgehog.kernels.softmax_attention import causal_softmax_attention

HEADS, HEAD_DIM = 32, 128
MAX_GRADIENT_ERROR, MAX_LOSS_ERROR = 1e-2, 1e-3


def make_maps(name: str, heads: int, head_dim: int) -> list[FeatureMap]:
    maps = [make_feature_map(name, num_heads=heads, head_dim=head_dim, side=side) for side in ("query", "key")]
    generator = torch.Generator().manual_seed(1)
    for feature_map in maps:
        for weight in feature_map.parameters():
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return [feature_map.cuda() for feature_map in maps]


def make_inputs(batch: int, heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype) -> list[Any]:
    generator = torch.Generator("cuda").manual_seed(length)
    shapes = [(batch, length, number, head_dim) for number in (heads, kv_heads)]
    return [torch.randn(s, generator=generator, device="cuda").to(dtype).transpose(1, 2) for s in shapes]


def gradients(
    loss: Callable[..., Any], q: Any, k: Any, maps: list[FeatureMap], **options: Any
) -> tuple[Any, list[Any]]:
    result = loss(q, k, *maps, **options)
    return result, list(torch.autograd.grad(result.loss, [p for m in maps for p in m.parameters()]))


def check_case(
    name: str,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    packed: bool,
    dtype: torch.dtype,
    query_fraction: float = 1.0,
) -> Any:
    """One row of the report: errors against float64, and whether a second run gives the same bits."""
    batch = 2
    q, k = make_inputs(batch, heads, kv_heads, length, head_dim, dtype)
    maps = make_maps(name, heads, head_dim)
    mask = torch.ones(batch, length, dtype=torch.bool, device="cuda")
    mask[0, : length // 3] = False
    mask[1, length - length // 4 :] = False
    segments = (torch.arange(length, device="cuda") // 100).expand(batch, -1) if packed else None
    options = {"mask_BL": mask, "segment_ids_BL": segments}
    if query_fraction < 1:
        options["row_weights_BL"] = sampled_row_weights(mask, query_fraction, 128, 0.3)
    chosen = select_distill_backend("auto", *maps, device="cuda", dtype=dtype)
    assert chosen.name == "triton", chosen.reason
    result, grads = gradients(chosen.loss, q, k, maps, **options)
    again, grads_again = gradients(chosen.loss, q, k, maps, **options)
    exact, exact_grads = gradients(attention_distillation_loss, q.double(), k.double(), maps, **options)
    found = [(result, grads)]
    handed_out = None if packed else teachers_log_sum_exp(q, k, mask)
    if handed_out is not None:
        found.append(gradients(chosen.loss, q, k, maps, log_sum_exp_BHL=handed_out, **options))
    loss_errors = [abs(float(result.loss.detach() / exact.loss.detach()) - 1) for result, _ in found]
    errors = [
        float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
        for _, grads in found
        for a, b in zip(grads, exact_grads, strict=True)
    ]
    row = {
        "map": name,
        "tokens": length,
        "heads": f"{heads}/{kv_heads} of {head_dim}",
        "packed": packed,
        "query_fraction": query_fraction,
        "dtype": str(dtype).removeprefix("torch."),
        "log_sum_handed_out": handed_out is not None,
        "loss_error": max(loss_errors) if length > 1 else 0.0,
        "gradient_error": max(errors) if length > 2 else 0.0,
        "same_bits": torch.equal(result.kl_H, again.kl_H) and all(map(torch.equal, grads, grads_again)),
    }
    row["right"] = (
        row["loss_error"] <= MAX_LOSS_ERROR and row["gradient_error"] <= MAX_GRADIENT_ERROR and row["same_bits"]
    )
    return row


def teachers_log_sum_exp(q_BHLD: torch.Tensor, k_BKLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor | None:
    """As the teacher's attention hands it out, each row's real tokens alone; None where torch keeps it to itself."""
    total = q_BHLD.new_zeros(q_BHLD.shape[:3], dtype=torch.float32)
    for row, real in enumerate(mask_BL):
        places = real.nonzero().flatten()
        here = (slice(row, row + 1), slice(None), slice(int(places[0]), int(places[-1]) + 1))
        _, part = causal_softmax_attention(q_BHLD[here], k_BKLD[here], k_BKLD[here], q_BHLD.shape[-1] ** -0.5)
        if part is None:
            return None
        total[here] = part
    return total


def check() -> Iterator[dict[str, Any]]:
    llama: dict[str, Any] = dict(heads=4, kv_heads=4, head_dim=128, packed=False, dtype=torch.bfloat16)
    cases: list[dict[str, Any]] = []
    cases += [dict(llama, name="hedgehog_softmax", length=length) for length in (1, 63, 64, 65, 300, 2048, 9000)]
    cases += [dict(llama, name=name, length=500) for name in ("hedgehog_exp", "hedgehog_joint")]
    cases += [dict(llama, name="hedgehog_softmax", length=777, packed=True, kv_heads=1)]
    cases += [dict(llama, name="hedgehog_softmax", length=500, head_dim=64, dtype=torch.float16)]
    cases += [dict(llama, name="hedgehog_softmax", length=3000, query_fraction=0.25)]
    for case in cases:
        yield check_case(**case)


def median_ms(task: Callable[[], Any], runs: int = 5) -> float:
    task()
    times = []
    for _ in range(runs):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        task()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


MATERIALISED = ("float32", "tf32", "bfloat16")
"""How the materialised baseline multiplies matrices."""


def measure(length: int, budget: Budget, forecast: Forecast, name: str = "hedgehog_softmax") -> dict[str, Any]:
    """Times and peak memory at one length, batch 1; None where a form does not fit, no entry where time is short."""
    q, k = make_inputs(1, HEADS, HEADS, length, HEAD_DIM, torch.bfloat16)
    maps = make_maps(name, HEADS, HEAD_DIM)
    chosen = select_distill_backend("auto", *maps, device="cuda", dtype=q.dtype)
    forms = {"chosen": (chosen.loss, "float32"), "torch": (attention_distillation_loss, "float32")}
    forms |= {f"materialised_{kind}": (materialised_distillation_loss, kind) for kind in MATERIALISED}
    flop = (HEAD_DIM + 3 * maps[0].num_features) * length * length * HEADS
    row: dict[str, Any] = {"tokens": length, "backend": chosen.name, "reason": chosen.reason}
    for form, (loss, products) in forms.items():
        if forecast.seconds(form, length) > budget.left_s():
            row.setdefault("left_out", []).append(form)
            continue
        began = time.monotonic()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            with products_in(products):
                row[f"{form}_ms"] = median_ms(lambda loss=loss: gradients(loss, q, k, maps))
            row[f"{form}_peak_MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        except torch.cuda.OutOfMemoryError:
            row |= {f"{form}_ms": None, f"{form}_peak_MB": None}
        forecast.note(form, length, time.monotonic() - began)
    if row.get("chosen_ms"):
        row["one_pass_tflop_per_s"] = flop / row["chosen_ms"] / 1e9
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="The distillation loss's Triton kernel on this GPU.")
    parser.add_argument("--check", action="store_true", help="only whether it is right")
    parser.add_argument("--no-check", action="store_true", help="only how fast")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768,65536")
    parser.add_argument("--budget-s", type=float, default=150.0, help="what would end later is left out")
    parser.add_argument("--allow-fallback", action="store_true", help="times of PyTorch in the kernel's place, too")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device")
    budget, forecast = Budget(arguments.budget_s), Forecast()
    device = torch.device("cuda", torch.cuda.current_device())
    report: dict[str, Any] = {**environment(device), "command": " ".join(sys.argv), "checks": [], "times": []}

    def keep(section: str, row: dict[str, Any]) -> None:
        report[section].append(row)
        print(row, flush=True)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    if not arguments.no_check:
        for row in check():
            keep("checks", row)
            if budget.left_s() < 0:
                report["left_out"] = "checks after the last one above: no time was left"
                break
    wrong = [row for row in report["checks"] if not row["right"]]
    lengths = [] if arguments.check or wrong else [int(length) for length in arguments.lengths.split(",")]
    fell_back = False
    for length in lengths:
        if budget.left_s() < 0:
            break
        keep("times", measure(length, budget, forecast))
        fell_back = report["times"][-1]["backend"] != "triton"
        if fell_back and not arguments.allow_fallback:
            print(f"not the kernel: {report['times'][-1]['reason']}", file=sys.stderr)
            break
    print(f"{len(report['checks'])} checks, {len(wrong)} wrong; {budget.spent_s():.0f} of {budget.limit_s:.0f} s")
    sys.exit(1 if wrong or (fell_back and not arguments.allow_fallback) else 0)


if __name__ == "__main__":
    main()

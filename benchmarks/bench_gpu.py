"""The CUDA kernels on a GPU, correctness first, then times: `make bench-gpu`.

    python benchmarks/bench_gpu.py [--out FILE.json] [--max-tokens 131072]
    python benchmarks/bench_gpu.py --device cpu       # the correctness part alone, through the emulation; no GPU needed

Stops with exit code 1 where a result is off: times of a wrong kernel mean nothing. Times are medians of CUDA events
over inputs that take turns, so that a call does not find its own in the cache. Ceilings (bytes/s of a large copy,
FLOP/s of a large bf16 matrix product) are measured in the same run, and every figure is given as a fraction of the
limit that they set. Everything goes into one JSON with the GPU's name, versions and the commit.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hedgehog.kernels.cuda.attention import num_segments, num_splits, why_not
from hedgehog.kernels.cuda.operators import linear_attention, linear_attention_token
from hedgehog.kernels.feature_maps import make_feature_map
from hedgehog.kernels.linear_attention import chunked_linear_attention, quadratic_linear_attention

EPS = 1e-30
RMS_LIMIT = 2e-3
CHUNK = 64
FEATURE_MAP = "hedgehog_softmax"
RESULTS = Path(__file__).parent / "results"


class Inputs:
    """Random q, k, v (bf16, as a model strides them) and weights for one call; B·H heads, one row."""

    def __init__(self, length: int, features: int, heads: int, device: torch.device, head_dim: int = 128) -> None:
        def tokens() -> Tensor:
            x = torch.randn(1, length, heads, head_dim, device=device, dtype=torch.bfloat16)
            return x.transpose(1, 2)

        self.q, self.k, self.v = tokens(), tokens(), tokens()
        shape = heads, head_dim, features // 2
        weights = [torch.randn(shape, device=device) / head_dim**0.5 for _ in range(2)]
        self.weights = [weight.bfloat16().float() for weight in weights]
        self.features, self.heads, self.head_dim, self.length, self.device = features, heads, head_dim, length, device

    def kernel(self, segments: int | None = None, return_state: bool = False) -> tuple[Tensor, ...]:
        """(o, d, S, z) by the kernel; as many segments as fill the GPU unless told."""
        if segments is None:
            segments = num_segments(self.device, 1, self.heads)
        nothing = None, None, None, None
        return linear_attention(
            self.q, self.k, self.v, *self.weights, *nothing, FEATURE_MAP, EPS, segments, return_state
        )

    def phi(self, dtype: torch.dtype) -> list[Tensor]:
        """φ(q), φ(k)."""
        return [
            make_feature_map(FEATURE_MAP, num_heads=1, head_dim=1, side=side).features(x.to(dtype), w.to(dtype))
            for side, x, w in (("query", self.q, self.weights[0]), ("key", self.k, self.weights[1]))
        ]

    def chunked(self) -> Tensor:
        """The PyTorch form, φ included."""
        phi_q, phi_k = (phi.bfloat16() for phi in self.phi(torch.float32))
        return chunked_linear_attention(phi_q, phi_k, self.v, eps=EPS)[0]

    def softmax(self) -> Tensor:
        """What it replaces: torch's SDPA, whichever backend torch takes."""
        return F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True)


def rms(x: Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


def correctness(device: torch.device) -> list[dict[str, Any]]:
    """RMS error of o against the quadratic form in float64, and of decoding against the last row of it."""
    rows = []
    for head_dim in (64, 128):
        for features in (128, 256):
            for length, segments in ((1, 1), (64, 1), (65, 1), (130, 1), (290, 4)):
                torch.manual_seed(length)
                inputs = Inputs(length, features, 2, device, head_dim)
                expected = quadratic_linear_attention(*inputs.phi(torch.float64), inputs.v.double(), eps=EPS)
                error = rms(inputs.kernel(segments)[0] - expected)
                row: dict[str, Any] = {
                    "head_dim": head_dim,
                    "features": features,
                    "length": length,
                    "segments": segments,
                }
                if length > 1:
                    *_, kv_state, k_sum = prefix_state(inputs)
                    last = [x[:, :, -1:] for x in (inputs.q, inputs.k, inputs.v)]
                    out = linear_attention_token(
                        *last, *inputs.weights, None, kv_state, k_sum, FEATURE_MAP, EPS, num_splits(device, 1, 2)
                    )
                    row["decoding_rms_error"] = rms(out - expected[:, :, -1:])
                rows.append({**row, "rms_error": error})
    return rows


def prefix_state(inputs: Inputs) -> tuple[Tensor, ...]:
    """The kernel's results for all tokens but the last."""
    before = [x[:, :, :-1] for x in (inputs.q, inputs.k, inputs.v)]
    return linear_attention(*before, *inputs.weights, None, None, None, None, FEATURE_MAP, EPS, 1, True)


def median_seconds(calls: list[Callable[[], Any]], rounds: int = 20) -> float:
    """Median over `rounds` of the calls in turn, each between two CUDA events, after a warm-up."""
    for call in calls:
        call()
    times = []
    for index in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        calls[index % len(calls)]()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return statistics.median(times)


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes a second of a large copy (read and write) and FLOP a second of a large bf16 product."""
    x = torch.empty(2**30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {
        "copy_bytes_per_s": 2 * x.numel() / median_seconds([lambda: y.copy_(x)]),
        "matmul_flop_per_s": 2 * 8192**3 / median_seconds([lambda: a @ b]),
    }


def forward_limit_s(inputs: Inputs, limits: dict[str, float]) -> float:
    """The longer of arithmetic and memory: φ of q and k, causal scores, A v, φ(q) S, S += φ(k)ᵀ v; q, k, v, o once."""
    d, f, c = inputs.head_dim, inputs.features, CHUNK
    flop = 2 * (2 * d * (f // 2)) + c * f + c * d + 2 * (2 * f * d)
    num_bytes = 4 * 2 * d + 4
    tokens = inputs.length * inputs.heads
    return tokens * max(flop / limits["matmul_flop_per_s"], num_bytes / limits["copy_bytes_per_s"])


def forward_times(device: torch.device, limits: dict[str, float], max_tokens: int) -> list[dict[str, Any]]:
    """Forward, B·H 32 and 128, beside PyTorch's chunked form and softmax; seconds, None where it was not run."""
    rows = []
    for heads in (32, 128):
        for features in (128, 256):
            length = 1024
            while length <= max_tokens and length * heads <= 2**23:
                inputs = [Inputs(length, features, heads, device) for _ in range(2)]
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                inputs[0].kernel()
                row: dict[str, Any] = {"heads": heads, "features": features, "length": length}
                row["peak_bytes_with_outputs"] = torch.cuda.max_memory_allocated() - before
                row["kernel_s"] = median_seconds([x.kernel for x in inputs])
                row["one_segment_s"] = median_seconds([lambda x=x: x.kernel(1) for x in inputs])
                row["limit_s"] = forward_limit_s(inputs[0], limits)
                row["fraction_of_limit"] = row["limit_s"] / row["kernel_s"]
                row["softmax_s"] = median_seconds([x.softmax for x in inputs], 10) if length <= 32768 else None
                row["pytorch_s"] = median_seconds([inputs[0].chunked], 3) if length <= 4096 else None
                rows.append(row)
                print(json.dumps(row), flush=True)
                length *= 2
    return rows


def decoding_call(batch: int, features: int, splits: int, device: torch.device) -> Callable[[], Tensor]:
    """One token for 32 heads of 128 on a state of its own."""
    x = [torch.randn(batch, 32, 1, 128, device=device, dtype=torch.bfloat16) for _ in range(3)]
    weights = [torch.randn(32, 128, features // 2, device=device, dtype=torch.bfloat16) for _ in range(2)]
    state = torch.rand(batch, 32, features, 128, device=device), torch.rand(batch, 32, features, device=device)
    return lambda: linear_attention_token(*x, *weights, None, *state, FEATURE_MAP, EPS, splits)


def decoding_times(device: torch.device, limits: dict[str, float]) -> list[dict[str, Any]]:
    """One token, 32 heads of 128, batches of 1 to 64: the state is read and written once."""
    rows = []
    for features in (128, 256):
        for batch in (1, 4, 16, 64):
            splits = num_splits(device, batch, 32)
            calls = [decoding_call(batch, features, splits, device) for _ in range(4)]
            row: dict[str, Any] = {"batch": batch, "features": features, "splits": splits}
            row["kernel_s"] = median_seconds(calls, 40)
            row["limit_s"] = 2 * 4 * batch * 32 * features * 129 / limits["copy_bytes_per_s"]
            row["fraction_of_limit"] = row["limit_s"] / row["kernel_s"]
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def commit() -> str | None:
    """The commit of the working tree this file lies in."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def main() -> int:
    """Correctness; on a GPU then the times. Returns 1 if a result is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--max-tokens", type=int, default=131072)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu runs the correctness part through the emulation", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device()) if arguments.device == "cuda" else torch.device("cpu")
    obstacle = why_not(device, torch.bfloat16, 256, 128)
    if obstacle:
        print(f"the kernels cannot serve this device: {obstacle}", file=sys.stderr)
        return 1
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "emulation",
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()},
        "commit": commit(),
        "correctness": correctness(device),
    }
    wrong = [
        row
        for row in report["correctness"]
        if not (row["rms_error"] <= RMS_LIMIT and row.get("decoding_rms_error", 0) <= RMS_LIMIT)
    ]
    print(f"correctness: {len(report['correctness'])} cases, {len(wrong)} wrong")
    if device.type == "cuda" and not wrong:
        report["ceilings"] = ceilings(device)
        report["forward"] = forward_times(device, report["ceilings"], arguments.max_tokens)
        report["decoding"] = decoding_times(device, report["ceilings"])
    out = arguments.out or RESULTS / f"bench_gpu_{arguments.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for row in wrong:
        print(f"WRONG {row}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""`run_benchmarks.py FOLDER`: what `make bench-all` does on a GPU, at sizes that a CPU can do, in this process.

A mistake found here does not cost the first minutes on a GPU. What it measures means nothing.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import bench_7b
import bench_gpu
import distill_kernel
import gpu_sanitizer
import gpu_timing

from hedgehog.pipeline.llama.shape import LlamaShape

folder = Path(sys.argv[1])

# the CUDA kernels: correctness, ceilings, every method, decoding as called and in a CUDA graph
meter = gpu_timing.CudaMeter
bench_gpu.CudaMeter = lambda device: meter(device, flush_bytes=4096, settle_bytes=4096)
meter.max_rounds = 2
gpu_sanitizer.start = lambda script: []  # it starts processes that want a GPU
code = bench_gpu.main(["--device", "cuda", "--quick", "--out", str(folder / "bench_gpu.json")])
assert code == 0, f"bench_gpu: exit code {code}"

# the Triton kernel of the distillation loss: one case of those that `--check` looks at
row = distill_kernel.check_case("hedgehog_softmax", 70, 2, 1, 64, False, distill_kernel.torch.bfloat16)
assert row["right"] and row["same_bits"] and row["log_sum_handed_out"], row

# both stages and generation, the softmax model's beside them
bench_7b.LLAMA_7B = LlamaShape(128, 2, 2, 2, 64, 160, 500, 4096)
bench_7b.MATERIALISED = {"cuda": ("float32", "tf32", "bfloat16")}
bench_7b.Bench.measure_peak_flops = lambda bench: setattr(bench, "peak_flops_per_s", 1e12)
seconds = bench_7b.Bench.seconds


def once(bench: bench_7b.Bench, step, least_s: float = 1.0) -> float:
    bench.quick = True
    return seconds(bench, step, least_s)


bench_7b.Bench.seconds = once
generate = bench_7b.generate_rows
bench_7b.generate_rows = lambda bench, positions, batches, num_tokens: generate(bench, [16], [1, 2], 3)
sys.argv = ["bench_7b.py", "--lengths", "64", "--out", str(folder / "bench_7b.json")]
code = bench_7b.main()
assert code == 0, f"bench_7b: exit code {code}"

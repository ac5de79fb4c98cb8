"""Real steps of both training stages through bench_7b.py's GPU branch, at 7B's proportions, with kernels that do
nothing: what they allocate is what they would on a GPU. `measure_memory.py REPORT.json`
"""

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import bench_7b

from hedgehog.kernels import distill_backends, distill_triton
from hedgehog.kernels.cuda import attention, gradients, library
from hedgehog.pipeline.llama.shape import LlamaShape

HEADS, LENGTHS = 4, "2048"


class Nothing:
    """A Triton kernel whose launches do nothing."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: Any) -> Any:
        return lambda **_: None


class Kernels:
    """A module of them."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return Nothing(found) if hasattr(found, "arg_names") else found


distill_triton._tiles, distill_triton._maps = Kernels(distill_triton._tiles), Kernels(distill_triton._maps)
distill_triton.triton_distillation_loss = distill_triton.triton_distillation_loss.interpreted  # bfloat16 as it comes
library.Library.forward = library.Library.backward = lambda self, arguments: None
distill_backends.disagreement = attention.disagreement = gradients.gradient_disagreement = lambda *_: None

bench_7b.LLAMA_7B = LlamaShape(128 * HEADS, 3, HEADS, HEADS, 128, 344 * HEADS, 500, 4096)
bench_7b.MATERIALISED = {"cuda": ()}
bench_7b.Bench.measure_peak_flops = lambda bench: setattr(bench, "peak_flops_per_s", 1e12)
bench_7b.Bench.seconds = lambda bench, step, least_s=1.0: 1.0
sys.argv = ["bench_7b.py", "--lengths", LENGTHS, "--sections", "distill,finetune", "--out", sys.argv[1]]
sys.exit(bench_7b.main())

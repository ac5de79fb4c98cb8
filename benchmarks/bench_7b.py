"""Stage one, stage two and generation at Llama-2 7B's size, with random weights: `make bench-7b`.

    python benchmarks/bench_7b.py [--lengths 1024,4096] [--sections distill,finetune,generate] [--quick] [--out FILE]
    python benchmarks/bench_7b.py --add-estimates FILE    # to a report of a machine that has no pydantic

On a GPU the model is Llama-2 7B in bfloat16, made on the device. Without one it is as deep, 1/64 as wide and in
float32: that shows that it runs, and checks the memory estimate of `hedgehog validate` against what was allocated.

For every length, one row of that many tokens: real steps through the engine (DeepSpeed, torch's AdamW, no checkpoint
files; where DeepSpeed is not installed torch's AdamW alone, and the report says so), tokens per second, model FLOP
utilisation (useful FLOPs over what a large matrix product reaches in this run), peak allocated memory over the weights.
Stage one stands beside the teacher's forward pass alone, and beside the same step with materialised attention weights,
all layers kept until one backward, as long as that fits. Stage two stands beside the same step with softmax attention;
generation beside the softmax model's. Every row names the implementation that ran and why; on a GPU a fallback ends its
section and is exit code 1, unless --allow-fallback.

It needs torch, transformers and, for stage two, peft.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import checkout  # noqa: F401  before all that imports hedgehog
import torch
from generated_tokens import token_clock
from gpu_environment import version_of
from gpu_timing import Forecast
from matrix_products import products_in
from plot_7b import plot_beside
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hedgehog.kernels.distill_loss import materialised_distillation_loss
from hedgehog.pipeline.allocation_peak import allocation_peak
from hedgehog.pipeline.distillation import FeatureMapDistillation, Teacher
from hedgehog.pipeline.distributed import World
from hedgehog.pipeline.families import HUB_SHAPES
from hedgehog.pipeline.formatting import format_bytes
from hedgehog.pipeline.llama.shape import LlamaShape
from hedgehog.pipeline.modeling.convert import convert_base, feature_map_modules
from hedgehog.pipeline.slurm.layer_groups import distill_flops
from hedgehog.pipeline.summary_loss import SummaryLoss

if TYPE_CHECKING:
    from hedgehog.pipeline.config import RunConfig

RESULTS = Path(__file__).parent / "results"
LLAMA_7B = HUB_SHAPES["meta-llama/Llama-2-7b-hf"]
NARROW = LlamaShape(64, 32, 2, 2, 32, 172, 500, 4096)
"""Llama-2 7B at 1/64 of its width; two heads, so that a head is not narrower than a feature map can use."""
MATERIALISED_LIMIT = {"cuda": 1 << 20, "cpu": 2048}
"""On a GPU the materialised loss runs until memory ends; on a CPU it would only use up the time."""
MATERIALISED = {"cuda": ("float32", "tf32", "bfloat16"), "cpu": ("float32",)}
"""How the materialised loss multiplies matrices."""
SETTINGS = {
    "distill": {
        "gradient_clip": 1.0,
        "packing": False,
        "cross_entropy_weight": 1.0,
        "output_mse_weight": 0.0,
        "loss_eps": 1e-6,
        "query_block": 64,
        "query_fraction": 1.0,
    },
    "model": {"feature_map": "hedgehog_softmax", "feature_dim": None},
}
"""The defaults of RunConfig that the steps look at: without pydantic there is no RunConfig."""
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


class FellBack(Exception):
    """Something else than the kernels ran on a GPU."""


class Bench:
    """Sizes, device and clock of one run."""

    def __init__(
        self, shape: LlamaShape, device: torch.device, budget_s: float, *, gradient_checkpointing: bool = True
    ) -> None:
        self.shape = shape
        self.gradient_checkpointing = gradient_checkpointing
        self.quick = False
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.world = World(rank=0, world_size=1, local_rank=0, device=device)
        self.allow_fallback = True
        self.fell_back = False
        self._ends_at = time.monotonic() + budget_s
        self._forecast = Forecast()
        self.peak_flops_per_s = 0.0
        self.settings = SimpleNamespace(**{name: SimpleNamespace(**values) for name, values in SETTINGS.items()})

    def out_of_time(self, key: Any = None, length: int = 1) -> bool:
        """Whether a row of this length would end after the budget, judging by the one before."""
        return time.monotonic() + self._forecast.seconds(key, length) > self._ends_at

    @contextmanager
    def row(self, key: Any, length: int) -> Iterator[None]:
        """What it takes is kept for `out_of_time`."""
        began = time.monotonic()
        yield
        self._forecast.note(key, length, time.monotonic() - began)

    def refuse_fallback(self, backend: str) -> None:
        """`backend` is the line that model or loss gave when it chose."""
        kernels = backend.startswith(("distillation loss: triton", "linear attention: cuda", "softmax"))
        if self.device.type != "cuda" or (kernels and "outside" not in backend and "by PyTorch" not in backend):
            return
        self.fell_back = True
        if not self.allow_fallback:
            raise FellBack(backend)

    def config(self, length: int, attention: str = "linear", **evaluate: int | bool) -> RunConfig:
        from hedgehog.pipeline.config import RunConfig

        sections: dict[str, Any] = {
            "name": "bench-7b",
            "model": {"base": "meta-llama/Llama-2-7b-hf", "attention": attention},
            "data": {"dataset": "none/none", "max_length_tokens": length},
            "distill": {"micro_batch_size": 1, "global_batch_size": 1},
            "finetune": {
                "micro_batch_size": 1,
                "global_batch_size": 1,
                "gradient_checkpointing": self.gradient_checkpointing,
                "feature_map_learning_rate": 1e-4,
            },
            "evaluate": evaluate,
            "engine": {"zero_stage": 0, "precision": str(self.dtype).removeprefix("torch.")},
        }
        return RunConfig.model_validate(sections)

    def llama(self) -> LlamaForCausalLM:
        """Random weights whose attention logits have a standard deviation of about 1.6, as Llama's own begin with."""
        shape = self.shape
        config = LlamaConfig(
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate_size,
            vocab_size=shape.vocab_size,
            max_position_embeddings=1 << 17,
            tie_word_embeddings=False,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        # transformers' wrapper of `to` has annotations that pyright misreads
        torch.nn.Module.to(model, dtype=self.dtype).to_empty(device=self.device)
        model.model.rotary_emb = LlamaRotaryEmbedding(config).to(self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1:
                    weight.fill_(1.0)
                    continue
                std = 1.28 * weight.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= (2 * shape.num_layers) ** -0.5
                weight.normal_(0.0, std, generator=generator)
        return model.eval()

    def batch(self, length: int) -> dict[str, Any]:
        """One row without padding; the last quarter of it is the summary, the share that the estimate assumes."""
        ids = torch.randint(3, self.shape.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
        labels = ids.clone()
        labels[:, : length - length // 4] = -100
        tensors = {
            "input_ids": ids,
            "mask": torch.ones(1, length, dtype=torch.bool),
            "position_ids": torch.arange(length).unsqueeze(0),
            "segment_ids": torch.zeros(1, length, dtype=torch.int64),
            "labels": labels,
        }
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        return {**tensors, "real_tokens_in_global_batch": length, "tokens_in_global_batch": length // 4}

    def seconds(self, step: Callable[[], Any], least_s: float = 1.0) -> float:
        """Median of at least three steps, of two where one takes over ten seconds; of one where only running counts."""
        times: list[float] = []

        def enough() -> bool:
            if self.quick:
                return len(times) == 1
            return len(times) >= (2 if times and times[0] > 10 else 3) and sum(times) >= least_s

        while not enough():
            self.synchronize()
            started = time.perf_counter()
            step()
            self.synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure_peak_flops(self) -> None:
        """FLOP/s of a large matrix product in the model's dtype: what utilisation is counted against."""
        size = 8192 if self.device.type == "cuda" else 1024
        a = torch.randn(size, size, device=self.device, dtype=self.dtype)
        torch.mm(a, a)
        self.peak_flops_per_s = 2 * size**3 / self.seconds(lambda: torch.mm(a, a), 0.5)


class MaterialisedDistillation(FeatureMapDistillation):
    """The same loss the direct way: every layer's T×T attention weights live until one backward pass through all."""

    def forward(self, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses: list[torch.Tensor] = []

        def see(seen: Any) -> None:
            with torch.enable_grad():
                map_q, map_k = self._maps(seen)
                losses.append(
                    materialised_distillation_loss(seen.q_BHLD, seen.k_BKLD, map_q, map_k, scale=seen.scale).loss
                )

        self._teacher[0](batch, False, see)
        return torch.stack(losses).sum(), {}


class PlainEngine:
    """One process without DeepSpeed: torch's AdamW with the settings that the engine gives it."""

    def __init__(self, module: torch.nn.Module, groups: list[dict[str, Any]]) -> None:
        groups = [{**group, "lr": group["peak_learning_rate"]} for group in groups]
        self.module = module
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, learning_rate_factor: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"] * learning_rate_factor
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


@contextmanager
def engine_of(
    bench: Bench, module: torch.nn.Module, groups: list[dict[str, Any]]
) -> Iterator[tuple[Any, torch.optim.Optimizer]]:
    """The engine and its optimizer."""
    if not HAS_DEEPSPEED:
        module.to(bench.device)
        engine = PlainEngine(module, groups)
        yield engine, engine.optimizer
        del engine
        tidy(bench)
        return
    from hedgehog.pipeline.engine import build_engine

    engine = build_engine(
        module,
        groups,
        config=bench.config(1024).engine,
        world=bench.world,
        micro_batch_size=1,
        num_accumulation=1,
        gradient_clip=None,
        adam_beta2=0.999,
        weight_decay=0.0,
    )
    try:
        yield engine, engine._engine.optimizer  # pyright: ignore[reportPrivateUsage]
    finally:
        engine.close()
        del engine
        tidy(bench)


def tidy(bench: Bench) -> None:
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def measured(bench: Bench, step: Callable[[], Any], length: int, flops: float) -> dict[str, Any]:
    """Time and peak of a step; or why there are none."""
    try:
        with allocation_peak(bench.device) as peak:
            step()
        seconds = bench.seconds(step)
    except torch.OutOfMemoryError:
        tidy(bench)
        return {"out_of_memory": True}
    return {
        "seconds": seconds,
        "tokens_per_s": length / seconds,
        "utilisation": flops / seconds / bench.peak_flops_per_s,
        "peak_bytes": peak.num_bytes,
    }


def estimated(bench: Bench, stage: str, row: dict[str, Any], step_peak: int, held: int) -> dict[str, Any]:
    """What `hedgehog validate` estimates for tensors, and what was allocated; weights and optimizer included.

    Without pydantic only the latter: `--add-estimates` completes the report elsewhere.
    """
    found: dict[str, Any] = {"allocated_bytes": held + step_peak}
    try:
        return found | compare_with_estimate(bench, stage, row, held + step_peak)
    except ImportError as error:
        return found | {"missing": f"{error}; --add-estimates makes it elsewhere"}


def compare_with_estimate(bench: Bench, stage: str, row: dict[str, Any], allocated: int) -> dict[str, Any]:
    """The estimate for the row's shape, its terms, and its ratio to what was allocated."""
    from hedgehog.pipeline.memory_estimate import estimate_memory

    attention, evaluate = row.get("attention", "linear"), {}
    if stage == "evaluate":
        evaluate = {"batch_size": row["batch"], "max_new_tokens": row["new_tokens"], "perplexity": False}
    config = bench.config(row.get("length") or row["position"], attention, **evaluate)
    estimates = estimate_memory(config, bench.shape, world_size=1, device=bench.device.type)
    terms = next(estimate.terms for estimate in estimates if estimate.stage == stage)
    total = sum(term.num_bytes for term in terms if term.kind != "overhead")
    return {
        "estimated_bytes": int(total),
        "ratio": total / allocated,
        "terms": {term.name: int(term.num_bytes) for term in terms if term.kind != "overhead"},
    }


def held_bytes(*owners: Any) -> int:
    """Bytes of all weights, gradients and optimizer states of modules and optimizers, each storage once."""
    tensors: list[torch.Tensor] = []
    for owner in owners:
        if isinstance(owner, torch.nn.Module):
            for tensor in (*owner.parameters(), *owner.buffers()):
                tensors += [tensor] if tensor.grad is None else [tensor, tensor.grad]
        else:
            tensors += [
                value for state in owner.state.values() for value in state.values() if isinstance(value, torch.Tensor)
            ]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def distill_rows(bench: Bench, lengths: list[int]) -> Iterator[dict[str, Any]]:
    shape, llama = bench.shape, bench.llama()
    layers = tuple(range(shape.num_layers))
    teacher = Teacher(llama, layers)
    for products in (None, *MATERIALISED[bench.device.type]):
        kind = FeatureMapDistillation if products is None else MaterialisedDistillation
        hedgehog = convert_base(llama, attention="linear", feature_map="hedgehog_softmax")
        said: list[str] = []
        module = kind(hedgehog, teacher, layers, bench.settings.distill, report=said.append)
        if products:
            said.append(f"materialised in PyTorch, products in {products}")
        with engine_of(bench, module, module.parameter_groups(1e-3)) as (engine, optimizer):
            for length in lengths:
                key = "distill", products
                if bench.out_of_time(key, length) or (products and length > MATERIALISED_LIMIT[bench.device.type]):
                    continue
                batch = bench.batch(length)
                forward, own = distill_flops(bench.settings, shape, length)  # pyright: ignore[reportArgumentType]
                flops = shape.num_layers * (forward + own) * length

                def step(
                    batch: dict[str, Any] = batch, engine: Any = engine, products: str = products or "float32"
                ) -> None:
                    with products_in(products):
                        engine.backward(engine(batch)[0])
                    engine.step(1.0)

                row: dict[str, Any] = {"length": length, "loss": f"materialised, {products}" if products else "tiled"}
                with bench.row(key, length):
                    try:
                        step()  # compiles and allocates what stays
                    except torch.OutOfMemoryError:
                        yield row | {"out_of_memory": True}
                        break
                    row["backend"] = said[-1]
                    if not products:
                        bench.refuse_fallback(said[-1])
                    row |= measured(bench, step, length, flops)
                    if not products and "seconds" in row:
                        row["teacher_seconds"] = bench.seconds(
                            lambda b=batch: teacher(b, False, lambda seen: None), 0.5
                        )
                        row["over_teacher"] = row["seconds"] / row["teacher_seconds"]
                        held = held_bytes(llama, module, optimizer)
                        row["estimate"] = estimated(bench, "distill", row, row["peak_bytes"], held)
                yield row
                if "out_of_memory" in row:
                    break
        del module, hedgehog


def finetune_rows(bench: Bench, lengths: list[int]) -> Iterator[dict[str, Any]]:
    if importlib.util.find_spec("peft") is None:
        yield {"skipped": "peft is not installed: no adapters"}
        return
    from hedgehog.pipeline.lora import attach_lora

    lora: Any = SimpleNamespace(
        rank=8, alpha=16.0, dropout=0.0, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")
    )
    for attention in ("linear", "softmax"):
        llama = bench.llama()
        model = convert_base(llama, attention=attention, feature_map="hedgehog_softmax")
        del llama
        said = ["softmax: SDPA, as torch chooses it"] if attention == "softmax" else []
        model.decoder.report = said.append
        adapted = attach_lora(model, lora, seed=0)
        maps = [p for module in feature_map_modules(model).values() for p in module.parameters()]
        for weight in maps:
            weight.requires_grad_()
        if bench.gradient_checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 renamed it, 5.17 has only this name
                model.gradient_checkpointing_enable({"use_reentrant": False})
        module = SummaryLoss(adapted, packed=False)
        groups = [{"params": [p for p in module.parameters() if p.requires_grad], "peak_learning_rate": 1e-4}]
        with engine_of(bench, module, groups) as (engine, optimizer):
            engine.module.train()
            for length in lengths:
                key = "finetune", attention
                if bench.out_of_time(key, length):
                    break
                batch = bench.batch(length)

                def step(batch: dict[str, Any] = batch, engine: Any = engine) -> None:
                    engine.backward(engine(batch) / batch["tokens_in_global_batch"])
                    engine.step(1.0)

                row: dict[str, Any] = {"length": length, "attention": attention}
                with bench.row(key, length):
                    try:
                        step()
                    except torch.OutOfMemoryError:
                        yield row | {"out_of_memory": True}
                        break
                    row["backend"] = said[-1]
                    bench.refuse_fallback(said[-1])
                    row |= measured(bench, step, length, finetune_flops(bench, length, attention))
                    if "seconds" in row:
                        held = held_bytes(module, optimizer)
                        row["estimate"] = estimated(bench, "finetune", row, row["peak_bytes"], held)
                yield row
        del module, adapted, model, maps, groups
        tidy(bench)


def finetune_flops(bench: Bench, length: int, attention: str) -> float:
    """Useful FLOPs of a step: forward and dX through frozen weights, attention forward and twice that backward.

    Recomputed layers (gradient checkpointing) and the adapters' own products are not counted.
    """
    shape = bench.shape
    linears = 4 * shape.num_layers * shape.num_layer_weights * length + 4 * shape.hidden_size * shape.vocab_size * (
        length // 4
    )
    if attention == "softmax":
        per_token = 4 * shape.head_dim * (length + 1) / 2
    else:  # maps, then state in and state out
        per_token = 2 * 2 * shape.head_dim**2 + 4 * 2 * shape.head_dim * shape.head_dim
    return linears + 3 * shape.num_layers * shape.num_heads * length * per_token


def generate_rows(
    bench: Bench, positions: list[int], batch_sizes: list[int], num_tokens: int
) -> Iterator[dict[str, Any]]:
    features = 2 * bench.shape.head_dim
    for attention in ("linear", "softmax"):
        model = convert_base(bench.llama(), attention=attention, feature_map="hedgehog_softmax")
        said = ["softmax: SDPA, as torch chooses it"] if attention == "softmax" else []
        model.decoder.report = said.append
        for batch_size in batch_sizes:
            for position in positions:
                key = "generate", attention
                if bench.out_of_time(key):  # decoding hardly takes longer at another position
                    continue
                ids = bench.batch(position)["input_ids"].expand(batch_size, -1)

                def generate(count: int, *clocks: Any, model: Any = model, ids: torch.Tensor = ids) -> None:
                    model.generate(
                        ids,
                        max_new_tokens=count,
                        min_new_tokens=count,
                        do_sample=False,
                        pad_token_id=0,
                        logits_processor=LogitsProcessorList(clocks),
                    )

                row: dict[str, Any] = {"position": position, "batch": batch_size, "attention": attention}
                with bench.row(key, 1):
                    try:
                        generate(2)
                        row["backend"] = said[-1]
                        bench.refuse_fallback(said[-1])
                        clock, times = token_clock(bench.device.type)
                        started = time.perf_counter()
                        generate(1 + num_tokens, clock)
                        between = [later - earlier for earlier, later in itertools.pairwise(times)]
                        row["ms_per_token"] = 1000 * statistics.median(between)
                        row["prefill_s"] = times[0] - started
                        row["new_tokens"] = 1 + num_tokens
                        heads = bench.shape.num_heads
                        per_row = 4 * bench.shape.num_layers * heads * features * (bench.shape.head_dim + 1)
                        if attention == "softmax":
                            keys = bench.shape.num_key_value_heads * bench.shape.head_dim
                            per_row = 2 * bench.shape.num_layers * keys * position * bench.dtype.itemsize
                        row["cache_bytes"] = batch_size * per_row
                        with allocation_peak(bench.device) as peak:
                            generate(1 + num_tokens)
                        row["estimate"] = estimated(bench, "evaluate", row, peak.num_bytes, held_bytes(model))
                    except torch.OutOfMemoryError:
                        tidy(bench)
                        row["out_of_memory"] = True
                yield row
        del model
        tidy(bench)


def show(section: str, row: dict[str, Any]) -> dict[str, Any]:
    """Print a row as soon as it is there."""
    words = []
    for key, value in row.items():
        if key == "estimate" and "ratio" not in value:
            words.append(f"allocated {format_bytes(value['allocated_bytes'])}")
        elif key == "estimate":
            words.append(f"estimate {value['ratio']:.2f} of {format_bytes(value['allocated_bytes'])}")
        elif key.endswith("bytes"):
            words.append(f"{key.removesuffix('_bytes')} {format_bytes(value)}")
        else:
            words.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    print(f"{section:<9} " + "  ".join(words), flush=True)
    return row


def add_estimates(file: Path) -> None:
    """Completes a report that was written where there is no pydantic."""
    report = json.loads(file.read_text())
    device = torch.device("cuda" if report["dtype"] == "torch.bfloat16" else "cpu")
    bench = Bench(LlamaShape(**report["shape"]), device, 0)
    for section, stage in (("distill", "distill"), ("finetune", "finetune"), ("generate", "evaluate")):
        for row in report.get(section, []):
            if "missing" in row.get("estimate", {}):
                del row["estimate"]["missing"]
                row["estimate"] |= compare_with_estimate(bench, stage, row, row["estimate"]["allocated_bytes"])
                show(section, row)
    file.write_text(json.dumps(report, indent=1) + "\n")


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="distill,finetune,generate")
    parser.add_argument("--lengths", help="tokens; by default 1k to 64k on a GPU, 512 to 4k without")
    parser.add_argument("--quick", action="store_true", help="4 layers, 256 and 512 tokens, no GPU")
    parser.add_argument("--budget-s", type=float, default=420.0, help="begin nothing after so many seconds")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_7b.json")
    parser.add_argument("--allow-fallback", action="store_true", help="figures of PyTorch in the kernels' place, too")
    parser.add_argument("--add-estimates", type=Path, metavar="FILE", help="complete a report; measures nothing")
    arguments = parser.parse_args()
    if arguments.add_estimates:
        add_estimates(arguments.add_estimates)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.quick else "cpu")
    shape = LLAMA_7B if device.type == "cuda" else replace(NARROW, num_layers=4) if arguments.quick else NARROW
    default = "1024,2048,4096,8192,16384,32768,65536" if device.type == "cuda" else "512,1024,2048,4096"
    lengths = [int(n) for n in (arguments.lengths or ("256,512" if arguments.quick else default)).split(",")]
    bench = Bench(shape, device, arguments.budget_s)
    bench.quick, bench.allow_fallback = arguments.quick, arguments.allow_fallback
    bench.measure_peak_flops()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    print(f"{shape.num_weights:,} weights, {bench.dtype}, {name}, {bench.peak_flops_per_s / 1e12:.2f} TFLOP/s")
    result: dict[str, Any] = {
        "device": name,
        "shape": shape.__dict__,
        "dtype": str(bench.dtype),
        "peak_flops_per_s": bench.peak_flops_per_s,
        "engine": "DeepSpeed, ZeRO-0" if HAS_DEEPSPEED else "torch's AdamW; DeepSpeed is not installed",
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{name: version_of(name) for name in ("transformers", "triton", "deepspeed", "peft")},
        },
        "command": " ".join(sys.argv),
        "commit": commit(),
        "load": os.getloadavg(),
    }
    few = arguments.quick or device.type == "cpu"
    measure: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "distill": lambda: distill_rows(bench, lengths),
        "finetune": lambda: finetune_rows(bench, lengths),
        "generate": lambda: generate_rows(bench, [64, lengths[-1] if few else 4096], [1, 16], 4 if few else 32),
    }
    print(f"at most {arguments.budget_s:.0f} s: a row that would end later is left out")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for section in measure:
        if section in arguments.sections.split(","):
            result[section] = []
            try:
                for row in measure[section]():
                    result[section].append(show(section, row))
                    # a run that is cut off leaves what it had
                    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
            except FellBack as backend:
                result[section].append(show(section, {"failed": f"not the kernels: {backend}"}))
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(plot_beside(result, arguments.out))
    print(f"written to {arguments.out}")
    if bench.fell_back:
        print("PyTorch ran in a kernel's place, as the rows say", file=sys.stderr)
    return 1 if bench.fell_back and not bench.allow_fallback else 0


if __name__ == "__main__":
    sys.exit(main())

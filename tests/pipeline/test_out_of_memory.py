"""When memory ends the message says what was estimated, and names only keys that still help."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hedgehog.pipeline import out_of_memory
from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.distributed import World
from hedgehog.pipeline.errors import ResourceError
from hedgehog.pipeline.families import HUB_SHAPES
from hedgehog.pipeline.formatting import format_bytes
from hedgehog.pipeline.held_memory import held_bytes
from hedgehog.pipeline.memory_estimate import estimate_memory
from hedgehog.pipeline.out_of_memory import explain, out_of_memory_explained

BASE = "meta-llama/Llama-2-7b-hf"
WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore that nobody reads"


def config(**sections: Any) -> RunConfig:
    model = {"base": BASE, **sections.pop("model", {})}
    return RunConfig.model_validate({"name": "x", "model": model, "data": {"dataset": "a/b"}, **sections})


def world(size: int = 1, device: str = "cuda") -> World:
    return World(rank=0, world_size=size, local_rank=0, device=torch.device(device))


def test_what_was_estimated_and_which_keys_help():
    said = explain("finetune", "finetune", config(finetune={"micro_batch_size": 8}), world(4), WORDS)
    assert said.startswith("finetune: out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB.).")
    estimates = estimate_memory(config(finetune={"micro_batch_size": 8}), HUB_SHAPES[BASE], world_size=4, device="cuda")
    total = next(estimate.num_bytes for estimate in estimates if estimate.stage == "finetune")
    assert f"Estimated: {total / 2**30:.1f} GiB (" in said
    for key in (
        "finetune.micro_batch_size (now 8)", "finetune.gradient_checkpointing=true", "data.max_length_tokens (now",
        "engine.zero_stage=3 (now 1)", "model.quantization=nf4", "engine.offload_optimizer=true",
    ):  # fmt: skip
        assert key in said, key


def test_what_is_set_already_is_not_advised():
    spent = config(
        model={"quantization": "nf4"},
        finetune={"micro_batch_size": 1, "gradient_checkpointing": True, "optimizer": "adamw8bit"},
    )
    said = explain("finetune", "finetune", spent, world(), WORDS)
    assert "What lowers it, the largest part first: " in said
    for key in ("micro_batch_size", "gradient_checkpointing", "quantization=nf4", "adamw8bit", "zero_stage"):
        assert key not in said, key


def test_the_largest_part_comes_first():
    short = explain("distill", "distill", config(data={"dataset": "a/b", "max_length_tokens": 512}), world(), WORDS)
    assert short.index("quantization") < short.index("max_length_tokens")
    long = config(data={"dataset": "a/b", "max_length_tokens": 1 << 20}, distill={"micro_batch_size": 4})
    said = explain("distill", "distill", long, world(), WORDS)
    assert said.index("distill.micro_batch_size (now 4)") < said.index("quantization")


GPU = {"is_initialized": True, "mem_get_info": (1 << 30, 24 << 30)}


@pytest.mark.parametrize(
    ("held", "peak", "others", "said"),
    [
        ({"weights": 13.5e9, "training": 0.5e9}, 14.2e9, False, "no estimate was too low."),
        ({"weights": 13.5e9, "training": 0.5e9}, 23e9, False, "the estimate of activations is too low by 8."),
        ({"weights": 13.5e9, "training": 9e9}, 23e9, True, "the estimate of training is too low by 7."),
        ({"weights": 23e9, "training": 0.5e9}, 23.6e9, True, "the estimate of weights is too low by 8."),
    ],
)
def test_which_estimate_was_too_low_on_a_gpu(
    held: dict[str, float], peak: float, others: bool, said: str, monkeypatch: pytest.MonkeyPatch
):
    counters = GPU | {"max_memory_allocated": peak, "memory_reserved": (0 if others else 23 << 30)}
    for name, value in counters.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(out_of_memory, "held_bytes", lambda device: held)
    message = explain("distill", "distill", config(), world(), WORDS)
    assert said in message
    assert f"weights {held['weights'] / 2**30:.1f} GiB (estimated 12.6 GiB)" in message
    assert f"activations up to {format_bytes(peak - sum(held.values()))} (estimated " in message
    assert ("The GPU has 24.0 GiB; other processes hold 23.0 GiB of it." if others else "24.0 GiB. What") in message
    # what was found decides which cures come first
    assert (message.index("max_length_tokens") < message.index("quantization")) == ("activations" in said)


def test_what_a_process_holds_is_told_by_kind():
    """Frozen weights; weights that learn with gradient and moments; each storage once, though two modules share it."""
    before = held_bytes(torch.device("cpu"))
    frozen, learns = torch.nn.Linear(1000, 500, bias=False), torch.nn.Linear(300, 500, bias=False)
    frozen.requires_grad_(False)
    shared = torch.nn.Sequential(frozen, learns)
    optimizer = torch.optim.Adam(learns.parameters())
    learns(torch.ones(300)).sum().backward()
    optimizer.state[learns.weight] = {name: torch.zeros(500, 300) for name in ("exp_avg", "exp_avg_sq")}
    after = held_bytes(torch.device("cpu"))
    assert len(shared) == 2
    assert after["weights"] - before["weights"] == 4 * 500_000
    assert after["training"] - before["training"] == pytest.approx(4 * 4 * 150_000, abs=16)
    said = explain("distill", "distill", config(), world(device="cpu"), WORDS)
    assert "Found: weights " in said and "activations up to" not in said


def test_a_model_of_unknown_size_has_no_estimate():
    said = explain("distill", "distill", config(model={"base": "somebody/unknown"}), world(), WORDS)
    assert "Estimated" not in said and "model.quantization=nf4" in said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(WORDS),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_each_way_memory_ends(error: Exception):
    explained = out_of_memory_explained("evaluate", "evaluate", config(), world(device="cpu"))
    with pytest.raises(ResourceError, match="evaluate: out of memory"), explained:
        raise error


def test_other_errors_pass():
    explained = out_of_memory_explained("evaluate", "evaluate", config(), world(device="cpu"))
    with pytest.raises(RuntimeError, match="something else"), explained:
        raise RuntimeError("something else")

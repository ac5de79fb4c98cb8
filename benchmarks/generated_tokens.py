"""Times of single tokens within `generate()` after prompts of different lengths, for `bench.py`.

The model is configs/tiny.yaml's Hedgehog-Llama with random weights. All of generate() counts: the attention mask and
the row of ids that grow, the bookkeeping, the recurrent step of every layer. The prompt's own pass does not.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import time
from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16_384,
}


def token_clock(device: str = "cpu") -> tuple[Any, list[float]]:
    """A logits processor for `generate(logits_processor=[…])`, and the times that it notes, one a token.

    The first is that of the prompt's pass; a GPU is waited for.
    """
    from transformers import LogitsProcessor

    times: list[float] = []

    class Clock(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return scores

    return Clock(), times


def seconds_a_token(positions: tuple[int, ...], *, num_tokens: int, rounds: int) -> dict[int, float]:
    """Position to the seconds of a token there, greedy, batch 1: the best over rounds of the median over tokens."""
    from transformers import LogitsProcessorList

    model = _model()
    best = dict.fromkeys(positions, float("inf"))
    for _ in range(rounds):
        for position in positions:
            prompt_BL = torch.randint(3, SHAPE["vocab_size"], (1, position), generator=torch.Generator().manual_seed(0))
            clock, times = token_clock()
            model.generate(
                prompt_BL,
                attention_mask=torch.ones_like(prompt_BL),
                max_new_tokens=num_tokens + 1,
                do_sample=False,
                logits_processor=LogitsProcessorList([clock]),
            )
            between = torch.tensor(times, dtype=torch.float64).diff()
            assert len(between) == num_tokens
            best[position] = min(best[position], float(between.median()))
    return best


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from hedgehog.pipeline.modeling.convert import convert_base

    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None, pad_token_id=0))
    return convert_base(llama.eval(), feature_map="hedgehog_exp", feature_dim=64)

"""Batches, left padding, end tokens and the loss on references, against rows computed alone."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from hedgehog.pipeline import generation
from hedgehog.pipeline.config import EvaluateConfig
from hedgehog.pipeline.generation import (
    generate_summaries,
    left_pad,
    length_sorted_batches,
    make_generation_config,
    reference_losses,
)
from hedgehog.pipeline.modeling.convert import convert_base

EOS, PAD = 2, 0


@pytest.fixture(scope="module", params=["softmax", "linear"])
def model(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        eos_token_id=EOS,
    )
    llama = LlamaForCausalLM(config).eval()
    return llama if request.param == "softmax" else convert_base(llama, feature_map="hedgehog_softmax")


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 40, (length,), generator=generator) for length in (3, 9, 6, 1)]


def settings(**changes) -> GenerationConfig:
    return make_generation_config(EvaluateConfig(max_new_tokens=12, **changes), bos_id=1, eos_id=EOS, pad_id=PAD)


def test_batches_are_longest_first_and_hold_every_row_once():
    batches = length_sorted_batches([5, 9, 5, 1, 7], batch_size=2)
    assert batches == [[1, 4], [0, 2], [3]]
    assert length_sorted_batches([], batch_size=2) == []


def test_left_padding_ends_every_row_in_the_last_column():
    batch = left_pad([torch.tensor([5, 6]), torch.tensor([7, 8, 9])], PAD, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[0, 5, 6], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 1], [0, 1, 2]]


def test_a_batch_generates_what_each_prompt_generates_alone(model):
    together = generate_summaries(model, prompts(), settings())
    alone = [generate_summaries(model, [prompt], settings())[0] for prompt in prompts()]
    assert together == alone


def test_greedy_tokens_are_the_argmax_of_the_whole_sequence(model):
    prompt = prompts()[1]
    [summary] = generate_summaries(model, [prompt], settings(min_new_tokens=0))
    sequence = prompt
    for token in summary.token_ids:
        assert model(sequence[None]).logits[0, -1].argmax().item() == token
        sequence = torch.cat([sequence, torch.tensor([token])])


def test_end_token_is_cut_off_and_its_absence_is_truncation(model, monkeypatch):
    # rows: ended at once after two tokens and then padded; never ended
    answer = torch.tensor([[9, 9, 9, 5, 6, EOS, PAD], [0, 0, 9, 5, 6, 7, 8]])
    monkeypatch.setattr(model, "generate", lambda **_: answer)
    ended, cut = generate_summaries(model, [torch.tensor([9, 9, 9]), torch.tensor([9])], settings())
    assert (ended.token_ids, ended.truncated) == ([5, 6], False)
    assert (cut.token_ids, cut.truncated) == ([5, 6, 7, 8], True)


def test_the_models_own_sampling_defaults_do_not_apply(model):
    expected = generate_summaries(model, prompts(), settings())
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, top_p=0.99, max_length=5)
    torch.manual_seed(5)
    assert generate_summaries(model, prompts(), settings()) == expected


def test_beams_find_a_likelier_summary_than_greedy(model):
    fixed = {"min_new_tokens": 12}
    greedy = generate_summaries(model, prompts(), settings(**fixed))
    beams = generate_summaries(model, prompts(), settings(num_beams=4, **fixed))
    assert beams != greedy

    def loss(summaries):
        rows = [
            (torch.cat([prompt, torch.tensor(summary.token_ids)]), len(prompt))
            for prompt, summary in zip(prompts(), summaries, strict=True)
        ]
        return sum(nats for nats, _ in reference_losses(model, rows, PAD))

    assert loss(beams) < loss(greedy)


def test_shortest_length_and_ngrams_are_obeyed(model):
    assert all(len(row.token_ids) >= 10 for row in generate_summaries(model, prompts(), settings(min_new_tokens=10)))
    for row in generate_summaries(model, prompts(), settings(min_new_tokens=12, no_repeat_ngram_size=1)):
        assert len(set(row.token_ids)) == len(row.token_ids)


@pytest.mark.parametrize("logits_at_once", [1 << 26, 300, 1])
def test_reference_loss_is_that_of_each_row_alone(model, logits_at_once, monkeypatch):
    """However few positions have their logits at a time."""
    monkeypatch.setattr(generation, "LOGITS_AT_ONCE", logits_at_once)
    rows = [(torch.cat([prompt, torch.tensor([4, 5, EOS][:n])]), len(prompt)) for n, prompt in enumerate(prompts(), 1)
            if n <= 3]  # fmt: skip
    measured = reference_losses(model, rows, PAD)
    for (row, prompt_length), (nats, num_tokens) in zip(rows, measured, strict=True):
        log_p = model(row[None]).logits[0].log_softmax(-1)
        expected = -sum(log_p[position - 1, row[position]].item() for position in range(prompt_length, len(row)))
        assert num_tokens == len(row) - prompt_length
        assert nats == pytest.approx(expected, rel=1e-5)

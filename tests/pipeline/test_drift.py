"""The drift figures from logits made by hand, and what a clean process that fails leaves to read."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hedgehog.pipeline import drift
from hedgehog.pipeline.clean_reload import HedgehogIsHidden, generate
from hedgehog.pipeline.data.tiny_tokenizer import save_tokenizer, train_tokenizer
from hedgehog.pipeline.data.tokenize import TextEncoder
from hedgehog.pipeline.data.tokens import TokenizedSplit
from hedgehog.pipeline.drift import ProbeAnswer, answer_in_clean_process, make_probe, measure_drift
from hedgehog.pipeline.errors import ModelError

PROBE = make_probe(TokenizedSplit.from_rows([([5, 6], [7, 2]), ([5], [2])]), ["a", "b"], pad_id=0)


def answer(logits: list[list[list[float]]], tokens: list[list[int]]) -> ProbeAnswer:
    return ProbeAnswer(torch.tensor(logits), torch.tensor(tokens))


def test_a_probe_holds_whole_rows_and_prompts():
    assert PROBE.input_ids_BL.tolist() == [[5, 6, 7, 2], [0, 0, 5, 2]]
    assert PROBE.prompt_ids_BL.tolist() == [[5, 6], [0, 5]]
    assert PROBE.prompt_tokens == [[5, 6], [5]]
    assert PROBE.num_positions == 4


def test_figures_counted_by_hand():
    zeros = [0.0, 0.0]
    # padding positions (the first two of row 1) are wild on both sides and must not count
    reference = answer(
        [[[2.0, 0.0], zeros, zeros, zeros], [[9.0, -9.0], zeros, zeros, [0.0, 4.0]]], [[5, 6, 1, 1], [0, 5, 1, 1]]
    )
    exported = answer(
        [[[2.0, 0.5], zeros, zeros, zeros], [[-9.0, 9.0], zeros, zeros, [3.0, 0.0]]], [[5, 6, 1, 3], [0, 5, 1, 1]]
    )
    figures = measure_drift(reference, exported, PROBE)
    assert figures["num_positions"] == 6
    assert figures["logits_max_abs"] == 4.0
    assert figures["logits_mean_abs"] == pytest.approx((0.5 + 3 + 4) / 12)
    assert figures["logits_relative"] == pytest.approx(math.sqrt(0.25 + 9 + 16) / math.sqrt(4 + 16))
    assert figures["equal_argmax_share"] == pytest.approx(5 / 6)
    assert figures["equal_generated_share"] == pytest.approx(3 / 4)
    p, q = torch.tensor([0.0, 4.0]).softmax(0), torch.tensor([3.0, 0.0]).softmax(0)
    assert figures["kl_max_nats"] == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    same = measure_drift(reference, reference, PROBE)
    assert same["logits_max_abs"] == same["kl_max_nats"] == 0.0
    assert same["equal_argmax_share"] == same["equal_generated_share"] == 1.0


def test_logits_that_are_not_finite_are_an_error():
    good = answer([[[0.0, 1.0]] * 4] * 2, [[5, 6, 1], [0, 5, 1]])
    bad = ProbeAnswer(good.logits_BKV.clone(), good.tokens_BL)
    bad.logits_BKV[0, 3, 1] = math.nan
    with pytest.raises(ModelError, match="not finite"):
        measure_drift(good, bad, PROBE)


def test_a_folder_that_does_not_load_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ntest "$1" = -I && test "$HF_HUB_OFFLINE" = 1 && test -z "$RANK" || exit 9\n'
        "echo KeyError: lost >&2\nexit 3\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(drift.sys, "executable", str(python))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(
        ModelError, match=r"(?s)model does not load in a clean process \(exit status 3\).*KeyError: lost"
    ):
        answer_in_clean_process(tmp_path / "model", PROBE, device=torch.device("cpu"), trust_remote_code=True)


def test_the_project_is_hidden_from_the_clean_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "meta_path", [HedgehogIsHidden(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="hidden"):
        importlib.import_module("hedgehog.does_not_exist_yet")
    assert importlib.import_module("json") is not None


def test_an_export_that_decodes_without_its_cache_is_refused():
    """Both sides of the comparison would be wrong alike, and agree."""
    with pytest.raises(ModelError, match=r"model decodes other tokens from its cache than without one .equal 10%"):
        drift._check_decoding(Path("model"), {"equal_uncached_share": 0.1})


def test_a_special_tokens_name_in_a_prompt_does_not_hide_that_bos_is_added(tmp_path: Path):
    """Else the card would tell to put another BOS before it."""
    texts = ["Ann: read </s> as text", "Bob: gladly"]
    save_tokenizer(train_tokenizer(texts * 20, 300), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True)
    encoder = TextEncoder(tokenizer)
    assert tokenizer(texts[0]).input_ids != encoder.prompts(texts)[0], "read as a special token here"
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    ids = torch.tensor([encoder.prompts(texts)[1]])
    tensors = {"input_ids": ids, "attention_mask": ids.ne(-1), "prompt_ids": ids, "prompt_mask": ids.ne(-1)}
    request = {"logits_to_keep": 1, "max_new_tokens": 2, "texts": texts}
    with torch.inference_mode():
        _, facts = generate(model, tokenizer, tensors, request)
    assert facts["encoded_with_special_tokens"] == encoder.prompts(texts)

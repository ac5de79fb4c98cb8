"""The card of a model that classifies; exports in tests/stages have those that write and read text."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.llama.shape import LlamaShape
from hedgehog.pipeline.model_card import CardFacts, write_model_card

DRIFT = {
    "logits_max_abs": 0.01,
    "logits_mean_abs": 0.002,
    "logits_relative": 0.001,
    "kl_mean_nats": 1e-5,
    "equal_argmax_share": 0.975,
    "num_positions": 40,
}


class Family(LlamaShape):
    """Names alone are looked at."""

    title = "BERT"
    hedgehog_title = "Hedgehog-BERT"


def entry(label: str, accuracy: float, **figures: Any) -> dict[str, Any]:
    figure = {"value": accuracy, "low": accuracy - 1, "high": accuracy + 1}
    scores = {"accuracy": figure, "f1": {"value": 88.0}, "mcc": {"value": 80.0}, "loss_nats_per_row": {"value": 0.25}}
    return {"label": label, "all": scores | figures}


BETTER = {
    "accuracy_difference": {"value": 0.3, "low": -0.5, "high": 1.1},
    "loss_gap_nats_per_row": {"value": 0.01, "low": None, "high": None},
}


def card(tmp_path: Path, *, names: tuple[str, ...] = ("no", "yes"), data: Any = None, **facts: Any) -> str:
    config = RunConfig.model_validate(
        {
            "name": "r",
            "model": {"base": "google/some-bert", **({"attention": "softmax"} if facts.pop("softmax", False) else {})},
            "finetune": {"enabled": facts.pop("finetuned", True)},
            "data": {"kind": "classification", "dataset": "some/rows", "max_length_tokens": 128, **(data or {})},
        }
    )
    values = {"scores": entry("hedge | hog", 90.5, **BETTER), "baseline": entry("soft | max", 90.2), "num_examples": 40}
    write_model_card(
        tmp_path,
        config,
        CardFacts(
            family=Family,
            drift=DRIFT,
            licence_files=(),
            tokenizer_adds_bos=True,
            kl_mean_nats=0.5,
            dtype="bfloat16",
            label_names=names,
            **{**values, **facts},
        ),
    )
    return (tmp_path / "README.md").read_text()


def test_a_base_as_it_was_is_not_called_finetuned(tmp_path: Path) -> None:
    assert "softmax attention, finetuned with LoRA, to classify texts: the baseline of" in card(tmp_path, softmax=True)
    text = card(tmp_path, softmax=True, finetuned=False)
    assert "softmax attention, as it was, to classify texts: a baseline of" in text and "LoRA" not in text


def code_of(text: str) -> str:
    found = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert found is not None
    ast.parse(found[1])
    return found[1]


def test_what_it_is_and_how_well_it_does(tmp_path):
    text = card(tmp_path)
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification\n")
    assert "base_model: google/some-bert" in text and "- text-classification" in text and "- linear-attention" in text
    assert "made to classify texts. Cost grows linearly with length. Method" in text
    for word in ("decoding", "greedy", "next-token", "ROUGE", "summar", "AutoModelForCausalLM", "generate"):
        assert word not in text, word
    assert "| hedge \\| hog | 90.50 (89.50 to 91.50) | 88.00 | 80.00 | 0.2500 |" in text
    assert "| soft \\| max | 90.20 (89.20 to 91.20) | 88.00 | 80.00 | 0.2500 |" in text
    assert "40 test rows. All but the loss × 100; F1 is that of `yes`, MCC is Matthews correlation." in text
    assert "accuracy is +0.3 points (-0.5 to +1.1) against soft | max, loss +0.0100 nats a row." in text
    assert "The maps and the head trained along." in text
    assert "the same class for 97.5% of 40 rows" in text and "Labels: `no`, `yes`.\n" in text


def test_the_example_reads_a_text_or_a_pair(tmp_path):
    single = code_of(card(tmp_path))
    assert "AutoModelForSequenceClassification.from_pretrained(folder" in single and "trust_remote_code=True" in single
    assert '"max_length": 128' in single and "beside it" not in single
    pair = code_of(card(tmp_path, data={"second_text_field": "hypothesis"}, softmax=True))
    assert 'tokenizer("the text to classify", "the text beside it"' in pair and "trust_remote_code" not in pair


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("not | sure", "`not | sure`"),
        ("<b>x</b>", "`<b>x</b>`"),
        ('say "yes"', '`say "yes"`'),
        ("two\nlines", '`"two\\nlines"`'),
        ("a`b``c", "```a`b``c```"),
        ("`x`", "`` `x` ``"),
        ("", '`""`'),
        (" x ", '`" x "`'),
        ("x" * 200, f"`{'x' * 79}…`"),
    ],
)
def test_names_of_classes_mean_nothing_in_markdown(tmp_path, name, shown):
    text = card(tmp_path, names=("no", name))
    assert f"Labels: `no`, {shown}.\n" in text and f"F1 is that of {shown}," in text
    code_of(text)


def test_many_classes(tmp_path):
    text = card(tmp_path, names=tuple(f"c{number}" for number in range(23)))
    assert "`c18`, `c19` and 3 more, which `config.json` lists.\n" in text and "`c20`" not in text
    assert "F1 is the mean over the classes" in text


def test_without_scores_or_baseline(tmp_path):
    assert "Not measured" in card(tmp_path, scores=None, baseline=None)
    alone = card(tmp_path, scores=entry("x", 90.0), baseline=None)
    assert "points" not in alone and "| x | 90.00" in alone

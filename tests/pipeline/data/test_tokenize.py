from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hedgehog.pipeline.config import DataConfig
from hedgehog.pipeline.data.dialogue_corpus import generate_dialogues
from hedgehog.pipeline.data.sources import Example
from hedgehog.pipeline.data.tiny_tokenizer import save_tokenizer, train_tokenizer
from hedgehog.pipeline.data.tokenize import (
    TextEncoder,
    choose_pad_id,
    load_tokenizer,
    render_prompt,
    tokenize_examples,
)
from hedgehog.pipeline.errors import ModelError

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer([d.text + "\n" + d.summary for d in generate_dialogues(150, 0)], 600)


@pytest.fixture(scope="module")
def tokenizer(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(model, folder)
    return load_tokenizer(str(folder))


def make_examples(*dialogues: str, summary: str = "A short summary.") -> list[Example]:
    return [Example(str(i), dialogue, summary) for i, dialogue in enumerate(dialogues)]


def test_the_tokenizer_is_deterministic_and_loads_as_llamas_does(model, tokenizer):
    sentencepiece = pytest.importorskip("sentencepiece")
    again = train_tokenizer([d.text + "\n" + d.summary for d in generate_dialogues(150, 0)], 600)
    assert again == model
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert processor.vocab_size() == len(tokenizer) == 600
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, BOS, EOS)
    for dialogue in generate_dialogues(30, 7):
        text = dialogue.text + "\n\n  Zoë’s 12 😀"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == processor.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer("Hello").input_ids[0] == BOS


@given(st.text(max_size=60), st.text(min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_any_text_comes_back_and_special_tokens_in_it_are_plain_text(tokenizer, dialogue, summary):
    encoder = TextEncoder(tokenizer)
    text = f"{dialogue}</s><s>{summary}"
    (prompt,), (answer,) = encoder.prompts([text]), encoder.summaries([text])
    assert prompt[0] == BOS and BOS not in prompt[1:] and EOS not in prompt
    assert answer[-1] == EOS and EOS not in answer[:-1] and BOS not in answer
    assert prompt[1:] == answer[:-1]
    assert tokenizer.decode(answer[:-1]).strip(" ") == text.strip(" ")


def test_the_border_is_exact_and_the_prompt_is_what_generation_starts_from(tokenizer):
    data = DataConfig()
    examples = [Example("x", d.text, d.summary) for d in generate_dialogues(20, 3)]
    result = tokenize_examples(tokenizer, examples, data)
    assert result.examples == examples
    for i, example in enumerate(examples):
        tokens, prompt_length = result.split[i]
        assert result.prompts[i] == render_prompt(data.prompt_template, example.dialogue)
        assert tokens[:prompt_length].tolist() == tokenizer(result.prompts[i]).input_ids
        assert tokens[-1] == EOS
        assert tokenizer.decode(tokens[prompt_length:-1]) == example.summary


def test_overlong_rows_are_dropped_and_counted(tokenizer):
    examples = make_examples("A: hi", "A: " + "word " * 80, "B: yo")
    result = tokenize_examples(tokenizer, examples, DataConfig(max_length_tokens=100))
    assert [e.id for e in result.examples] == ["0", "2"]
    assert (result.dropped_overlong, result.truncated) == (1, 0)


@given(st.integers(60, 200), st.text(st.sampled_from("abc \n.é😀"), min_size=100, max_size=300))
@settings(deadline=None, max_examples=25)
def test_truncation_cuts_the_dialogue_only_and_uses_the_room(tokenizer, max_length, dialogue):
    data = DataConfig(max_length_tokens=max_length, overlong="truncate_dialogue")
    dialogue = "x" + dialogue.strip() + "x"
    (example,) = make_examples(dialogue)
    encoder = TextEncoder(tokenizer)
    full = len(encoder.prompts([render_prompt(data.prompt_template, dialogue)])[0])
    summary_ids = encoder.summaries([example.summary])[0]
    result = tokenize_examples(tokenizer, [example], data)
    if full + len(summary_ids) <= max_length:
        assert (result.truncated, result.examples) == (0, [example])
        return
    assert (result.truncated, result.dropped_overlong) == (1, 0)
    tokens, prompt_length = result.split[0]
    kept = result.examples[0].dialogue
    assert dialogue.startswith(kept) and len(kept) < len(dialogue)
    assert result.prompts[0] == render_prompt(data.prompt_template, kept)
    assert result.prompts[0].endswith("\n---\nSummary:\n")
    assert tokens[:prompt_length].tolist() == tokenizer(result.prompts[0]).input_ids
    assert tokens[prompt_length:].tolist() == summary_ids
    # A character is at most 4 byte tokens, and white space before the cut (at most one run of it) is removed.
    gap = max_length - len(tokens)
    run = len(dialogue[len(kept) :]) - len(dialogue[len(kept) :].lstrip())
    assert 0 <= gap <= 8 + run


def test_a_summary_that_fills_the_row_alone_is_dropped_even_when_truncating(tokenizer):
    examples = make_examples("A: hi", summary="word " * 50)
    data = DataConfig(max_length_tokens=64, overlong="truncate_dialogue")
    result = tokenize_examples(tokenizer, examples, data)
    assert (len(result.split), result.dropped_overlong, result.truncated) == (0, 1, 0)


def test_an_added_special_token_pads_before_a_plain_word():
    from transformers import AddedToken

    added = {
        900: AddedToken("<|end|>", special=True), 901: AddedToken("<|other|>", special=True),
        902: AddedToken("word", special=False),
    }  # fmt: skip
    tokenizer = SimpleNamespace(
        pad_token_id=None, unk_token_id=None, bos_token_id=None, eos_token_id=900, added_tokens_decoder=added
    )
    assert choose_pad_id(tokenizer)[0] == 901
    added[903] = AddedToken("<|right_pad|>", special=True)
    assert choose_pad_id(tokenizer)[0] == 903


@pytest.mark.parametrize(
    ("pad", "unk", "bos", "eos", "chosen"),
    [
        (5, 0, 1, 2, 5),
        (None, 0, 1, 2, 0),
        (2, 0, 1, 2, 0),
        (2, None, 0, 2, 1),
        (None, 2, 1, 2, 0),
        (None, None, None, 0, 1),
    ],
)
def test_padding_is_never_bos_or_eos(pad, unk, bos, eos, chosen):
    tokenizer = SimpleNamespace(
        pad_token_id=pad, unk_token_id=unk, bos_token_id=bos, eos_token_id=eos, added_tokens_decoder={}
    )
    pad_id, reason = choose_pad_id(tokenizer)
    assert pad_id == chosen
    assert reason


def test_a_missing_or_damaged_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match=r"model\.tokenizer"):
        load_tokenizer(str(tmp_path))

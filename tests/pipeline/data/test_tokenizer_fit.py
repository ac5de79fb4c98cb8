"""A tokenizer of another model is refused, or doubted aloud."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from hedgehog.pipeline.data.tiny_tokenizer import make_tokenizer
from hedgehog.pipeline.data.tokenize import load_tokenizer
from hedgehog.pipeline.data.tokenizer_fit import check_rotation, check_template, check_unknown_tokens, check_vocabulary
from hedgehog.pipeline.errors import ModelError

MODEL = SimpleNamespace(vocab_size=100, bos_token_id=1, eos_token_id=[2, 7])
UNK = 0


class Tokenizer:
    """Knows digits; its tokens are characters."""

    name_or_path = "somewhere"

    def __init__(self, size: int = 100, bos: int | None = 1, eos: int = 2, unk: int | None = UNK) -> None:
        self.size, self.bos_token_id, self.eos_token_id, self.unk_token_id = size, bos, eos, unk

    def get_vocab(self) -> dict[str, int]:
        return {str(index): index for index in range(self.size)}

    def __call__(self, texts: list[str], **options: object) -> SimpleNamespace:
        rows = [[int(letter) + 1 if letter.isdigit() else UNK for letter in text] for text in texts]
        return SimpleNamespace(input_ids=rows)


def test_its_own_tokenizer_is_not_doubted():
    assert check_vocabulary(Tokenizer(), MODEL) == []
    assert check_vocabulary(Tokenizer(95, eos=7), MODEL) == [], "an embedding may be padded"
    assert check_vocabulary(Tokenizer(bos=None), SimpleNamespace(**{**vars(MODEL), "bos_token_id": None})) == []


@pytest.mark.parametrize(
    ("size", "message"),
    [(101, r"somewhere\) has ids up to 100, but the model's vocabulary ends at 99"), (49, "belongs to another model")],
)
def test_a_vocabulary_that_cannot_be_the_models(size, message):
    with pytest.raises(ModelError, match=message):
        check_vocabulary(Tokenizer(size), MODEL)


def test_what_deserves_a_warning():
    (small,) = check_vocabulary(Tokenizer(80), MODEL)
    assert "has 80 tokens, the model's embedding 100" in small
    bos, eos = check_vocabulary(Tokenizer(bos=5, eos=1), MODEL)
    assert "has 5 for BOS, the model's config.json 1" in bos
    assert "has 1 for EOS, the model's config.json [2, 7]" in eos


def test_unknown_tokens():
    assert check_unknown_tokens(Tokenizer(), ["1234"] * 3) == []
    assert check_unknown_tokens(Tokenizer(unk=None), ["abcd"]) == []
    (doubt,) = check_unknown_tokens(Tokenizer(), ["12345678ab"])
    assert "20% of the tokens of the first 1 dialogues are unknown" in doubt
    with pytest.raises(ModelError, match=r"75% .* made for other text"):
        check_unknown_tokens(Tokenizer(), ["abc1"])


def test_special_tokens_in_a_template_are_told_of(tmp_path):
    make_tokenizer("llama", ["some words to learn from"], 300, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert check_template(tokenizer, "Summarize.\n{dialogue}\n") == []
    (doubt,) = check_template(tokenizer, "<s>[INST] {dialogue} [/INST]")
    assert doubt == "data.prompt_template holds <s>: read as plain characters, not as special tokens"


@pytest.mark.parametrize(
    ("kind", "longest", "told"),
    [("dynamic", 65, True), ("longrope", 65, True), ("dynamic", 64, False), ("yarn", 900, False)],
)
def test_rotations_that_depend_on_the_batch_are_told_of(kind, longest, told):
    config = LlamaConfig(max_position_embeddings=64)
    config.rope_parameters = {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 64}
    doubt = check_rotation(config, longest)
    assert (doubt is not None) == told
    assert doubt is None or ("beyond 64 tokens" in doubt and "data.max_length_tokens at 64" in doubt)

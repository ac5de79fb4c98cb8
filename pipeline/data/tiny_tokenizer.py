"""The tokenizer of a tiny run: of the kind that the model's family has, saved the way its own is."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def make_tokenizer(architecture: str, texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train the family's kind of tokenizer on `texts` and save it, so that AutoTokenizer loads `folder`."""
    _KINDS[architecture](texts, vocab_size, folder)


def _save_sentencepiece(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    save_tokenizer(train_tokenizer(texts, vocab_size), folder)


def _save_byte_level_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """GPT-2's: <|endoftext|> 0 (BOS and EOS), the 256 bytes, then what the texts call for."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in trained["merges"]]
    tokenizer: Any = GPT2Tokenizer(vocab=trained["vocab"], merges=merges)
    tokenizer.save_pretrained(folder)


def _save_word_piece(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """BERT's, in lower case: five special tokens, every character alone and inside a word, then what the texts call
    for; [unused0] and so on where they call for less than `vocab_size`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    texts = list(texts)
    lower, words = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    characters = sorted({c for t in texts for word, _ in words.pre_tokenize_str(lower.normalize_str(t)) for c in word})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = lower, words
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # Characters that are not named here get their ids in an order that is another one each time.
        special_tokens=[*special, *characters, *(f"##{character}" for character in characters)],
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    vocab = pieces.get_vocab()
    vocab |= {f"[unused{i}]": len(vocab) + i for i in range(vocab_size - len(vocab))}
    tokenizer: Any = BertTokenizer(vocab=vocab)
    tokenizer.save_pretrained(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a BPE of `vocab_size` pieces: <unk> 0, <s> 1, </s> 2, 256 bytes, then what the texts call for.

    Text is taken as it stands (no normalization), one thread, so that equal texts give an equal model.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def save_tokenizer(model: bytes, folder: Path) -> None:
    """Write `tokenizer.model`, and from it `tokenizer.json` and its config, so that AutoTokenizer loads the folder."""
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer: Any = _llama_tokenizer(folder)
    tokenizer.save_pretrained(folder)


def _llama_tokenizer(folder: Path) -> Any:
    from transformers import LlamaTokenizer

    return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)


_KINDS = {"llama": _save_sentencepiece, "gpt2": _save_byte_level_bpe, "bert": _save_word_piece}

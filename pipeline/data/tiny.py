"""The inputs of a tiny run, made on the spot: corpus, tokenizer, and a small model that has read but not summarized.

A BERT's corpus asks a question about each dialogue, and its model was finetuned on other ones of the kind.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from ..config import TinyConfig
from ..families import FAMILIES
from ..run_folder import atomic_directory, atomic_write
from .answer_corpus import ANSWERS, generate_questions
from .dialogue_corpus import GeneratedDialogue, generate_dialogues, pretraining_texts
from .tiny_pretrain import make_model, pretrain
from .tiny_tokenizer import make_tokenizer
from .tokenize import TextEncoder, load_tokenizer
from .tokenize_labelled import RowEncoder
from .tokens import TokenizedSplit

if TYPE_CHECKING:
    from ..metrics import Reporter

_TOKENIZER_DIALOGUES = 4000
"""Dialogues that the tokenizer learns from; more of them change no piece that matters."""


CORPUS_FIELDS = {"text_field": "dialogue", "second_text_field": "question", "label_field": "answer"}
"""What keys of `data` are in a corpus to classify that was made here."""


def make_corpus(tiny: TinyConfig, seed: int, folder: Path) -> dict[str, Path]:
    """Write train, validation and test as JSONL; no dialogue occurs twice. Returns the file of each split."""
    sizes = {
        "train": tiny.num_train_dialogues,
        "validation": tiny.num_validation_dialogues,
        "test": tiny.num_test_dialogues,
    }
    contents = _contents(tiny, sum(sizes.values()), seed)
    files = {}
    start = 0
    for split, size in sizes.items():
        rows = [{"id": f"{split}-{i}", **content} for i, content in enumerate(contents[start : start + size])]
        start += size
        files[split] = folder / f"{split}.jsonl"
        atomic_write(files[split], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return files


def _contents(tiny: TinyConfig, count: int, seed: int) -> list[dict[str, str]]:
    if FAMILIES[tiny.architecture].is_encoder:
        return [asdict(asked) for asked in generate_questions(count, seed)]
    return [{"dialogue": dialogue.text, "summary": dialogue.summary} for dialogue in generate_dialogues(count, seed)]


def make_base_model(
    tiny: TinyConfig,
    seed: int,
    folder: Path,
    checkpoint: Path,
    fingerprint: str,
    reporter: Reporter,
) -> None:
    """Make `folder`: a pretrained model (float32) with its tokenizer. It appears when it is complete.

    A call after an interruption goes on from `checkpoint`; where the folder is there, nothing is done.
    """
    if folder.exists():
        checkpoint.unlink(missing_ok=True)
        return
    with atomic_directory(folder) as unfinished:
        family = FAMILIES[tiny.architecture]
        texts = _question_texts(seed) if family.is_encoder else _tokenizer_texts(seed)
        make_tokenizer(tiny.architecture, texts, tiny.vocab_size, unfinished)
        tokenizer = load_tokenizer(str(unfinished), generates=not family.is_encoder)
        model = make_model(tiny, seed, ANSWERS if family.is_encoder else None)
        num_weights = sum(parameter.numel() for parameter in model.parameters())
        reporter.info(f"pretraining a {family.title} of {num_weights:,} weights for {tiny.pretrain_steps} steps")
        documents = (_asked_documents if family.is_encoder else _documents)(tiny, seed, tokenizer)
        loss = pretrain(model, documents, tiny, seed, checkpoint, fingerprint, reporter)
        reporter.info(f"pretrained to {loss:.3f} nats a {'row' if family.is_encoder else 'token'}")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(unfinished)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(unfinished)
        # Not model.save_pretrained: safetensors reports a full disk as an error of its own, without errno.
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}  # tied ones once
        (unfinished / "model.safetensors").write_bytes(save(weights, {"format": "pt"}))
    checkpoint.unlink(missing_ok=True)


def _pretraining_seed(seed: int) -> int:
    # Other dialogues than those of the corpus, so that the test rows are new to the model.
    return seed + 1_000_003


def _tokenizer_texts(seed: int) -> Sequence[str]:
    def texts(dialogue: GeneratedDialogue) -> list[str]:
        # With the line breaks: a name at the start of a line has a piece of its own.
        return [f"{dialogue.text}\n{dialogue.story}", dialogue.summary]

    dialogues = generate_dialogues(_TOKENIZER_DIALOGUES, _pretraining_seed(seed))
    return [text for dialogue in dialogues for text in texts(dialogue)]


def _documents(tiny: TinyConfig, seed: int, tokenizer: Any) -> TokenizedSplit:
    """Enough documents for every step to see new ones, each between BOS and EOS."""
    count = tiny.pretrain_steps * tiny.pretrain_batch_size
    texts = list(pretraining_texts(count, _pretraining_seed(seed)))
    encoder = TextEncoder(tokenizer)
    return TokenizedSplit.from_rows(([ids[0]], ids[1:]) for ids in encoder.documents(texts))


def _question_texts(seed: int) -> Sequence[str]:
    asked = generate_questions(_TOKENIZER_DIALOGUES, _pretraining_seed(seed))
    return [text for one in asked for text in (one.dialogue, one.question)]


def _asked_documents(tiny: TinyConfig, seed: int, tokenizer: Any) -> TokenizedSplit:
    """The same of an encoder's rows: a dialogue, a question and, as the class, its answer."""
    asked = generate_questions(tiny.pretrain_steps * tiny.pretrain_batch_size, _pretraining_seed(seed))
    rows = RowEncoder(tokenizer).rows([one.dialogue for one in asked], [one.question for one in asked])
    return TokenizedSplit.from_rows(rows, [ANSWERS.index(one.answer) for one in asked])

"""Rows of text become rows of tokens:

    [BOS] template with the dialogue │ summary [EOS]

Prompt and summary are tokenized apart, so that the border lies between two tokens and the prompt's tokens are those
that generation starts from. BOS stands where the tokenizer has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import LABELLED_KINDS, DataConfig, ModelConfig
from ..errors import ModelError
from ..interrupts import stop_if_asked
from ..manifest import StageInput
from .base_fingerprint import fingerprint_tokenizer
from .examples import Example
from .tokens import TokenizedSplit

_ROWS_AT_ONCE = 1000
"""Rows per call of the tokenizer: enough for its threads, and no whole dataset of encodings in memory."""


@dataclass
class TokenizedExamples:
    """Rows that fit, as tokens and as text in the same order, and what became of the others."""

    split: TokenizedSplit
    examples: list[Example]
    """Their dialogues as tokenized: a truncated one is cut here too."""
    prompts: list[str]
    dropped_overlong: int
    truncated: int


def load_tokenizer(
    path_or_id: str, *, revision: str | None = None, trust_remote_code: bool = False, generates: bool = True
) -> Any:
    """The tokenizer in a local folder or of a hub id. Where its model `generates`, it must have an EOS, or that would
    never end.

    Raises ModelError where there is none, or where it would need code that the config does not allow.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path_or_id, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a damaged tokenizer.json raises the Rust library's bare Exception
        reason = " ".join(str(error).split())[:300]
        hint = "; set model.trust_remote_code=true if you trust it" if "trust_remote_code" in reason else ""
        raise ModelError(
            f"{path_or_id}: no tokenizer could be loaded ({reason}){hint}. A local folder needs tokenizer.json or "
            "tokenizer.model; model.tokenizer can name another folder or hub id"
        ) from None
    if generates and tokenizer.eos_token_id is None:
        raise ModelError(f"{path_or_id}: the tokenizer has no EOS token, so a summary would have no end")
    return tokenizer


def load_prepared_tokenizer(prepare: StageInput, model: ModelConfig, report: Callable[[str], None]) -> Any:
    """The tokenizer that `prepare` read; `report` is told where it is another one by now.

    Not refused: another version of its library may write down the same tokenizer otherwise.

    Raises:
        ModelError: it cannot be loaded.
    """
    source = prepare.summary["tokenizer"]
    tokenizer = load_tokenizer(
        source,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        generates=prepare.summary.get("kind") not in LABELLED_KINDS,
    )
    if prepare.summary.get("tokenizer_fingerprint") not in (None, fingerprint_tokenizer(tokenizer)):
        report(f"{source} is another tokenizer than the one that prepare read, or was changed")
    return tokenizer


def choose_pad_id(tokenizer: Any) -> tuple[int, str]:
    """A padding token that is neither EOS nor BOS, and why it was chosen.

    Padding is masked by position, never by comparing ids, so any other token does. A pad that equals EOS would teach
    whoever masks by id that summaries do not end.
    """
    forbidden = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in forbidden:
        return tokenizer.pad_token_id, "the tokenizer's pad token"
    problem = "the tokenizer has no pad token" if tokenizer.pad_token_id is None else "the pad token is BOS or EOS"
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for text, index in sorted(added.items(), key=lambda entry: entry[1]):
        if "pad" in text.lower() and index not in forbidden:
            return index, f"{problem}; {text} pads"
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in forbidden:
        return tokenizer.unk_token_id, f"{problem}; unk pads instead"
    for text, index in sorted(added.items(), key=lambda entry: entry[1]):
        if index not in forbidden:
            return index, f"{problem}, and there is no unk; {text} pads instead, masked by position"
    spare = next(token_id for token_id in range(3) if token_id not in forbidden)
    return spare, f"{problem}, and there is no unk; token {spare} pads instead, masked by position"


def render_prompt(template: str, dialogue: str) -> str:
    """The text before the summary."""
    head, tail = template.split("{dialogue}")
    return head + dialogue + tail


class TextEncoder:
    """Text to tokens, the same way for training and generation.

    `</s>` and its like inside a user's text are plain characters here: they must not end a summary.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of prompts, with BOS and without EOS."""
        return [self._prefix + ids for ids in self._encode(texts)]

    def summaries(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of summaries, with EOS and without BOS."""
        return [[*ids, self._tokenizer.eos_token_id] for ids in self._encode(texts)]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of whole texts, with BOS and EOS: what a base model is pretrained on."""
        return [self._prefix + ids for ids in self.summaries(texts)]

    def pieces(self, texts: Sequence[str], go_on: Sequence[bool]) -> list[list[int]]:
        """Tokens of texts that are parts of something longer: neither BOS nor EOS.

        A sentencepiece tokenizer puts a space before whatever it is given. Where a text goes on with what came before
        (`go_on`), it does not get one.
        """
        if not any(go_on) or not self._puts_a_space_first():
            return self._encode(texts)
        (before,) = self._encode(["\n"])
        rows = self._encode(["\n" * goes_on + text for text, goes_on in zip(texts, go_on, strict=True)])
        for number, goes_on in enumerate(go_on):
            if goes_on:
                row = rows[number]
                rows[number] = row[len(before) :] if row[: len(before)] == before else self._encode([texts[number]])[0]
        return rows

    def _puts_a_space_first(self) -> bool:
        """Whether a word has other tokens at the beginning of what is encoded than behind a line's end."""
        alone, end, behind = self._encode(["word", "\n", "\nword"])
        return behind[: len(end)] == end and behind[len(end) :] != alone

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids


def tokenize_examples(tokenizer: Any, examples: Sequence[Example], data: DataConfig) -> TokenizedExamples:
    """Tokenize a split and apply `data.overlong` to rows beyond `data.max_length_tokens`.

    A truncated row loses the end of its dialogue, never the template's tail and never a token of the summary. A row
    whose summary and template alone are too long is dropped, whatever `overlong` says.

    Raises:
        Interrupted: a signal came; nothing is saved.
    """
    encoder = TextEncoder(tokenizer)
    result = TokenizedExamples(TokenizedSplit.from_rows([]), [], [], dropped_overlong=0, truncated=0)

    def rows() -> Iterator[tuple[list[int], list[int]]]:
        for start in range(0, len(examples), _ROWS_AT_ONCE):
            stop_if_asked("tokenizing begins anew")
            batch = examples[start : start + _ROWS_AT_ONCE]
            prompts = [render_prompt(data.prompt_template, example.dialogue) for example in batch]
            prompt_ids = encoder.prompts(prompts)
            summary_ids = encoder.summaries([example.summary for example in batch])
            for example, prompt, ids, summary in zip(batch, prompts, prompt_ids, summary_ids, strict=True):
                if len(ids) + len(summary) > data.max_length_tokens:
                    room = data.max_length_tokens - len(summary)
                    cut = None if data.overlong == "drop" else _truncate(encoder, example.dialogue, room, data)
                    if cut is None:
                        result.dropped_overlong += 1
                        continue
                    result.truncated += 1
                    dialogue, prompt, ids = cut
                    example = Example(example.id, dialogue, example.summary, example.seen_in_train)
                result.examples.append(example)
                result.prompts.append(prompt)
                yield ids, summary

    result.split = TokenizedSplit.from_rows(rows())
    return result


def _truncate(encoder: TextEncoder, dialogue: str, room: int, data: DataConfig) -> tuple[str, str, list[int]] | None:
    """The longest beginning of a dialogue whose prompt has at most `room` tokens: (dialogue, prompt, tokens).

    Bisects over characters and tokenizes the whole prompt each time, so that the result is what generation would get
    from the cut text, for any tokenizer. None where less than one character fits.
    """
    best: tuple[str, str, list[int]] | None = None
    low, high = 1, len(dialogue)
    while low <= high:
        middle = (low + high) // 2
        cut = dialogue[:middle].rstrip()
        prompt = render_prompt(data.prompt_template, cut)
        (ids,) = encoder.prompts([prompt])
        if len(ids) <= room:
            best = (cut, prompt, ids)
            low = middle + 1
        else:
            high = middle - 1
    return best

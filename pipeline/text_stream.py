"""A text that a model makes, said as its tokens come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


class TextStream(BaseStreamer):
    """Says a text as its tokens come, without the blanks around it. Keeps the time of the first token.

    Only the newest tokens are decoded, together with those before them that decide their blanks, so that a long text
    costs no more a token than a short one. (transformers' TextStreamer decodes the whole line at each token, which
    would be in the times that are reported.)

    Args:
        tokenizer: of the model.
        say: given each piece; None only takes the time.
    """

    def __init__(self, tokenizer: Any, say: Callable[[str], None] | None) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._token_ids: list[int] | None = None
        """None until the prompt has passed."""
        self._context = self._num_decoded = 0
        """What comes before `_num_decoded` is said already; from `_context` on it is decoded again with new tokens."""
        self._blanks: str | None = None
        """Held back until something follows; None before the first word, whose blanks are dropped."""
        self.started = 0.0
        self.first_token_s: float | None = None

    def put(self, value: torch.Tensor) -> None:
        if self._token_ids is None:
            self._token_ids = []
            return
        self._token_ids += value.flatten().tolist()
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.started
        self._advance(at_end=False)

    def end(self) -> None:
        self._advance(at_end=True)

    def _advance(self, *, at_end: bool) -> None:
        if self._say is None or not self._token_ids:
            return
        before = self._decode(self._token_ids[self._context : self._num_decoded])
        now = self._decode(self._token_ids[self._context :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not at_end):  # perhaps half of a character
            return
        self._context, self._num_decoded = self._num_decoded, len(self._token_ids)
        new = now[len(before) :]
        text = (new if self._blanks is not None else new.lstrip()).rstrip()
        if text:
            self._say((self._blanks or "") + text)
            self._blanks = ""
        if self._blanks is not None:
            self._blanks += new[len(new.rstrip()) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

"""Does this tokenizer belong to this model? Ids alone do not tell: a smaller foreign vocabulary fits any embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ModelError

_OTHER_MODELS = 0.5
"""Below this share of the embedding's rows the vocabulary is another model's: padding and added tokens are few."""
_SUSPICIOUS = 0.9
_MANY_UNKNOWN = 0.01
_MOSTLY_UNKNOWN = 0.5
_NUM_SAMPLED = 200
"""Texts that are looked through for unknown tokens."""


def check_vocabulary(tokenizer: Any, model_config: Any) -> list[str]:
    """Hold the tokenizer's ids to the model's config; returns what deserves a warning.

    Raises:
        ModelError: ids beyond the embedding, or a vocabulary that is less than half of it.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    num_rows = model_config.vocab_size
    num_ids = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if num_ids > num_rows:
        raise ModelError(
            f"the tokenizer ({name}) has ids up to {num_ids - 1}, but the model's vocabulary ends at {num_rows - 1}: "
            "use the tokenizer that belongs to the model, or enlarge the model's embedding first"
        )
    sizes = f"the tokenizer ({name}) has {num_ids} tokens, the model's embedding {num_rows}"
    if num_ids < _OTHER_MODELS * num_rows:
        raise ModelError(f"{sizes}: it belongs to another model; model.tokenizer names the right one")
    found = [f"{sizes}: does it belong to this model?"] if num_ids < _SUSPICIOUS * num_rows else []
    for kind in ("bos", "eos"):
        own, models = getattr(tokenizer, f"{kind}_token_id"), getattr(model_config, f"{kind}_token_id")
        known = models if isinstance(models, (list, tuple)) else [models]
        if models is not None and own not in known:
            found.append(
                f"the tokenizer ({name}) has {own} for {kind.upper()}, the model's config.json {models}: "
                f"the tokenizer's is used. Does it belong to this model?"
            )
    return found


def check_unknown_tokens(tokenizer: Any, texts: Sequence[str], what: str = "dialogues") -> list[str]:
    """Count unknown tokens in some of the texts; returns what deserves a warning.

    Raises:
        ModelError: the tokenizer knows less than half of what stands there.
    """
    if tokenizer.unk_token_id is None or not texts:
        return []
    sample = list(texts[:_NUM_SAMPLED])
    rows = tokenizer(sample, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    num_tokens = sum(map(len, rows))
    num_unknown = sum(row.count(tokenizer.unk_token_id) for row in rows)
    share = num_unknown / max(num_tokens, 1)
    said = f"{share:.0%} of the tokens of the first {len(sample)} {what} are unknown to the tokenizer"
    if share > _MOSTLY_UNKNOWN:
        raise ModelError(f"{said}: it was made for other text; model.tokenizer names another one")
    return [f"{said}; what they stand for is lost"] if share > _MANY_UNKNOWN else []

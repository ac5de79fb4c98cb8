"""Does this tokenizer belong to this model? Ids alone do not tell: a smaller foreign vocabulary fits any embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ModelError
from .tokens import TokenizedSplit

_OTHER_MODELS = 0.5
"""Below this share of the embedding's rows the vocabulary is another model's: padding and added tokens are few."""
_SUSPICIOUS = 0.9
_MANY_UNKNOWN = 0.01
_MOSTLY_UNKNOWN = 0.5
_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>")
"""What corpora write between documents."""
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


def check_template(tokenizer: Any, template: str) -> list[str]:
    """Names of special tokens in the prompt's template: they are plain characters there, as in a dialogue."""
    known = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = sorted(name for name in known if name in template)
    if not found:
        return []
    return [f"data.prompt_template holds {', '.join(found)}: read as plain characters, not as special tokens"]


def check_text_rows(tokenizer: Any, rows: TokenizedSplit) -> list[str]:
    """Count unknown tokens in rows of running text, and names of its end that stand there as characters; returns what
    deserves a warning.

    Raises:
        ModelError: the tokenizer knows less than half of what stands there.
    """
    num_looked_at = min(len(rows), _NUM_SAMPLED)
    ids = rows.input_ids[: int(rows.offsets[num_looked_at])]
    doubts = []
    if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id):  # GPT-2's are all one
        share = float((ids == tokenizer.unk_token_id).double().mean())
        said = f"{share:.0%} of the tokens of the first {num_looked_at} rows are unknown to the tokenizer"
        if share > _MOSTLY_UNKNOWN:
            raise ModelError(f"{said}: it was made for other text; model.tokenizer names another one")
        if share > _MANY_UNKNOWN:
            doubts.append(f"{said}; what they stand for is lost")
    text = tokenizer.decode(ids[(ids != tokenizer.eos_token_id) & (ids != tokenizer.bos_token_id)].tolist())
    for name in _ENDS:
        if (num := text.count(name)) > 0:
            doubts.append(
                f"the first {num_looked_at} rows hold {name} {num} times: read as plain characters, not as the end of "
                "a document; give the documents as rows of a JSONL file, behind each of which an end is put"
            )
    return doubts


def check_rotation(model_config: Any, longest_row: int) -> str | None:
    """What deserves a warning where RoPE's frequencies are those of the longest row of a batch."""
    rope = getattr(model_config, "rope_parameters", None) or getattr(model_config, "rope_scaling", None) or {}
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if kind not in ("dynamic", "longrope"):
        return None
    border = rope.get("original_max_position_embeddings") or getattr(model_config, "max_position_embeddings", None)
    if border is None or longest_row <= border:
        return None
    return (
        f"the base model's RoPE ({kind}) turns all rows of a batch as its longest one where that is beyond {border} "
        f"tokens, and the longest here has {longest_row}: losses then depend on how rows are batched. Keep "
        f"data.max_length_tokens at {border}, or batches of one row"
    )


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

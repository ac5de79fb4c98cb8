"""`hedgehog generate` on the terminal: the text on standard output as it comes, what it took on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .errors import ConfigError
from .formatting import for_stream, format_bytes


def read_text(text: str | None, file: str | None) -> str:
    """The user's text: as given, out of a file (`-` is standard input), or, with neither, from standard input.

    Raises:
        ConfigError: both were given, or the file cannot be read or is not UTF-8.
    """
    if text is not None and file is not None:
        raise ConfigError("--text and --file: give one of them")
    if text is not None:
        return text
    try:
        if file is not None and file != "-":
            return Path(file).expanduser().read_text(encoding="utf-8-sig")
        if sys.stdin.isatty():
            print("Type or paste the dialogue; end it with Ctrl-D on a line of its own.", file=sys.stderr)
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise ConfigError(f"--file {file or '-'}: {reason}; give a text file in UTF-8") from None


def print_answers(
    run: str,
    text: str,
    *,
    raw: bool,
    variants: Sequence[str],
    overrides: Sequence[str],
    temperature: float,
    seed: int,
    as_json: bool,
) -> None:
    """Print what each variant makes of `text`; with several, each under its label.

    Raises:
        ConfigError, CheckpointError, ModelError, ResourceError: see `answers.answer`.
    """
    from .answers import Answer, Question, answer

    several = len(set(variants)) > 1

    def begin(_: str, label: str) -> None:
        if several and not as_json:
            print(f"{label}:", flush=True)

    def say(piece: str) -> None:
        if not as_json:
            print(piece, end="", flush=True)

    def facts(found: Answer) -> str:
        took = f"{found.seconds:.2f} s"
        if found.first_token_s is not None and found.num_new_tokens > 1:
            rate = (found.num_new_tokens - 1) / max(1e-9, found.seconds - found.first_token_s)
            took += f", {found.first_token_s:.2f} s of it to read; {rate:.0f} tokens/s"
        cut = " (cut at evaluate.max_new_tokens)" if found.truncated else ""
        tokens = f"{found.num_prompt_tokens} tokens read, {found.num_new_tokens} made{cut}"
        return f"{found.label}: {tokens} in {took}. Kept between tokens: {format_bytes(found.state_bytes)}"

    def report(message: str) -> None:
        print(for_stream(message, sys.stderr), file=sys.stderr, flush=True)

    question = Question(text, raw=raw, temperature=temperature, seed=seed)
    for found in answer(run, question, variants=variants, overrides=overrides, begin=begin, say=say, report=report):
        if as_json:
            print(json.dumps(asdict(found), ensure_ascii=False), flush=True)
        else:
            print("\n" if several else "", flush=True)
            report(facts(found))

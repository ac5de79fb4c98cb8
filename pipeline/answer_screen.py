"""`hedgehog generate` on the terminal: the text on standard output as it comes, what it took on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path

from .errors import ConfigError
from .formatting import for_stream, format_bytes


def read_text(text: str | None, file: str | None) -> str:
    """The user's text: as given, out of a file (`-` is standard input), or, with neither, from standard input.

    Raises:
        ConfigError: both were given, or the file cannot be read or is not UTF-8.
    """
    if text is not None:
        if file is not None:
            raise ConfigError("--text and --file: give one of them")
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of the command line that no character is made of
            raise ConfigError("--text: is not UTF-8 text") from None
        return text
    from_stdin = file in (None, "-")
    source = "standard input" if from_stdin else f"--file {file}"
    try:
        if file is not None and not from_stdin:
            return Path(file).expanduser().read_text(encoding="utf-8-sig")
        if sys.stdin is None:
            return ""
        if sys.stdin.isatty():
            print("Type or paste the dialogue; end it with Ctrl-D on a line of its own.", file=sys.stderr)
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: is not UTF-8 text; give a text file in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read ({error.strerror})") from None


def print_answers(
    run: str,
    *,
    text: str | None,
    file: str | None,
    raw: bool,
    variants: Sequence[str],
    overrides: Sequence[str],
    temperature: float,
    seed: int,
    as_json: bool,
) -> None:
    """Print what each variant makes of a text; with several, each under its label.

    Raises:
        ConfigError, CheckpointError, ModelError, ResourceError: see `read_text`, and `open_variants` and `answer` in
            answers.py.
    """
    from .answers import Answer, Question, answer, open_variants

    if isinstance(sys.stdout, TextIOWrapper):  # a terminal of another encoding shows what it can
        sys.stdout.reconfigure(errors="backslashreplace")
    opened = open_variants(run, variants, overrides)
    question = Question(read_text(text, file), raw=raw, temperature=temperature, seed=seed)
    several = len(opened) > 1

    def begin(_: str, label: str) -> None:
        if several and not as_json:
            print(f"{label}:", flush=True)

    def say(piece: str) -> None:
        print(piece, end="", flush=True)

    def facts(found: Answer) -> str:
        took = f"{found.seconds:.2f} s"
        if found.first_token_s is not None:
            took += f", {found.first_token_s:.2f} s of it to read"
        if found.tokens_per_s is not None:
            took += f"; {found.tokens_per_s:.0f} tokens/s"
        cut = " (cut at evaluate.max_new_tokens)" if found.truncated else ""
        tokens = f"{found.num_prompt_tokens} tokens read, {found.num_new_tokens} made{cut}"
        return f"{found.label}: {tokens} in {took}. Kept between tokens: {format_bytes(found.state_bytes)}"

    def report(message: str) -> None:
        print(for_stream(message, sys.stderr), file=sys.stderr, flush=True)

    for found in answer(question, opened, begin=begin, say=None if as_json else say, report=report):
        if as_json:
            print(json.dumps(asdict(found), ensure_ascii=not _holds_unicode()), flush=True)
        else:
            print("\n" if several else "", flush=True)
            report(facts(found))


def _holds_unicode() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"

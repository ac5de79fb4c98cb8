"""Long lines on a terminal: broken at blanks, what is copied stays whole. Sizes."""

from __future__ import annotations

import io

import pytest

from hedgehog.pipeline.formatting import for_stream, format_bytes, parse_bytes, wrapped


def test_lines_are_broken_at_blanks_and_indented():
    text = "error: config.yaml: 2 problems\n  model.base: " + "no such folder; " * 8 + "\n  short"
    lines = wrapped(text, 60)
    assert lines[0] == "error: config.yaml: 2 problems" and lines[-1] == "  short"
    assert all(len(line) <= 60 for line in lines)
    assert [len(line) - len(line.lstrip()) for line in lines[1:-1]] == [2, *[6] * (len(lines) - 3)]
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_paths_and_commands_stay_whole():
    command = "`hedgehog run runs/trial/config.resolved.yaml finetune.epochs=3`"
    path = "/scratch/" + "folder-name/" * 9
    lines = wrapped(f"the stage has not run in {path} yet, so give the command {command} now", 60)
    assert any(command in line for line in lines) and any(path in line for line in lines)


def test_an_empty_and_a_narrow_terminal():
    assert wrapped("", 80) == [""]
    assert wrapped("one two", 1) == ["one two"]


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminals_messages_are_wrapped(terminal: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    assert ("\n" in for_stream("word " * 20, stream)) == terminal


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("7B", 7), ("2TiB", 2**41), ("1TB", 10**12)],
)
def test_a_size_is_read(text: str, num_bytes: int):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("num_bytes", [3, 5 * 2**10, 7 * 2**20 + 2**19, 2**30, 2**40])
def test_a_size_is_read_as_it_is_shown(num_bytes: int):
    assert parse_bytes(format_bytes(num_bytes)) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "big", "5", "GB", "0GB", "0.0001KB", "-1GB", "5gb", "5 GB ", "5GBit", "5iB", "٥B"]
)
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ValueError, match="expected a size such as 5GB"):
        parse_bytes(text)

"""What tests ask of a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from typer.testing import CliRunner

from hedgehog.pipeline import cli

SECTIONS = ["results", "stage-one", "stage-two", "cost", "summaries", "provenance"]


def invoke(*arguments: object) -> Any:
    """`hedgehog report`."""
    return CliRunner().invoke(cli.app, ["report", *(str(argument) for argument in arguments)])


def read(file: Path) -> ElementTree.Element:
    """The page, which is well-formed XML behind its first line."""
    first, _, rest = file.read_text().partition("\n")
    assert first == "<!DOCTYPE html>"
    return ElementTree.fromstring(re.sub(r' xmlns="[^"]*"', "", rest))


def text(element: ElementTree.Element | None) -> str:
    """All that is written in it, blanks joined."""
    assert element is not None
    return " ".join(" ".join(element.itertext()).split())


def section(page: ElementTree.Element, name: str) -> ElementTree.Element:
    """The section with this id."""
    found = next((e for e in page.iter("section") if e.get("id") == name), None)
    assert found is not None, name
    return found


def rows(element: ElementTree.Element) -> list[list[str]]:
    """Cells of its tables, headings too."""
    return [[text(cell) for cell in row] for row in element.iter("tr")]

"""The whole page: the sections in the order in which a colleague would ask."""

from __future__ import annotations

from datetime import datetime

from ..config import LABELLED_KINDS
from .cost import cost
from .headline import headline
from .markup import Markup, raw, tag
from .mistakes import mistakes
from .provenance import provenance
from .results import results
from .run_files import RunFiles
from .scores import Scores, read_scores
from .staleness import find_stale
from .style import STYLE
from .summaries import summaries
from .training import stage_one, stage_two


def page(run: RunFiles, written_at: datetime) -> str:
    """One HTML file that needs no other: style and charts are in it, and nothing in it is a script or a link outward.

    Args:
        written_at: for the foot of the page; UTC.
    """
    stale = find_stale(run)
    scores = read_scores(run.folder.stage("evaluate") / "rouge.json", run.kind)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content_="width=device-width, initial-scale=1"),
        tag("title", f"{run.name}: a {run.converted_to} conversion"),
        tag("style", raw(STYLE)),
    )
    body = tag(
        "body",
        headline(run, scores, stale),
        tag(
            "main",
            results(run, scores, stale),
            stage_one(run),
            stage_two(run),
            cost(run, stale),
            _samples(run, scores),
            provenance(run),
        ),
        tag("footer", f"Written by hedgehog report on {written_at:%Y-%m-%d %H:%M} UTC."),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _samples(run: RunFiles, scores: Scores | str) -> Markup | None:
    """What the conversions made of some test rows: of running text nothing that could be shown."""
    if run.kind == "text":
        return None
    return mistakes(run, scores) if run.kind in LABELLED_KINDS else summaries(run)

"""The top of the page: what was converted, what came of it in one sentence, what is done."""

from __future__ import annotations

from collections import Counter

from ..config import LABELLED_KINDS
from ..go_on import shown
from ..model_card import base_name, short_name
from ..run_folder import MAIN, STAGES
from ..score_table import comparison_lines, table_columns, table_rows
from ..status import StageStatus
from .blocks import prose
from .markup import Markup, joined, tag
from .run_files import RunFiles, status_command
from .scores import Scores
from .staleness import Stale

_SIGNS = {"done": "✓", "skipped": "✓", "unfinished": "…", "not started": "–", "stale": "!"}


def headline(run: RunFiles, scores: Scores | str, stale: Stale) -> Markup:
    """Name, result, facts, stages, and the commands that go on where the run is not finished."""
    facts = _facts(run)
    what_next = [_to_renew(stale), _to_go_on(run)]
    if stale.input_unfinished:
        what_next.reverse()
    return tag(
        "header",
        tag("p", f"{run.converted_to} conversion", class_="kicker"),
        tag("h1", run.name),
        tag("p", f"made as {run.config.name}", class_="note") if run.config and run.config.name != run.name else None,
        tag("p", _result(scores), class_="lead") if isinstance(scores, Scores) else None,
        tag("dl", *(joined(tag("dt", name), tag("dd", value)) for name, value in facts.items())) if facts else None,
        tag("ol", *(_stage(run, stage, stale) for stage in STAGES), class_="stages"),
        *(tag("p", f"{title}: {error}", class_="warning") for title, error in _errors(run)),
        *what_next,
    )


def _to_renew(stale: Stale) -> Markup | None:
    if not stale.titles:
        return None
    said = f"Out of date: {stale.reasons()}."
    said += f" So is what follows: {', '.join(stale.following)}." if stale.following else ""
    if len(stale.commands) == 1:
        return prose(f"{said} To make it again: `{stale.commands[0]}`", "warning")
    listed = tag("ol", *(tag("li", tag("code", command)) for command in stale.commands))
    return joined(prose(f"{said} To make them again, in this order:", "warning"), listed)


def _to_go_on(run: RunFiles) -> Markup | None:
    running = [files.status.title for files in run.begun if files.may_run]
    said = "Not finished."
    if running:
        said += f" {' and '.join(running)} may be running: files were written there just before this page."
    if run.submitted is not None:
        said += f" Submitted to Slurm: `{status_command(run.folder)}` says what its jobs do"
        return prose(said + (f"; `{shown(run.submitted)}` submits what is missing." if run.submitted else "."))
    to_go_on = "Where nothing runs any more, to go on" if running else "To go on"
    if len(run.commands) < 2:
        return prose(f"{said} {to_go_on}: `{run.commands[0]}`") if run.commands else None
    listed = tag("ol", *(tag("li", tag("code", command)) for command in run.commands))
    return joined(prose(f"{said} {to_go_on}, in this order:"), listed)


def _facts(run: RunFiles) -> dict[str, str]:
    if run.config is None:
        return {}
    model, data = run.config.model, run.config.data
    facts = {"Base model": base_name(run.config)}
    if model.attention == "softmax":
        facts["Attention"] = "softmax, as in the base model"
    else:
        width = "as wide as a head" if model.feature_dim is None else f"{model.feature_dim} wide"
        facts["Attention"] = f"linear, feature map {model.feature_map}, {width}"
    source = data.train_file or data.dataset
    if source is not None and run.config.tiny is None:
        facts["Data"] = short_name(source) if data.train_file is None else source.rpartition("/")[2]
    others = [label for name, label in run.labels.items() if name != MAIN]
    if others:
        facts["Compared with"] = ", ".join(others)
    return facts


def _result(scores: Scores) -> str:
    """How the main conversion compares with the softmax baseline, or what it scores where there is none."""
    main = {name: scores.figures[name] for name in (MAIN, scores.reference) if name in scores.figures}
    if scores.reference != MAIN:
        for line in comparison_lines(main, scores.reference):
            return f"{line}."
    if MAIN not in main:
        return ""
    nothing = {name: {"minutes": None, "peak_memory_bytes": None} for name in main}
    row = dict(zip(table_columns(main)[0], table_rows(main, nothing)[0], strict=True))
    if "accuracy" in row:
        said = [
            f"accuracy is {row['accuracy']}",
            f"F1 {row['F1']}",
            f"MCC {row['MCC']}",
            f"loss {row['loss']} nats a row",
        ]
    elif "Pearson" in row:
        said = [
            f"Pearson correlation is {row['Pearson']}",
            f"Spearman {row['Spearman']}",
            f"squared error {row['sq. error']}",
        ]
    else:
        said = [f"ROUGE-1 is {row['ROUGE-1']}"] if "ROUGE-1" in row else []
        said += [f"loss {row['loss']} nats a token"] if row["loss"] != "–" else []
        said += [f"perplexity {row['perplexity']}"] if "ROUGE-1" not in row else []
    return f"{row['variant']}: {', '.join(said)}."


def _stage(run: RunFiles, stage: str, stale: Stale) -> Markup:
    whole = [status for status in run.statuses if status.stage == stage and not status.layers and not status.shard]
    main = next(status for status in whole if status.variant is None)
    others = Counter(
        status.state in ("done", "skipped") and status.title not in stale.titles
        for status in whole
        if status.variant is not None
    )
    parts = [
        s.state == "done" for s in run.statuses if s.stage == stage and s.variant is None and (s.layers or s.shard)
    ]
    said, state = _state(main, run), main.state
    if state == "not started" and parts:
        said, state = f"in parts, {sum(parts)} of {len(parts)} done", "unfinished"
    if main.title in stale.titles:
        said, state = f"{said}, but out of date", "stale"
    beside = f"; {others[True]} of {others.total()} variants done" if others else ""
    return tag(
        "li",
        tag("span", _SIGNS[state], class_="sign", aria_hidden="true"),
        tag("strong", stage),
        f" {said}{beside}",
        class_=state.replace(" ", "-"),
    )


def _state(status: StageStatus, run: RunFiles) -> str:
    if status.state == "skipped":
        return "had nothing to do"
    if status.state != "unfinished" or status.step is None:
        return status.state
    rows = "rows" if run.kind in ("text", *LABELLED_KINDS) else "summaries"
    what = rows if status.stage == "evaluate" else "steps"
    return f"unfinished, {status.step:,} of {status.total_steps:,} {what}" if status.total_steps else status.state


def _errors(run: RunFiles) -> list[tuple[str, str]]:
    return [(status.title, " ".join(status.error.split())[:500]) for status in run.statuses if status.error]

"""Both training stages: the KL of every layer, and what was recorded step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .bar_chart import Bar, bar_chart
from .blocks import count, figure, prose, section, wide_and_narrow
from .chart import legend
from .curve import MAX_MARKS, Curve, read_curve
from .line_chart import line_chart
from .markup import Markup, tag
from .run_files import RunFiles, StageFiles
from .scale import is_drawable

_KL = "KL to softmax attention, nats"
_LOSSES = {
    "text": "loss, nats a token",
    "classification": "loss, nats a row",
    "regression": "squared error a row",
    "dialogues": "loss, nats a token of the summary",
}
_LEARNT = {
    "text": "LoRA adapters learn on running text; the loss is that of all tokens but each row's first.",
    "classification": "LoRA adapters and the head learn to classify; the loss is that of each row's label.",
    "regression": "LoRA adapters and the head learn to score; the loss is the squared error of each row's score.",
    "dialogues": "LoRA adapters learn to summarize dialogues; the loss is that of the summaries' tokens.",
}
"""By `data.kind`; nothing else was known before there was that key."""
_LOW = 1 / 3
"""Below this part of the highest value a variant's bars get an axis of their own."""
_MANY_LAYERS = 40
"""From here on a panel of bars takes the page's width."""


def stage_one(run: RunFiles) -> Markup:
    """KL per layer of every variant that has maps, and the KL by step of those that were trained."""
    panels, same_axis, faults = _layers(run)
    curves = _curves(run, "distill", "kl_nats", "validation_kl_nats")
    content: list[Markup | None] = [
        prose(
            "Feature maps learn, layer by layer, to reproduce the frozen softmax attention. Their figure is the KL "
            "divergence of the linear from the softmax attention, in nats: zero is a perfect imitation."
        )
    ]
    if panels:
        note = ["A bar is the mean over a layer's heads, its thin line goes from the best head to the worst."]
        note += [] if same_axis else ["The vertical axes differ: small values are enlarged."]
        content.append(figure("KL per layer on validation rows", tag("div", *panels, class_="panels"), note=note))
    elif not faults:
        content.append(_missing(run, "distill", "No KL per layer"))
    content += [prose(fault, "warning") for fault in faults]
    content.append(_by_step("kl-by-step", curves, "KL by step", _KL, from_zero=True))
    if panels and not any(not curve.is_empty for curve in curves):
        content.append(prose("No steps were recorded: no maps were trained.", "note"))
    return section("stage-one", "Stage one: distill", *content)


def stage_two(run: RunFiles) -> Markup:
    """The training loss by step of every variant."""
    kind = run.kind if run.kind in _LEARNT else "dialogues"
    name = "loss_mse" if kind == "regression" else "loss_nats"
    curves = _curves(run, "finetune", name, f"validation_{name}")
    chart = _by_step("loss-by-step", curves, "Training loss by step", _LOSSES[kind])
    return section(
        "stage-two",
        "Stage two: finetune",
        prose(_LEARNT[kind]),
        chart if chart is not None else _missing(run, "finetune", "No losses"),
    )


def _missing(run: RunFiles, stage: str, what: str) -> Markup:
    whole = run.whole(stage)
    if whole is not None and whole.status.state == "skipped":
        return prose(f"{what}: {whole.status.detail}.", "note")
    state = "has not begun" if whole is None else "has recorded none"
    return prose(f"{what}: {stage} {state}.{run.what_makes('them')}", "note")


def _curves(run: RunFiles, stage: str, name: str, mark: str) -> list[Curve]:
    """Of every variant, and of every subset of layers, which was a training of its own."""
    found = [files for files in run.of_stage(stage) if files.status.shard is None]
    in_parts = any(files.is_part for files in found)
    curves = []
    for files in found:
        layers = f", layers {files.status.layers}" if files.status.layers else ""
        curve = read_curve(run.labels[files.variant] + layers, run.style(files.variant), files.records, name, mark)
        if not curve.is_empty or curve.num_left_out:
            curves.append(replace(curve, style=len(curves)) if in_parts else curve)
    return curves


def _by_step(
    identifier: str, curves: Sequence[Curve], title: str, unit: str, *, from_zero: bool = False
) -> Markup | None:
    wide, narrow = (
        line_chart(
            f"{identifier}-{name}", curves, title=title, unit=unit, from_zero=from_zero, width=width, height=height
        )
        for name, width, height in (("wide", 832.0, 330.0), ("narrow", 360.0, 270.0))
    )
    if wide is None:
        num_bad = sum(curve.num_left_out for curve in curves)
        return prose(f"{title}: none of {count(num_bad, 'value')} is a finite number.", "warning") if num_bad else None
    shown = [curve for curve in curves if not curve.is_empty]
    entries = legend([(curve.label, curve.style) for curve in shown])
    return figure(title, entries, wide_and_narrow(wide, narrow), note=_how_to_read(curves))


def _how_to_read(curves: Sequence[Curve]) -> list[str]:
    said = []
    most = max(curve.steps_per_point for curve in curves)
    if most > 1:
        each = "" if all(curve.steps_per_point == most for curve in curves) else "up to "
        said.append(f"Each point of a line is the mean over {each}{count(most, 'recorded step')}.")
    windows = sorted({curve.smooth_steps for curve in curves if curve.smooth})
    if windows:
        steps = " or ".join(f"{window:,}" for window in windows)
        said.append(f"Thick lines are running means over {steps} steps, thin ones what they are made of.")
    if any(curve.marks for curve in curves):
        said.append("Marks: on validation rows.")
    if any(curve.num_marks > len(curve.marks) for curve in curves):
        said.append(f"Of each line at most {MAX_MARKS} marks are shown, evenly chosen.")
    num_bad = sum(curve.num_left_out for curve in curves)
    if num_bad:
        said.append(f"{count(num_bad, 'value')} left out: no finite number.")
    return said


def _layers(run: RunFiles) -> tuple[list[Markup], bool, list[str]]:
    """A panel for every variant that has layers, whether all have the same axis, and what cannot be shown.

    They have, but where a variant's values would be too low to be told apart.
    """
    found = {name: _bars(run, name) for name in run.labels}
    tops = {name: max((v for bar in bars for v in bar.values()), default=0.0) for name, (bars, *_) in found.items()}
    highest = max(tops.values())
    drawn = {name for name, (bars, *_) in found.items() if any(is_drawable(bar.value) for bar in bars)}
    enlarged = {name for name in drawn if tops[name] < _LOW * highest}
    panels, faults = [], []
    for name, (bars, trained, unreadable) in found.items():
        faults += unreadable
        width = 400.0 if len(bars) <= _MANY_LAYERS else 832.0
        label = run.labels[name]
        chart = bar_chart(
            f"kl-per-layer-{run.style(name)}",
            bars,
            title=f"KL per layer, {label}",
            unit=_KL,
            style=run.style(name),
            highest=tops[name] if name in enlarged else highest,
            width=width,
        )
        if bars:
            num_bad = sum(not is_drawable(bar.value) for bar in bars)
            mean = f"mean {sum(bar.value for bar in bars) / len(bars):.4f}"
            said = f"{count(num_bad, 'layer')} not finite" if num_bad else mean
            said += "" if trained else "; not trained"
            panels.append(tag("div", tag("p", tag("strong", label), f" {said}", class_="panel-title"), chart))
    return panels, not enlarged, faults


def _bars(run: RunFiles, name: str) -> tuple[list[Bar], bool, list[str]]:
    """A variant's layers, of the whole stage or else of the subsets that are done; whether its maps learnt; faults."""
    whole = run.whole("distill", name)
    places = [files for files in run.of_stage("distill") if files.variant == name and files.is_part]
    if whole is not None and "kl_per_layer" in whole.manifest.summary:
        places = [whole]
    bars: dict[int, Bar] = {}
    faults = []
    for files in places:
        try:
            bars |= {bar.layer: bar for bar in _of_summary(files)}
        except (TypeError, ValueError):  # edited, or of another version
            faults.append(f"The KL per layer in the manifest of {files.status.title} cannot be read.")
    trained = any(files.manifest.summary.get("steps") for files in places)
    return [bars[layer] for layer in sorted(bars)], trained, faults


def _of_summary(files: StageFiles) -> list[Bar]:
    """The layers that a stage noted; what is no finite number stays in, not to be drawn.

    Raises:
        TypeError, ValueError: the manifest holds something else there.
    """
    summary: dict[str, Any] = files.manifest.summary
    means = summary.get("kl_per_layer", [])
    layers = summary.get("layers", range(len(means)))  # a merged stage has them all
    heads = summary.get("kl_per_head", [[] for _ in means])
    bars = []
    for layer, mean, kl_H in zip(layers, means, heads, strict=True):
        known = [kl for kl in kl_H if is_drawable(kl)]
        bars.append(Bar(int(layer), mean, min(known, default=None), max(known, default=None)))
    return bars

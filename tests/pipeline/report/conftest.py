"""A finished run as files alone, and readers of what the charts draw."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.config_loading import dump_resolved
from hedgehog.pipeline.manifest import Artifact, Manifest

LABELS = {"main": "Hedgehog & LoRA", "soft": "softmax <b>", "t2r": "T2R"}
NUM_ROWS = 8


class RunWriter:
    """Writes stages of a run as they lie on the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True)

    def config(self, **values: Any) -> None:
        config = {
            "name": self.root.name,
            "label": LABELS["main"],
            "model": {"base": "some/llama"},
            "data": {"dataset": "some/rows"},
            "variants": {
                "soft": {"label": LABELS["soft"], "overrides": {"model.attention": "softmax"}},
                "t2r": {"label": LABELS["t2r"], "overrides": {"model.feature_map": "relu"}},
            },
        }
        resolved = dump_resolved(RunConfig.model_validate({**config, **values}))
        (self.root / "config.resolved.yaml").write_text(resolved)

    def stage(self, place: str, records: list[dict[str, Any]] | None = None, **fields: Any) -> Path:
        folder = self.root / place
        folder.mkdir(parents=True)
        parts = place.split("/")
        values = {"status": "done", "fingerprint": "f" * 64, "config": {}, "versions": {"torch": "2.11"}}
        values |= {"command": ["hedgehog", "run", "c.yaml"], "duration_s": 90.0, "peak_memory_bytes": 3 << 30}
        if parts[0] == "variants":
            values["variant"] = parts[1]
        stage = next(name for name in reversed(parts) if not name.startswith("layers-"))
        Manifest(stage=stage, **{**values, **fields}).write(folder)
        if records is not None:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder

    def age(self, minutes: float = 60.0) -> None:
        """As if nothing had been written lately."""
        then = time.time() - 60 * minutes
        for path in self.root.rglob("*"):
            os.utime(path, (then, then))

    def scores(self, **variants: dict[str, Any]) -> None:
        """rouge.json as evaluate writes it, of variants by name to what differs from the default."""
        figure = {"value": 40.0, "low": 38.0, "high": 42.0}
        subset = {
            "num_examples": NUM_ROWS,
            **dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), figure),
            "loss_nats_per_token": {"value": 1.25, "low": 1.2, "high": 1.3},
            "perplexity": {"value": 3.49, "low": 3.3, "high": 3.7},
        }
        content = {
            "settings": {
                "generation": {"max_new_tokens": 40, "min_new_tokens": 0, "num_beams": 1, "no_repeat_ngram_size": 0},
                "intervals": {"kind": "percentile bootstrap", "level": 0.95, "samples": 1000, "seed": 0},
                "precision": "float32",
            },
            "num_examples": NUM_ROWS,
            "num_examples_seen_in_train": 1,
            "num_references_that_rouge_cannot_score": 0,
            "softmax_reference": "soft",
            "variants": {
                name: {
                    "label": LABELS.get(name, name),
                    "kl_mean_nats": None,
                    "all": {**subset, **changes},
                    "unseen": None,
                }
                for name, changes in variants.items()
            },
        }
        (self.root / "evaluate" / "rouge.json").write_text(json.dumps(content))

    def dialogues(self, texts: list[str]) -> None:
        """prepare's test rows; the first stands in train."""
        rows = [
            {"id": f"d{number}", "dialogue": text, "summary": f"reference {number}"}
            for number, text in enumerate(texts)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        artifacts = {"examples_test": Artifact(path="examples_test.jsonl", sha256="e" * 64, num_bytes=len(lines))}
        folder = self.stage("prepare", artifacts=artifacts)
        (folder / "examples_test.jsonl").write_text(lines)

    def predictions(self, name: str, summaries: list[str]) -> None:
        folder = self.root / "evaluate" / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "index": index,
                "id": f"d{index}",
                "prediction": summary,
                "reference": f"reference {index}",
                "seen_in_train": index == 0,
                "num_tokens": 3,
                "truncated": False,
            }
            for index, summary in enumerate(summaries)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def steps(num: int, name: str, validation: str, *, every: int = 10, start: float = 3.0) -> list[dict[str, Any]]:
    """metrics.jsonl of a training whose loss falls as 1 / sqrt(step)."""
    records: list[dict[str, Any]] = []
    for step in range(1, num + 1):
        value = start / step**0.5
        record = {"step": step, "tokens": 1000, name: value, "step_s": 0.5, "memory_bytes": 1}
        records.append(record | ({validation: value + 0.1} if step % every == 0 else {}))
    return records


@pytest.fixture
def training_records() -> Callable[..., list[dict[str, Any]]]:
    return steps


@pytest.fixture
def new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunWriter:
    """`runs/trial`, with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return RunWriter(Path("runs/trial"))


@pytest.fixture
def finished(new_folder: RunWriter) -> RunWriter:
    """A finished run with a softmax baseline and an untrained variant."""
    run = new_folder
    run.config()
    run.dialogues([f"Ann: hello number {number}\nBob: hi" for number in range(NUM_ROWS)])
    kl = {"kl_mean": 0.25, "kl_per_layer": [0.2, 0.3], "kl_per_head": [[0.1, 0.3], [0.3, 0.3]], "layers": [0, 1]}
    run.stage("distill", steps(60, "kl_nats", "validation_kl_nats"), summary={**kl, "steps": 60})
    run.stage("finetune", steps(60, "loss_nats", "validation_loss_nats"), summary={"validation_loss": 1.0})
    run.stage("variants/soft/distill", skipped="model.attention is softmax: there are no feature maps")
    run.stage("variants/soft/finetune", steps(60, "loss_nats", "validation_loss_nats", start=2.5))
    run.stage("variants/t2r/distill", [], summary={**kl, "kl_mean": 0.5, "kl_per_layer": [0.4, 0.6], "steps": 0})
    run.stage("variants/t2r/finetune", steps(60, "loss_nats", "validation_loss_nats", start=4.0))
    training = {"minutes": 3.0, "peak_memory_bytes": 3 << 30}
    run.stage("evaluate", [], summary={"training": dict.fromkeys(LABELS, training)})
    compared = {
        "rouge1_ratio": {"value": 0.95, "low": 0.9, "high": 1.0},
        "loss_gap_nats_per_token": {"value": 0.1, "low": 0.05, "high": 0.15},
    }
    run.scores(main=compared, soft={}, t2r=compared)
    for name in LABELS:
        run.predictions(name, [f"{name} says {number}" for number in range(NUM_ROWS)])
    run.stage("export")
    return run


class Drawing:
    """A chart as it was drawn: where its axes have their ticks, and so which value a pixel stands for."""

    def __init__(self, svg: str) -> None:
        self.root = ElementTree.fromstring(svg.replace(' xmlns="http://www.w3.org/2000/svg"', ""))
        self.width, self.height = (float(number) for number in self.root.attrib["viewBox"].split()[2:])

    def all(self, name: str, class_: str | None = None) -> list[ElementTree.Element]:
        return [e for e in self.root.iter(name) if class_ is None or e.get("class") == class_]

    def texts(self) -> list[str]:
        return [element.text or "" for element in self.root.iter("text")]

    def described(self) -> str:
        return self.root.findtext("desc") or ""

    def ticks(self, axis: str) -> list[tuple[float, float]]:
        """(pixel, value) along `x` or `y`: the lines of the ticks, and what stands beside each."""
        anchor = "end" if axis == "y" else "middle"
        texts = [e.text or "" for e in self.all("text", "tick") if e.get("text-anchor") == anchor]
        lines = self.all("line", "grid" if axis == "y" else "axis")
        along = [float(e.attrib[f"{axis}1"]) for e in lines if e.get(f"{axis}1") == e.get(f"{axis}2")]
        return [(pixel, float(text.replace(",", ""))) for pixel, text in zip(along, texts, strict=True)]

    def value(self, axis: str, pixel: float) -> float:
        """What stands at a pixel, by a straight line through the first tick and the last."""
        ticks = self.ticks(axis)
        (p0, v0), (p1, v1) = ticks[0], ticks[-1]
        return v0 + (pixel - p0) / (p1 - p0) * (v1 - v0)


@pytest.fixture
def drawn() -> Callable[[str | None], Drawing]:
    def read(svg: str | None) -> Drawing:
        assert svg is not None
        return Drawing(svg)

    return read


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the operating system refuse a file, or all in a folder; root, as whom tests may run, may read any."""

    def forbid(name: str) -> None:
        def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Any, *arguments: Any, **options: Any) -> Any:
                if isinstance(path, (str, Path)) and name in Path(path).parts:
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                return function(path, *arguments, **options)

            return call

        monkeypatch.setattr("io.open", refusing(open))  # what pathlib calls
        monkeypatch.setattr("pathlib.Path.stat", refusing(Path.stat))
        monkeypatch.setattr("pathlib.Path.mkdir", refusing(Path.mkdir))

    return forbid

"""Which stages are out of date, and what makes them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hedgehog.pipeline.manifest import Artifact, read_manifest
from hedgehog.pipeline.report.writing import write_report

from .reading import read, rows, section, text


def test_scores_of_earlier_weights_are_called_that(finished):
    manifest = json.loads((finished.root / "evaluate/manifest.json").read_text())
    tuned = read_manifest(finished.root / "variants/t2r/finetune")
    assert tuned is not None
    for digest, expected in ((tuned.output_fingerprint, False), ("0" * 64, True)):
        manifest["consumed"] = {"t2r/finetune": digest, "data": "1" * 64}
        (finished.root / "evaluate/manifest.json").write_text(json.dumps(manifest))
        said = text(section(read(write_report("trial")), "results"))
        assert ("scores of earlier weights: t2r/finetune ran anew since" in said) == expected


def link_inputs(root: Path) -> None:
    """Notes in every manifest what its stage consumed, as the runner does."""

    def digest(place: str) -> str:
        manifest = read_manifest(root / place)
        assert manifest is not None
        return manifest.output_fingerprint

    def consume(place: str, **consumed: str) -> None:
        manifest = read_manifest(root / place)
        assert manifest is not None
        manifest.model_copy(update={"consumed": {key: digest(of) for key, of in consumed.items()}}).write(root / place)

    scored = {"prepare": "prepare", "distill": "distill", "finetune": "finetune"}
    for prefix, name in (("", "main"), ("variants/soft/", "soft"), ("variants/t2r/", "t2r")):
        consume(f"{prefix}distill", prepare="prepare")
        consume(f"{prefix}finetune", prepare="prepare", distill=f"{prefix}distill")
        scored |= {f"{name}/prepare": "prepare"}
        scored |= {f"{name}/{stage}": f"{prefix}{stage}" for stage in ("distill", "finetune")}
    consume("evaluate", **scored)
    consume("export", prepare="prepare", distill="distill", finetune="finetune")


def make_anew(folder: Path, **values: Any) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    artifacts = {"made": Artifact(path="manifest.json", sha256="9" * 64, num_bytes=1)}
    manifest.model_copy(update={"artifacts": artifacts, **values}).write(folder)


C = "runs/trial/config.resolved.yaml"
AGAIN = "To make them again, in this order:"


@pytest.mark.parametrize(
    ("place", "said", "out_of_date"),
    [
        (
            "distill",
            "Out of date: finetune (distill ran anew since). So is what follows: evaluate, export. "
            f"{AGAIN} hedgehog finetune {C} --force hedgehog evaluate {C} --force hedgehog export {C} --force",
            ["finetune", "evaluate", "export"],
        ),
        (
            "variants/t2r/distill",
            "Out of date: t2r/finetune (t2r/distill ran anew since). So is what follows: evaluate. "
            f"{AGAIN} hedgehog finetune {C} --force --variant t2r hedgehog evaluate {C} --force",
            ["finetune", "evaluate"],
        ),
        (
            "finetune",
            "Out of date: evaluate (finetune ran anew since); export (finetune ran anew since). "
            f"{AGAIN} hedgehog evaluate {C} --force hedgehog export {C} --force",
            ["evaluate", "export"],
        ),
        (
            "variants/t2r/finetune",
            f"Out of date: evaluate (t2r/finetune ran anew since). To make it again: hedgehog evaluate {C} --force",
            ["evaluate"],
        ),
        (
            "prepare",
            "Out of date: distill (prepare ran anew since); t2r/distill (prepare ran anew since); "
            "soft/finetune (prepare ran anew since). So is what follows: finetune, t2r/finetune, evaluate, export. ",
            ["distill", "finetune", "finetune", "finetune", "distill", "evaluate", "export"],
        ),
    ],
)
def test_the_first_stage_that_is_out_of_date_is_named_and_what_follows(finished, place, said, out_of_date):
    link_inputs(finished.root)
    assert "ut of date" not in text(read(write_report("trial")))
    make_anew(finished.root / place)
    page = read(write_report("trial"))
    header = page.find("body/header")
    assert said in text(header)
    cost = rows(section(page, "cost"))
    assert sorted(row[0] for row in cost if row[2] == "done, out of date") == sorted(out_of_date)
    assert "! evaluate done, but out of date" in text(header) and "✓ evaluate" not in text(header)
    assert "These are scores of earlier weights: " in text(section(page, "results"))


def test_scores_of_stale_weights_are_stale_though_made_since(finished):
    """Evaluate ran after distill was made anew, but scored the finetune of before."""
    link_inputs(finished.root)
    before = read_manifest(finished.root / "finetune")
    make_anew(finished.root / "distill")
    link_inputs(finished.root)
    assert before is not None
    before.write(finished.root / "finetune")
    header = text(read(write_report("trial")).find("body/header"))
    assert "Out of date: finetune (distill ran anew since). So is what follows: evaluate, export." in header


def test_subsets_are_made_again_before_they_are_merged(finished):
    prepare = read_manifest(finished.root / "prepare")
    assert prepare is not None
    consumed = {"prepare": prepare.output_fingerprint}
    for layers in ("0", "1"):
        finished.stage(f"distill/layers-{layers}", consumed=consumed, summary={"layers": [int(layers)]})
    link_inputs(finished.root)
    make_anew(finished.root / "prepare")
    header = text(read(write_report("trial")).find("body/header"))
    subsets = " ".join(f"hedgehog distill {C} --layers {layers} --force" for layers in ("0", "1"))
    assert f"{AGAIN} {subsets} hedgehog merge {C} --force hedgehog distill {C} --force --variant t2r" in header


def test_an_input_that_is_being_made_anew_comes_first(finished):
    link_inputs(finished.root)
    make_anew(finished.root / "distill", status="running")
    finished.age()
    header = text(read(write_report("trial")).find("body/header"))
    assert header.index("To go on") < header.index("Out of date: finetune (distill ran anew since)")

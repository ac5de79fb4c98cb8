"""A sweep: several sets of overrides, a run folder each; names that collide are refused before all else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hedgehog.pipeline.errors import ConfigError
from hedgehog.pipeline.slurm.submission import submit
from hedgehog.pipeline.slurm.sweep import read_sweep


def sweep(text: str) -> Path:
    file = Path("sweep.yaml")
    file.write_text(text)
    return file


def names(file: Path) -> list[str]:
    return [run.overrides[-1].removeprefix("name=") for run in read_sweep(file, "trial.yaml")]


def test_a_grid_is_every_combination(write_config):
    file = sweep("grid:\n  seed: [0, 1]\n  model.feature_map: [relu, hedgehog_exp]\n")
    assert names(file) == [
        f"trial-seed{seed}-feature_map_{kind}" for seed in (0, 1) for kind in ("relu", "hedgehog_exp")
    ]
    assert read_sweep(file, "trial.yaml")[1].overrides[:2] == ("seed=0", "model.feature_map=hedgehog_exp")


def test_a_list_of_runs_with_and_without_names(write_config):
    file = sweep("runs:\n  - {name: slow, finetune.learning_rate: 1e-5}\n  - {seed: 1}\n")
    assert names(file) == ["trial-slow", "trial-seed1"]


def test_each_run_gets_a_graph_and_a_folder(slurm, write_config):
    submit("trial.yaml", sweep=str(sweep("grid: {seed: [0, 1]}")))
    assert len(slurm.calls("sbatch")) == 16
    for seed in (0, 1):
        folder = Path(f"runs/trial-seed{seed}/slurm")
        assert f"seed={seed} name=trial-seed{seed})" in (folder / "prepare.sbatch").read_text()
        command = json.loads((folder / "jobs.json").read_text())["command"]
        assert command == ["hedgehog", "submit", "trial.yaml", "--sweep", "sweep.yaml"]
    slurm.forget_calls()
    submit("trial.yaml", sweep=str(sweep("grid: {seed: [0, 1, 2]}")))
    assert len(slurm.calls("sbatch")) == 8


def test_configs_are_an_axis_of_their_own(slurm, write_config):
    Path("other.yaml").write_text(write_config().read_text().replace("name: trial", "name: other"))
    file = sweep("configs: [other.yaml, trial.yaml]\ngrid: {seed: [0, 1]}")
    assert names(file) == ["trial-seed0", "trial-seed1", "other-seed0", "other-seed1"]
    submit("trial.yaml", ["variants.soft="], last="prepare", sweep=str(sweep("configs: [other.yaml]")))
    assert (
        "ARGUMENTS=(prepare other.yaml variants.soft= name=other)"
        in Path("runs/other/slurm/prepare.sbatch").read_text()
    )
    assert Path("runs/trial/slurm/prepare.sbatch").is_file() and len(slurm.calls("sbatch")) == 2
    with pytest.raises(ConfigError, match=r"output_dir: runs/trial/trial-seed0 lies in the run folder .*runs/trial;"):
        submit("trial.yaml", ["output_dir=runs/trial"], sweep=str(sweep("grid: {seed: [0]}")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs: [{name: a, seed: 1}, {name: a, seed: 2}]", r"share the folder .*trial-a: \(seed=1\) and \(seed=2\)"),
        ("grid: {seed: [1, 1]}", "share the folder"),
        ("runs: [{name: a, seed: 1}, {name: A, seed: 2}]", r"trial-a and \S+trial-A where case does not count"),
        ("runs: [{name: a}, {name: b, output_dir: runs/trial-a/distill}]", "trial-b lies in another run's folder"),
        ("configs: [trial.yaml, nowhere.yaml]", "nowhere.yaml"),
        ("configs: trial.yaml", "configs: expected a list of YAML files"),
        ("runs: [{data.prompt_template: '{dialogue}!'}, {data.prompt_template: '{dialogue}?'}]", "share the folder"),
        ("grid: {sed: [1]}", "sed .*unknown key; did you mean seed"),
        ("grid: {seed: 1}", r"grid\.seed: expected a list of values"),
        ("runs: {seed: 1}", "runs: expected a list"),
        ("seeds: [1]", "one key, `grid`"),
        ("grid: {seed: [1]}\ngrid: {seed: [2]}", "given twice, in lines 1 and 2"),
    ],
)
def test_sweeps_that_cannot_be(text, message, slurm, write_config):
    with pytest.raises(ConfigError, match=message):
        submit("trial.yaml", sweep=str(sweep(text)))
    assert slurm.calls("sbatch") == []

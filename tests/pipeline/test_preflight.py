"""What would stop a run is told before it leaves anything on the disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hedgehog.pipeline import cli, runner
from hedgehog.pipeline.manifest import Manifest

ROWS = [{"id": str(i), "dialogue": f"Ann: {i}?\nBen: yes", "summary": f"Ben agrees to {i}."} for i in range(9)]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a config, whose rows are there and whose base model is on the hub."""
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(json.dumps(ROWS))
    Path("trial.yaml").write_text(
        "name: trial\nmodel: {base: some/llama}\n"
        "data: {train_file: rows.json, test_file: rows.json, num_validation_examples: 2}\n"
    )
    return tmp_path


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the command line would have run."""
    seen: list[str] = []
    monkeypatch.setattr(runner, "run_stage", lambda config, stage, **_: seen.append(stage))
    monkeypatch.setattr(runner, "run_pipeline", lambda config, **_: seen.append("run"))
    return seen


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def prepared() -> None:
    Manifest(stage="prepare", status="done", fingerprint="", config={}).write(Path("runs/trial/prepare"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run"], ["there is no file gone.json", "epochs (command line): expected a number"]),
        (["run", "--to", "distill"], ["there is no file gone.json"]),
        (["run", "model.base=./gone"], ["./gone: no such folder", "there is no file gone.json"]),
        (["run", "finetune.lora.target_modules=[fc1]"], ["unknown module fc1"]),
        (["prepare"], ["there is no file gone.json"]),
        (["submit", "--dry-run"], ["there is no file gone.json", "epochs (command line): expected a number"]),
        (["distill", "--layers", "8", "model.base=meta-llama/Llama-2-7b-hf"], []),
        (["distill", "--layers", "32", "model.base=meta-llama/Llama-2-7b-hf"], ["the model has layers 0 to 31"]),
        (["finetune", "engine.deepspeed_config=gone"], ["engine.deepspeed_config (command line): cannot read gone"]),
    ],
)
def test_a_mistake_leaves_nothing_behind(work: Path, arguments: list[str], told: list[str]):
    command, *others = arguments
    missing = ["data.test_file=gone.json", *["distill.epochs=x"] * any("epochs" in part for part in told)]
    before = sorted(work.iterdir())
    result = invoke(command, "trial.yaml", *missing, *others)
    assert result.exit_code == 2
    assert all(part in result.stderr for part in told), result.stderr
    assert sorted(work.iterdir()) == before


def test_a_stage_is_not_refused_for_what_is_another_ones(work: Path, begun: list[str]):
    for stage, override in (("evaluate", "finetune.lora.target_modules=[fc1]"), ("finetune", "distill.layers=99")):
        base = "model.base=meta-llama/Llama-2-7b-hf"
        assert invoke(stage, "trial.yaml", base, override).exit_code == 0, stage
    assert begun == ["evaluate", "finetune"]


def test_a_conversion_is_not_refused_for_the_batches_of_another(work: Path, begun: list[str], monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    variant = "variants.one.overrides.finetune.global_batch_size=6"
    assert invoke("finetune", "trial.yaml", variant).exit_code == 0
    refused = invoke("finetune", "trial.yaml", variant, "--variant", "one")
    assert "variants.one.overrides.finetune.global_batch_size (command line): 6 is not a multiple" in refused.stderr
    assert "finetune.global_batch_size" in invoke("run", "trial.yaml", variant).stderr
    turned = ["finetune.global_batch_size=6", "variants.one.overrides.finetune.global_batch_size=8"]
    assert invoke("finetune", "trial.yaml", *turned, "--variant", "one").exit_code == 0
    assert invoke("finetune", "trial.yaml", *turned).exit_code == 2
    assert begun == ["finetune", "finetune"]


def test_what_is_prepared_needs_its_files_no_more(work: Path, begun: list[str]):
    gone = ["trial.yaml", "data.train_file=gone.json", "model.base=./gone"]
    assert invoke("run", *gone).exit_code == 2
    assert invoke("run", *gone, "--from", "distill").exit_code == 0
    prepared()
    assert invoke("run", *gone).exit_code == 0
    assert invoke("run", *gone, "--force").exit_code == 2
    assert begun == ["run", "run"]


def test_submit_refuses_what_no_job_could_read(work: Path, monkeypatch: pytest.MonkeyPatch):
    from hedgehog.pipeline.slurm.submission import load_run

    monkeypatch.setattr("hedgehog.pipeline.slurm.submission.require_slurm", lambda: None)
    result = invoke("submit", "trial.yaml", "model.base=./gone", "data.train_file=gone.json", "slurm.time=3")
    assert result.exit_code == 2
    for part in ("3 problems", "gone: no such folder", "there is no file gone.json", "3 is 180 s, too short"):
        assert part in result.stderr
    assert not Path("runs").exists()
    prepared()
    assert load_run("trial.yaml", ["model.base=./gone", "data.train_file=gone.json"]).name == "trial"


def test_submit_looks_without_torch(work: Path):
    code = (
        "import sys\nfrom hedgehog.pipeline.slurm.submission import load_run\n"
        "load_run('trial.yaml', [])\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_process_finds_the_same_mistake_and_one_tells_it(work: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    result = invoke("run", "trial.yaml", "data.train_file=gone.json")
    assert (result.exit_code, result.stderr) == (2, "")

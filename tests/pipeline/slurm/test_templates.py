"""The templates in `slurm/` and the page beside them: usable by hand, complete, shipped with the package."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from hedgehog.pipeline.requeue import _PREEMPTED
from hedgehog.pipeline.slurm.scripts import TEMPLATES
from hedgehog.pipeline.slurm.submission import submit
from hedgehog.pipeline.slurm_config import SlurmConfig, SlurmResources

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("stage", "finetune configs/tiny.yaml"),
        ("array", "distill configs/tiny.yaml --layers 2"),
    ],
)
def test_a_template_runs_as_it_is(name: str, called: str, tmp_path: Path):
    for program, body in (("srun", 'echo "options: $1"; shift; exec "$@"'), ("hedgehog", 'echo "$@"')):
        (tmp_path / program).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / program).chmod(0o755)
    variables = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "1"}
    environment = os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("SLURM_CPUS_PER_TASK", None)
    done = subprocess.run(
        ["bash", str(TEMPLATES / f"{name}.sbatch")], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1:] == ["options: --kill-on-bad-exit=1", called]


@pytest.mark.parametrize(("name", "job"), [("stage", "7"), ("array", "5_1")])
@pytest.mark.parametrize(
    ("condition", "state", "again"),
    [
        ("", "", True),
        (_PREEMPTED, "JobState=RUNNING Reason=None PreemptTime=2026-11-23T19:15:44", True),
        (_PREEMPTED, "JobState=RUNNING Reason=None PreemptTime=None", False),
        (_PREEMPTED, "JobState=CANCELLED Reason=None PreemptTime=2026-11-23T19:15:44", False),
    ],
    ids=["asked", "preempted", "not preempted", "cancelled"],
)
def test_the_script_queues_the_job_again_for_a_program_that_cannot(
    name: str, job: str, condition: str, state: str, again: bool, tmp_path: Path
):
    calls = tmp_path / "calls"
    for program, body in (
        ("srun", 'shift; exec "$@"'),
        ("hedgehog", 'printf %s "$CONDITION" > "$HEDGEHOG_REQUEUE_FILE"; echo "$SLURM_EXPORT_ENV"; exit 75'),
        ("scontrol", f'echo "$@" ${{SLURM_CLUSTERS-}} >> {calls}; [ $1 = requeue ] || echo "{state}"'),
    ):
        (tmp_path / program).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / program).chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1"}
    environment = os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_EXPORT_ENV": "NONE"}
    environment |= {"CONDITION": condition, "SLURM_CLUSTERS": "far"}
    script = str(TEMPLATES / f"{name}.sbatch")
    done = subprocess.run(["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[1:]) == (75, ["ALL"])
    looks = [f"-o show job {job}"] if condition else []
    assert calls.read_text().splitlines() == looks + [f"requeue {job}"] * again
    assert not list(tmp_path.glob("requeue-*"))


def test_templates_and_all_packages_are_shipped():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"]["hedgehog.slurm"] == "slurm"
    assert settings["package-data"]["hedgehog.slurm"] == ["*.sbatch"]
    folders = {file.parent for floor in ("kernels", "pipeline", "stages") for file in (ROOT / floor).rglob("*.py")}
    packages = {".".join(["hedgehog", *folder.relative_to(ROOT).parts]) for folder in folders}
    assert set(settings["packages"]) == packages | {"hedgehog.slurm"}


def test_the_page_names_every_key():
    page = (ROOT / "slurm" / "README.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    keys = {*SlurmConfig.model_fields, *SlurmResources.model_fields}
    stages = {"prepare", "distill", "merge", "finetune", "evaluate", "export"}
    assert keys - stages <= named


@pytest.mark.parametrize(
    ("size", "overrides", "num_rows"), [("7b", [], 3), ("70b", ["slurm.layer_groups=4"], 3), ("70b", [], 1)]
)
def test_the_pages_gpu_hours_are_what_the_dry_run_prints(
    size: str, overrides: list[str], num_rows: int, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    submit(str(ROOT / f"configs/llama2-{size}-samsum.yaml"), overrides, dry_run=True)
    shown = capsys.readouterr().out
    rows = re.findall(r"^  (\d) +(\S+) +(\d+) +(\d+) +[\d.]+ +(\d+)% +([\d.]+)$", shown, flags=re.MULTILINE)
    finetune = re.search(r"finetuning .*: finetune ([\d.]+)", shown)
    assert len(rows) == num_rows and finetune
    page = (ROOT / "slurm" / "README.md").read_text()
    table = page[page.index(f"| `llama2-{size}-samsum`") :].partition("\n\n")[0]
    for element, layers, *figures, share, hours in rows:
        cells = [element, layers.replace("-", "–"), *figures, f"{share} %", hours]
        assert f" | {' | '.join(cells)} |\n" in table
    assert f"| … finetune | | | | | | {finetune[1]} |" in table

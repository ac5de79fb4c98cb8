"""The templates in `slurm/` and the page beside them: usable by hand, complete, shipped with the package."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hedgehog.pipeline.requeue import _NOT_ENDED, _PREEMPTED
from hedgehog.pipeline.slurm.scripts import TEMPLATES
from hedgehog.pipeline.slurm.submission import submit
from hedgehog.pipeline.slurm_config import SlurmConfig, SlurmResources

ROOT = Path(__file__).parents[3]


Run = Callable[..., "subprocess.CompletedProcess[str]"]
RUNNING = "JobState=RUNNING Reason=None PreemptTime=None"
BEING_PREEMPTED = "JobState=RUNNING Reason=None PreemptTime=2026-11-23T19:15:44"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run(name, hedgehog="exit 1")`: a template with a pretended srun, scontrol and hedgehog on the path.

    `state` is what scontrol shows. Its command lines are in tmp_path/calls.
    """

    def start(
        name: str, *, hedgehog: str, state: str = "", setup: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        (tmp_path / "calls").touch()
        for program, body in (
            ("srun", 'echo "options: $1"; shift; exec "$@"'),
            ("hedgehog", hedgehog),
            ("scontrol", f'echo "$@" ${{SLURM_CLUSTERS-}} >> {tmp_path}/calls; [ $1 = requeue ] || echo "{state}"'),
        ):
            (tmp_path / program).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / program).chmod(0o755)
        job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1"}
        environment = os.environ | job | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        environment.pop("SLURM_CPUS_PER_TASK", None)
        script = (TEMPLATES / f"{name}.sbatch").read_text().replace("# module load cuda", setup)
        return subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)

    return start


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("stage", "finetune configs/tiny.yaml"),
        ("array", "distill configs/tiny.yaml --layers 2"),
    ],
)
def test_a_template_runs_as_it_is(name: str, called: str, run: Run):
    done = run(name, hedgehog='echo "$@"')
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, ["options: --kill-on-bad-exit=1", called])


@pytest.mark.parametrize(("name", "job"), [("stage", "7"), ("array", "5_1")])
@pytest.mark.parametrize(
    ("condition", "state", "again"),
    [
        (_NOT_ENDED, RUNNING, True),
        (_PREEMPTED, BEING_PREEMPTED, True),
        (_PREEMPTED, RUNNING, False),
        (_PREEMPTED, "JobState=CANCELLED Reason=None PreemptTime=2026-11-23T19:15:44", False),
    ],
    ids=["warned", "preempted", "not preempted", "cancelled"],
)
def test_the_script_queues_the_job_again_for_a_program_that_cannot(
    name: str, job: str, condition: str, state: str, again: bool, run: Run, tmp_path: Path
):
    hedgehog = 'printf %s "$CONDITION" > "$HEDGEHOG_REQUEUE_FILE"; echo "$SLURM_EXPORT_ENV"; exit 75'
    given = {"CONDITION": condition, "SLURM_CLUSTERS": "far", "SLURM_EXPORT_ENV": "NONE"}
    done = run(name, hedgehog=hedgehog, state=state, **given)
    assert (done.returncode, done.stdout.splitlines()[2]) == (75, "ALL")
    assert (tmp_path / "calls").read_text().splitlines() == [f"-o show job {job}"] + [f"requeue {job}"] * again
    assert not list(tmp_path.glob("requeue-*"))


@pytest.mark.parametrize("name", ["stage", "array"])
@pytest.mark.parametrize(
    ("hedgehog", "state", "again"),
    [
        ("kill -USR2 $$", RUNNING, True),  # the warning, before there are handlers
        ("kill -USR2 $PPID; kill -KILL $$", RUNNING, True),  # the same, and the end of another rank comes first
        ("kill -USR2 $PPID; exit 75", RUNNING, False),  # the program has seen to it
        ("kill -USR2 $PPID; exit 0", RUNNING, False),
        ('touch "$HEDGEHOG_LISTENING"; kill -USR2 $PPID; exit 1', RUNNING, False),  # it listened, and failed to save
        ('touch "$HEDGEHOG_LISTENING"; kill -USR2 $PPID; kill -KILL $$', RUNNING, False),
        ("kill -USR2 $$", "JobState=COMPLETING Reason=None PreemptTime=None", False),  # somebody cancels the job
        ("kill -USR2 $$", "JobState=COMPLETING Reason=TimeLimit PreemptTime=None", True),
        ("kill -TERM $PPID; kill -TERM $$", BEING_PREEMPTED, True),
        ("kill -TERM $$", RUNNING, False),
        ("exit 1", BEING_PREEMPTED, True),
        ("exit 2", BEING_PREEMPTED, False),
    ],
)
def test_a_signal_that_comes_before_the_program_listens(
    name: str, hedgehog: str, state: str, again: bool, run: Run, tmp_path: Path
):
    done = run(name, hedgehog=hedgehog, state=state)
    assert ("requeue " in (tmp_path / "calls").read_text()) is again, done
    assert not list(tmp_path.glob("requeue-*"))


@pytest.mark.parametrize("name", ["stage", "array"])
@pytest.mark.parametrize("setup", ["kill -TERM $$", "kill -TERM $$; bash -c 'kill -TERM $$'"])
def test_a_preemption_while_the_environment_is_set_up(name: str, setup: str, run: Run, tmp_path: Path):
    done = run(name, hedgehog="exit 0", setup=setup, state=BEING_PREEMPTED)
    assert done.returncode == 143
    assert "requeue " in (tmp_path / "calls").read_text()


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

"""What is told after an interruption and by `status` is the same command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hedgehog.pipeline import cli
from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.config_loading import dump_resolved
from hedgehog.pipeline.errors import Interrupted
from hedgehog.pipeline.go_on import own_command, shown
from hedgehog.pipeline.manifest import Manifest
from hedgehog.pipeline.status import read_status
from hedgehog.stages import prepare

RESOLVED = "hedgehog run runs/trial/config.resolved.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    values = {"name": "trial", "model": {"base": "a/b"}, "data": {"dataset": "c/d"}}
    folder = Path("runs/trial")
    folder.mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(dump_resolved(RunConfig.model_validate(values)))
    return folder


def add(folder: Path, place: str, status: str, command: str, directory: str | None = None) -> None:
    """A stage that `command` ran in this directory or another one."""
    fields = {"command": shlex.split(command), "directory": directory or str(Path.cwd()), "status": status}
    Manifest(stage=place.split("/")[0], fingerprint="f", config={}, **fields).write(folder / place)


@pytest.mark.parametrize("stop", [Interrupted("nothing is lost", signals=("SIGINT",)), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "arguments",
    [["run", "t.yaml", "--force", "label=a b"], ["prepare", "t.yaml"], ["run", "t.yaml", "--to", "distill"]],
)
def test_ctrl_c_and_status_tell_the_same_command(tmp_path, monkeypatch, arguments, stop):
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text("name: trial\nmodel: {base: a/b}\ndata: {dataset: c/d}\n")

    def interrupted(_: object) -> None:
        raise stop

    monkeypatch.setattr(prepare, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["hedgehog", *arguments])
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 130, result.output
    told = result.stderr.strip().partition("To go on: ")[2]
    assert told == shlex.join(["hedgehog", *(word for word in arguments if word != "--force")])
    commands = read_status("trial").commands
    assert commands[0] == told
    assert (RESOLVED in commands) == (arguments[0] == "prepare" or "--to" in arguments), "the rest of the run"


def test_a_run_stopped_between_two_stages_goes_on_by_its_own_command(folder):
    add(folder, "prepare", "done", "hedgehog run t.yaml seed=3")
    assert read_status("trial").commands == ("hedgehog run t.yaml seed=3",)
    add(folder, "distill", "done", "hedgehog distill t.yaml seed=3")
    assert read_status("trial").commands == (RESOLVED,), "what was given last was for one stage"


def test_torchrun_on_one_machine_is_part_of_the_command(folder, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    command = shown(own_command(["run", "t.yaml", "--force"]))
    assert command == "torchrun --nproc-per-node 8 -m hedgehog.pipeline.cli run t.yaml"
    add(folder, "prepare", "running", command)
    assert read_status("trial").commands == (command,)
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert own_command(["run", "t.yaml"]) == ("hedgehog", "run", "t.yaml")


def test_a_stage_begun_alone_is_finished_before_the_rest(folder):
    add(folder, "prepare", "done", "hedgehog run t.yaml --to prepare")
    add(folder, "distill", "running", "hedgehog distill t.yaml seed=3")
    assert read_status("trial").commands == ("hedgehog distill t.yaml seed=3", RESOLVED)


def test_a_subset_of_layers_goes_on_by_its_own_command(folder):
    add(folder, "prepare", "done", "hedgehog run t.yaml --to prepare")
    add(folder, "distill/layers-0-1", "running", "hedgehog distill t.yaml --layers 0-1 seed=3")
    first, merge, rest = read_status("trial").commands
    assert first == "hedgehog distill t.yaml --layers 0-1 seed=3"
    assert (merge, rest) == (RESOLVED.replace(" run ", " merge "), RESOLVED)


def test_elsewhere_the_resolved_config_stands_in(folder, monkeypatch):
    """A relative path in the command would mean another file, and a folder that was moved another run."""
    add(folder, "prepare", "running", "hedgehog run t.yaml", directory="/elsewhere")
    assert read_status("trial").commands == (RESOLVED,)
    add(folder, "prepare", "running", "hedgehog run t.yaml")
    folder.rename("runs/other")
    assert read_status("other").commands == ("hedgehog run runs/other/config.resolved.yaml name=other",)

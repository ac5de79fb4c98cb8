"""The command line: answers at once, gives one message for a mistake, and exits as documented."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hedgehog.pipeline import cli, runner
from hedgehog.pipeline.errors import ConfigError, DataError, Interrupted, LeaseError
from hedgehog.pipeline.run_folder import STAGES

VALID = """\
name: trial
model: {base: some/llama}
data: {dataset: some/rows}
variants: {soft: {overrides: {model.attention: softmax}}}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(VALID)
    return file


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the CLI asked of the runner, which here does nothing."""
    seen: list[dict[str, Any]] = []
    for name in ("run_pipeline", "run_stage", "merge_layers"):

        def record(config: Any, *stage: str, _name: str = name, **options: Any) -> None:
            seen.append({"call": _name, "config": config, "stage": stage, **options})

        monkeypatch.setattr(runner, name, record)
    return seen


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(runner, "run_stage", fail)


def test_help_shows_every_command_and_imports_nothing_heavy():
    heavy = ("torch", "pydantic", "rich", "yaml", "transformers")
    code = (
        "import sys; sys.argv = ['hedgehog', '--help']\n"
        "from hedgehog.pipeline.cli import main\n"
        "try: main()\n"
        f"finally: print('imported', *(set({heavy}) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "imported"
    assert result.stdout.startswith("Usage: hedgehog ") and "..." not in result.stdout.partition("Commands:")[2]
    for command in ("run", *STAGES, "merge", "validate", "status", "report", "env"):
        assert f"\n  {command} " in result.stdout


def test_the_module_runs_as_a_program():
    result = subprocess.run(
        [sys.executable, "-m", "hedgehog.pipeline.cli", "run", "/nowhere/x.yaml"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: /nowhere/x.yaml: no such config file.\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here, which is always full")
def test_output_to_a_full_disk_is_one_message():
    command = [sys.executable, "-m", "hedgehog.pipeline.cli", "--help"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no room for what this command writes") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["run", *STAGES, "merge", "validate", "status", "report", "env"])
def test_every_commands_help_has_an_example(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: hedgehog {command}" in result.stdout


def test_the_examples_of_validate_are_valid(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    lines = [line for line in invoke("validate", "--help").stdout.splitlines() if " hedgehog validate configs" in line]
    assert len(lines) == 2
    for line in lines:
        words = line.split("hedgehog validate ")[1].split()
        paths = [str(path.relative_to(root)) for word in words for path in root.glob(word)]
        result = invoke("validate", *paths, *(word for word in words if not word.startswith("configs/")))
        assert paths and result.exit_code == 0, result.output


def test_help_of_run_shows_the_stages_in_order():
    assert ", ".join(STAGES) in invoke("run", "--help").stdout
    assert [stage.value for stage in cli.Stage] == list(STAGES)


def test_run_hands_everything_to_the_pipeline(config_file, calls):
    result = invoke("run", config_file, "--from", "distill", "--to", "evaluate", "--force", "finetune.epochs=3")
    assert result.exit_code == 0, result.output
    (call,) = calls
    assert (call["call"], call["first"], call["last"], call["force"]) == ("run_pipeline", "distill", "evaluate", True)
    assert call["config"].finetune.epochs == 3


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_command_runs_that_stage(config_file, calls, stage):
    assert invoke(stage, config_file, "--force", "seed=5").exit_code == 0
    (call,) = calls
    assert (call["call"], call["stage"], call["variant"], call["force"]) == ("run_stage", (stage,), None, True)
    assert call["config"].seed == 5


def test_options_of_stages_are_overrides(config_file, calls):
    assert invoke("distill", config_file, "--layers", "0-1", "--variant", "soft").exit_code == 0
    assert (
        invoke("export", config_file, "--dtype", "float32", "--max-shard-size", "1GB", "--push-to-hub", "a/b").exit_code
        == 0
    )
    assert invoke("merge", config_file, "--variant", "soft").exit_code == 0
    distill, export, merge = calls
    assert (distill["config"].distill.layers, distill["variant"]) == ("0-1", "soft")
    settings = export["config"].export
    assert (settings.dtype, settings.max_shard_size, settings.push_to_hub) == ("float32", "1GB", "a/b")
    assert (merge["call"], merge["variant"]) == ("merge_layers", "soft")


def test_an_options_value_is_checked_like_the_configs(config_file, calls):
    result = invoke("export", config_file, "--dtype", "int4")
    assert result.exit_code == 2
    assert 'export.dtype (command line): expected one of bfloat16, float16, float32, got "int4"' in result.stderr
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["destill", "x.yaml"], "distill"),
        (["run", "x.yaml", "--forse"], "--force"),
        (["run", "x.yaml", "--to", "finetun"], "finetune"),
        (["run"], "CONFIG"),
    ],
)
def test_misspelt_commands_and_options_bring_the_right_ones(arguments, expected):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr


def test_a_config_that_is_wrong_starts_nothing(config_file, calls):
    result = invoke("run", config_file, "finetune.lora.rnk=4", "model.feature_dim=0")
    assert result.exit_code == 2
    assert "2 problems" in result.stderr
    assert "did you mean finetune.lora.rank?" in result.stderr
    assert not calls


def test_an_unknown_feature_map_is_refused_before_anything_runs(config_file, calls):
    result = invoke("run", config_file, "model.feature_map=hedgehog")
    assert result.exit_code == 2
    assert "model.feature_map (command line): unknown feature map 'hedgehog'; known: hedgehog_softmax" in result.stderr
    assert not calls


def test_a_world_size_that_batches_cannot_be_split_over_is_refused(config_file, calls, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    result = invoke("run", config_file)
    assert result.exit_code == 2
    assert "8 is not a multiple of micro_batch_size 1 x 3 processes = 3; take 6 or 9" in result.stderr
    assert not calls


def test_a_users_mistake_is_one_message_without_a_traceback(config_file, monkeypatch):
    fail_with(monkeypatch, DataError("rows.json:3: no JSON"))
    result = invoke("prepare", config_file)
    assert (result.exit_code, result.stderr) == (2, "error: rows.json:3: no JSON\n")


def test_other_ranks_tell_only_what_may_be_theirs_alone(config_file, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    fail_with(monkeypatch, DataError("rows.json:3: no JSON"))
    assert invoke("prepare", config_file).stderr == "error (rank 1): rows.json:3: no JSON\n"
    fail_with(monkeypatch, ConfigError("wrong on every rank"))
    result = invoke("prepare", config_file)
    assert (result.exit_code, result.stderr) == (2, "")


@pytest.mark.parametrize("sees_config", [True, False])
def test_a_later_node_that_does_not_see_the_run_folder_says_so(config_file, calls, monkeypatch, tmp_path, sees_config):
    monkeypatch.setenv("RANK", "2")
    submitted = tmp_path / "elsewhere" / "config.submitted.yaml"
    monkeypatch.setenv("HEDGEHOG_SUBMITTED_CONFIG", str(submitted))
    result = invoke("finetune", config_file if sees_config else "nowhere.yaml")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error (rank 2): {socket.gethostname()} does not see {submitted}: ")
    assert not calls


def test_ctrl_c_gives_the_command_that_goes_on(config_file, monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    arguments = ["distill", str(config_file), "--force", "data.prompt_template=a {dialogue}"]
    monkeypatch.setattr(sys, "argv", ["hedgehog", *arguments])
    result = invoke(*arguments)
    assert result.exit_code == 130
    assert f"hedgehog distill {config_file} 'data.prompt_template=a {{dialogue}}'\n" in result.stderr
    assert "--force" not in result.stderr


@pytest.mark.parametrize(("signals", "exit_code"), [(("SIGTERM",), 75), (("SIGINT",), 130)])
def test_an_interruption_says_what_is_saved_and_how_to_go_on(config_file, monkeypatch, signals, exit_code):
    fail_with(monkeypatch, Interrupted("distill: saved after step 3 of 4", signals=signals))
    monkeypatch.setattr(sys, "argv", ["hedgehog", "distill", str(config_file)])
    result = invoke("distill", config_file)
    assert result.exit_code == exit_code
    assert result.stderr == f"distill: saved after step 3 of 4. To go on: hedgehog distill {config_file}\n"


def test_after_a_requeue_there_is_nothing_to_repeat(config_file, monkeypatch):
    stop = Interrupted("distill: saved; job 7 is queued again and goes on there", signals=("SIGUSR2",))
    stop.goes_on_by_itself = True
    fail_with(monkeypatch, stop)
    assert invoke("distill", config_file).stderr == f"{stop}\n"


def test_what_stops_all_ranks_is_told_once(config_file, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for error in (Interrupted("saved", signals=("SIGTERM",)), LeaseError("in use")):
        fail_with(monkeypatch, error)
        result = invoke("distill", config_file)
        assert (result.exit_code, result.stderr) == (error.exit_code, "")


def test_a_signal_during_the_imports_is_heard_and_queues_the_job_again(config_file, tmp_path):
    calls = tmp_path / "calls"
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    process = subprocess.Popen(
        [sys.executable, "-m", "hedgehog.pipeline.cli", "prepare", str(config_file), f"output_dir={tmp_path}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    status = Path(f"/proc/{process.pid}/status")
    bit = 1 << (signal.SIGUSR2 - 1)
    while process.poll() is None:  # until there is a handler; torch and the rest are imported after that
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) & bit:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGUSR2)
    _, stderr = process.communicate()
    assert process.returncode == 75, stderr
    assert "prepare stopped by SIGUSR2: this attempt had not begun; job 7 is queued again and goes on there\n" in stderr
    assert "To go on" not in stderr
    assert calls.read_text().splitlines() == ["-o show job 7", "requeue 7"]
    assert not (tmp_path / "trial" / "prepare").exists()


def test_a_fault_of_ours_crashes_loudly(config_file, monkeypatch):
    fail_with(monkeypatch, RuntimeError("a bug"))
    result = invoke("distill", config_file)
    assert isinstance(result.exception, RuntimeError)


def test_validate_takes_several_files_and_overrides(config_file, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(VALID.replace("model:", "modle:"))
    result = invoke("validate", config_file, other, "seed=3")
    assert result.exit_code == 2
    assert f"{config_file}: valid" in result.stdout
    assert "modle (line 2): unknown key; did you mean model?" in result.stderr
    assert invoke("validate", config_file).exit_code == 0
    assert "no config file given" in invoke("validate", "seed=3").stderr


def test_env_reports_versions_and_what_is_missing():
    result = invoke("env")
    assert result.exit_code == 0
    for name in ("python", "torch", "transformers", "deepspeed", "attention", "distillation loss", "bitsandbytes"):
        assert f"\n{name} " in "\n" + result.stdout


def test_env_claims_nothing_that_the_code_belies():
    """A package is said to be imported here, or not to be, as it is."""
    from hedgehog.pipeline.environment import OPTIONAL_PACKAGES

    sources = Path(__file__).parents[2]
    code = "\n".join(
        p.read_text() for floor in ("kernels", "pipeline", "stages") for p in (sources / floor).rglob("*.py")
    )
    for module, use in OPTIONAL_PACKAGES.values():
        imported = re.search(rf"^\s*(import|from) {module}\b|from torch\.utils\.{module}", code, re.MULTILINE)
        assert bool(imported) != ("nothing here imports it" in use), module


def test_a_step_of_slurm_checks_its_own_stages_batches_and_tells_once(config_file, calls, monkeypatch):
    """finetune may run on other numbers of processes than distill."""
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n1"}
    batches = ["distill.global_batch_size=4", "finetune.global_batch_size=2"]
    for rank, told in (("0", "finetune.global_batch_size (command line): 2 is not a multiple"), ("3", "")):
        with monkeypatch.context() as patch:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                patch.delenv(name, raising=False)  # and take back what the command sets
            for name, value in {**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}.items():
                patch.setenv(name, value)
            patch.setattr("os.environ", dict(os.environ))
            assert invoke("distill", config_file, *batches).exit_code == 0
            refused = invoke("finetune", config_file, *batches)
            assert refused.exit_code == 2 and told in refused.stderr and bool(refused.stderr) == bool(told)

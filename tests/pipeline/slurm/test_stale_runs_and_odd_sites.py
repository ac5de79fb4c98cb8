"""What submit must not take for done, ended or its own: stale stages, unknown states, a site's words and options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hedgehog.pipeline.errors import ConfigError
from hedgehog.pipeline.manifest import Artifact, Manifest, read_manifest
from hedgehog.pipeline.slurm import scheduler
from hedgehog.pipeline.slurm.cancelling import cancel
from hedgehog.pipeline.slurm.scheduler import JobState, SubmittedJob, submission_environment
from hedgehog.pipeline.slurm.scripts import _option
from hedgehog.pipeline.slurm.submission import submit
from hedgehog.pipeline.stale_inputs import changed_inputs
from hedgehog.pipeline.status import read_status
from hedgehog.pipeline.status_screen import screen_lines

ONE = ["variants.soft=", "slurm.layer_groups=1"]


def fingerprint(folder: Path) -> str:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest.output_fingerprint


def chain(finish) -> None:
    """All stages of a run without variants, each made from the one before."""
    prepare = fingerprint(finish("prepare"))
    distill = fingerprint(finish("distill", consumed={"prepare": prepare}))
    tuned = fingerprint(finish("finetune", consumed={"prepare": prepare, "distill": distill}))
    known = {"prepare": prepare, "main/prepare": prepare, "main/distill": distill, "main/finetune": tuned}
    evaluate = fingerprint(finish("evaluate", consumed=known))
    finish("export", consumed={"prepare": prepare, "distill": distill, "finetune": tuned, "evaluate": evaluate})


def test_a_stage_of_inputs_that_ran_anew_is_refused_before_the_queue(slurm, write_config, finish):
    chain(finish)
    submit("trial.yaml", ONE)
    assert slurm.calls("sbatch") == []
    status = read_status("trial")
    assert status.finished and not any(stage.outdated for stage in status.stages)

    other = {"tokens": Artifact(path="something", sha256="0" * 64, num_bytes=0)}
    finish("prepare", artifacts=other)
    said = r"(?s)trial/distill was finished with an earlier prepare: it ran anew since.*Or move the folders"
    with pytest.raises(ConfigError, match=said):
        submit("trial.yaml", ONE)
    assert slurm.calls("sbatch") == []
    status = read_status("trial")
    assert not status.finished
    assert [stage.title for stage in status.stages if stage.outdated] == ["distill", "finetune", "evaluate", "export"]
    assert status.commands[0].startswith("hedgehog distill ") and status.commands[0].endswith(" --force")
    lines = "\n".join(screen_lines(status, width=100, height=None))
    assert "done: out of date" in lines and "distill is out of date: prepare ran anew since" in lines
    assert "finished." not in lines


def test_what_a_variants_stage_consumed_is_its_own(tmp_path, monkeypatch, finish):
    from hedgehog.pipeline.run_folder import RunFolder

    monkeypatch.chdir(tmp_path)
    main, own = (fingerprint(finish(f"{place}distill", summary={"of": place})) for place in ("", "variants/soft/"))
    folder = RunFolder(Path("runs/trial"))
    of_soft = Manifest(stage="finetune", fingerprint="f", config={}, consumed={"distill": own})
    assert changed_inputs(folder, of_soft, "soft") == ()
    joint = Manifest(stage="evaluate", fingerprint="f", config={}, consumed={"main/distill": main, "soft/distill": own})
    assert changed_inputs(folder, joint, None) == ()
    finish("variants/soft/distill", artifacts={"maps": Artifact(path="something", sha256="1" * 64, num_bytes=0)})
    assert changed_inputs(folder, of_soft, "soft") == changed_inputs(folder, joint, None) == ("soft/distill",)


def test_changed_files_and_lost_ones_are_refused_before_the_queue(slurm, write_config, finish):
    Path("rows.json").write_text("[]")
    write_config(tiny=None, model={"base": "who/knows"}, data={"train_file": "rows.json", "test_file": "rows.json"})
    finish("prepare", consumed={"data.train_file rows.json": "another", "data.test_file rows.json": "another"})
    with pytest.raises(ConfigError, match=r"with another input: data\.test_file rows\.json: the file changed"):
        submit("trial.yaml", ONE, first="distill", last="distill")
    write_config()
    finish("prepare", artifacts={"tokens": Artifact(path="tokens.bin", sha256="0" * 64, num_bytes=1)})
    with pytest.raises(ConfigError, match=r"runs/trial/prepare has lost tokens\.bin"):
        submit("trial.yaml", ONE)
    assert slurm.calls("sbatch") == []


@pytest.mark.parametrize("word", ["RESV_DEL_HOLD", "POWER_UP_NODE", "EXPEDITING", "A_NEW_WORD"])
def test_a_state_that_nobody_knows_is_no_end(word, slurm, write_config):
    submit("trial.yaml", ONE, last="distill")
    slurm.set(_101=word)
    slurm.forget_calls()
    submit("trial.yaml", ONE, last="distill")
    assert slurm.submissions() == {}, "the job is in the queue, and not doubled"
    stage = next(stage for stage in read_status("trial").stages if stage.stage == "prepare")
    assert stage.state == "queued" and word in stage.detail
    cancel("trial")
    assert ["102", "101"] in slurm.calls("scancel")


@pytest.mark.parametrize("word", [*sorted(scheduler.FAILED_STATES), "COMPLETED"])
def test_ends_are_ends(word):
    assert not JobState(word).is_live and not JobState(word).waits
    assert JobState("RUNNING").is_live and not JobState("RUNNING").waits and JobState("PENDING").waits
    assert not JobState("COMPLETING").is_live and not JobState("").is_live


def test_words_of_a_sites_own_behind_the_id(slurm, write_config, monkeypatch):
    real = slurm.bin / "sbatch"
    real.rename(slurm.bin / "placed-by")
    text = f"#!/bin/sh\n{slurm.bin}/placed-by \"$@\"\necho 'Note: this job costs 3 core hours'\n"
    real.write_text(text.replace("placed-by", "sbatch.d/sbatch"))
    (slurm.bin / "sbatch.d").mkdir()
    (slurm.bin / "placed-by").rename(slurm.bin / "sbatch.d" / "sbatch")
    real.chmod(0o755)
    submit("trial.yaml", ONE, last="distill")
    jobs = json.loads(Path("runs/trial/slurm/jobs.json").read_text())["jobs"]
    assert [job["job_id"] for job in jobs] == ["101", "102"]


def test_anothers_token_under_the_same_id_and_name():
    mine = SubmittedJob("12", token="hedgehog:mine", name="t.prepare")
    assert mine.is_shown_as("renamed", "project x hedgehog:mine")
    assert not mine.is_shown_as("t.prepare", "hedgehog:another's"), "the id was given anew"
    assert mine.is_shown_as("t.prepare", "what the site writes") and mine.is_shown_as("t.prepare", None)


def test_bytes_that_are_no_text(slurm, write_config):
    (slurm.bin / "squeue").write_text("#!/bin/sh\nprintf '7|N/A|RUNNING|None|caf\\351|x\\n'\n")
    submit("trial.yaml", ONE, last="prepare")
    assert read_status("trial").stages[0].state == "queued", "as sacct says"


def test_an_array_that_was_cancelled_before_it_began(slurm, write_config):
    submit("trial.yaml", ["variants.soft="], last="distill")
    slurm.set(_102_0="", _102_1="", _102_2="", _102="CANCELLED")
    states = {stage.title: stage.state for stage in read_status("trial").stages if stage.layers}
    assert set(states.values()) == {"cancelled"} and len(states) == 3


def test_slurm_that_does_not_answer_is_not_an_empty_queue(slurm, write_config):
    submit("trial.yaml", ONE, last="prepare")
    slurm.fail("squeue", "Unable to contact slurm controller")
    slurm.fail("sacct", "no accounting")
    detail = next(stage.detail for stage in read_status("trial").stages if stage.stage == "prepare")
    assert detail == "nothing written; job 101 may wait or run: Slurm does not answer"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("/a/b%%c/d-%j.log", "#SBATCH --x=/a/b%%c/d-%j.log"),
        ('/a "b"/c', '#SBATCH --x="/a \\"b\\"/c"'),
        ("/a\\b", '#SBATCH --x="/a\\\\b"'),
    ],
)
def test_paths_as_sbatch_reads_them(value, line):
    assert _option("x", value) == line


def test_a_percent_sign_in_the_logs_folder(slurm, write_config):
    submit("trial.yaml", [*ONE, "output_dir=50%j"], last="prepare")
    script = Path("50%j/trial/slurm/prepare.sbatch").read_text()
    assert f"--output={Path('50%%j/trial/logs').absolute()}/prepare-%j.log" in script


@pytest.mark.parametrize("line", ["--array=0-1", "-o out.txt", "--wait", "--dependency afterok:3"])
def test_lines_that_break_what_submit_relies_on(line, slurm, write_config):
    write_config(slurm={"sbatch_lines": [line]})
    with pytest.raises(ConfigError, match=r"slurm\.sbatch_lines \(line \d+\): .* `submit` itself decides --"):
        submit("trial.yaml")


@pytest.mark.parametrize("how", ["line", "environment"])
def test_a_short_limit_from_elsewhere(how, slurm, write_config, monkeypatch):
    if how == "line":
        write_config(slurm={"sbatch_lines": ["--time=2"]})
    else:
        write_config(slurm={"time": None})
        monkeypatch.setenv("SBATCH_TIMELIMIT", "2")
    with pytest.raises(ConfigError, match=r"2 is 120 s, too short for slurm\.grace_period_s"):
        submit("trial.yaml")
    write_config(slurm={"sbatch_lines": ["--time=UNLIMITED"]})
    submit("trial.yaml", last="prepare")


def test_a_variants_layers_are_chosen_by_submit_too(slurm, write_config):
    write_config(variants={"soft": {"overrides": {"distill.layers": "0-1"}}})
    with pytest.raises(ConfigError, match=r"variants\.soft\.overrides\.distill\.layers: `submit` chooses"):
        submit("trial.yaml")


def test_where_ranks_of_the_submitting_shell_meet_stays_there():
    of_a_shell = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "0", "HOME": "h"}
    assert submission_environment(of_a_shell) == {"HOME": "h"}


def test_the_faulty_run_of_a_sweep_is_named(slurm, write_config):
    Path("sweep.yaml").write_text("runs: [{seed: 3}, {seed: -x}]\n")
    with pytest.raises(ConfigError, match=r"sweep\.yaml: seed=-x: .*expected a whole number"):
        submit("trial.yaml", sweep="sweep.yaml")


def test_a_submission_in_doubt_is_told_by_status(slurm, write_config):
    slurm.fail("sbatch", "Unable to contact slurm controller (connect failure)")
    with pytest.raises(scheduler.DoubtfulSubmission):
        submit("trial.yaml", ONE)
    status = read_status("trial")
    assert any("gave no answer about the job of prepare" in note for note in status.notes)
    assert status.commands and status.commands[0].startswith("hedgehog submit ")

"""What `submit` hands to sbatch, with a pretended Slurm: the graph, the scripts, and only what is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hedgehog.pipeline.errors import ConfigError, LeaseError
from hedgehog.pipeline.lease import acquire
from hedgehog.pipeline.slurm import submission
from hedgehog.pipeline.slurm.cancelling import cancel
from hedgehog.pipeline.slurm.layout_checks import time_limit_s
from hedgehog.pipeline.slurm.scheduler import SchedulerError, refusal, submission_environment
from hedgehog.pipeline.slurm.submission import submit

NAMES = [
    *("prepare", "distill", "merge", "finetune", "soft.distill", "soft.finetune"),
    *("evaluate", "export"),
]


LLAMA_70B = Path(__file__).parents[3] / "configs" / "llama2-70b-samsum.yaml"


def script(name: str) -> str:
    return Path(f"runs/trial/slurm/{name}.sbatch").read_text()


def directives(name: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", script(name), flags=re.MULTILINE)


def records() -> list[dict]:
    return json.loads(Path("runs/trial/slurm/jobs.json").read_text())["jobs"]


def groups() -> list[str]:
    found = re.search(r"^ELEMENTS=\((.*)\)$", script("distill"), flags=re.MULTILINE)
    assert found
    return found[1].split()


def test_the_whole_graph(slurm, write_config):
    submit("trial.yaml")
    jobs = slurm.submissions()
    assert list(jobs) == NAMES
    ids = {name: str(101 + number) for number, name in enumerate(NAMES)}
    after = {name: options.get("dependency") for name, options in jobs.items()}
    assert after == {
        "prepare": None,
        "distill": f"afterok:{ids['prepare']}",
        "merge": f"afterok:{ids['distill']}",
        "finetune": f"afterok:{ids['merge']}",
        "soft.distill": f"afterok:{ids['prepare']}",
        "soft.finetune": f"afterok:{ids['soft.distill']}",
        "evaluate": f"afterok:{ids['finetune']}:{ids['soft.finetune']}",
        "export": f"afterok:{ids['evaluate']}",
    }
    assert all(options["kill-on-invalid-dep"] == "yes" for options in jobs.values())
    assert jobs["distill"]["array"] == "0-2" and "array" not in jobs["soft.distill"]
    assert Path("runs/trial/slurm/config.submitted.yaml").is_file()
    recorded = json.loads(Path("runs/trial/slurm/jobs.json").read_text())
    assert [job["job_id"] for job in recorded["jobs"]] == list(ids.values())


def test_two_submits_at_once_submit_once(slurm, write_config):
    other = acquire(Path("runs/trial/slurm"))
    with pytest.raises(LeaseError, match="is in use"):
        submit("trial.yaml")
    assert slurm.calls("sbatch") == []
    submit("trial.yaml", dry_run=True)
    other.release()
    submit("trial.yaml")
    assert list(slurm.submissions()) == NAMES


def test_a_stage_that_a_variant_skips_asks_for_no_gpu(slurm, write_config):
    write_config(variants={"zero": {"overrides": {"model.attention": "softmax", "finetune.enabled": False}}})
    submit("trial.yaml")
    gpus = {name: [line for line in directives(name) if "--gres" in line] for name in slurm.submissions()}
    with_gpus = {name for name, lines in gpus.items() if lines}
    assert with_gpus == {"distill", "finetune", "soft.finetune", "evaluate"}
    records = json.loads(Path("runs/trial/slurm/jobs.json").read_text())["jobs"]
    assert [record["stage"] for record in records if record["variant"] == "zero"] == ["distill", "finetune"]


def test_what_a_script_asks_for_and_runs(slurm, write_config):
    overrides = {"setup": "module load cuda\nsource venv", "array_throttle": 2, "grace_period_s": 60}
    overrides |= {"srun_lines": ["--container-image=/shared/a b.sqsh --mpi=none".replace("a b", "'a b'")]}
    finetune = {"nodes": 2, "time": "2-00:00:00", "partition": "big", "sbatch_lines": ["--mail-type=FAIL"]}
    write_config(slurm={**overrides, "finetune": finetune, "prepare": {"memory": "8G"}}, finetune={})
    submit("trial.yaml", ["seed=3", "label=a b"])
    asked = directives("finetune")
    wanted = ["nodes=2", "ntasks-per-node=2", "gres=gpu:2", "time=2-00:00:00", "account=proj", "partition=big"]
    wanted += ["mail-type=FAIL", "signal=USR2@60", "requeue", "open-mode=append", "job-name=trial.finetune"]
    assert {f"--{option}" for option in wanted} <= set(asked)
    here = Path.cwd()
    assert f"--output={here}/runs/trial/logs/finetune-%j.log" in asked and f"--chdir={here}" in asked
    assert "--array=0-2%2" in directives("distill") and f"--output={here}/runs/trial/logs/distill-%A_%a.log" in (
        directives("distill")
    )
    assert slurm.submissions()["distill"]["array"] == "0-2%2"
    alone = directives("prepare")
    assert "--mem=8G" in alone and "--ntasks-per-node=1" in alone and not any("gres" in line for line in alone)
    assert "module load cuda\nsource venv\n# --- end" in script("finetune")
    assert "\nSRUN_OPTIONS=('--container-image=/shared/a b.sqsh' --mpi=none)\n" in script("finetune")
    assert "HEDGEHOG=(hedgehog)\nARGUMENTS=(finetune trial.yaml seed=3 'label=a b')\n" in script("finetune")
    assert "ARGUMENTS=(finetune trial.yaml seed=3 'label=a b' --variant soft)" in script("soft.finetune")
    for name in NAMES:
        subprocess.run(["bash", "-n", f"runs/trial/slurm/{name}.sbatch"], check=True)
        text = script(name)
        # sbatch stops reading at the first line that is no comment
        assert text.rindex("#SBATCH") < text.index("set -eo pipefail")


def test_a_script_runs_its_element_and_refuses_an_index_out_of_range(slurm, write_config, tmp_path):
    write_config(slurm={"command": "echo", "srun_lines": ["--container-image='a b'"]})
    submit("trial.yaml")
    srun = slurm.bin / "srun"
    srun.write_text('#!/bin/bash\n[ "$2" = "--container-image=a b" ] && shift 2 && exec "$@"\n')
    srun.chmod(0o755)

    def start(index: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": index}
        command = ["bash", "runs/trial/slurm/distill.sbatch"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert start("1").stdout.splitlines()[-1] == f"distill trial.yaml --layers {groups()[1]}"
    beyond = start("3")
    assert beyond.returncode == 2
    assert beyond.stderr.startswith("error: array index 3 is out of range: this script has the elements 0 to 2 (")
    Path("runs/trial/slurm/config.submitted.yaml").unlink()
    unshared = start("0")
    assert unshared.returncode == 2
    assert "the run folder must be on a file system that all nodes share" in unshared.stderr


def test_submitting_again_submits_what_failed_and_what_waits_for_it(slurm, write_config, finish):
    submit("trial.yaml")
    parts = groups()
    finish("prepare")
    finish(f"distill/layers-{parts[0]}")
    for name in ("distill", "finetune"):
        finish(f"variants/soft/{name}")
    slurm.set(_101="COMPLETED", _102_0="COMPLETED", _102_1="FAILED", _102_2="RUNNING", _105="COMPLETED")
    slurm.set(_106="COMPLETED", **dict.fromkeys(("_103", "_104", "_107", "_108"), "CANCELLED"))
    slurm.forget_calls()
    submit("trial.yaml")
    again = slurm.submissions()
    assert list(again) == ["distill", "merge", "finetune", "evaluate", "export"]
    assert again["distill"]["array"] == "1" and "dependency" not in again["distill"]
    # the old array as a whole would never succeed: the element that still runs is waited for by itself
    assert again["merge"]["dependency"] == "afterok:102_2:109"
    assert groups() == parts

    slurm.forget_calls()
    submit("trial.yaml")
    assert slurm.submissions() == {}


def test_a_job_that_is_just_ending_is_waited_for(slurm, write_config, finish, monkeypatch):
    monkeypatch.setattr(submission, "_ENDING_S", 0.0)
    finish("prepare")
    submit("trial.yaml")
    cancel("trial")
    slurm.set(_101_0="COMPLETING")
    slurm.forget_calls()
    submit("trial.yaml")
    assert slurm.submissions()["distill"] == {
        "kill-on-invalid-dep": "yes",
        "dependency": "afterany:101_0",
        "array": "0-2",
    }


def test_what_slurm_is_about_to_take_out_is_submitted_again(slurm, write_config, finish):
    finish("prepare")
    submit("trial.yaml", ["variants.soft="])
    parts = groups()
    finish(f"distill/layers-{parts[0]}")
    finish(f"distill/layers-{parts[2]}")
    slurm.set(_101_0="COMPLETED", _101_1="FAILED", _101_2="COMPLETED")  # 102 to 105 still are in the queue
    slurm.forget_calls()
    submit("trial.yaml", ["variants.soft="])
    again = slurm.submissions()
    assert list(again) == ["distill", "merge", "finetune", "evaluate", "export"]
    assert again["distill"]["array"] == "1"
    assert again["merge"]["dependency"] == "afterok:106,afterany:102"
    assert again["export"]["dependency"] == "afterok:109,afterany:105"


def test_a_part_of_the_graph(slurm, write_config, finish):
    submit("trial.yaml", ["variants.soft="], last="distill")
    assert list(slurm.submissions()) == ["prepare", "distill", "merge"]
    slurm.forget_calls()
    submit("trial.yaml", ["variants.soft="], first="finetune", last="finetune")
    assert {name: options["dependency"] for name, options in slurm.submissions().items()} == {"finetune": "afterok:103"}
    command = json.loads(Path("runs/trial/slurm/jobs.json").read_text())["command"]
    assert command[-4:] == ["--from", "finetune", "--to", "finetune"]
    with pytest.raises(ConfigError, match="export needs evaluate, which is neither done nor in the queue"):
        submit("trial.yaml", ["variants.soft="], first="export")
    with pytest.raises(ConfigError, match="--from export comes after --to distill"):
        submit("trial.yaml", first="export", last="distill")


def test_later_stages_may_have_another_config(slurm, write_config, finish):
    """70B is evaluated in NF4 after it was trained in bfloat16."""
    for place in ("prepare", "distill", "finetune"):
        finish(place, config={"model.quantization": None})
    overrides = ["variants.soft=", "model.quantization=nf4"]
    with pytest.raises(ConfigError, match=r"model\.quantization: null"):
        submit("trial.yaml", overrides)
    submit("trial.yaml", overrides, first="evaluate")
    assert list(slurm.submissions()) == ["evaluate", "export"]


def test_subsets_that_were_begun_keep_their_layers(slurm, write_config, finish):
    finish("prepare")
    finish("distill/layers-0-2")
    finish("distill/layers-5", status="running")
    submit("trial.yaml")
    assert groups()[0] == "0-2" and "5" in groups()
    layers = sorted(
        layer
        for text in groups()
        for span in text.split(",")
        for layer in range(int(span.split("-")[0]), int(span.split("-")[-1]) + 1)
    )
    assert layers == list(range(8))
    assert slurm.submissions()["distill"]["array"] == "1-2"


def test_subsets_that_overlap_are_refused(slurm, write_config, finish):
    finish("distill/layers-0-2")
    finish("distill/layers-2-7")
    with pytest.raises(ConfigError, match=r"distill: its subsets \(layers-0-2, layers-2-7\) .* layer 2 is in two"):
        submit("trial.yaml")


def test_a_distillation_begun_whole_goes_on_as_one_job(slurm, write_config, finish):
    finish("prepare")
    finish("distill", status="running")
    Path("runs/trial/distill/checkpoints").mkdir()
    submit("trial.yaml")
    assert "merge" not in slurm.submissions() and "array" not in slurm.submissions()["distill"]


@pytest.mark.parametrize("shards", [1, 4])
def test_shards_in_the_queue_keep_their_number(slurm, write_config, finish, shards):
    write_config(slurm={"evaluate_shards": 2})
    submit("trial.yaml")
    for place in ("prepare", "distill", "finetune", "variants/soft/distill", "variants/soft/finetune"):
        finish(place)
    slurm.forget_calls()
    write_config(slurm={"evaluate_shards": shards})
    submit("trial.yaml")
    assert slurm.submissions() == {}
    finish("evaluate/shard-0-of-2")
    finish("evaluate/shard-1-of-2")
    job = next(record for record in records() if record["name"] == "evaluate-shards")["job_id"]
    slurm.set(**{f"_{job}_0": "", f"_{job}_1": ""})
    submit("trial.yaml")
    assert slurm.submissions() == {}, "the job that joins them is the evaluation now"


def test_a_shard_of_another_config_is_refused_before_the_queue(slurm, write_config, finish):
    write_config(slurm={"evaluate_shards": 2})
    finish("evaluate/shard-0-of-2", config={"evaluate.num_beams": 1})
    write_config(slurm={"evaluate_shards": 2}, evaluate={"num_beams": 4})
    with pytest.raises(ConfigError, match=r"shard-0-of-2 was finished with another config: evaluate.num_beams: 1 → 4"):
        submit("trial.yaml")
    assert slurm.calls("sbatch") == []


def test_evaluate_over_shards(slurm, write_config, finish):
    write_config(slurm={"evaluate_shards": 4}, variants={"soft": None})
    finish("prepare")
    finish("distill")
    finish("finetune")
    finish("evaluate/shard-2-of-4")
    submit("trial.yaml", ["variants.soft="])
    jobs = slurm.submissions()
    assert list(jobs) == ["evaluate-shards", "evaluate", "export"]
    assert jobs["evaluate-shards"]["array"] == "0-1,3"
    assert "OPTION=--shard\nELEMENTS=(0/4 1/4 2/4 3/4)\n" in script("evaluate-shards")
    assert jobs["evaluate"]["dependency"] == "afterok:101"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("sbatch: error: invalid partition specified: foo", "slurm.partition or slurm.distill.partition"),
        ("Invalid account or account/partition combination specified", "slurm.account or slurm.distill.account"),
        ("Batch job submission failed: Invalid qos specification", "slurm.qos"),
        (
            "QOSMaxSubmitJobPerUserLimit: Batch job submission failed: Job violates accounting/QOS policy",
            "Change slurm.qos or slurm.distill.qos; slurm.time",
        ),
        ("AssocMaxSubmitJobLimit", "wait until some of your jobs have ended"),
        ("Invalid feature specification", "slurm.constraint"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "slurm.time"),
        ("Memory specification can not be satisfied", "slurm.memory"),
        ("Invalid generic resource (gres) specification", "slurm.gpus"),
        ("Requested node configuration is not available", "slurm.gpu_type"),
        ("More processors requested than permitted", "slurm.cpus_per_task"),
        ("Invalid job array specification", "slurm.layer_groups"),
        ("sbatch: unrecognized option '--foo'", "slurm.sbatch_lines"),
    ],
)
def test_slurms_words_and_the_key_to_change(words, key):
    message = refusal("distill", words, {"partition": "foo"})
    assert words in message and key in message


def test_a_refused_job_in_the_middle_loses_nothing(slurm, write_config):
    slurm.fail("sbatch", "sbatch: error: Batch job submission failed: Invalid account", where="soft.distill")
    with pytest.raises(ConfigError, match=r"(?s)Invalid account.*slurm\.account .*\(now proj\).*submit again: only"):
        submit("trial.yaml")
    slurm.works_again()
    slurm.forget_calls()
    submit("trial.yaml")
    again = slurm.submissions()
    assert list(again) == NAMES[4:]
    assert again["soft.distill"]["dependency"] == "afterok:101"


def test_no_slurm_on_the_path(write_config, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"sbatch: not found on the path.*--dry-run"):
        submit("trial.yaml")
    submit("trial.yaml", dry_run=True)
    shown = capsys.readouterr().out
    assert "#SBATCH --array=0-2" in shown and not Path("runs").exists()


def test_a_controller_that_does_not_answer_submits_nothing_twice(slurm, write_config):
    submit("trial.yaml")
    slurm.forget_calls()
    slurm.fail("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    with pytest.raises(SchedulerError, match="Unable to contact slurm controller"):
        submit("trial.yaml")
    assert slurm.calls("sbatch") == []


def test_the_dry_run_tells_what_each_group_costs(write_config, capsys):
    submit("trial.yaml", dry_run=True)
    shown = capsys.readouterr().out
    assert "distill                3 elements x 2 tasks with 2 GPUs" in shown
    rows = re.findall(r"^  (\d) +([\d,-]+) +(\d+) +(\d+) +([\d.]+) +(\d+)%", shown, flags=re.MULTILINE)
    assert [int(row[0]) for row in rows] == [0, 1, 2]
    assert sum(int(row[3]) for row in rows) == 8 and rows[-1][2] == "8"
    assert max(int(row[5]) for row in rows) == 100


def test_the_dry_run_counts_kept_hidden_states(write_config, capsys):
    overrides = ["distill.max_steps=null", "distill.epochs=4"]
    submit("trial.yaml", overrides, dry_run=True)
    without = capsys.readouterr().out
    submit("trial.yaml", [*overrides, "distill.cache_hidden_states=true"], dry_run=True)
    shown = capsys.readouterr().out
    assert "count 0.25: distill.cache_hidden_states runs them" in shown
    assert "cache_hidden_states" not in without.split("#####")[0]

    def gain(text: str) -> float:
        return float(re.findall(r"one job would take ([\d.]+) times as long as this array", text)[0])

    assert gain(shown) > gain(without)


def test_another_config_while_jobs_wait_is_refused(slurm, write_config):
    submit("trial.yaml")
    write_config(slurm={"time": "02:00:00"})
    submit("trial.yaml")  # what jobs ask for may change
    write_config(finetune={"epochs": 3})
    with pytest.raises(ConfigError, match=r"(?s)still in the queue \(101, .*finetune\.epochs: 1\.0 → 3\.0.*cancel"):
        submit("trial.yaml")


def test_a_finished_stage_of_another_config_is_refused_before_the_queue(slurm, write_config, finish):
    finish("prepare", config={"seed": 4, "model.base": None})
    with pytest.raises(ConfigError, match=r"(?s)runs/trial/prepare was finished .*: seed: 4 → 0.*--force"):
        submit("trial.yaml")
    assert slurm.calls("sbatch") == []


def memory_shown(capsys, config: Path, *overrides: str, **options) -> tuple[dict[str, str], list[str]]:
    """What a dry run says of each stage's memory, and its warnings."""
    submit(str(config), overrides, dry_run=True, **options)
    shown = capsys.readouterr().out
    return (
        dict(re.findall(r"^  (\w+) +([\d.]+ GiB .*)$", shown, flags=re.MULTILINE)),
        re.findall(r"^(?:warning|note): (.*)$", shown, flags=re.MULTILINE),
    )


def test_70b_fits_as_shipped_and_a_hopeless_submission_is_told_so(capsys):
    memory, said = memory_shown(capsys, LLAMA_70B, last="finetune")
    assert memory == {"distill": "21.4 GiB on each of 8 GPUs", "finetune": "21.4 GiB on each of 8 GPUs"}
    assert [line.split(":")[0] for line in said] == ["engine.zero_stage"], "validate's note, and no warning"
    evaluation = ["model.quantization=nf4", "engine.zero_stage=1"]
    memory, said = memory_shown(capsys, LLAMA_70B, *evaluation)
    assert memory["evaluate"].startswith("39.7 GiB") and memory["export"] == "130.2 GiB of its node" and said == []
    memory, said = memory_shown(capsys, LLAMA_70B, "slurm.gpus=1", "slurm.export.memory=64G")
    warned = {line.split()[0]: line for line in said}
    assert memory["finetune"] == "135.2 GiB on its GPU"
    assert "about 145 GB on each GPU, more than the 80 GB" in warned["finetune"]
    assert "slurm.finetune.gpus" in warned["finetune"] and "micro_batch_size" not in warned["finetune"]
    assert "model.quantization=nf4 engine.zero_stage=1" in warned["evaluate"]
    assert "slurm.export.memory is 64G" in warned["export"]
    _, said = memory_shown(capsys, LLAMA_70B.with_name("llama2-7b-samsum.yaml"), "finetune.micro_batch_size=8")
    assert any(
        line.startswith("finetune (t2r) needs") and "finetune.gradient_checkpointing=true" in line for line in said
    )


def test_batches_that_do_not_fit_the_tasks(slurm, write_config):
    write_config(slurm={"nodes": 3})
    with pytest.raises(
        ConfigError, match=r"distill\.global_batch_size \(line 2\): 4 is not a multiple .* 6 processes .*3 nodes x 2"
    ):
        submit("trial.yaml")


@pytest.mark.parametrize(
    ("slurm_section", "key"),
    [
        ({"time": "3"}, r"slurm\.time \(line 11\): 3 is 180 s"),
        ({"finetune": {"time": "0:03:59"}}, r"slurm\.finetune\.time \(line 10\): 0:03:59 is 239 s"),
        ({"grace_period_s": 3600}, r"slurm\.time \(line 12\): 01:00:00 is 3600 s"),
    ],
)
def test_a_limit_whose_warning_would_come_before_the_first_step(slurm, write_config, slurm_section, key):
    write_config(slurm=slurm_section)
    with pytest.raises(
        ConfigError, match=rf"^trial\.yaml: {key}.* slurm\.grace_period_s=\d+: .*at least \d+ minutes"
    ) as refused:
        submit("trial.yaml")
    assert str(refused.value).count("Allow at least") == 1, "said once, not for every stage"
    assert slurm.calls("sbatch") == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("4", 240),
        ("3:59", 239),
        ("1:02:03", 3723),
        ("2-12", 216000),
        ("1-0:30", 88200),
        ("1-01:00:01", 90001),
        ("0", None),
    ],
)
def test_times_as_sbatch_reads_them(text, seconds):
    assert time_limit_s(text) == seconds


def test_the_program_is_told_which_signal_the_job_asked_for(slurm, write_config):
    write_config(slurm={"signal": "HUP"})
    submit("trial.yaml")
    assert "--signal=HUP@120" in directives("finetune")
    assert all("\nexport HEDGEHOG_INTERRUPT_SIGNAL=HUP\n" in script(name) for name in NAMES)
    with pytest.raises(ConfigError, match=r"slurm\.signal .* USR1, USR2, HUP, got"):  # TERM ends a job for good
        submit("trial.yaml", ["slurm.signal=TERM"])


def test_distill_layers_are_chosen_by_submit(slurm, write_config):
    with pytest.raises(ConfigError, match=r"distill\.layers: `submit` chooses"):
        submit("trial.yaml", ["distill.layers=0-1"])


def test_a_model_on_the_hub_of_unknown_depth(slurm, write_config, capsys):
    write_config(tiny=None, model={"base": "who/knows"}, data={"dataset": "c/d"})
    with pytest.raises(ConfigError, match=r"model\.base: who/knows .* slurm\.layer_groups=1"):
        submit("trial.yaml")
    submit("trial.yaml", ["slurm.layer_groups=1"])
    assert "who/knows is on the hub, so what it needs of memory is not known here" in capsys.readouterr().out


def test_submitting_from_inside_a_job_passes_nothing_of_it_on():
    inside = {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "4", "SLURM_CONF": "c", "RANK": "0", "PATH": "p"}
    assert submission_environment(inside) == {"SLURM_CONF": "c", "PATH": "p"}
    assert submission_environment({"SLURM_CPUS_PER_TASK": "4"}) == {"SLURM_CPUS_PER_TASK": "4"}


def test_submit_status_and_cancel_import_no_torch():
    modules = ["slurm.submission", "slurm.cancelling", "status_report"]
    code = "import sys, importlib, hedgehog.pipeline\n" + "".join(
        f"importlib.import_module('hedgehog.pipeline.{m}')\n" for m in modules
    )
    code += "hedgehog.pipeline.slurm.submission.submit(sys.argv[1], dry_run=True)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(LLAMA_70B)], capture_output=True, text=True)
    assert "memory of a process" in done.stdout and done.stdout.endswith("\nFalse\n"), done.stderr

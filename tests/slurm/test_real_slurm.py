"""`hedgehog submit`, `status` and `cancel` on a real Slurm, on the tiny model."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
]


def manifest(cluster: Cluster, stage: str) -> dict:
    return json.loads((cluster.cwd / "runs" / "micro" / stage / "manifest.json").read_text())


def submitted(output: str) -> dict[str, str]:
    """Name of every job that was submitted, and what the line says of it."""
    return dict(re.findall(r"^  (\S+) +submitted (.*)$", output, flags=re.MULTILINE))


def test_the_whole_graph_ends_in_an_exported_model(whole_graph: Cluster):
    deadline = time.monotonic() + 240
    while set((states := whole_graph.slurm_states()).values()) != {"COMPLETED"}:  # Slurm lags behind the manifests
        assert time.monotonic() < deadline, states
        time.sleep(0.5)
    parts = ["distill 0-1", "distill 2", "evaluate 0/2", "evaluate 1/2"]
    assert set(states) == {"prepare", "distill", "finetune", "evaluate", "export", *parts}
    assert (whole_graph.cwd / "runs/micro/export/model/config.json").is_file()
    shown = whole_graph.hedgehog("status", "micro").stdout
    assert "finished." in shown and "to go on" not in shown
    again = whole_graph.hedgehog("submit", "micro.yaml")
    assert submitted(again.stdout) == {} and "nothing to submit" in again.stdout
    for log in sorted((whole_graph.cwd / "runs/micro/logs").iterdir()):
        assert log.read_text().startswith("=== "), log
    print_costs(whole_graph)


def print_costs(cluster: Cluster) -> None:
    """What a job takes beside its stage's own work, for slurm/README.md. Slurm and manifests tell whole seconds."""
    ids = ",".join(stage["job"] for stage in cluster.status()["stages"] if stage["job"])
    asked = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,Start,End", f"--jobs={ids}"]
    rows = cluster.run(*asked).stdout
    jobs = {job: times for job, *times in (row.split("|") for row in rows.split())}
    for title, folder in (
        ("prepare", "prepare"), ("distill", "distill"), ("evaluate 0/2", "evaluate/shard-0-of-2"),
        ("evaluate", "evaluate"), ("export", "export"),
    ):  # fmt: skip
        own = manifest(cluster, folder)
        started, finished = (datetime.fromisoformat(own[name]) for name in ("started_at", "finished_at"))
        start, end = (datetime.fromisoformat(time_).astimezone() for time_ in jobs[cluster.job(title)])
        name = title.replace("distill", "merge")
        print(
            f"{name}: {(started - start).total_seconds():.0f} s from the job's start to the "
            f"stage's, {own['duration_s']:.1f} s of its own, {(end - finished).total_seconds():.0f} s to the job's end"
        )


def test_an_array_distils_the_model_that_one_process_distils(distilled_alone: Cluster, whole_graph: Cluster):
    maps = "runs/micro/distill/feature_maps.safetensors"
    from safetensors.torch import load_file

    one, array = load_file(distilled_alone.cwd / maps), load_file(whole_graph.cwd / maps)
    assert one.keys() == array.keys() and len(one) == 6
    different = [name for name in one if one[name].numpy().tobytes() != array[name].numpy().tobytes()]
    assert different == []


def test_an_element_fails_and_only_it_runs_again(prepared: Cluster):
    obstacle = prepared.cwd / "runs/micro/distill/layers-2"
    obstacle.parent.mkdir()
    obstacle.write_text("a file where the element's folder should be")
    first = submitted(prepared.hedgehog("submit", "micro.yaml").stdout)
    assert list(first) == ["distill", "merge", "finetune", "evaluate-shards", "evaluate", "export"]
    states = prepared.wait(lambda states: states["distill 2"] == "failed" and states["export"] == "cancelled")
    prepared.wait(lambda states: states["distill 0-1"] == "done")
    assert {states[name] for name in ("distill", "finetune", "evaluate 0/2", "evaluate")} == {"cancelled"}
    stages = {stage["stage"]: stage for stage in prepared.status()["stages"] if stage["layers"] in (None, "2")}
    assert stages["export"]["detail"] == "needs distill, which failed"
    shown = prepared.hedgehog("status", "micro").stdout
    assert "exit code 2" in " ".join(shown.split())
    assert "distill/2: error: distill/2: a file stands where a folder should be" in " ".join(shown.split())
    assert "to go on: hedgehog submit micro.yaml" in shown

    obstacle.unlink()
    again = submitted(prepared.hedgehog("submit", "micro.yaml").stdout)
    assert list(again) == list(first)
    assert again["distill"].startswith("2 as ")
    before = manifest(prepared, "distill/layers-0-1")
    prepared.wait(lambda states: states["distill"] == "done")
    assert manifest(prepared, "distill/layers-0-1") == before
    shown = prepared.hedgehog("cancel", "micro").stdout
    assert "export" in shown and "to go on: hedgehog submit micro.yaml" in " ".join(shown.lower().split())
    prepared.wait(lambda states: states["export"] == "cancelled" and "queued" not in states.values())


def test_without_accounting_squeue_is_enough_and_without_both_the_manifests(
    whole_graph: Cluster, prepared: Cluster, slurm_conf: Path, tmp_path: Path
):
    plain = tmp_path / "slurm.conf"
    lines = [line for line in slurm_conf.read_text().splitlines() if not line.startswith("AccountingStorage")]
    plain.write_text("\n".join([*lines, "AccountingStorageType=accounting_storage/none"]) + "\n")
    (tmp_path / "gres.conf").write_text((slurm_conf.parent / "gres.conf").read_text())
    (tmp_path / "cgroup.conf").write_text((slurm_conf.parent / "cgroup.conf").read_text())
    user = whole_graph.under(SLURM_CONF=str(plain))
    assert user.run("sacct", check=False).returncode != 0
    status = user.status()
    assert len(status["notes"]) == 1 and "accounting storage is disabled" in status["notes"][0].lower()
    assert {stage["state"] for stage in status["stages"]} == {"done"}
    waiting = prepared.under(SLURM_CONF=str(plain))
    prepared.write_config(slurm={"distill": {"sbatch_lines": ["--hold"]}})
    waiting.hedgehog("submit", "micro.yaml")
    assert (
        waiting.states()["distill 0-1"] == "queued" and submitted(waiting.hedgehog("submit", "micro.yaml").stdout) == {}
    )
    waiting.hedgehog("cancel", "micro")
    waiting.wait(lambda states: "queued" not in states.values(), 60)
    nothing = whole_graph.under(PATH="/nowhere")
    assert [note.split(":")[0] for note in nothing.status()["notes"]] == ["sacct", "squeue"]
    assert nothing.states() == user.states()


def test_a_config_edited_while_the_job_waits(prepared: Cluster):
    prepared.write_config(slurm={"distill": {"sbatch_lines": ["--hold"]}})
    prepared.hedgehog("submit", "micro.yaml")
    job = prepared.job("distill 0-1").partition("_")[0]
    prepared.write_config(distill={"learning_rate": 0.5})
    refused = prepared.hedgehog("submit", "micro.yaml", check=False)
    assert refused.returncode == 2
    assert "distill.learning_rate: 0.001 → 0.5" in refused.stderr and "hedgehog cancel runs/micro" in refused.stderr
    prepared.run("scontrol", "release", job)
    prepared.wait(lambda states: states["distill 0-1"] == states["distill 2"] == "failed")
    log = (prepared.cwd / f"runs/micro/logs/distill-{job}_0.log").read_text()
    assert "the config was edited after this job was submitted" in log
    assert "distill.learning_rate: 0.001 → 0.5" in log
    assert not (prepared.cwd / "runs/micro/distill").exists()


@pytest.mark.long
def test_a_run_folder_that_one_node_does_not_see(prepared: Cluster, slurm_conf: Path):
    """The second node sees an empty folder there."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("this root may not give a process mounts of its own")
    outputs = slurm_conf.parents[1] / "on-n1-only" / "runs"
    shutil.copytree(prepared.cwd / "runs", outputs)
    run = str(outputs / "micro")
    options = [f"output_dir={outputs}", "slurm.layer_groups=1", "--from", "distill", "--to", "distill"]
    prepared.hedgehog("submit", "micro.yaml", *options, "slurm.distill.nodes=2", "slurm.tasks_per_node=1")
    prepared.wait(lambda states: states["distill"] == "failed", 120, run)
    assert f"error (rank 1): {socket.gethostname()} does not see {run}/slurm/config.submitted.yaml: " in prepared.logs(
        run
    )
    assert "does not see" in " ".join(prepared.hedgehog("status", run).stdout.split())

    prepared.write_config(slurm={"distill": {"sbatch_lines": ["--nodelist=n2"]}})
    prepared.hedgehog("submit", "micro.yaml", *options)
    prepared.wait(lambda states: states["distill"] == "failed", 120, run)
    shown = " ".join(prepared.hedgehog("status", run).stdout.split())
    # the controller's word, and later that of accounting
    assert "JobLaunchFailure" in shown or "exit code 0:53" in shown, f"Slurm could not open the log: {shown}"
    assert "no log at" in shown and "does the node see this file system?" in shown


def test_slurms_own_words_about_a_partition_and_an_index(prepared: Cluster):
    refused = prepared.hedgehog("submit", "micro.yaml", "slurm.merge.partition=nowhere", check=False)
    assert refused.returncode == 2
    assert "invalid partition specified: nowhere" in refused.stderr
    assert "slurm.partition or slurm.merge.partition (now nowhere)" in refused.stderr
    assert "What was submitted before it stays in the queue" in refused.stderr
    refused = prepared.hedgehog("submit", "micro.yaml", "slurm.account=nobody", check=False)
    assert refused.returncode == 2
    assert "Invalid account or account/partition combination specified" in refused.stderr
    assert "slurm.account" in refused.stderr and "(now nobody)" in refused.stderr
    prepared.hedgehog("cancel", "micro")
    script = prepared.cwd / "runs/micro/slurm/distill.sbatch"
    beyond = prepared.run("sbatch", "--parsable", "--wait", "--array=7", str(script), check=False)
    log = prepared.cwd / f"runs/micro/logs/distill-{beyond.stdout.strip()}_7.log"
    assert beyond.returncode == 2
    assert "error: array index 7 is out of range: this script has the elements 0 to 1 (0-1 2)" in log.read_text()

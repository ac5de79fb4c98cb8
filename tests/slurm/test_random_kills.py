"""A graph whose jobs are killed, cancelled, requeued and warned at random: what it ends in is the same.

Every stage gets its share: as long as a job may be disturbed it rarely comes to its end.

HEDGEHOG_SLURM_KILLS says how often, and makes it the whole graph (`make test-slurm-long`: fifty, in a quarter of an
hour); otherwise it is two disturbances of one part of the graph, to save time. HEDGEHOG_KILL_SEED repeats the choices.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Cluster

NUM_KILLS = int(os.environ.get("HEDGEHOG_SLURM_KILLS", "2"))
PARTS = (("distill", "distill"), ("finetune", "finetune"), ("evaluate", "export"))
"""First and last stage."""
JOBS = {
    "prepare": ("prepare",),
    "distill": ("distill", "merge"),
    "finetune": ("finetune",),
    "evaluate": ("evaluate-shards", "evaluate"),
    "export": ("export",),
}
"""By stage."""
STAGES = tuple(JOBS)
MEASURED = re.compile(r'"(step_s|memory_bytes|tokens_per_s|elapsed_s)": [^,}]+,? ?')
COMPARED = ("evaluate/predictions/", "evaluate/rouge.json", "export/model/config.json")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(1800 + 180 * NUM_KILLS),
]


def programs_of(job: str, runs: Path) -> list[int]:
    """Processes of this project that belong to a job (`12` or, of an array, `12_3`)."""
    array, _, index = job.partition("_")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(
                entry.split("=", 1) for entry in (folder / "environ").read_text().split("\0") if "=" in entry
            )
            command, cwd = (folder / "cmdline").read_text(), os.readlink(folder / "cwd")
        except (OSError, UnicodeDecodeError):
            continue  # it has ended, or is not ours
        mine = environment.get("SLURM_ARRAY_JOB_ID", environment.get("SLURM_JOB_ID")) == array
        mine = mine and (not index or environment.get("SLURM_ARRAY_TASK_ID") == index)
        program = "hedgehog.pipeline.cli" in command and not command.startswith(("srun", "bash"))
        if mine and program and Path(cwd) == runs.parent:
            found.append(int(folder.name))
    return found


def disturb(cluster: Cluster, job: str, how: str) -> bool:
    """Whether there was something left to disturb."""
    if how == "kill":
        victims = programs_of(job, cluster.cwd / "runs")
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return False
        return bool(victims)
    command = {
        "cancel": ["scancel", job],
        "requeue": ["scontrol", "requeue", job],
        "warn": ["scancel", "--signal=USR2", job],
    }[how]
    return cluster.run(*command, check=False).returncode == 0


def running_jobs(cluster: Cluster) -> list[tuple[str, str]]:
    """Id and name in the graph."""
    listed = cluster.run("squeue", "--noheader", "--states=RUNNING", "--format=%i %j %Z").stdout.splitlines()
    rows = [line.split() for line in listed]
    return sorted((job, name.removeprefix("micro.")) for job, name, cwd in rows if cwd == str(cluster.cwd))


def share(name: str, jobs: tuple[str, ...]) -> int:
    """Disturbances until the end of this job and those before it."""
    return math.ceil(NUM_KILLS * (jobs.index(name) + 1) / len(jobs))


def usual_job_s(whole_graph: Cluster) -> float:
    """How long a job of the undisturbed graph took."""
    jobs = [stage["job"] for stage in whole_graph.status()["stages"] if stage["job"]]
    asked = ["sacct", "--allocations", "--noheader", "--format=ElapsedRaw", f"--jobs={','.join(jobs)}"]
    return statistics.median(int(seconds) for seconds in whole_graph.run(*asked).stdout.split())


def sleep_into_a_job(cluster: Cluster, seconds: float) -> None:
    """Wait until a job runs, if one is to come, and then so long."""
    while live_jobs(cluster) and not running_jobs(cluster):
        time.sleep(0.2)
    time.sleep(seconds)


def live_jobs(cluster: Cluster) -> bool:
    listed = cluster.run("squeue", "--noheader", "--format=%i %Z").stdout.splitlines()
    return any(line.split()[1] == str(cluster.cwd) for line in listed)


def finished(run: Path, stage: str) -> bool:
    manifest = run / stage / "manifest.json"
    return manifest.is_file() and json.loads(manifest.read_text())["status"] == "done"


def outcome(run: Path, stages: tuple[str, ...]) -> dict[str, bytes | str]:
    """Weights, summaries, scores and losses of these stages, by file."""
    found: dict[str, bytes | str] = {}
    for file in sorted(run.rglob("*")):
        name = str(file.relative_to(run))
        if not file.is_file() or "checkpoints" in file.parts or name.partition("/")[0] not in stages:
            continue
        if file.name == "metrics.jsonl":
            found[name] = MEASURED.sub("", file.read_text())
        elif file.suffix in (".safetensors", ".model") or name.startswith(COMPARED):
            found[name] = file.read_bytes()
    assert {name.partition("/")[0] for name in found} == set(stages)
    if "evaluate" in stages:
        assert "evaluate/rouge.json" in found and any(name.endswith("predictions/main.jsonl") for name in found)
    return found


def test_random_kills_over_a_graph_change_nothing(new_cluster: Callable[[], Cluster], whole_graph: Cluster):
    seed = int(os.environ.get("HEDGEHOG_KILL_SEED", random.SystemRandom().randrange(1 << 30)))
    chance = random.Random(seed)
    whole = "HEDGEHOG_SLURM_KILLS" in os.environ
    first, last = (STAGES[0], STAGES[-1]) if whole else chance.choice(PARTS)
    print(f"seed {seed}: {first} to {last}")
    cluster = new_cluster()
    run, undisturbed = (place.cwd / "runs" / "micro" for place in (cluster, whole_graph))
    for stage in STAGES[: STAGES.index(first)]:
        shutil.copytree(undisturbed / stage, run / stage)
    stages = STAGES[STAGES.index(first) : STAGES.index(last) + 1]
    jobs = tuple(job for stage in stages for job in JOBS[stage])
    longest_wait_s = 0.8 * usual_job_s(whole_graph)  # so that some are met at work, and few come to their end
    disturbed: list[tuple[str, str]] = []
    num_submissions, missed = 0, False
    while not finished(run, last) or live_jobs(cluster):
        if not live_jobs(cluster):
            num_submissions += 1
            assert num_submissions <= NUM_KILLS + 2, cluster.logs()
            cluster.hedgehog("submit", "micro.yaml", "--from", first, "--to", last)
        due = len(disturbed) < NUM_KILLS
        sleep_into_a_job(cluster, 0.2 if due and missed else chance.uniform(0, longest_wait_s) if due else 1)
        running = [(job, name) for job, name in running_jobs(cluster) if len(disturbed) < share(name, jobs)]
        if running:
            (job, name), how = chance.choice(running), chance.choice(["kill", "kill", "requeue", "warn", "cancel"])
            missed = not disturb(cluster, job, how)
            if not missed:
                disturbed.append((name, how))
    counts = Counter(f"{how} {name}" for name, how in disturbed)
    told = ", ".join(f"{count} × {what}" for what, count in counts.items())
    print(f"{len(disturbed)} disturbances, {num_submissions} submissions: {told}")
    # a short part of the graph may be through before its second disturbance comes
    least = NUM_KILLS if whole else 1
    assert len(disturbed) >= least, "the graph ended before it was disturbed so often: make the waits shorter"
    actual, expected = outcome(run, stages), outcome(undisturbed, stages)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if actual[name] != expected[name]] == []

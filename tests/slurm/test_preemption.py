"""Jobs on a real Slurm that meet a time limit, a preemption, a lost node, a user's scancel or a copy of themselves.

Most are held after the third step of six, with the last checkpoint after the second. Whatever comes then, the losses
and files are those of the run that nothing happened to, bit for bit.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .conftest import Cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
]

PROGRAM = Path(__file__).with_name("held_program.py")
HELD_AT, LAST_SAVED = 3, 2
MEASURED = {"step_s", "memory_bytes", "tokens_per_s", "elapsed_s"}
"""What differs between two equal runs."""


class Disturbed:
    """A run whose stages before `stage` are copied from the whole graph's, and whose jobs can be held."""

    def __init__(self, cluster: Cluster, whole: Cluster, stage: str) -> None:
        self.cluster = cluster
        self.stage = stage
        self.runs = cluster.cwd / "runs" / "micro"
        self.whole = whole.cwd / "runs" / "micro"
        self.program = cluster.cwd / "program"
        self.program.mkdir()
        for earlier in ("prepare", "distill")[: ("distill", "finetune").index(stage) + 1]:
            shutil.copytree(self.whole / earlier, self.runs / earlier)

    def hold(self, restart: int = 0, step: int = HELD_AT, *, deaf: bool = False) -> Path:
        """Let a start of the job (of an array: of its first element) wait after a step; `deaf`: signals or not."""
        file = self.program / f"hold-{restart}"
        file.write_text(f"{step} deaf" if deaf else str(step))
        return file

    def hold_early(self, restart: int) -> None:
        """Let a start of the job wait before it listens to signals."""
        (self.program / f"early-{restart}").touch()

    def submit(self, nodes: int = 1, tasks_per_node: int = 1, sbatch_lines: tuple[str, ...] = (), **slurm: Any) -> str:
        """Submit the stage; its job's id."""
        command = shlex.join([sys.executable, str(PROGRAM), str(self.program)])
        own = {"nodes": nodes, "tasks_per_node": tasks_per_node, "sbatch_lines": list(sbatch_lines)}
        self.cluster.write_config(slurm={self.stage: {"command": command, **own}, **slurm})
        self.cluster.hedgehog("submit", "micro.yaml", "--from", self.stage, "--to", self.stage)
        records = json.loads((self.runs / "slurm" / "jobs.json").read_text())["jobs"]
        return next(record["job_id"] for record in reversed(records) if record["name"] == self.stage)

    def times(self, what: str) -> list[dict[str, Any]]:
        file = self.program / "times.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [record for record in records if record["what"] == what]

    def steps(self, restart: int) -> list[int]:
        """Steps that a start of the job has done."""
        return [
            record["step"]
            for record in self.times("step")
            if record["restart"] == restart and record["part"] in (None, "0")
        ]

    def wait(self, until: Callable[[], Any], timeout_s: float = 400) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (value := until()):
            assert time.monotonic() < deadline, f"{self.cluster.run('squeue').stdout}\n{self.cluster.logs()}"
            time.sleep(0.4)
        return value

    def wait_for_step(self, step: int, restart: int = 0) -> None:
        self.wait(lambda: step in self.steps(restart))

    def shorten_limit(self, job: str) -> None:
        """Let the time limit come soon, and wait until the job is in the queue again.

        Slurm looks every 30 s, and has to look once before the limit to warn.
        """
        self.end_in(35, job)
        self.wait(lambda: self.job(job).get("Restarts") == "1", 180)

    def end_in(self, seconds: int, job: str) -> None:
        """Set the time limit, which Slurm otherwise takes in whole minutes only."""
        end = datetime.now() + timedelta(seconds=seconds)
        self.cluster.run("scontrol", "update", f"JobId={job}", f"EndTime={end:%Y-%m-%dT%H:%M:%S}")

    def finish(self, element: str = "") -> None:
        """Wait until the stage, or an element of its array, is done, and compare it with the undisturbed one."""
        title = f"{self.stage} {element}".strip()
        self.cluster.wait(lambda states: states[title] == "done", 180)
        place = f"{self.stage}/layers-{element}" if element else self.stage
        assert results(self.runs / place) == results(self.whole / place)
        print(self.costs())

    def costs(self) -> str:
        """What the machinery took, in seconds, for slurm/README.md. The log's own times are whole seconds."""
        logs = (self.runs / "logs").glob("*.log")
        scripts = [line.split()[1] for log in logs for line in log.read_text().splitlines() if line[:4] == "=== "]
        starts = [record["at"] for record in self.times("start") if record["part"] in (None, "0")]
        starts = [starts[0], starts[-1]]
        script = max(t for t in (datetime.fromisoformat(script).timestamp() for script in scripts) if t <= starts[0])
        first_steps = [next(r["at"] for r in self.times("step") if r["at"] > start) for start in starts]
        last_before = max(record["at"] for record in self.times("save") if record["at"] < starts[1])
        saves = sorted(record["seconds"] for record in self.times("save"))
        searches = sorted(record["seconds"] for record in self.times("newest"))
        return (
            f"{self.stage}: script to program {starts[0] - script:.1f} s, program to first step "
            f"{first_steps[0] - starts[0]:.1f} s, resumed {first_steps[1] - starts[1]:.1f} s, of which "
            f"{searches[-1]:.3f} s to find and check the checkpoint; a save {saves[len(saves) // 2]:.3f} s (longest "
            f"{saves[-1]:.3f} s); from the last save to the program's next start {starts[1] - last_before:.1f} s"
        )

    def log(self) -> str:
        """All that the jobs said, in one line."""
        return " ".join(self.cluster.logs(last=1_000_000).split())

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.runs / self.stage / "manifest.json").read_text())

    def job(self, job: str) -> dict[str, str]:
        """What scontrol shows about a job."""
        words = self.cluster.run("scontrol", "-o", "show", "job", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)


def results(stage: Path) -> dict[str, Any]:
    """Losses and weights that a stage leaves, by file."""
    found: dict[str, Any] = {}
    for file in sorted(stage.rglob("*")):
        name = str(file.relative_to(stage))
        if "checkpoints" in name:
            continue
        if file.name == "metrics.jsonl":
            records = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{k: v for k, v in record.items() if k not in MEASURED} for record in records]
        elif file.suffix == ".safetensors":
            found[name] = file.read_bytes()
    assert any(name.endswith(".safetensors") for name in found) and "metrics.jsonl" in found
    return found


@pytest.fixture
def disturbed(
    new_cluster: Callable[[], Cluster], whole_graph: Cluster, distilled_alone: Cluster
) -> Callable[..., Disturbed]:
    """`disturbed(stage)`: one that will be compared with the whole graph's; `alone`: with distillation in one job."""
    return lambda stage, alone=False: Disturbed(new_cluster(), distilled_alone if alone else whole_graph, stage)


def test_at_its_time_limit_an_element_of_an_array_saves_and_queues_itself(disturbed: Callable[..., Disturbed]):
    run = disturbed("distill")
    run.hold()
    job = run.submit(grace_period_s=50) + "_0"
    run.wait_for_step(HELD_AT)
    run.shorten_limit(job)
    run.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    run.finish("0-1")
    assert run.steps(0) == [1, 2, 3, 4] and run.steps(1) == [5, 6], "the step is ended, and nothing is done twice"
    said = run.log()
    assert "stopped by SIGUSR2: saved after step 4 of 6" in said and "resumed from step-000004" in said
    run.cluster.hedgehog("cancel", "micro")


def test_four_ranks_on_two_nodes_save_together_and_go_on_together(
    disturbed: Callable[..., Disturbed], distilled_alone: Cluster
):
    """These nodes' names are in no DNS, and nothing is passed by hand."""
    run = disturbed("distill")
    run.hold(step=2)
    job = run.submit(nodes=2, tasks_per_node=2, layer_groups=1)
    run.wait_for_step(2)
    run.cluster.run("scancel", "--signal=USR2", job)
    run.cluster.wait(lambda states: states["distill"] == "done", 180)
    assert "stopped by SIGUSR2: saved after step 3 of 6" in run.log(), "all four after the same step"
    assert run.steps(0) == [1, 2, 3] and run.steps(1) == [4, 5, 6], "nothing is lost or done twice"
    assert (run.manifest()["world_size"], run.manifest()["num_resumes"]) == (4, 1)
    undisturbed = distilled_alone.cwd / "runs" / "micro" / "distill"
    assert losses(run.runs / "distill") == pytest.approx(losses(undisturbed), rel=1e-4)


@pytest.mark.long
def test_a_rank_dies_and_takes_the_job_along_and_one_process_goes_on(disturbed: Callable[..., Disturbed]):
    run = disturbed("finetune")
    run.cluster.write_config(finetune={"micro_batch_size": 1, "save_every_steps": 1})
    run.hold(step=2)
    job = run.submit(nodes=2, tasks_per_node=2)
    run.wait_for_step(2)
    os.kill(int((run.program / "rank-3").read_text()), signal.SIGKILL)  # the first rank sleeps and would not notice
    run.cluster.wait(lambda states: states["finetune"] == "failed", 120)
    assert run.job(job)["JobState"] == "FAILED" and run.job(job)["Restarts"] == "0"
    assert "task 3: Exited with exit code 137" in run.log()
    assert run.manifest()["world_size"] == 4

    (run.program / "hold-0").unlink()
    assert run.submit() != job
    run.cluster.wait(lambda states: states["finetune"] == "done", 180)
    assert run.steps(0) == [1, 2, 2, 3, 4, 5, 6], "only the step that was not saved is done again"
    assert (run.manifest()["world_size"], run.manifest()["num_resumes"]) == (1, 1)
    assert losses(run.runs / "finetune") == pytest.approx(losses(run.whole / "finetune"), rel=1e-4)


def losses(stage: Path) -> list[float]:
    found = [record["loss_nats"] for record in results(stage)["metrics.jsonl"] if "loss_nats" in record]
    assert len(found) == 6
    return found


@pytest.fixture
def without_user_signal(slurm_conf: Path) -> Iterator[Callable[[Cluster], None]]:
    """`without_user_signal(cluster)`: Slurm as most sites have it, which announces a preemption by TERM alone."""
    original, clusters = slurm_conf.read_text(), []
    parameter = "SlurmctldParameters=preempt_send_user_signal\n"
    assert parameter in original

    def reconfigure(cluster: Cluster) -> None:
        clusters.append(cluster)
        slurm_conf.write_text(original.replace(parameter, ""))
        cluster.run("scontrol", "reconfigure")

    yield reconfigure
    slurm_conf.write_text(original)
    for cluster in clusters:
        cluster.run("scontrol", "reconfigure")


def preempt(run: Disturbed, job: str) -> None:
    """Let a job of the higher partition take the node, and wait until ours is in the queue again."""
    restarts = int(run.job(job)["Restarts"])
    higher = ["--partition=high", f"--nodelist={run.job(job)['NodeList']}", "--exclusive", "--output=/dev/null"]
    other = run.cluster.run("sbatch", "--parsable", *higher, "--wrap=sleep 1").stdout.strip()
    run.wait(lambda: run.job(job).get("Restarts") == str(restarts + 1))
    run.wait(lambda: run.job(other)["JobState"] == "COMPLETED")


def test_a_job_of_a_higher_partition_comes_first(
    disturbed: Callable[..., Disturbed], without_user_signal: Callable[[Cluster], None]
):
    """Announced by the job's own signal, and by TERM; each before the program listens, and at its work."""
    run = disturbed("finetune")
    run.hold_early(restart=0)
    run.hold(restart=1, step=2)
    run.hold_early(restart=2)
    run.hold(restart=3, step=4)
    job = run.submit(partition="second")
    run.wait(lambda: len(run.times("early")) == 1)
    preempt(run, job)
    run.wait_for_step(2, restart=1)
    preempt(run, job)
    without_user_signal(run.cluster)
    run.wait(lambda: len(run.times("early")) == 2)
    preempt(run, job)
    run.wait_for_step(4, restart=3)
    preempt(run, job)
    run.finish()
    assert [run.steps(start) for start in (1, 3, 4)] == [[1, 2, 3], [4, 5], [6]], "the signals came before the end"
    said = run.log()
    assert f"job {job} ended with 140; it is queued again" in said
    assert "stopped by SIGUSR2: saved after step 3 of 6" in said
    assert f"job {job} ended with 143; it is queued again" in said
    assert "stopped by SIGTERM: saved after step 5 of 6" in said


def test_scancel_then_a_limit_without_a_warning_then_a_node_goes_down(disturbed: Callable[..., Disturbed]):
    run = disturbed("distill", alone=True)
    run.hold(step=1)
    cancelled = run.submit(layer_groups=1, partition="third")
    run.wait_for_step(1)
    run.cluster.run("scancel", cancelled)
    run.cluster.wait(lambda states: states["distill"] == "cancelled", 120)
    assert run.job(cancelled)["Restarts"] == "0", "who cancels a job does not want it back"
    assert run.steps(0) == [1, 2], "scancel's TERM leaves time to save"

    run.hold(deaf=True)  # a step that outlasts what Slurm leaves between TERM and KILL
    timed_out = run.submit(layer_groups=1, sbatch_lines=("--signal=URG@1",))  # URG: it means nothing to the program
    run.wait_for_step(HELD_AT)
    run.end_in(1, timed_out)
    run.cluster.wait(lambda states: states["distill"] == "failed", 120)
    assert run.cluster.slurm_states()["distill"] == "TIMEOUT" and run.job(timed_out)["Restarts"] == "0"

    run.hold(step=5)
    again = run.submit(layer_groups=1)
    run.wait_for_step(5)
    assert run.steps(0) == [1, 2, 3, 3, 4, 5], "at most save_every_steps are lost"
    node = run.job(again)["NodeList"]
    for state in ("DRAIN", "DOWN"):  # DRAIN, or it is back at once, and may get the job while the first copy still ends
        run.cluster.run("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")
    try:
        run.wait(lambda: run.job(again).get("Restarts") == "1")
        run.finish()
        assert run.job(again)["NodeList"] != node
    finally:
        run.cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
    assert [record["job"] for record in run.times("start")] == [cancelled, timed_out, again, again]
    assert run.steps(1)[0] >= 5, "at most save_every_steps are lost"


def test_a_job_that_slurm_thinks_dead_runs_beside_its_copy(
    disturbed: Callable[..., Disturbed], slurm_conf: Path, local_slurm: Callable[..., None]
):
    """`kill -9` of a node's daemon leaves its processes; Slurm starts the job anew on the other node.

    It would miss the daemon after SlurmdTimeout. Here it is told so that the test need not wait.
    """
    run = disturbed("distill", alone=True)
    older, newer = run.hold(), run.hold(restart=1, step=5)
    job = run.submit(layer_groups=1, partition="fourth")
    run.wait_for_step(HELD_AT)
    node, process = run.job(job)["NodeList"], Path("/proc") / str(run.times("start")[0]["pid"])
    try:
        daemon = int((slurm_conf.parents[1] / "run" / f"slurmd-{node}.own").read_text().split()[0])
        os.kill(daemon, signal.SIGKILL)
        run.cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        run.wait_for_step(5, restart=1)
        assert run.job(job)["NodeList"] != node and process.exists(), "both run"
        older.unlink()
        run.wait(lambda: not process.exists())
        newer.unlink()
        run.finish()
    finally:
        local_slurm("start-node", node)
    assert run.steps(1) == [3, 4, 5, 6] and run.steps(0)[:3] == [1, 2, 3]
    assert f"takes over from an earlier start of this job (job {job} of cluster local, restart 0" in run.log()
    # Slurm has cut the lost node's output off the log
    said = (run.program / "stderr-0").read_text()
    place = f"{run.runs.relative_to(run.cluster.cwd)}/{run.stage}"
    assert f"error: {place}: another process has taken over (job {job} of cluster local, restart 1, " in said
    assert "This older one stops and writes nothing more." in said

"""A real Slurm for these tests, which `local-slurm` starts on the loopback interface.

Where it cannot be had they are skipped, with the reason: only as root, and from Debian's packages. Where it can be had
and does not start they fail; under CI (`CI=true`) they do so too where Debian has no package for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

SCRIPT = Path(__file__).with_name("local-slurm")
START_TIMEOUT_S = 600
"""Installing the packages included."""
UNAVAILABLE = 77
"""local-slurm's exit code where this machine cannot have Slurm."""

MICRO: dict[str, Any] = {
    "name": "micro",
    "tiny": {
        "num_train_dialogues": 64, "num_validation_dialogues": 8, "num_test_dialogues": 8, "vocab_size": 400,
        "hidden_size": 32, "num_layers": 3, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64,
        "pretrain_steps": 12, "pretrain_batch_size": 4,
    },
    "data": {"max_length_tokens": 256},
    "distill": {"max_steps": 6, "global_batch_size": 4, "save_every_steps": 2},
    "finetune": {"max_steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "save_every_steps": 2},
    "evaluate": {"batch_size": 3, "max_new_tokens": 6, "bootstrap_samples": 20},
    "export": {"dtype": "float32"},
    "engine": {"precision": "float32", "device": "cpu", "cpu_threads": 1},
    "slurm": {"gpus": 0, "time": "10", "layer_groups": 2, "evaluate_shards": 2},
}  # fmt: skip


def why_not() -> str | None:
    """Why no Slurm can be started here, or None."""
    if os.environ.get("HEDGEHOG_SKIP_SLURM"):
        return "HEDGEHOG_SKIP_SLURM is set"
    if os.geteuid() != 0:
        return "local-slurm starts Slurm's daemons as root, and this is another user"
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        return "Slurm is not installed, and there is no apt-get to install it with"
    return None


def start_slurm(script: Path, environment: dict[str, str]) -> None:
    """Skip where it cannot be had, fail where it does not start."""
    done = subprocess.run([script, "up"], env=environment, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    if done.returncode == 0:
        return
    said = "\n".join(done.stderr.strip().splitlines()[-5:])
    if done.returncode == UNAVAILABLE and environment.get("CI", "").lower() not in ("1", "true"):
        pytest.skip(f"no Slurm: {said}")
    pytest.fail(f"Slurm does not start (HEDGEHOG_SKIP_SLURM=1 leaves these tests out): {said}", pytrace=False)


@pytest.fixture
def start() -> Callable[..., None]:
    """`start_slurm`, to be tested."""
    return start_slurm


@pytest.fixture(scope="session")
def slurm_conf(everyones_folder: Path) -> Iterator[Path]:
    """Path of the slurm.conf of a fresh cluster: pairs of nodes of four CPUs and two pretended GPUs, with accounting.

    One for all workers of xdist: who needs it first starts it, and the last to end stops it.
    """
    reason = why_not()
    if reason:
        pytest.skip(f"no Slurm: {reason}")
    root = everyones_folder / "slurm"
    root.mkdir(exist_ok=True)
    environment = os.environ | {"LOCAL_SLURM_ROOT": str(root)}
    conf = root / "etc" / "slurm.conf"
    is_up = conf.with_name("is-up")
    with open(root / "users", "w") as users:
        try:
            with locked(root / "lock"):
                fcntl.flock(users, fcntl.LOCK_SH)
                if not is_up.exists():
                    start_slurm(SCRIPT, environment | {"LOCAL_SLURM_PORT": str(free_ports())})
                    is_up.touch()
            yield conf
        finally:
            with locked(root / "lock"), contextlib.suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_UN)
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                subprocess.run([SCRIPT, "down"], env=environment, capture_output=True, timeout=START_TIMEOUT_S)
                shutil.rmtree(conf.parent, ignore_errors=True)


def free_ports() -> int:
    """The first of 200 ports, as `local-slurm` takes them, below those that Linux hands out. Another session on this
    machine has others: its controller listens on the first."""
    for block in range(os.getpid(), os.getpid() + 60):
        port = 20_000 + 200 * (block % 60)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("60 Slurms run on this machine already")


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    with open(file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def local_slurm(slurm_conf: Path) -> Callable[..., None]:
    """`local_slurm("start-node", "n1")`: the script's other commands, for this cluster."""
    port = next(line for line in slurm_conf.read_text().splitlines() if line.startswith("SlurmctldPort="))
    where = {"LOCAL_SLURM_ROOT": str(slurm_conf.parents[1]), "LOCAL_SLURM_PORT": port.partition("=")[2]}

    def call(*arguments: str) -> None:
        subprocess.run([SCRIPT, *arguments], env=os.environ | where, check=True, timeout=300)

    return call


@dataclass
class Cluster:
    """A working directory with micro.yaml, and the commands that a user would type there."""

    cwd: Path
    environment: dict[str, str]
    values: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(MICRO)))

    def write_config(self, **sections: dict[str, Any]) -> None:
        """micro.yaml, with these keys of some sections changed."""
        for name, changes in sections.items():
            self.values[name] = {**self.values.get(name, {}), **changes}
        (self.cwd / "micro.yaml").write_text(yaml.safe_dump(self.values))

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=self.cwd, env=self.environment, capture_output=True, text=True, timeout=600)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def hedgehog(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "hedgehog.pipeline.cli", *arguments, check=check)

    def status(self, run: str = "micro") -> dict[str, Any]:
        """`hedgehog status --json`, in the test's own process: it is asked often."""
        from hedgehog.pipeline.status import read_status

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.cwd)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            return asdict(read_status(run))

    def states(self, run: str = "micro") -> dict[str, str]:
        return {title(stage): stage["state"] for stage in self.status(run)["stages"]}

    def slurm_states(self, run: str = "micro") -> dict[str, str]:
        """Slurm's word for the newest job of every stage and part."""
        return {title(stage): stage["job_state"] for stage in self.status(run)["stages"]}

    def under(self, **variables: str) -> Cluster:
        """The same working directory seen by a user with another environment."""
        return replace(self, environment={**self.environment, **variables})

    def wait(
        self, until: Callable[[dict[str, str]], bool], timeout_s: float = 600, run: str = "micro"
    ) -> dict[str, str]:
        """Look until the states (by title) are as wanted."""
        deadline = time.monotonic() + timeout_s
        while True:
            states = self.states(run)
            if until(states):
                return states
            assert time.monotonic() < deadline, f"{states}\n{self.logs(run)}"
            time.sleep(1.5)

    def logs(self, run: str = "micro", last: int = 1500) -> str:
        """The ends of all jobs' logs."""
        files = sorted((self.cwd / "runs" / run / "logs").glob("*"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-last:]}" for file in files)

    def job(self, title_: str, run: str = "micro") -> str:
        return next(stage["job"] for stage in self.status(run)["stages"] if title(stage) == title_)


def title(stage: dict[str, Any]) -> str:
    parts = [stage[key] for key in ("variant", "stage", "layers", "shard") if stage[key]]
    return " ".join(parts)


@pytest.fixture(scope="session")
def new_cluster(slurm_conf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Cluster]:
    """`new_cluster()`: an empty working directory on the same cluster."""

    def make() -> Cluster:
        environment = os.environ | {"SLURM_CONF": str(slurm_conf), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        cluster = Cluster(tmp_path_factory.mktemp("work"), dict(environment))
        cluster.write_config()
        return cluster

    return make


@pytest.fixture(scope="session")
def whole_graph(
    new_cluster: Callable[[], Cluster], slurm_conf: Path, made_once: Callable[[Path, Callable[[], Any]], Any]
) -> Cluster:
    """A run that went through the whole graph, from `submit` to the exported model."""

    def make() -> str:
        cluster = new_cluster()
        done = cluster.hedgehog("submit", "micro.yaml")
        assert done.stdout.count("submitted") == 7
        cluster.wait(lambda states: all(state == "done" for state in states.values()))
        return str(cluster.cwd)

    return replace(new_cluster(), cwd=Path(made_once(slurm_conf.with_name("whole-graph.json"), make)))


@pytest.fixture(scope="session")
def new_prepared(new_cluster: Callable[[], Cluster], whole_graph: Cluster) -> Callable[[], Cluster]:
    """`new_prepared()`: a working directory whose run has finished `prepare`, and nothing else."""

    def make() -> Cluster:
        cluster = new_cluster()
        shutil.copytree(whole_graph.cwd / "runs" / "micro" / "prepare", cluster.cwd / "runs" / "micro" / "prepare")
        return cluster

    return make


@pytest.fixture
def prepared(new_prepared: Callable[[], Cluster]) -> Cluster:
    return new_prepared()


@pytest.fixture(scope="session")
def distilled_alone(
    new_prepared: Callable[[], Cluster],
    run_forked: Callable[..., tuple[int, str]],
    slurm_conf: Path,
    made_once: Callable[[Path, Callable[[], Any]], Any],
) -> Cluster:
    """A run whose layers were all distilled by one process, without Slurm."""

    def make() -> str:
        cluster = new_prepared()
        status, said = run_forked(Path(__file__).with_name("distill_once.py"), [str(cluster.cwd)], cluster.environment)
        assert status == 0, said
        return str(cluster.cwd)

    return replace(new_prepared(), cwd=Path(made_once(slurm_conf.with_name("distilled-alone.json"), make)))

"""Only the newest attempt writes in a stage's folder; who may become it, and how the older one learns."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hedgehog.pipeline import lease as lease_module
from hedgehog.pipeline.checkpoints import Checkpoints
from hedgehog.pipeline.distributed import World
from hedgehog.pipeline.errors import Interrupted, LeaseError
from hedgehog.pipeline.interrupts import listening
from hedgehog.pipeline.lease import Holder, Lease, acquire, leased
from hedgehog.pipeline.manifest import Manifest
from hedgehog.pipeline.metrics import Reporter
from hedgehog.pipeline.row_log import RowLog
from hedgehog.pipeline.run_folder import LEASE, atomic_directory, atomic_write, write_fault

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lease_module, "STALE_AFTER_S", 0.6)
    monkeypatch.setattr(lease_module, "_POLL_S", 0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "distill"


def forge(folder: Path, token: int = 1, **changes: Any) -> Holder:
    """A lease that another process left or holds."""
    holder = replace(lease_module._this_process(), **changes)
    (folder / LEASE).mkdir(parents=True, exist_ok=True)
    (folder / LEASE / f"{token:08d}.json").write_text(json.dumps(asdict(holder)))
    return holder


def refuse_to_wait(message: str) -> None:
    pytest.fail(f"it should know at once, but says: {message}")


ELSEWHERE = {"host": "gpu-03", "machine": "gpu-03 boot", "pid": 4711}


@contextmanager
def beating(folder: Path, **changes: Any) -> Iterator[None]:
    """A holder on another machine that is alive."""
    ended = threading.Event()

    def beat() -> None:
        beats = 0
        while not ended.wait(0.05):
            beats += 1
            lease_module._write_over(folder / LEASE, 1, replace(holder, beats=beats))

    holder = forge(folder, **changes)
    thread = threading.Thread(target=beat)
    thread.start()
    yield
    ended.set()
    thread.join()


def test_tokens_grow_over_releases(folder: Path) -> None:
    for token in (1, 2, 3):
        lease = acquire(folder)
        assert lease.token == token
        assert lease.fault() is None
        lease.release()
    assert [file.name for file in (folder / LEASE).iterdir()] == ["00000003.json"]


def test_only_one_of_many_claims_a_token(folder: Path) -> None:
    (folder / LEASE).mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path; from hedgehog.pipeline import lease\n"
        "leases, me = Path(sys.argv[1]), lease._this_process(); sys.stdin.readline()\n"
        "print(sum(lease._claim(leases, token, me) for token in range(1, 101)))"
    )
    claimants = [
        subprocess.Popen([sys.executable, "-c", code, str(folder / LEASE)], stdin=-1, stdout=-1, text=True)
        for _ in range(3)
    ]
    for claimant in claimants:
        assert claimant.stdin is not None
        claimant.stdin.write("go\n")
        claimant.stdin.flush()
    assert sum(int(claimant.communicate()[0]) for claimant in claimants) == 100
    assert len(list((folder / LEASE).iterdir())) == 100


def test_a_file_system_without_links_will_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    lease = acquire(folder)
    assert lease.token == 1
    assert not lease_module._claim(folder / LEASE, 1, lease_module._this_process())


def test_a_process_that_is_gone_is_replaced_at_once(folder: Path) -> None:
    gone = subprocess.Popen(["true"])
    forge(folder, pid=gone.pid)
    while lease_module._process_start(gone.pid) is not None:  # it becomes a zombie, which counts as gone
        time.sleep(0.01)
    assert acquire(folder, refuse_to_wait).token == 2
    gone.wait()


def test_another_process_with_the_same_pid_is_not_the_holder(folder: Path) -> None:
    forge(folder, process_start="12345")
    assert acquire(folder).token == 2


def test_a_living_process_of_this_machine_refuses_at_once(folder: Path) -> None:
    forge(folder, pid=os.getppid(), process_start=lease_module._process_start(os.getppid()))
    with pytest.raises(LeaseError, match=rf"in use \(process {os.getppid()} on .*since .*`kill {os.getppid()}`"):
        acquire(folder, refuse_to_wait)


def test_a_living_process_whose_heart_stands_still_is_replaced_after_a_while(folder: Path) -> None:
    old = time.monotonic() - 3600
    forge(folder, pid=os.getppid(), process_start=lease_module._process_start(os.getppid()), beat_clock_s=old)
    assert acquire(folder).token == 2


@pytest.fixture(params=[FileNotFoundError, PermissionError], ids=["hidepid=2", "hidepid=1"])
def another_users_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A living process that /proc shows to its owner only."""
    process = {"pid": os.getppid(), "process_start": lease_module._process_start(os.getppid())}
    read_text = Path.read_text

    def hidden(self: Path, *arguments: Any, **rest: Any) -> str:
        if str(self) == f"/proc/{os.getppid()}/stat":
            raise request.param(str(self))
        return read_text(self, *arguments, **rest)

    monkeypatch.setattr(Path, "read_text", hidden)
    return process


def test_a_process_that_proc_hides_is_not_taken_for_gone(folder: Path, another_users_process: dict[str, Any]) -> None:
    with beating(folder, **another_users_process), pytest.raises(LeaseError, match="its heartbeat goes on"):
        acquire(folder)


def test_a_hidden_process_without_a_heartbeat_is_replaced(folder: Path, another_users_process: dict[str, Any]) -> None:
    forge(folder, **another_users_process)
    started = time.monotonic()
    assert acquire(folder).token == 2
    assert time.monotonic() - started >= 0.6


def test_a_process_of_another_user_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    assert lease_module._exists(1)


@pytest.mark.parametrize("clock", [0.0, 1e12])
def test_a_heartbeat_elsewhere_that_goes_on_refuses_whatever_its_clock_says(folder: Path, clock: float) -> None:
    with (
        beating(folder, **ELSEWHERE, job="12", beat_clock_s=clock),
        pytest.raises(LeaseError, match=r"job 12, restart 0, process 4711 on gpu-03.*`scancel 12`"),
    ):
        acquire(folder)


def test_a_heartbeat_elsewhere_that_stands_still_is_watched_then_replaced(folder: Path) -> None:
    forge(folder, **ELSEWHERE)
    said: list[str] = []
    started = time.monotonic()
    assert acquire(folder, said.append).token == 2
    assert time.monotonic() - started >= 0.6
    assert len(said) == 2 and "no sign of life" in said[1]


def test_a_torn_lease_is_watched_too(folder: Path) -> None:
    forge(folder)
    (folder / LEASE / "00000001.json").write_text('{"job": ')
    started = time.monotonic()
    assert acquire(folder).token == 2
    assert time.monotonic() - started >= 0.6


def test_a_signal_while_watching_is_heard(folder: Path) -> None:
    forge(folder, **ELSEWHERE)
    with listening(), pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGUSR2)
        acquire(folder)


def test_a_later_restart_of_the_job_takes_over_from_a_living_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with beating(folder, **ELSEWHERE, job="12", restart=1):
        said: list[str] = []
        assert acquire(folder, said.append).token == 2
    assert len(said) == 1 and "takes over from an earlier start" in said[0]


@pytest.mark.parametrize("released", [False, True])
def test_an_earlier_restart_of_the_job_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, released: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    forge(folder, **ELSEWHERE, job="12", restart=1, released=released)
    with pytest.raises(LeaseError, match="later start of this job works here"):
        acquire(folder)


@pytest.mark.parametrize("restart", ["0", "2"])
def test_the_same_number_on_another_cluster_is_another_job(
    folder: Path, monkeypatch: pytest.MonkeyPatch, restart: str
) -> None:
    for name, value in (("JOB_ID", "12"), ("RESTART_COUNT", restart), ("CLUSTER_NAME", "beta")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    theirs = {**ELSEWHERE, "job": "12", "cluster": "alpha", "restart": 1}
    with (
        beating(folder, **theirs),
        pytest.raises(LeaseError, match=r"in use \(job 12 of cluster alpha, .*`scancel 12` on cluster alpha\)"),
    ):
        acquire(folder)
    forge(folder, **theirs, released=True)
    assert acquire(folder, refuse_to_wait).token == 2


def test_a_restart_on_the_same_cluster_takes_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("JOB_ID", "12"), ("RESTART_COUNT", "2"), ("CLUSTER_NAME", "alpha")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    forge(folder, **ELSEWHERE, job="12", cluster="alpha", restart=1)
    said: list[str] = []
    assert acquire(folder, said.append).token == 2
    assert len(said) == 1 and "earlier start of this job (job 12 of cluster alpha, restart 1, " in said[0]


def test_in_an_allocation_nobody_is_told_to_cancel_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with beating(folder, **ELSEWHERE, job="12"), pytest.raises(LeaseError, match=r"\(`kill 4711` on gpu-03\)"):
        acquire(folder)


def test_a_command_in_an_allocation_does_not_work_for_its_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    forge(folder, **ELSEWHERE, job="12", restart=4, released=True)
    lease = acquire(folder, refuse_to_wait, for_job=False)
    holder = lease_module._read(folder / LEASE, lease.token)
    assert holder is not None and (holder.job, holder.restart) == (None, 0)


def test_the_heart_beats_while_the_work_goes_on(folder: Path) -> None:
    with leased(folder, ALONE, print):
        first = lease_module._read(folder / LEASE, 1)
        time.sleep(0.3)
        second = lease_module._read(folder / LEASE, 1)
    assert first is not None and second is not None
    assert second.beats > first.beats
    left = lease_module._read(folder / LEASE, 1)
    assert left is not None and left.released


def take_over(folder: Path) -> None:
    forge(folder, token=2, **ELSEWHERE, job="12", restart=3)


def publish_file(folder: Path) -> None:
    atomic_write(folder / "a.json", "older")


def publish_folder(folder: Path) -> None:
    with atomic_directory(folder / "a") as unfinished:
        (unfinished / "x").write_text("older")


def publish_checkpoint(folder: Path) -> None:
    Checkpoints(folder / "checkpoints", "f", ALONE).save(2, {"w.safetensors": {"w": torch.ones(2)}}, layout={})


def publish_manifest(folder: Path) -> None:
    Manifest(stage="distill", fingerprint="", config={}).write(folder)


def append_row(folder: Path) -> None:
    log = RowLog(folder / "rows.jsonl", ALONE)
    log._file = open(folder / "rows.jsonl", "a")  # noqa: SIM115
    log.append([{"index": 1}])


@pytest.mark.parametrize(
    "publish",
    [publish_file, publish_folder, publish_checkpoint, publish_manifest, append_row],
    ids=lambda f: f.__name__,
)
def test_who_was_replaced_publishes_nothing_more(folder: Path, publish: Callable[[Path], None]) -> None:
    with leased(folder, ALONE, print):
        publish(folder)
        for path in folder.iterdir():  # what the newer attempt finds it may change
            if path.is_file():
                path.write_text("newer")
        take_over(folder)
        before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*") if LEASE not in path.parts}
        with pytest.raises(LeaseError, match=r"taken over \(job 12, restart 3, process 4711 on gpu-03"):
            publish(folder)
        after = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*") if LEASE not in path.parts}
        assert after == before
        atomic_write(folder.parent / "elsewhere.json", "the fence is around the stage's folder only")
    newest = lease_module._read(folder / LEASE, 2)
    assert newest is not None and newest.job == "12" and not newest.released, "the older one touches its own file only"


def test_metrics_of_who_was_replaced_are_dropped(folder: Path) -> None:
    with leased(folder, ALONE, print):
        reporter = Reporter("distill", folder)
        reporter.record({"step": 1})
        take_over(folder)
        reporter.record({"step": 2})
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_folder_that_was_removed_stops_the_work(folder: Path) -> None:
    with leased(folder, ALONE, print) as lease:
        for file in (folder / LEASE).iterdir():
            file.unlink()
        with pytest.raises(LeaseError, match="removed or replaced"):
            atomic_write(folder / "a.json", "x")
        assert isinstance(lease, Lease)


def test_what_killed_attempts_were_writing_goes_away(folder: Path) -> None:
    subset = folder / "layers-0-1"
    for path in (folder / "a.partial", folder / "checkpoints" / "step-000002.1.partial", subset / "b.partial"):
        path.mkdir(parents=True)
    with leased(folder, ALONE, print):
        assert not list(folder.glob("*.partial")) and not list(folder.glob("checkpoints/*"))
        assert (subset / "b.partial").is_dir(), "a subset of layers has a lease of its own"


def test_a_file_system_that_gives_no_answer_is_no_take_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(_: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with leased(folder, ALONE, print):
        monkeypatch.setattr(lease_module, "_newest", stale)
        assert write_fault() is None
        with pytest.raises(OSError, match="Stale"):
            atomic_write(folder / "a.json", "x")


def test_a_rank_that_was_asked_to_stop_leaves_the_lease_free(folder: Path) -> None:
    class WithAnother(World):
        def gather(self, value: object) -> list[object]:
            return [value, Interrupted("theirs", signals=("SIGTERM",))]

    world = WithAnother(rank=0, world_size=2, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(Interrupted, match="theirs"), leased(folder, world, print):
        pytest.fail("it went on alone")
    left = lease_module._read(folder / LEASE, 1)
    assert left is not None and left.released

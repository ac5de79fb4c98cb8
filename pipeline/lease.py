"""Who may write in a stage's folder: the newest attempt, and nobody else.

    <stage>/lease/00000007.json     7 is the fencing token; inside: who holds it, and a heartbeat

A newcomer writes a file of its own and links it to the next token's name: only one of several can. So tokens grow, and
the highest holds the lease. A holder renews only its own file, and looks before everything that it publishes whether
there is a higher token; then it stops. Nothing here needs locks, equal clocks, or more of a shared file system than
that a link or an exclusive creation succeeds once and that a folder opened anew shows what is in it.

Who comes to a folder that is held:
- a later restart of the same Slurm job (its id and its cluster's name) takes over at once, an earlier one is refused:
  Slurm may think a job dead that still runs;
- a holder that released the lease, or whose process is gone from this machine, is replaced at once;
- a heartbeat that goes on refuses the newcomer; one that stands still for STALE_AFTER_S, as the newcomer's own clock
  measures it, is replaced. On the holder's machine its process and clock tell at once, unless /proc hides them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import LeaseError, ResourceError
from .interrupts import stop_if_asked, stopping_together
from .run_folder import LEASE, fenced, fsync_directory, remove_temporaries

if TYPE_CHECKING:
    from .distributed import World

HEARTBEAT_S = 10.0
STALE_AFTER_S = 60.0
"""Six heartbeats: a slow file system or a long computation without the interpreter may miss some."""
_POLL_S = 0.25
_NAME = re.compile(r"(\d{8})\.json")


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, and the last sign of life."""

    job: str | None
    """SLURM_JOB_ID; a requeued job keeps it. None outside Slurm, and for a command that submits or cancels jobs."""
    restart: int
    """SLURM_RESTART_COUNT."""
    host: str
    machine: str
    """Equal where process ids mean the same processes: host name, boot and pid namespace."""
    pid: int
    process_start: str
    """Tells apart two processes that had the same pid."""
    since: str
    beats: int = 0
    beat_clock_s: float = 0.0
    """The machine's monotonic clock at the last heartbeat."""
    released: bool = False
    cluster: str | None = None
    """SLURM_CLUSTER_NAME: clusters that share a file system number their jobs each for itself."""

    def __str__(self) -> str:
        cluster = f" of cluster {self.cluster}" if self.cluster else ""
        job = f"job {self.job}{cluster}, restart {self.restart}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}, since {self.since}"

    def same_job(self, other: Holder) -> bool:
        """Whether both work for one Slurm job, be it in different starts of it."""
        return self.job is not None and (self.job, self.cluster) == (other.job, other.cluster)

    def cure_for(self, newcomer: Holder) -> str:
        """The command that ends it, but not the newcomer with it: both may be in one interactive allocation."""
        if self.job is None or self.same_job(newcomer):
            return f"`kill {self.pid}` on {self.host}"
        return f"`scancel {self.job}`" + (f" on cluster {self.cluster}" if self.cluster != newcomer.cluster else "")


class Lease:
    """A token that was the highest when it was claimed. Ranks other than 0 only look."""

    def __init__(self, folder: Path, token: int, holder: Holder | None = None) -> None:
        self.folder = folder
        """The stage's folder."""
        self.token = token
        self.tag = str(token)
        self._holder = holder
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def fault(self) -> LeaseError | None:
        """Why this process may write nothing more, or None. Costs the reading of one small folder."""
        newest = _newest(self.folder / LEASE)
        if newest == self.token:
            return None
        if newest is None:
            return LeaseError(
                f"{self.folder}: the folder was removed or replaced while this process worked in it. It stops and "
                "writes nothing more."
            )
        other = _read(self.folder / LEASE, newest)
        return LeaseError(
            f"{self.folder}: another process has taken over ({other or 'token ' + str(newest)}). This older one stops "
            "and writes nothing more."
        )

    def keep_alive(self) -> None:
        """Renew the heartbeat every HEARTBEAT_S seconds, in a thread of its own."""
        self._thread = threading.Thread(target=self._beat, name="lease heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            # a full disk must not end the run here; if it lasts, the run fails where it writes
            with contextlib.suppress(OSError):
                if self.fault() is not None:
                    return
                self._renew()

    def _renew(self, *, released: bool = False) -> None:
        assert self._holder is not None
        self._holder = replace(
            self._holder, beats=self._holder.beats + 1, beat_clock_s=time.monotonic(), released=released
        )
        _write_over(self.folder / LEASE, self.token, self._holder)

    def release(self) -> None:
        """Let the next one in at once."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):  # the next one then finds this process gone
            if self.fault() is None:
                self._renew(released=True)


@contextmanager
def leased(folder: Path, world: World, say: Callable[[str], None]) -> Iterator[Lease]:
    """Hold the lease of a stage's folder, which is made where there is none. Collective; rank 0 holds it for all.

    Inside, nothing is published in the folder any more once another process has taken it over.

    Args:
        say: told why it waits or what it takes over.

    Raises:
        LeaseError: another process holds it.
        Interrupted: a signal came before.
    """
    own: Lease | None = None
    try:
        with stopping_together(world):
            stop_if_asked("this attempt had not begun")
            if world.is_main:
                own = acquire(folder, say)
                own.keep_alive()
        lease = own or Lease(folder, 0)
        lease.token = world.broadcast(lease.token)
        lease.tag = str(lease.token)
        if own is not None:
            remove_temporaries(folder)
        with fenced(lease):
            yield lease
    finally:
        if own is not None:
            own.release()


def acquire(folder: Path, say: Callable[[str], None] = lambda _: None, *, for_job: bool = True) -> Lease:
    """Claim the next token of a stage's folder, as soon as that is allowed.

    Args:
        for_job: whether this is the work of the Slurm job that the process is in, if any. A command that a user types
            in an interactive allocation is not: it neither ends nor starts again with it.

    Raises:
        LeaseError: the folder is in use, or a later restart of this job was here.
        Interrupted: a signal came while waiting.
        ResourceError: the folder cannot be made there.
    """
    leases = folder / LEASE
    try:
        leases.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # as in /proc, though its permissions would allow it
        raise ResourceError(
            f"no folder can be made in {Path(error.filename).parent}: choose another output_dir"
        ) from None
    me = _this_process(for_job=for_job)
    while True:
        newest = _newest(leases)
        if newest is not None and not _may_replace(leases, newest, me, folder, say):
            continue
        token = (newest or 0) + 1
        if _claim(leases, token, me):
            for file in leases.iterdir():
                if file.name[:8].isdigit() and int(file.name[:8]) < token:
                    file.unlink(missing_ok=True)
            return Lease(folder, token, me)


def _may_replace(leases: Path, token: int, me: Holder, folder: Path, say: Callable[[str], None]) -> bool:
    """Whether the holder of `token` may be replaced; False: it has changed meanwhile, look again."""
    holder = _read(leases, token)
    if holder is None:
        return _stands_still(leases, token, None, me, folder, say)
    same_job = me.same_job(holder)
    if same_job and holder.restart > me.restart:
        raise LeaseError(
            f"{folder}: a later start of this job works here ({holder}). This is restart {me.restart} of job {me.job}, "
            "which Slurm has given up; it stops."
        )
    if holder.released:
        return True
    if same_job and holder.restart < me.restart:
        say(f"takes over from an earlier start of this job ({holder})")
        return True
    if holder.machine == me.machine:
        start = _process_start(holder.pid)
        # where one of them is not known, the process may be the holder or not: its heartbeat will tell
        is_known = bool(start and holder.process_start)
        if start is None or (is_known and start != holder.process_start):
            return True
        if is_known and time.monotonic() - holder.beat_clock_s < STALE_AFTER_S:
            raise _in_use(folder, holder, me)
    return _stands_still(leases, token, holder, me, folder, say)


def _stands_still(
    leases: Path, token: int, holder: Holder | None, me: Holder, folder: Path, say: Callable[[str], None]
) -> bool:
    """Watch a heartbeat for STALE_AFTER_S seconds of this process's clock. False: the holder is another meanwhile."""
    whom = holder or "an unknown process"
    say(f"{folder} is held by another ({whom}): watches for up to {STALE_AFTER_S:.0f} s whether it lives")
    started = time.monotonic()
    while time.monotonic() - started < STALE_AFTER_S:
        stop_if_asked("this attempt had not begun")
        time.sleep(_POLL_S)
        if _newest(leases) != token:
            return False
        seen = _read(leases, token)
        if seen != holder:
            if seen is None or seen.released or holder is None:
                return False
            raise _in_use(folder, seen, me)
    say(f"takes over: there was no sign of life ({whom})")
    return True


def _in_use(folder: Path, holder: Holder, me: Holder) -> LeaseError:
    return LeaseError(
        f"{folder} is in use ({holder}), and its heartbeat goes on. Wait until it is done, or end it "
        f"({holder.cure_for(me)}) and run the same command again; or choose another name=…."
    )


def _newest(leases: Path) -> int | None:
    # Listing opens the folder anew, which NFS answers with what is there now; a stat of one name it may not.
    try:
        tokens = [int(found[1]) for found in map(_NAME.fullmatch, os.listdir(leases)) if found]
    except FileNotFoundError:
        return None
    return max(tokens, default=None)


def _file(leases: Path, token: int) -> Path:
    return leases / f"{token:08d}.json"


def _read(leases: Path, token: int) -> Holder | None:
    """None where the file is gone or not whole."""
    try:
        return Holder(**json.loads(_file(leases, token).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _claim(leases: Path, token: int, holder: Holder) -> bool:
    """Make the token's file with its content, unless somebody else was faster."""
    target = _file(leases, token)
    content = json.dumps(asdict(holder), indent=2) + "\n"
    unique = leases / f"{socket.gethostname()}.{os.getpid()}.claim"
    with open(unique, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    try:
        try:
            os.link(unique, target)
        except FileExistsError:
            # NFS may do the link, lose its answer, ask again and say this
            if os.stat(unique).st_nlink != 2:
                return False
        except OSError:  # a file system without hard links
            try:
                with open(target, "x") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            except FileExistsError:
                return False
    finally:
        unique.unlink(missing_ok=True)
    fsync_directory(leases)
    return True


def _write_over(leases: Path, token: int, holder: Holder) -> None:
    """Renew the token's file in one step. Not flushed to disk: after a power failure nobody asks for heartbeats."""
    temporary = leases / f"{token:08d}.renewed"
    temporary.write_text(json.dumps(asdict(holder), indent=2) + "\n")
    os.replace(temporary, _file(leases, token))


def _this_process(*, for_job: bool = True) -> Holder:
    job = os.environ.get("SLURM_JOB_ID") or None if for_job else None
    restart = os.environ.get("SLURM_RESTART_COUNT", "0") if job else "0"
    return Holder(
        job=job,
        restart=int(restart) if restart.isdigit() else 0,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process_start=_process_start(os.getpid()) or "",
        since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        beat_clock_s=time.monotonic(),
        cluster=os.environ.get("SLURM_CLUSTER_NAME") or None,
    )


def _machine() -> str:
    """Containers may share a host name, and machines of a cluster an image: neither shares boot and pid namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux: the host name must do
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _process_start(pid: int) -> str | None:
    """When a process of this machine began, as the kernel counts; None where it is gone.

    "" for a process that is there, but does not show it: on a system without /proc, and where /proc is mounted with
    hidepid and the process is another user's.
    """
    try:
        # after the name in parentheses, which may hold anything: state, …, start time
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if _exists(pid) else None
    return None if fields[0] in "ZX" else fields[19]


def _exists(pid: int) -> bool:
    """Asks the kernel itself, which hidepid does not keep from answering."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

"""Signals that ask a run to stop. A handler only notes them; the stage stops where nothing is lost.

    $HEDGEHOG_INTERRUPT_SIGNAL (USR2)   save, have Slurm queue the job again (requeue.py), leave with 75
    TERM                                the same if Slurm preempts the job, else save, leave with 75
    INT (Ctrl-C)                        save, leave with 130; a second one aborts at once

The signal is a property of the job script, which asks Slurm for it, so it comes from the environment and not from the
config; and so the handlers can be there before the config is read. One that comes still earlier ends the process, and
the script queues the job again. USR1 would be a bad choice: NCCL may take it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError, Interrupted, LeaseError
from .run_folder import write_fault

if TYPE_CHECKING:
    from .distributed import World

VARIABLE = "HEDGEHOG_INTERRUPT_SIGNAL"
_DEFAULT = "USR2"
_NEVER = ("SIGKILL", "SIGSTOP", "SIGCONT", "SIGCHLD", "SIGTERM", "SIGINT")
"""They cannot be handled, come by themselves, or mean something else here."""

_LISTENING_FILE = "HEDGEHOG_LISTENING"
"""Names the file by which the job's script (slurm/) learns that signals are seen to here from now on."""

# Handlers belong to the process, and so does what they noted.
_received: set[signal.Signals] = set()
_listening = False


def interrupt_signal() -> signal.Signals:
    """The signal that asks to save and to be queued again.

    Raises:
        ConfigError: the environment names none.
    """
    name = os.environ.get(VARIABLE) or _DEFAULT
    found = signal.Signals.__members__.get("SIG" + name.upper().removeprefix("SIG"))
    if found is None or found.name in _NEVER:
        raise ConfigError(f"the environment's {VARIABLE} is '{name}': name a signal such as USR2, or unset it.")
    return found


@contextmanager
def listening() -> Iterator[None]:
    """Inside, the stopping signals are noted and not died of; afterwards all is as before.

    Blocks may be nested: the outermost counts. Outside the main thread, where Python has no signals, nothing changes.

    Raises:
        ConfigError: the environment names a signal that is none.
    """
    global _listening
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = [interrupt_signal(), signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored: in the background of a shell, nohup
        signals.append(signal.SIGINT)
    _received.clear()
    _listening = True
    before = {number: signal.signal(number, _note) for number in signals}
    if os.environ.get(_LISTENING_FILE):
        with suppress(OSError):
            Path(os.environ[_LISTENING_FILE]).touch()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _listening = False
        _received.clear()


def _note(number: int, _frame: object) -> None:
    received = signal.Signals(number)
    if received is signal.SIGINT and received in _received:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt
    if received not in _received and os.environ.get("RANK", "0") == "0":
        again = "; once more stops at once" if received is signal.SIGINT else ""
        # not print: a handler may interrupt a print
        os.write(2, f"\n{received.name}: saves and stops as soon as it can{again}\n".encode())
    _received.add(received)


def votes() -> list[float]:
    """What this rank received, as numbers that ranks may add up; see `from_votes`."""
    return [float(number in _received) for number in _kinds()] if _received else [0.0, 0.0, 0.0]


def from_votes(total: Sequence[float]) -> Interrupted | None:
    """What all ranks do, from the sum of their votes; its message is still to be given."""
    if not any(total):
        return None
    return _interrupted([number for number, count in zip(_kinds(), total, strict=True) if count], "")


def _kinds() -> tuple[signal.Signals, ...]:
    return interrupt_signal(), signal.SIGTERM, signal.SIGINT


def asked_to_stop() -> bool:
    """Whether this process received a signal."""
    return bool(_received)


def stop_if_asked(saved: str) -> None:
    """Stop here if this process received a signal, or if another attempt has taken the folder over.

    For this process only: call it where the other ranks wait at the end of a `stopping_together`, or are none.

    Args:
        saved: what is safe, for the user ("the summaries made so far are kept").

    Raises:
        Interrupted, LeaseError.
    """
    fault = write_fault()
    if fault is not None:
        raise fault
    if _received:
        raise _interrupted(sorted(_received), saved)


def stopped_child(returncode: int, saved: str) -> None:
    """Stop if a child process died of a stopping signal: a terminal and Slurm send them to every process of a job.

    Raises:
        Interrupted.
    """
    if -returncode in _kinds():
        raise _interrupted(sorted({*_received, signal.Signals(-returncode)}), saved)


def _interrupted(kinds: Sequence[signal.Signals], saved: str) -> Interrupted:
    return Interrupted(saved, signals=tuple(kind.name for kind in kinds), requeue=interrupt_signal() in kinds)


@contextmanager
def stopping_together(world: World) -> Iterator[None]:
    """A rank that stops inside waits at the end for the others, and they stop with it. Collective.

    Every rank must be able to come to the end without the one that stopped: no collectives inside, unless all ranks
    stop at the same of them.

    Raises:
        Interrupted, LeaseError: what any rank raised, on every rank.
    """
    own: Interrupted | LeaseError | None = None
    try:
        yield
    except (Interrupted, LeaseError) as error:
        own = error
    stops = [stop for stop in world.gather(own) if stop is not None]
    if not stops:
        return
    # who lost the folder must not act on a signal; of the others one asks for the queue if any does
    raise min(stops, key=lambda stop: (not isinstance(stop, LeaseError), not getattr(stop, "requeue", False)))

"""Signals are noted, not died of; the second Ctrl-C aborts; everything is as before afterwards."""

from __future__ import annotations

import os
import pickle
import signal
import threading

import pytest
import torch

from hedgehog.pipeline import interrupts
from hedgehog.pipeline.distributed import World
from hedgehog.pipeline.errors import ConfigError, Interrupted, LeaseError
from hedgehog.pipeline.interrupts import (
    VARIABLE,
    asked_to_stop,
    from_votes,
    listening,
    stop_if_asked,
    stopped_child,
    stopping_together,
    votes,
)

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
NOTED = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("numbers", "requeue", "exit_code"),
    [
        ((signal.SIGUSR2,), True, 75),
        ((signal.SIGTERM,), False, 75),
        ((signal.SIGINT,), False, 130),
        ((signal.SIGUSR2, signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM), True, 75),
        ((signal.SIGINT, signal.SIGTERM), False, 75),
    ],
)
def test_a_signal_only_leaves_a_note(numbers: tuple[signal.Signals, ...], requeue: bool, exit_code: int) -> None:
    with listening():
        stop_if_asked("nobody asked")
        send(*numbers)
        assert asked_to_stop()
        with pytest.raises(Interrupted, match="all of it") as raised:
            stop_if_asked("all of it")
    assert raised.value.requeue is requeue
    assert raised.value.exit_code == exit_code
    assert set(raised.value.signals) == {number.name for number in numbers}


def test_the_second_ctrl_c_aborts_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), listening():
        send(signal.SIGINT)
        assert "once more stops at once" in capfd.readouterr().err
        send(signal.SIGINT)
        pytest.fail("the second one came through")


def test_handlers_and_notes_go_away_with_the_outermost_block() -> None:
    before = [signal.getsignal(number) for number in NOTED]
    with listening():
        with listening():
            send(signal.SIGUSR2)
        assert asked_to_stop(), "the inner block is part of the outer one"
        assert signal.getsignal(signal.SIGUSR2) is not before[0]
    assert [signal.getsignal(number) for number in NOTED] == before
    assert not asked_to_stop()


def test_a_background_job_keeps_ignoring_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening():
            send(signal.SIGINT)
            assert not asked_to_stop()
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_changes() -> None:
    seen = []

    def work() -> None:
        with listening():
            seen.append(signal.getsignal(signal.SIGUSR2))

    before = signal.getsignal(signal.SIGUSR2)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_signal_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sigusr1")
    with listening():
        send(signal.SIGUSR1)
        with pytest.raises(Interrupted) as raised:
            stop_if_asked("x")
    assert raised.value.requeue
    for wrong in ("USR9", "KILL", "TERM", "12"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(ConfigError, match=f"'{wrong}'"), listening():
            pytest.fail("taken for a signal")


def test_votes_of_all_ranks_add_up_to_one_decision() -> None:
    assert from_votes([0.0] * len(votes())) is None
    with listening():
        send(signal.SIGTERM)
        mine = votes()
    other = [2.0, 0.0, 0.0]
    decision = from_votes([a + b for a, b in zip(mine, other, strict=True)])
    assert decision is not None
    assert (decision.signals, decision.requeue) == (("SIGUSR2", "SIGTERM"), True)


def test_a_child_that_died_of_the_signal_is_no_fault_of_the_child() -> None:
    stopped_child(0, "x")
    stopped_child(-signal.SIGSEGV, "x")
    with pytest.raises(Interrupted) as raised:
        stopped_child(-signal.SIGUSR2, "x")
    assert raised.value.requeue


class TwoRanks(World):
    """Rank 0 of two; the other one brings what the test says."""

    theirs: BaseException | None

    def gather(self, value: object) -> list[object]:
        return [pickle.loads(pickle.dumps(entry)) for entry in (value, self.theirs)]


def test_one_rank_takes_the_others_along() -> None:
    world = TwoRanks(rank=0, world_size=2, local_rank=0, device=torch.device("cpu"))
    object.__setattr__(world, "theirs", Interrupted("theirs", signals=("SIGUSR2",), requeue=True))
    with pytest.raises(Interrupted, match="theirs") as raised, stopping_together(world):
        pass
    assert raised.value.requeue and raised.value.exit_code == 75
    with pytest.raises(Interrupted, match="theirs"), stopping_together(world):
        raise Interrupted("mine", signals=("SIGTERM",))
    with pytest.raises(LeaseError, match="lost"), stopping_together(world):
        raise LeaseError("lost")
    with pytest.raises(ValueError, match="a bug"), stopping_together(world):
        raise ValueError("a bug")
    with stopping_together(ALONE):
        pass


def test_kinds_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "HUP")
    assert interrupts.interrupt_signal() is signal.SIGHUP

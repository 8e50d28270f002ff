"""Being asked to stop: three signals, one exception, and none of them while results are saved."""

import os
import signal

import pytest

from fused_rl.system import signals
from fused_rl.system.signals import Stopped, status_of, stop_behind, stoppable, stops

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STATUS, ids=lambda n: n.name)
def test_each_signal_stops_with_its_status(number):
    with stoppable(), pytest.raises(KeyboardInterrupt) as stopped:
        send(number)
    assert status_of(stopped.value) == STATUS[number]


def test_a_stop_of_somebody_elses_is_ctrl_c():
    assert status_of(KeyboardInterrupt()) == 130


def test_held_signals_wait_for_the_release():
    done = []
    with stoppable():
        stops.held = True
        for number in (signal.SIGINT, signal.SIGTERM):
            send(number)
            done.append(number)
        with pytest.raises(Stopped) as stopped:
            stops.release()
        assert status_of(stopped.value) == 143 and len(done) == 2
        stops.release()
        with pytest.raises(Stopped):
            send(signal.SIGINT)
    assert not stops.held


def test_handlers_come_back_and_what_is_ignored_stays_ignored():
    before = {n: signal.getsignal(n) for n in STATUS}
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            assert signal.getsignal(signal.SIGTERM) is signals._handle
            send(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert {n: signal.getsignal(n) for n in STATUS} == before


def test_a_stop_is_found_behind_the_errors_of_a_dead_terminal():
    try:
        try:
            raise Stopped(signal.SIGHUP)
        finally:
            raise OSError("Input/output error")
    except OSError as error:
        assert status_of(stop_behind(error)) == 129
    assert stop_behind(OSError()) is None

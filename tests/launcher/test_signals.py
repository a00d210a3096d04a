"""Signals to the launcher: a stop breaks off a load, which can take seconds, and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

import pytest
from harness import EVERYONE_NULL, PATIENCE_S, Broker, Raw, folder, running, status_of

from fdbroker.launcher.signals import Signals, Stopped

CAUGHT = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE)
# takes a second or more for each of them
LONG = "version: 1\nusers:\n  54321:\n    devices:\n" + "    - {path: /dev/null, class: mem}\n" * 7000


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in CAUGHT}
    made = Signals()
    made.catch()
    yield made
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)
    made.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_stop_breaks_off_what_may_be(signals, number):
    timer = threading.Timer(0.1, os.kill, (os.getpid(), number))
    timer.start()
    end_s = time.monotonic() + PATIENCE_S
    with pytest.raises(Stopped), signals.breaking_off():
        try:
            while time.monotonic() < end_s:
                pass
        except Exception:
            pytest.fail("whoever takes it for an error of its own goes on")
    timer.join()
    with pytest.raises(Stopped), signals.breaking_off():
        pytest.fail("it has come before")
    os.kill(os.getpid(), number)  # nothing is broken off: it is read
    assert signals.read() == bytes([number, number])
    assert signals.read() == b""


class _Ends:
    """Does something when it ends, where nobody above hears of an error."""

    def __init__(self, does):
        self.does = does

    def __del__(self):
        self.does()


@pytest.fixture
def said(monkeypatch):
    """The errors of finalizers that are said."""
    errors = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: errors.append(type(lost.exc_value)))
    return errors


def test_a_stop_that_a_finalizer_swallows_is_heard_later_and_no_error(signals, said):
    with signals.breaking_off():
        _Ends(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert said == []
    assert signals.read() == bytes([signal.SIGTERM])


@pytest.mark.parametrize("stopped", [False, True])
def test_a_file_that_is_left_open_is_said_but_for_one_that_a_stop_has_left(signals, said, stopped):
    def warns():
        raise ResourceWarning

    def fails():
        raise ValueError

    with contextlib.suppress(Stopped), signals.breaking_off():
        if stopped:
            _Ends(lambda: os.kill(os.getpid(), signal.SIGTERM))
        _Ends(warns)
        _Ends(fails)
    assert said == ([ValueError] if stopped else [ResourceWarning, ValueError])
    _Ends(warns)
    assert said[-1] is ResourceWarning  # outside of the block all are


def test_a_hangup_breaks_off_nothing(signals):
    with signals.breaking_off():
        os.kill(os.getpid(), signal.SIGHUP)
    assert signals.read() == bytes([signal.SIGHUP])


def _write_long(place):
    (place / "policy.d").mkdir()
    for number in range(4):
        (place / f"policy.d/{number}.yaml").write_text(LONG)


def test_a_stop_is_heard_while_the_first_policy_is_loaded(dev):
    with folder() as place:
        _write_long(place)
        broker = Broker(place, EVERYONE_NULL)
        try:
            end_s = time.monotonic() + PATIENCE_S
            while not int(status_of(broker.process.pid)["SigCgt"], 16) & 1 << signal.SIGTERM - 1:
                assert time.monotonic() < end_s
            assert broker.stop() == 0
            assert "serving with" not in broker.text()
        finally:
            broker.process.kill()
            broker.process.wait()


def test_a_stop_is_heard_while_another_policy_is_loaded_and_who_asked_for_it_is_told(dev):
    with running(EVERYONE_NULL) as broker, Raw(broker.socket) as client:
        client.call("io.fdbroker.Broker.About")
        _write_long(broker.folder)
        client.send_call("io.fdbroker.Admin.Reload")
        broker.wait_for("reloading")
        time.sleep(0.5)
        assert broker.stop() == 0
        (finding,) = client.reply()["parameters"]["findings"]
        assert "told to stop" in str(finding)

"""Every error has its exit code, in the library's classes and as the commands end with it."""

from __future__ import annotations

import errno
import importlib
import pkgutil
import subprocess
import sys

import pytest
from fakes import answering
from harness import command

import fdbroker
from fdbroker import errors
from fdbroker.refusals import OpenFailed
from fdbroker.wire import varlink

# sysexits.h, by what a script does next
CODES = {
    "bad data": 65,
    "not there": 66,
    "no broker": 69,
    "a fault": 70,
    "the kernel refused": 74,
    "try again": 75,
    "not what the rule says": 76,
    "denied": 77,
    "the policy or the configuration": 78,
}
CLASSES = {
    "AnotherBroker": "no broker",
    "BrokerUnavailable": "no broker",
    "BusUnavailable": "no broker",
    "CallFailed": "a fault",
    "CannotListen": "the policy or the configuration",
    "CapabilitiesMissing": "the policy or the configuration",
    "ChildRefused": "the policy or the configuration",
    "ClientNotReading": "try again",
    "Denied": "denied",
    "DescriptorsRefused": "bad data",
    "DeviceGone": "try again",
    "LibraryMissing": "no broker",
    "LibraryTooOld": "no broker",
    "LinkViolation": "a fault",
    "MessageTooLong": "bad data",
    "NoInputDevice": "bad data",
    "NoSuchRecipient": "bad data",
    "NoSuchResource": "not there",
    "NotWhatItWas": "not what the rule says",
    "OpenFailed": "the kernel refused",
    "PolicyBroken": "try again",
    "PolicyError": "the policy or the configuration",
    "ProtocolViolation": "bad data",
    "QueueFull": "try again",
    "QuotaExceeded": "try again",
    "RateLimited": "try again",
    "RefuserFailed": "a fault",
    "RestartNeeded": "the policy or the configuration",
    "ServiceFailed": "a fault",
    "StateUnusable": "the policy or the configuration",
    "TooLong": "bad data",
    "TopicDenied": "denied",
    "WrongMatch": "bad data",
}


def _classes():
    for module in pkgutil.walk_packages(fdbroker.__path__, "fdbroker."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    waiting = errors.FdbrokerError.__subclasses__()
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind is not errors.Refused:
            yield kind


def test_every_error_class_has_the_exit_code_that_is_meant():
    assert {kind.__name__: kind.exit_code for kind in _classes()} == {
        name: CODES[meaning] for name, meaning in CLASSES.items()
    }


# what the broker says, how `open` ends, and what stands on standard error
RESOURCE = {"resource": {"device": "/dev/x", "access": "ro"}}
REFUSALS = {
    "Denied": (RESOURCE, 77, "what would allow it: fdbroker policy explain"),
    "NoSuchResource": (RESOURCE, 66, "/dev/x: the policy allows it, and it is not there now"),
    "NotWhatItWas": ({**RESOURCE, "reason": "a FIFO"}, 76, "/dev/x: not what the policy names: a FIFO"),
    "OpenFailed": ({**RESOURCE, "errno": 16}, 74, "/dev/x: it could not be opened: EBUSY"),
    "QuotaExceeded": ({"limit": "connections", "maximum": 64}, 75, "limit connections is reached, maximum 64"),
    "RateLimited": ({"retryAfterMilliseconds": 7}, 75, "try again in 7 ms"),
    "ClientNotReading": ({}, 75, "too many grants wait unread"),
    "PolicyBroken": ({}, 75, "fdbroker policy check"),
}


def test_every_refusal_of_open_is_here():
    assert set(REFUSALS) == set(errors.REFUSALS)


def test_where_a_driver_may_yet_come_one_is_to_try_again():
    codes = {OpenFailed(number).exit_code for number in (errno.ENODEV, errno.ENXIO)}
    assert (codes, OpenFailed(errno.EBUSY).exit_code) == ({75}, 74)


@pytest.mark.parametrize("name", REFUSALS)
def test_open_ends_with_the_code_of_the_refusal(root, name):
    parameters, code, text = REFUSALS[name]
    with answering(varlink.encode_error(f"io.fdbroker.Broker.{name}", parameters), unread=False) as address:
        ended, out, err = command(address, "open", "/dev/x")
    assert (ended, out) == (code, "")
    assert text in err


@pytest.mark.parametrize(
    ("words", "answer", "code"),
    [
        (("open", "/dev/x"), b"no json\0", 65),
        (("open", "/dev/x"), b"", 69),
        (("open", "/dev/x"), varlink.encode_error("org.varlink.service.MethodNotFound", {"method": "x"}), 70),
        (("open", "relative"), b"", 64),
        (("send", "t", "x"), varlink.encode_error("io.fdbroker.Inbox.Denied", {"topic": "t"}), 77),
        (("send", "t", "x"), varlink.encode_error("io.fdbroker.Inbox.TooLong", {"maximum": 0}), 65),
        (("send", "t", "x"), varlink.encode_error("io.fdbroker.Inbox.NoSuchRecipient", {"to": "x"}), 65),
        (("send", "t", "x"), varlink.encode_error("io.fdbroker.Inbox.DescriptorsRefused", {"reason": "x"}), 65),
        (("send", "t", "x"), varlink.encode_error("io.fdbroker.Inbox.QuotaExceeded", {"limit": "x"}), 75),
    ],
)
def test_every_other_end_has_its_code(root, words, answer, code):
    with answering(answer, unread=False) as address:
        ended, out, err = command(address, *words)
    assert (ended, out) == (code, ""), err
    assert err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("redirected", "words", "code"), [(">&-", "--help", 71), ("<&-", "send x", 71), ("2>&-", "--help", 0)]
)
def test_a_closed_standard_stream_is_an_error_of_its_own(redirected, words, code):
    """No traceback, and no file that is opened later gets its number."""
    line = f"{sys.executable} -I -m fdbroker {words} {redirected}"
    found = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert found.returncode == code
    assert "Traceback" not in found.stderr
    assert ("Bad file descriptor" in found.stderr) == bool(code)

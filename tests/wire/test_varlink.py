"""Varlink messages: what is a call, what is an error that can be answered, what ends the connection."""

from __future__ import annotations

import json
import time

import pytest

from fdbroker.errors import REFUSALS, ProtocolViolation
from fdbroker.limits import every as limits
from fdbroker.wire import varlink
from fdbroker.wire.frame import TooLong


def test_messages_come_out_as_they_went_in_however_they_are_cut():
    messages = [b'{"method":"a.B"}', b"", b"{}" * 100]
    data = b"".join(message + b"\0" for message in messages)
    for step in range(1, len(data) + 1):
        reader, got = varlink.VarlinkReader(), []
        for at in range(0, len(data), step):
            reader.feed(data[at : at + step])
            while (message := reader.next_message()) is not None:
                got.append(message)
        assert got == messages


@pytest.mark.parametrize("with_nul", [False, True])
def test_the_limit_is_65536_bytes(with_nul):
    for size, fits in ((limits.MESSAGE_BYTES, True), (limits.MESSAGE_BYTES + 1, False)):
        reader = varlink.VarlinkReader()
        reader.feed(b"x" * size + (b"\0" if with_nul else b""))
        if fits:
            assert (reader.next_message() is not None) == with_nul
        else:
            with pytest.raises(TooLong):
                reader.next_message()


def test_a_call_is_taken_apart():
    call = varlink.decode_call(b'{"method":"io.fdbroker.Broker.Open","parameters":{"a":1},"more":true}')
    assert call == varlink.Call("io.fdbroker.Broker", "Open", {"a": 1}, False, True)
    assert varlink.decode_call(b'{"method":"x"}') == varlink.Call("", "x", {}, False, False)
    assert varlink.decode_call(b'{"method":"x","parameters":null,"more":null}').parameters == {}


@pytest.mark.parametrize(
    "message", [b"", b"x", b"[]", b"1", b"{}", b'{"method":1}', b'{"method":"\xff"}', b'{"method":"\\ud800"}']
)
def test_what_is_no_call_is_a_violation(message):
    with pytest.raises(ProtocolViolation):
        varlink.decode_call(message)


@pytest.mark.parametrize(
    ("message", "parameter"),
    [
        ({"method": "a.B", "nonsense": 1}, "nonsense"),
        ({"method": "a.B", "parameters": []}, "parameters"),
        ({"method": "a.B", "parameters": "x"}, "parameters"),
        ({"method": "a.B", "more": 1}, "more"),
        ({"method": "a.B", "oneway": "true"}, "oneway"),
        ({"method": "a.B", "upgrade": True}, "upgrade"),
    ],
)
def test_a_wrong_member_is_answered_with_its_name(message, parameter):
    with pytest.raises(varlink.VarlinkError) as caught:
        varlink.decode_call(json.dumps(message).encode())
    assert caught.value.name == "org.varlink.service.InvalidParameter"
    assert caught.value.parameters == {"parameter": parameter}


def test_replies_and_errors_go_both_ways():
    reply = varlink.decode_reply(varlink.encode_reply({"a": [1]}, continues=True)[:-1])
    assert reply == varlink.Reply({"a": [1]}, "", True)
    error = varlink.decode_reply(varlink.encode_error("x.Y", {"b": 2})[:-1])
    assert error == varlink.Reply({"b": 2}, "x.Y", False)
    for message in (b"[]", b'{"parameters":[]}', b'{"error":1}', b'{"continues":"x"}'):
        with pytest.raises(ProtocolViolation):
            varlink.decode_reply(message)


def test_a_call_that_is_too_long_for_the_wire_is_refused_here():
    with pytest.raises(ValueError, match="at most"):
        varlink.encode_call("a.B", {"x": "y" * limits.MESSAGE_BYTES})


def test_the_interface_files_are_what_the_code_serves():
    from fdbroker.inbox.dispatch import HANDLERS

    assert {f"{interface}.{method}" for interface, method in HANDLERS} == {
        f"{interface}.{method}" for interface, methods in varlink.METHODS.items() for method in methods
    }
    assert set(varlink.ERRORS["io.fdbroker.Broker"]) == set(REFUSALS)
    for name, text in varlink.DESCRIPTIONS.items():
        assert f"interface {name}\n" in text


def test_the_value_of_a_float_is_never_looked_for():
    """No call has one. 1e-320 took 11 us, so that a message of 1,000 bytes took as long as hundreds of others."""
    call = b'{"method":"io.fdbroker.Broker.List","parameters":{"x":[%s]}}'
    assert varlink.decode_call(call % b"1e-320,1.5").parameters == {"x": [0.5, 0.5]}
    spent_s = []
    for item in (b"1e-320", b'"0-320"'):
        message = call % b",".join([item] * 9000)
        began_s = time.thread_time()
        for _ in range(5):
            varlink.decode_call(message)
        spent_s.append(time.thread_time() - began_s)
    assert spent_s[0] < 10 * spent_s[1], spent_s

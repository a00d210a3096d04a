"""What the tests of messages share: a subscriber, frames, and descriptors to send along."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import threading

from harness import Raw, outcome

import fdbroker
from fdbroker.kernel.sealed import sealed_memfd

SUBSCRIBE = "io.fdbroker.Inbox.Subscribe"
SEND = "io.fdbroker.Inbox.Send"


class Subscriber(Raw):
    """A client that has subscribed; `message` is the next one."""

    def __init__(self, address, *topics):
        super().__init__(address)
        self.send_call(SUBSCRIBE, {"topics": list(topics)}, more=True)
        # subscribing is answered by messages alone: two that arrive show that this one is in force
        while True:
            with Raw(address) as client:
                assert (
                    outcome(client.call("io.fdbroker.Inbox.Send", {"topic": topics[0], "payload": "are you there"}))
                    == "granted"
                )
            self.sock.settimeout(0.2)
            try:
                assert self.message()["payload"] == "are you there"
                break
            except TimeoutError:
                continue
            finally:
                self.sock.settimeout(15)

    def message(self):
        reply = self.reply()
        assert reply["continues"] is True
        return reply["parameters"]["message"]


@contextlib.contextmanager
def subscribed(broker, *topics):
    """A client whose subscription is in force, and the messages that come."""
    with fdbroker.connect(broker.socket) as client:
        messages = client.subscribe(topics)
        found = []
        thread = threading.Thread(target=lambda: found.append(next(messages)))
        thread.start()
        while thread.is_alive():
            with fdbroker.connect(broker.socket) as sender:
                sender.send(topics[0], "are you there")
            thread.join(0.02)
        yield (message for message in messages if message.payload != b"are you there")


def temporary(text):
    """An owned descriptor of a file that nobody else can name."""
    number = os.memfd_create("x")
    os.write(number, text)
    return number


def send_frame(address, payload, count):
    numbers = [temporary(b"%d" % index) for index in range(count)]
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(address)
            socket.send_fds(sock, [struct.pack("!I", len(payload)) + payload], numbers)
            return struct.unpack("!I", sock.recv(4))[0]
    finally:
        for number in numbers:
            os.close(number)


def raw_send(address, parameters, make):
    """Send with the descriptors that `make` makes; the short outcome and the parameters of an error."""
    numbers = make()
    try:
        with Raw(address) as client:
            call = json.dumps({"method": SEND, "parameters": parameters}).encode() + b"\0"
            socket.send_fds(client.sock, [call], numbers)
            reply = client.reply()
            return [outcome(reply), (reply or {}).get("parameters")]
    finally:
        for number in numbers:
            os.close(number)


def unsealed():
    return [temporary(b"text")]


def half_sealed():
    number = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(number, b"text")
    fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x10)  # F_SEAL_FUTURE_WRITE
    return [number]


def sealed(size=4):
    return [sealed_memfd("x", b"x" * size)]


NOT_SEALED = {"reason": "the payload is no memfd that is sealed with SHRINK, GROW and WRITE"}

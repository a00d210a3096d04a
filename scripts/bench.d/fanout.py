"""A client of scripts/bench that publishes to many: fanout.py KIND ADDRESS SUBSCRIBERS MESSAGES.

KIND is fdbroker, redis or mosquitto, ADDRESS a Unix socket. So many subscribers, all in this process, get so many
messages of 100 bytes that one publisher sends without waiting for the answers. Prints the nanoseconds from the first
byte that is sent to the last that has arrived.
"""

import json
import selectors
import socket
import sys
import time

_PAYLOAD = "x" * 100


def _line(*words: str) -> bytes:
    return f"*{len(words)}\r\n".encode() + b"".join(f"${len(word)}\r\n{word}\r\n".encode() for word in words)


def _mqtt(kind: int, body: bytes) -> bytes:
    return bytes([kind, len(body)]) + body  # every packet here is below 128 bytes


def _text(text: str) -> bytes:
    return len(text).to_bytes(2, "big") + text.encode()


def _call(method: str, more: dict[str, bool], **parameters: object) -> bytes:
    call = {"method": f"io.fdbroker.Inbox.{method}", "parameters": parameters, **more}
    return json.dumps(call).encode() + b"\0"


# What each kind says: to begin with, to subscribe, one message; what each delivery has once.
_CONNECT = _mqtt(0x10, _text("MQTT") + b"\x04\x02\0\0" + _text(""))
KINDS = {
    "fdbroker": (
        b"",
        _call("Subscribe", {"more": True}, topics=["news"]),
        _call("Send", {}, topic="news", payload=_PAYLOAD),
        b"\0",
    ),
    "redis": (b"", _line("SUBSCRIBE", "news"), _line("PUBLISH", "news", _PAYLOAD), b"$7\r\nmessage\r\n"),
    "mosquitto": (
        _CONNECT,
        _mqtt(0x82, b"\0\1" + _text("news") + b"\0"),
        _mqtt(0x30, _text("news") + _PAYLOAD.encode()),
        _text("news"),
    ),
}


def _connected(address: str, begin: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(address)
    if begin:
        sock.sendall(begin)
        sock.recv(100)
    return sock


def main() -> None:
    """Measure."""
    kind, address, subscribers, messages = sys.argv[1:]
    begin, subscribe, message, mark = KINDS[kind]
    count = int(messages)
    poll = selectors.DefaultSelector()
    missing = {}
    for _ in range(int(subscribers)):
        sock = _connected(address, begin)
        sock.sendall(subscribe)
        if kind != "fdbroker":
            sock.recv(100)
        sock.setblocking(False)
        poll.register(sock, selectors.EVENT_READ, sock)
        missing[sock] = count
    publisher = _connected(address, begin)
    time.sleep(0.5)  # fdbroker does not answer a subscription
    publisher.setblocking(False)
    waiting = bytearray(message * count)
    poll.register(publisher, selectors.EVENT_READ | selectors.EVENT_WRITE)
    left = len(missing)
    began = time.perf_counter_ns()
    while left:
        for key, events in poll.select(20):
            if key.fileobj is publisher:
                if events & selectors.EVENT_READ:
                    publisher.recv(1 << 16)
                if events & selectors.EVENT_WRITE:
                    del waiting[: publisher.send(waiting[: 1 << 16])]
                    if not waiting:
                        poll.modify(publisher, selectors.EVENT_READ)
                continue
            subscriber = key.data
            data = subscriber.recv(1 << 18)
            if not data:
                raise SystemExit("a subscriber was disconnected")
            if b'"lost":' in data:
                raise SystemExit("messages were lost")
            missing[subscriber] -= data.count(mark)
            left -= missing[subscriber] == 0
    print(time.perf_counter_ns() - began)


main()

"""The links between our processes: what a decoder takes is one message, which its encoder writes and it reads again.

Where the less trusted end speaks, it is written byte for byte as it came: nothing in it was overlooked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fdbroker import limits
from fdbroker.errors import (
    ClientNotReading,
    Denied,
    LinkViolation,
    NoSuchResource,
    NotWhatItWas,
    OpenFailed,
    QuotaExceeded,
    RateLimited,
    Refused,
)
from fdbroker.terms import Device, Namespace, Offer, Socket, Topic, TopicUse, Uplink, User
from fdbroker.wire import link, rights, worker

TABLES = (
    link.INBOX_TO_OPENER,
    link.OPENER_TO_INBOX,
    link.LAUNCHER_TO_OPENER,
    link.OPENER_TO_LAUNCHER,
    link.LAUNCHER_TO_WORKER,
    link.INBOX_TO_LAUNCHER,
    link.WORKER_TO_LAUNCHER,
)
ASK, ANSWER = len(TABLES), len(TABLES) + 1  # the two directions between opener and namespaces worker
WORDS = (b"\0\0\0\0\0\0\0\1", b"\xff" * 8, b"\0\x08/dev/snd", b"\0\xff", b"\xff\xfe", b"\xef\xbf\xbd")
FROM_INBOX = 0  # of TABLES


def seeds() -> Iterator[bytes]:
    asked = [Device("/dev/snd/ä", "rw"), Namespace("net", "vpn"), Namespace("mnt", pid=7), Namespace("uts")]
    asked += [Socket("vpn", "inet6", "dgram", 443)]
    yield b"\0" + link.encode_open(2**64 - 1, asked)
    yield b"\0" + rights.encode_denied_use(1, TopicUse("subscribe", "nö"))
    for one in (link.encode_list(1, watch=True), link.encode_closed(1, 4), link.encode_shutdown(1), link.DRAINED):
        yield b"\0" + one
    may = rights.Rights(frozenset({0, 255}), frozenset({7}), 1, 2, 3, 4, 5)
    yield b"\1" + rights.encode_connected(1, rights.Sender(1000, 1000, 7, "c1"), may)
    yield b"\1" + rights.encode_changed(1, may)
    yield b"\1" + rights.encode_topics([Topic("inbox", ("journal", "queue"), 65536, 60, everyone=True)])
    yield from (b"\1" + one for one in rights.encode_users([User(1000, "bob", frozenset({1}))]))
    yield b"\1" + link.encode_offered(1, [Offer(one, "/etc/p.yaml:7") for one in asked], last=True)
    for refusal in (
        *(None, Denied("x", index=3), NoSuchResource("x", index=0), NotWhatItWas("a FIFO", index=63)),
        *(OpenFailed(16), QuotaExceeded("burst", 9), RateLimited(10), ClientNotReading()),
    ):
        yield b"\1" + link.encode_outcome(9, refusal, why=True)
    yield from (b"\2" + one for one in (link.encode_policy(3), link.STOP, link.PING))
    yield from (b"\3" + one for one in (link.encode_applied(3), link.STOP_ASKED, link.WORKER_STUCK))
    yield from (b"\4" + link.RESTART, b"\5" + link.READY, b"\6" + link.READY)
    uplink = Uplink("br0", "10.0.0.0/24", isolated=True)
    yield bytes([ASK]) + worker.encode_ask(worker.Ask(1, 1000, Namespace("net"), (4, 5), 16, uplink))
    yield from (bytes([ASK]) + worker.encode_ask(worker.Ask(1, 1000, one)) for one in asked[1:])
    yield bytes([ANSWER]) + worker.encode_made(worker.Made(1, 4026531840, 2, (True, False)))
    yield bytes([ANSWER]) + link.encode_outcome(1, OpenFailed(110))
    yield bytes([ANSWER]) + worker.LOST


def encoded(message: Any) -> bytes | None:
    """The message as its sender writes it; None for a word without parameters."""
    match message:
        case link.Open():
            return link.encode_open(message.connection, message.resources)
        case link.List():
            return link.encode_list(message.connection, watch=message.watch)
        case link.Closed():
            return link.encode_closed(*message)
        case link.Shutdown():
            return link.encode_shutdown(*message)
        case link.Outcome():
            return link.encode_outcome(*message, why=True)
        case link.Offered(connection, last, offers):
            return link.encode_offered(connection, offers, last=last)
        case link.Policy():
            return link.encode_policy(*message)
        case link.Applied():
            return link.encode_applied(*message)
        case rights.Connected():
            return rights.encode_connected(*message)
        case rights.RightsChanged():
            return rights.encode_changed(*message)
        case rights.Topics():
            return rights.encode_topics(*message)
        case rights.Users(users) if 1 <= len(users) <= 256:
            (data,) = rights.encode_users(users)
            return data
        case rights.DeniedUse():
            return rights.encode_denied_use(*message)
        case worker.Ask():
            return worker.encode_ask(message)
        case worker.Made():
            return worker.encode_made(message)
    return None


def decoded(direction: int, data: bytes) -> Any:
    if direction == ASK:
        return worker.decode_ask(data)
    if direction == ANSWER:
        return worker.decode_answer(data)
    return link.decode(TABLES[direction], data)


def plain(message: Any) -> Any:
    """Exceptions have no equality of their own."""
    if isinstance(message, link.Outcome) and isinstance(message.refusal, Refused):
        return message._replace(refusal=(type(message.refusal), str(message.refusal), message.refusal.index))
    return message


def target(data: bytes) -> None:
    direction, data = data[0] % (len(TABLES) + 2) if data else 0, data[1:]
    try:
        message = decoded(direction, data)
    except LinkViolation:
        return
    again = encoded(message)
    if again is None:
        return
    assert len(again) <= limits.LINK_BYTES
    cut_text = isinstance(message, rights.DeniedUse | rights.Connected) and "\N{REPLACEMENT CHARACTER}" in str(message)
    if not cut_text:  # which could not be read anyway
        assert plain(decoded(direction, again)) == plain(message)
        assert direction != FROM_INBOX or again == data
    judge(message)


def judge(message: Any) -> None:
    """What other code takes for granted of a message."""
    match message:
        case link.Open(_, asked):
            assert 1 <= len(asked) <= limits.RESOURCES_PER_OPEN
        case link.Closed(_, reason):
            assert 0 <= reason < len(link.CLOSED_REASONS)
        case rights.DeniedUse(_, use):
            assert len(use.topic) <= limits.NAME_BYTES
        case rights.Connected(_, sender) | rights.Connected(_, sender, _):
            assert len(sender.session) <= 32
        case worker.Ask():
            assert len(message.known) <= worker.KNOWN
            assert message.maximum <= worker.KNOWN
        case worker.Made():
            assert len(message.living) <= worker.KNOWN
            assert message.unusable == worker.UNKNOWN or worker.UNUSABLE[message.unusable] is not None

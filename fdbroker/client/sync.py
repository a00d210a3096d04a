"""The blocking client: a socket around `calls`.

Runs in: any program. Not for several threads at once: one client each.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import NoReturn, Protocol, Self, TypeVar

from fdbroker.client import calls, closing, unreachable
from fdbroker.client.descriptor import Descriptor
from fdbroker.client.replies import Continued, Replies
from fdbroker.errors import BrokerUnavailable, NoSuchRecipient, PolicyBroken, PolicyError, ProtocolViolation
from fdbroker.kernel import sockets
from fdbroker.kernel.sealed import sealed_memfd
from fdbroker.limits import inbox as limits
from fdbroker.offers import Offer
from fdbroker.wire import frame, varlink

_READ_BYTES = 65536
T = TypeVar("T")


class Client:
    """A connection to the broker, which this object owns. Use it as a context manager, or `close` it.

    After BrokerUnavailable or ProtocolViolation it is closed; after a refusal it goes on.
    """

    def __init__(self, sock: socket.socket, timeout_s: float | None, address: str | None = None) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        self._address = address
        self._closed = False
        self._subscribed = False
        self._replies = Replies()
        self._buffer = bytearray(_READ_BYTES)

    @classmethod
    def connect(cls, address: str | None = None, *, timeout_s: float | None = 30.0) -> Self:
        """See `fdbroker.connect`."""
        return cls(connected(address, timeout_s), timeout_s, address)

    def open(self, resource: str, access: str = "ro") -> Descriptor:
        """Ask for one resource; returns its descriptor, owned by the caller.

        `resource` is a path below /dev, net:NAME, TYPE:pid:PID, TYPE:new or socket:net:NAME; `access`, for devices, is
        ro, wo or rw. Raises Denied, NoSuchResource, NotWhatItWas, OpenFailed, QuotaExceeded, RateLimited
        or ClientNotReading as the broker refuses; BrokerUnavailable when it is gone; ValueError for a wrong word.
        """
        return self.open_all([resource], access)[0]

    def open_all(self, resources: Sequence[calls.Asked], access: str = "ro") -> list[Descriptor]:
        """Ask for 1 to 64 at once: all of them, in this order, or none and the error of the first in the way.

        Each is a text, for which `access` is asked, or a pair of a text and its own access.
        """
        asked = calls.asked(resources, access)
        reply, numbers = self._call(calls.open_call(asked))
        return self._judged(lambda: calls.opened(reply, numbers, asked))

    def offers(self) -> list[Offer]:
        """What this program may open now, with the most access that it may ask for."""
        reply, numbers = self._call(calls.list_call(more=False))
        calls.close_all(numbers)
        return self._judged(lambda: calls.offered(reply))

    def watch(self) -> Iterator[list[Offer]]:
        """The same list now and again after every change, without end; close the client to stop.

        Nothing else can be asked on this client from then on.
        """
        self._send(calls.list_call(more=True))
        while True:
            reply, numbers = self._reply(None)
            calls.close_all(numbers)
            calls.answer(reply)
            yield self._judged(partial(calls.offered, reply))

    def about(self) -> calls.About:
        """Which policy is in force, for everybody: since when, and made of which files."""
        reply, numbers = self._call(calls.about_call())
        calls.close_all(numbers)
        return self._judged(lambda: calls.about(reply))

    def reload(self) -> None:
        """Have the policy loaded again; returns once the new one is in force.

        Raises PolicyError with all that is wrong, and then the old one stays in force; Denied for all but
        administrators; RateLimited.
        """
        reply, numbers = self._call(calls.reload_call())
        calls.close_all(numbers)
        findings = self._judged(lambda: calls.reloaded(reply))
        if findings:
            raise PolicyError(findings)

    def ping(self) -> float:
        """Send PING on a connection of its own; returns the round trip in seconds.

        Raises BrokerUnavailable; QuotaExceeded or PolicyBroken when the broker does not let that connection in.
        """
        return ping(self._address, timeout_s=self._timeout_s)

    def send(
        self,
        topic: str,
        payload: str | bytes,
        *,
        to: str | int | None = None,
        descriptors: Sequence[int | HasFileno] = (),
    ) -> None:
        """Send a message; it returns once every handler of the topic has it: a stored one is on the disk then.

        `to` is the name or number of the one user whom it is for, None for all. A payload that is too long for the wire
        goes in a memfd. `descriptors`, at most 16 with that one, are borrowed: each receiver gets copies. Raises
        TopicDenied, NoSuchRecipient, MessageTooLong, DescriptorsRefused, QuotaExceeded or RateLimited; OSError, and
        the client goes on, when the kernel does not send the descriptors, for example EBADF.
        """
        with outgoing(topic, payload, to, descriptors) as (call, numbers):
            try:
                _, received = self._call(call, numbers)
            except PermissionError:
                with contextlib.suppress(NoSuchRecipient):
                    self._call(calls.probe_call(topic))
                raise
        calls.close_all(received)

    def receive(self, maximum: int = 100, acknowledge: Iterable[int] = ()) -> list[calls.Message]:
        """What is stored for the caller's user, the oldest first; [] when nothing is. It stays until acknowledged.

        `acknowledge` are numbers of messages that are done with: once this returns they do not come again. Raises
        RateLimited, QuotaExceeded.
        """
        reply, numbers = self._call(calls.receive_call(maximum, acknowledge))
        calls.close_all(numbers)
        return self._judged(lambda: calls.messages(reply))

    def subscribe(self, topics: Sequence[str], *, after: int | None = None) -> Iterator[calls.Message]:
        """The messages of these topics as they come, without end; close the client to stop.

        With `after`, first those above that number that are stored for the caller's user and not acknowledged. When
        the broker goes away, it connects again, for as long as it takes, and goes on after the last number that it
        had: what is stored comes, what is not is lost. Nothing else can be asked on this client from then on. Raises
        TopicDenied, QuotaExceeded or RateLimited, then or later, when a new policy does not allow it any more.
        """
        begun = Continued(after)
        while True:
            try:
                for message in self._messages(calls.subscribe_call(topics, begun.after)):
                    if begun.is_new(message):
                        yield message
            except (BrokerUnavailable, PolicyBroken) as error:
                if self._closed or not begun.goes_on(error):
                    raise
                self._drop()
                time.sleep(begun.lost())
                with contextlib.suppress(BrokerUnavailable):  # the next call finds that as well
                    self._sock, self._replies = connected(self._address, self._timeout_s), Replies()

    def _messages(self, call: bytes) -> Iterator[calls.Message]:
        self._subscribed = True
        self._send(call)
        while True:
            reply, numbers = self._reply(None)
            yield self._judged(partial(calls.message, calls.answer(reply).parameters.get("message"), numbers))

    def close(self) -> None:
        """Close the connection and whatever arrived on it and was not taken."""
        self._closed = True
        self._drop()

    def detach(self) -> int:
        """The number of the connection, which from now on is the caller's to close; the client is closed."""
        self._closed = True
        self._replies.close()
        return self._sock.detach()

    def _drop(self) -> None:
        if self._subscribed:  # what waits there unread is closed with it
            closing.close_later([self._sock.detach()])
        self._sock.close()
        self._replies.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _call(self, call: bytes, with_it: Sequence[int] = ()) -> tuple[varlink.Reply, list[int]]:
        """One call and its reply, with the descriptors that it owns, now the caller's. Raises an error reply.

        Raises OSError when the kernel does not send the descriptors, nor anything of the call: the client goes on.
        """
        try:
            self._send(call, with_it)
        except OSError:
            raise
        except BaseException:
            self._drop()  # half a call cannot be taken back
            raise
        try:
            reply, numbers = self._reply(None if self._timeout_s is None else time.monotonic() + self._timeout_s)
            if not self._replies.spent:
                calls.close_all(numbers)
                raise ProtocolViolation("more than the answer came")
        except BaseException:
            self._drop()  # whatever interrupted it: the next call must not get this one's answer
            raise
        calls.answer(reply)
        return reply, numbers

    def _judged(self, judge: Callable[[], T]) -> T:
        try:
            return judge()
        except ProtocolViolation:
            self._drop()
            raise

    def _send(self, call: bytes, with_it: Sequence[int] = ()) -> None:
        if self._sock.fileno() < 0:
            raise BrokerUnavailable("the client is closed")
        self._sock.settimeout(self._timeout_s)
        try:
            if with_it:
                call = call[socket.send_fds(self._sock, [call], with_it) :]
                with_it = ()
            self._sock.sendall(call)
        except TimeoutError:
            self._lost("the broker does not read")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it hung up, and may have said why: `_reply` finds that, or the end
        except OSError as error:
            if with_it:
                raise
            self._lost(f"a call could not be sent: {error.strerror}")

    def _reply(self, deadline_s: float | None) -> tuple[varlink.Reply, list[int]]:
        try:
            while (reply := self._replies.next_reply()) is None:
                self._sock.settimeout(None if deadline_s is None else max(0.001, deadline_s - time.monotonic()))
                size, numbers = sockets.receive_into(
                    self._sock, self._buffer, calls.DESCRIPTORS_PER_READ, close=closing.close_later
                )
                if not size:
                    self._lost("the broker closed the connection")
                self._replies.feed(bytes(self._buffer[:size]), numbers)
            return reply, self._replies.take(calls.count_descriptors(reply))
        except ProtocolViolation:
            self._drop()
            raise
        except TimeoutError:
            self._lost("the broker did not answer in time")
        except OSError as error:
            self._lost(f"the connection to the broker is lost: {error.strerror}")

    def _lost(self, why: str) -> NoReturn:
        self._drop()
        raise BrokerUnavailable(why)


class HasFileno(Protocol):
    """What has a descriptor: a file, a socket, a Descriptor."""

    def fileno(self) -> int:
        """The number, which stays its own."""


@contextlib.contextmanager
def outgoing(
    topic: str, payload: str | bytes, to: str | int | None, descriptors: Sequence[int | HasFileno]
) -> Iterator[tuple[bytes, list[int]]]:
    """The call that sends a message, and its descriptors; a memfd before them holds a payload that is too long.

    Raises ValueError for too many descriptors, and for an empty `to`.
    """
    numbers = [one if isinstance(one, int) else one.fileno() for one in descriptors]
    if to == "":
        raise ValueError("to is empty: it is a user's name or number, or None for everybody")
    _check_count(len(numbers), "")
    try:
        call = calls.send_call(topic, payload, to, len(numbers))
    except ValueError:
        _check_count(len(numbers) + 1, ", with the memfd that has the payload")
        file = sealed_memfd("message", payload.encode() if isinstance(payload, str) else payload)
        try:
            yield calls.send_call(topic, None, to, len(numbers)), [file, *numbers]
        finally:
            os.close(file)
    else:
        yield call, numbers


def _check_count(count: int, which: str) -> None:
    if count > limits.DESCRIPTORS_PER_MESSAGE:
        raise ValueError(f"{count} descriptors{which}: at most {limits.DESCRIPTORS_PER_MESSAGE} go with a message")


def connected(address: str | None, timeout_s: float | None) -> socket.socket:
    """A connected socket, owned by the caller. Raises BrokerUnavailable, which says what to do."""
    path = calls.address(address, os.environ)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if timeout_s is not None:
            # not settimeout: to a full backlog a non-blocking connect says EAGAIN at once
            seconds = struct.pack("ll", int(timeout_s), min(int(timeout_s % 1 * 1_000_000) + 1, 999_999))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise BrokerUnavailable(unreachable.why(path, error)) from None
    return sock


def ping(address: str | None = None, *, timeout_s: float | None = 10.0) -> float:
    """Send PING by the inbox framing; returns the round trip in seconds, of which it takes at most `timeout_s`.

    Raises BrokerUnavailable; QuotaExceeded or PolicyBroken when the broker does not let the caller in.
    """
    with connected(address, timeout_s) as sock:
        received = b""
        began_s = time.perf_counter()
        try:
            with contextlib.suppress(ConnectionError):  # it hung up, and may have said why
                sock.settimeout(timeout_s)
                sock.sendall(frame.encode_frame(frame.PING))
            while not calls.is_pong(received):
                if timeout_s is not None:
                    sock.settimeout(max(0.001, began_s + timeout_s - time.perf_counter()))
                data = sock.recv(_READ_BYTES)
                if not data:
                    raise BrokerUnavailable("the broker closed the connection")
                received += data
        except (OSError, ProtocolViolation) as error:
            raise BrokerUnavailable(f"no answer to PING: {error}") from None
        return time.perf_counter() - began_s

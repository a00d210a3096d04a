"""The asyncio client: a socket and the event loop around `calls`.

Runs in: any program. Several tasks may call at once; answers come in the order of the calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from fdbroker.client import calls, closing, unreachable
from fdbroker.client.descriptor import Descriptor
from fdbroker.client.replies import Continued, Replies
from fdbroker.client.sync import HasFileno, outgoing, ping
from fdbroker.errors import (
    BrokerUnavailable,
    FdbrokerError,
    NoSuchRecipient,
    PolicyBroken,
    PolicyError,
    ProtocolViolation,
)
from fdbroker.kernel import sockets
from fdbroker.offers import Offer
from fdbroker.wire import varlink

_READ_BYTES = 65536
_REPLIES = 16  # that wait for one caller, which is slower than they come: then no more are read
T = TypeVar("T")
_CLOSED = partial(BrokerUnavailable, "the client is closed")


class _Waiting:
    """One call: the bytes that are still to be sent, and a queue of replies.

    The queue lets a caller give up without holding up the calls behind. `descriptors` are the caller's; the kernel has
    copies of them once the call has `begun`, which means that its first byte is sent.
    """

    def __init__(self, call: bytes, descriptors: Sequence[int]) -> None:
        self.unsent = call
        self.descriptors = descriptors
        self.begun = False
        self.abandoned = False
        self.replies: asyncio.Queue[tuple[varlink.Reply, list[int]] | Exception] = asyncio.Queue()

    def discard(self) -> None:
        """Close what came for a caller that is not there any more."""
        self.abandoned = True
        while not self.replies.empty():
            item = self.replies.get_nowait()
            if isinstance(item, tuple):
                calls.discard(*item)


class Client:
    """A connection to the broker, which this object owns. Use it as an async context manager, or `close` it.

    After BrokerUnavailable or ProtocolViolation it is closed; after a refusal it goes on.
    """

    def __init__(self, sock: socket.socket, address: str | None = None) -> None:
        self._address = address
        self._closed = False
        self._subscribed = False
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray(_READ_BYTES)
        self._waiting: deque[_Waiting] = deque()  # for replies, in the order of the calls
        self._unsent: deque[_Waiting] = deque()  # the last of these, to be sent
        self._use(sock)

    def _use(self, sock: socket.socket) -> None:
        self._sock = sock
        self._replies = Replies()
        # makes the exception of the next call of a client that has ended
        self._ended: Callable[[], FdbrokerError] | None = None
        self._reads = True
        self._loop.add_reader(sock.fileno(), self._readable)

    def _read_on(self, *, wanted: bool) -> None:
        """Read while `wanted`. Otherwise messages stay with the kernel, and the broker notices a slow reader."""
        if wanted != self._reads and self._ended is None:
            self._reads = wanted
            if wanted:
                self._loop.add_reader(self._sock.fileno(), self._readable)
            else:
                self._loop.remove_reader(self._sock.fileno())

    @classmethod
    async def connect(cls, address: str | None = None) -> Self:
        """See `fdbroker.aio.connect`."""
        return cls(await _connected(address), address)

    async def open(self, resource: str, access: str = "ro") -> Descriptor:
        """Ask for one resource; returns its descriptor, owned by the caller. All as in the blocking client."""
        return (await self.open_all([resource], access))[0]

    async def open_all(self, resources: Sequence[calls.Asked], access: str = "ro") -> list[Descriptor]:
        """Ask for 1 to 64 at once: all of them, in this order, or none and the error of the first in the way.

        Each is a text, for which `access` is asked, or a pair of a text and its own access.
        """
        asked = calls.asked(resources, access)
        waiting = self._send(calls.open_call(asked))
        reply, numbers = await self._next(waiting)
        return self._judged(lambda: calls.opened(reply, numbers, asked))

    async def offers(self) -> list[Offer]:
        """What this program may open now, with the most access that it may ask for."""
        waiting = self._send(calls.list_call(more=False))
        return await self._next_offers(waiting)

    async def watch(self) -> AsyncIterator[list[Offer]]:
        """The same list now and again after every change, without end; close the client to stop.

        Nothing else is answered on this client from then on.
        """
        waiting = self._send(calls.list_call(more=True))
        try:
            while True:
                yield await self._next_offers(waiting)
        finally:
            self._abandon(waiting)

    async def about(self) -> calls.About:
        """Which policy is in force, for everybody: since when, and made of which files."""
        reply, numbers = await self._next(self._send(calls.about_call()))
        calls.close_all(numbers)
        return self._judged(lambda: calls.about(reply))

    async def reload(self) -> None:
        """Have the policy loaded again; returns once the new one is in force. All as in the blocking client."""
        reply, numbers = await self._next(self._send(calls.reload_call()))
        calls.close_all(numbers)
        findings = self._judged(lambda: calls.reloaded(reply))
        if findings:
            raise PolicyError(findings)

    async def ping(self) -> float:
        """Send PING on a connection of its own; returns the round trip in seconds. All as in the blocking client."""
        return await asyncio.to_thread(ping, self._address)

    async def send(
        self,
        topic: str,
        payload: str | bytes,
        *,
        to: str | int | None = None,
        descriptors: Sequence[int | HasFileno] = (),
    ) -> None:
        """Send a message; it returns once every handler of the topic has it. All as in the blocking client."""
        with outgoing(topic, payload, to, descriptors) as (call, numbers):
            try:
                _, received = await self._next(self._send(call, numbers))
            except PermissionError:
                with contextlib.suppress(NoSuchRecipient):
                    await self._next(self._send(calls.probe_call(topic)))
                raise
        calls.close_all(received)

    async def receive(self, maximum: int = 100, acknowledge: Iterable[int] = ()) -> list[calls.Message]:
        """What is stored for the caller's user; it stays until acknowledged. All as in the blocking client."""
        waiting = self._send(calls.receive_call(maximum, acknowledge))
        reply, numbers = await self._next(waiting)
        calls.close_all(numbers)
        return self._judged(lambda: calls.messages(reply))

    async def subscribe(self, topics: Sequence[str], *, after: int | None = None) -> AsyncIterator[calls.Message]:
        """The messages of these topics as they come, without end; close the client to stop.

        When the broker goes away it connects again and goes on, all as in the blocking client. Nothing else is
        answered on this client from then on.
        """
        begun = Continued(after)
        while True:
            messages = self._messages(calls.subscribe_call(topics, begun.after))
            try:
                async for message in messages:
                    if begun.is_new(message):
                        yield message
            except (BrokerUnavailable, PolicyBroken) as error:
                if self._closed or not begun.goes_on(error):
                    raise
                self._end(partial(BrokerUnavailable, str(error)))
                await asyncio.sleep(begun.lost())
                with contextlib.suppress(BrokerUnavailable):  # the next call finds that as well
                    await self._connect_again()
            finally:
                await messages.aclose()

    async def _connect_again(self) -> None:
        sock = await _connected(self._address)
        if self._closed:  # meanwhile
            sock.close()
        else:
            self._use(sock)

    async def _messages(self, call: bytes) -> AsyncGenerator[calls.Message, None]:
        self._subscribed = True
        waiting = self._send(call)
        try:
            while True:
                reply, numbers = await self._next(waiting)
                yield self._judged(partial(calls.message, reply.parameters.get("message"), numbers))
        finally:
            self._abandon(waiting)

    def close(self) -> None:
        """Close the connection; every call that still waits gets BrokerUnavailable."""
        self._closed = True
        self._end(partial(BrokerUnavailable, "the client was closed"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: bytes, descriptors: Sequence[int] = ()) -> _Waiting:
        """Send a call as far as there is room; the event loop sends the rest, whatever becomes of the caller.

        Nothing here waits, so a caller that is cancelled has either not begun its call or has it sent whole.
        """
        if self._ended is not None:
            make, self._ended = self._ended, _CLOSED
            raise make()
        waiting = _Waiting(call, descriptors)
        self._waiting.append(waiting)
        self._unsent.append(waiting)
        if len(self._unsent) == 1 and not self._flush():
            self._loop.add_writer(self._sock.fileno(), self._writable)
        return waiting

    def _writable(self) -> None:
        if self._flush():
            self._loop.remove_writer(self._sock.fileno())

    def _flush(self) -> bool:
        """Send what there is room for; false when some is left."""
        while self._unsent:
            first = self._unsent[0]
            try:
                size = sockets.send(self._sock, first.unsent, first.descriptors)
            except BlockingIOError:
                return False
            except ConnectionError:  # the broker hung up, and may have said why: `_readable` finds that, or the end
                self._unsent.clear()
            except OSError as error:
                if first.begun:
                    self._end(partial(BrokerUnavailable, f"a call could not be sent: {error.strerror}"))
                else:  # the kernel does not send these descriptors, nor anything of this call
                    self._withdraw(first)
                    first.replies.put_nowait(error)
            else:
                first.unsent, first.descriptors, first.begun = first.unsent[size:], (), True
                if not first.unsent:
                    self._unsent.popleft()
        return True

    def _withdraw(self, waiting: _Waiting) -> None:
        """Forget a call of which nothing is sent."""
        for queue in (self._unsent, self._waiting):
            with contextlib.suppress(ValueError):
                queue.remove(waiting)

    def _abandon(self, waiting: _Waiting) -> None:
        """The caller does not want the replies any more."""
        waiting.discard()
        self._read_on(wanted=True)
        if not waiting.begun:
            self._withdraw(waiting)

    async def _next_offers(self, waiting: _Waiting) -> list[Offer]:
        reply, numbers = await self._next(waiting)
        calls.close_all(numbers)
        return self._judged(lambda: calls.offered(reply))

    def _judged(self, judge: Callable[[], T]) -> T:
        """What `judge` makes of a reply; the connection ends when that is no reply to the call."""
        try:
            return judge()
        except ProtocolViolation as error:
            self._end(partial(ProtocolViolation, str(error)))
            raise

    async def _next(self, waiting: _Waiting) -> tuple[varlink.Reply, list[int]]:
        try:
            item = await waiting.replies.get()
        except asyncio.CancelledError:
            self._abandon(waiting)
            raise
        if waiting.replies.qsize() < _REPLIES:
            self._read_on(wanted=True)
        if isinstance(item, Exception):
            raise item
        return item

    def _readable(self) -> None:
        try:
            size, numbers = sockets.receive_into(
                *(self._sock, self._buffer, calls.DESCRIPTORS_PER_READ, socket.MSG_DONTWAIT),
                close=closing.close_later,
            )
        except BlockingIOError:
            return
        except OSError as error:
            self._end(partial(self._replies.ended, f"the connection to the broker is lost: {error.strerror}"))
            return
        if not size:
            self._end(partial(self._replies.ended, "the broker closed the connection"))
            return
        self._replies.feed(bytes(self._buffer[:size]), numbers)
        try:
            while (reply := self._replies.next_reply()) is not None:
                self._deliver(reply)
            if not self._waiting and not self._replies.spent:
                raise ProtocolViolation("more than the answers came")
        except ProtocolViolation as error:
            self._end(partial(ProtocolViolation, str(error)))

    def _deliver(self, reply: varlink.Reply) -> None:
        """Give a reply, with the descriptors that it owns, to the call that waits longest."""
        if not self._waiting:
            if reply.error:  # a refusal at accept comes before any call
                self._end(partial(calls.refusal, reply.error, reply.parameters))
            else:
                self._end(partial(ProtocolViolation, "a reply that nobody asked for"))
            return
        numbers = self._replies.take(calls.count_descriptors(reply))  # first: if it fails, this call hears of it too
        waiting = self._waiting[0] if reply.continues else self._waiting.popleft()
        if waiting.abandoned:
            calls.discard(reply, numbers)
        elif reply.error:
            waiting.replies.put_nowait(calls.refusal(reply.error, reply.parameters))
        else:
            waiting.replies.put_nowait((reply, numbers))
            if waiting.replies.qsize() >= _REPLIES:
                self._read_on(wanted=False)

    def _end(self, make: Callable[[], FdbrokerError]) -> None:
        """Close the connection; every call that waits gets an exception of its own, which `make` makes.

        Without such a call the next one gets it; the calls after that get BrokerUnavailable.
        """
        if self._ended is None:
            self._ended = _CLOSED if self._waiting else make
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            if self._subscribed:  # what waits there unread is closed with it
                closing.close_later([self._sock.detach()])
            self._sock.close()
        self._replies.close()
        self._unsent.clear()
        while self._waiting:
            self._waiting.popleft().replies.put_nowait(make())


async def _connected(address: str | None) -> socket.socket:
    """A connected socket, owned by the caller. Raises BrokerUnavailable, which says what to do."""
    path = calls.address(address, os.environ)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                sock.connect(path)
                break
            except BlockingIOError:  # the backlog is full; the loop's sock_connect takes that for success
                await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        # in a thread: a database of users may be on the network
        raise BrokerUnavailable(await asyncio.to_thread(unreachable.why, path, error)) from None
    return sock

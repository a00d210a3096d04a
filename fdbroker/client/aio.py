"""The asyncio client: a socket and the event loop around `calls`.

Runs in: any program. Several tasks may call at once; answers come in the order of the calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Self

from fdbroker.client import calls
from fdbroker.client.descriptor import Descriptor
from fdbroker.client.sync import HasFileno, outgoing, ping
from fdbroker.errors import BrokerUnavailable, FdbrokerError, ProtocolViolation
from fdbroker.kernel import sockets
from fdbroker.terms import Offer
from fdbroker.wire import varlink

_READ_BYTES = 65536


class _Waiting:
    """One call: a queue of replies, so that a caller that gave up does not hold up those behind it."""

    def __init__(self) -> None:
        self.replies: asyncio.Queue[tuple[varlink.Reply, list[int]] | FdbrokerError] = asyncio.Queue()
        self.abandoned = False

    def discard(self) -> None:
        """Close what came for a caller that is not there any more."""
        self.abandoned = True
        while not self.replies.empty():
            item = self.replies.get_nowait()
            if isinstance(item, tuple):
                calls.close_all(item[1])


class Client:
    """A connection to the broker, which this object owns. Use it as an async context manager, or `close` it.

    After BrokerUnavailable or ProtocolViolation it is closed; after a refusal it goes on.
    """

    def __init__(self, sock: socket.socket, address: str | None = None) -> None:
        self._address = address
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray(_READ_BYTES)
        self._waiting: deque[_Waiting] = deque()
        self._writing = asyncio.Lock()
        self._sending: asyncio.Task[None] | None = None
        self._use(sock)

    def _use(self, sock: socket.socket) -> None:
        self._sock = sock
        self._replies = calls.Replies()
        self._ended: FdbrokerError | None = None
        self._loop.add_reader(sock.fileno(), self._readable)

    @classmethod
    async def connect(cls, address: str | None = None) -> Self:
        """See `fdbroker.aio.connect`."""
        return cls(await _connected(address), address)

    async def open(self, resource: str, access: str = "ro") -> Descriptor:
        """Ask for one resource; returns its descriptor, owned by the caller. All as in the blocking client."""
        return (await self.open_all([resource], access))[0]

    async def open_all(self, resources: list[str], access: str = "ro") -> list[Descriptor]:
        """Ask for 1 to 64 at once: all of them, in this order, or none and the error of the first in the way."""
        asked = calls.asked(resources, access)
        waiting = await self._send(calls.open_call(asked))
        reply, numbers = await self._next(waiting)
        try:
            return calls.opened(reply, numbers, asked)
        except ProtocolViolation as error:
            self._end(error)
            raise

    async def offers(self) -> list[Offer]:
        """What this program may open now, with the most access that it may ask for."""
        waiting = await self._send(calls.list_call(more=False))
        return await self._next_offers(waiting)

    async def watch(self) -> AsyncIterator[list[Offer]]:
        """The same list now and again after every change, without end; close the client to stop.

        Nothing else is answered on this client from then on.
        """
        waiting = await self._send(calls.list_call(more=True))
        while True:
            yield await self._next_offers(waiting)

    async def ping(self) -> float:
        """Send PING on a connection of its own; returns the round trip in seconds. Raises BrokerUnavailable."""
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
            waiting = await self._send(call, numbers)
        _, received = await self._next(waiting)
        calls.close_all(received)

    async def receive(self, maximum: int = 100, acknowledge: Iterable[int] = ()) -> list[calls.Message]:
        """What is stored for the caller's user; it stays until acknowledged. All as in the blocking client."""
        waiting = await self._send(calls.receive_call(maximum, acknowledge))
        reply, numbers = await self._next(waiting)
        calls.close_all(numbers)
        try:
            return calls.messages(reply)
        except ProtocolViolation as error:
            self._end(error)
            raise

    async def subscribe(self, topics: Sequence[str], *, after: int | None = None) -> AsyncIterator[calls.Message]:
        """The messages of these topics as they come, without end; close the client to stop.

        When the broker goes away it connects again and goes on, all as in the blocking client. Nothing else is
        answered on this client from then on.
        """
        begun = calls.Continued(after)
        while True:
            messages = self._messages(calls.subscribe_call(topics, begun.after))
            try:
                async for message in messages:
                    if begun.is_new(message):
                        yield message
            except BrokerUnavailable:
                if self._closed:
                    raise
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
        waiting = await self._send(call)
        try:
            while True:
                reply, numbers = await self._next(waiting)
                try:
                    yield calls.message(reply.parameters.get("message"), numbers)
                except ProtocolViolation as error:
                    self._end(error)
                    raise
        finally:
            waiting.discard()  # who stopped listening does not want them kept

    def close(self) -> None:
        """Close the connection; who still waits gets BrokerUnavailable."""
        self._closed = True
        self._end(BrokerUnavailable("the client was closed"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    async def _write(self, call: bytes, with_it: Sequence[int]) -> None:
        while with_it:
            try:
                call, with_it = call[sockets.send(self._sock, call, with_it) :], ()
            except BlockingIOError:  # calls before it are not read yet
                await asyncio.sleep(0.01)
        await self._loop.sock_sendall(self._sock, call)

    async def _send(self, call: bytes, with_it: Sequence[int] = ()) -> _Waiting:
        async with self._writing:
            if self._sock.fileno() < 0:
                raise self._ended or BrokerUnavailable("the client is closed")
            waiting = _Waiting()
            self._waiting.append(waiting)
            self._sending = self._loop.create_task(self._write(call, with_it))
            try:
                (error,) = await asyncio.gather(self._sending, return_exceptions=True)
            except asyncio.CancelledError:
                self.close()  # half a call cannot be taken back
                raise
            finally:
                self._sending = None
            # or it hung up, and may have said why: the reader finds that, or the end
            if isinstance(error, OSError) and not isinstance(error, ConnectionError) and waiting in self._waiting:
                self._waiting.remove(waiting)  # the kernel does not send these descriptors: nothing of the call is sent
                raise error
            return waiting

    async def _next_offers(self, waiting: _Waiting) -> list[Offer]:
        reply, numbers = await self._next(waiting)
        calls.close_all(numbers)
        try:
            return calls.offered(reply)
        except ProtocolViolation as error:
            self._end(error)
            raise

    async def _next(self, waiting: _Waiting) -> tuple[varlink.Reply, list[int]]:
        try:
            item = await waiting.replies.get()
        except asyncio.CancelledError:
            waiting.discard()
            raise
        if isinstance(item, FdbrokerError):
            raise item
        return item

    def _readable(self) -> None:
        try:
            size, numbers = sockets.receive_into(
                self._sock, self._buffer, calls.DESCRIPTORS_PER_READ, socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return
        except OSError as error:
            self._end(BrokerUnavailable(f"the connection to the broker is lost: {error.strerror}"))
            return
        if not size:
            self._end(BrokerUnavailable("the broker closed the connection"))
            return
        self._replies.feed(bytes(self._buffer[:size]), numbers)
        try:
            while (reply := self._replies.next_reply()) is not None:
                self._deliver(reply)
            if not self._waiting and not self._replies.spent:
                raise ProtocolViolation("more than the answers came")
        except ProtocolViolation as error:
            self._end(error)

    def _deliver(self, reply: varlink.Reply) -> None:
        """Give a reply, with the descriptors that it owns, to the call that waits longest."""
        if not self._waiting:
            # a refusal at accept comes before any call
            error = calls.refusal(reply.error, reply.parameters) if reply.error else None
            self._end(error or ProtocolViolation("a reply that nobody asked for"))
            return
        numbers = self._replies.take(calls.count_descriptors(reply))  # first: if it fails, this call hears of it too
        waiting = self._waiting[0] if reply.continues else self._waiting.popleft()
        if waiting.abandoned:
            calls.close_all(numbers)
        elif reply.error:
            waiting.replies.put_nowait(calls.refusal(reply.error, reply.parameters))
        else:
            waiting.replies.put_nowait((reply, numbers))

    def _end(self, error: FdbrokerError) -> None:
        if self._sock.fileno() >= 0:
            self._ended = error
            if self._sending is not None:
                self._sending.cancel()  # or it waits for ever: a closed socket is never writable
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
        self._replies.close()
        while self._waiting:
            self._waiting.popleft().replies.put_nowait(error)


async def _connected(address: str | None) -> socket.socket:
    """A connected socket, owned by the caller. Raises BrokerUnavailable."""
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
        raise BrokerUnavailable(f"nobody answers at {path}: {error.strerror or error}") from None
    return sock

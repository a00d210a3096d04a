"""Where the launcher starts the refuser: fdbroker/launcher/start.py calls `main`, with its orders as the one argument.

In the opener's place while the policy is broken: everybody who connects is told so, and nothing else happens.

Runs in: a process confined like the opener, without any capability. An attacker controls how often it connects; nothing
that a client sends is read. Without it a waiting connection would start a service that cannot run again and again.
What a client has sent is closed with its connection, and that can take as long as the client likes: threads do it.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import sys
import time
from typing import NoReturn

from fdbroker import errors
from fdbroker.errors import PolicyBroken
from fdbroker.kernel import orders, sockets
from fdbroker.kernel.jobs import Jobs
from fdbroker.kernel.link import Link
from fdbroker.kernel.refusal import say_refusal
from fdbroker.limits import opener as limits
from fdbroker.limits.launcher import BROKEN_LOOK_SECONDS, REFUSED_AT_ONCE
from fdbroker.wire import link
from fdbroker.wire.launcher import LAUNCHER_TO_REFUSER, LOOK

_LOOK_S = BROKEN_LOOK_SECONDS
_AT_ONCE = REFUSED_AT_ONCE
_OTHERS = 65_536  # from here on there are subordinate uids, and those of containers: subuid(5)
_PAUSE_S = limits.ACCEPT_PAUSE_MS / 1000


def refuse_all(listener: socket.socket, closing: Jobs) -> None:
    """Tell at most REFUSED_AT_ONCE waiting clients that the policy is broken, then let the launcher be heard."""
    try:
        for _ in range(_AT_ONCE):
            sock, _ = listener.accept()
            say_refusal(sock, PolicyBroken())
            with contextlib.suppress(OSError):  # the client is gone
                sockets.hang_up(sock)
            sockets.hear_urgent(sock)  # else what came with an urgent byte is not seen
            if _has_more(sock):
                closing.put(_account(sockets.peer_credentials(sock)[1]), sock.close)
            else:
                sock.close()
    except OSError as error:  # nobody waits any more
        if error.errno == errno.EMFILE:  # until some are closed
            time.sleep(_PAUSE_S)


def serve(listener: socket.socket, launcher: Link) -> None:
    """Until the launcher says stop, or goes: ask it, at most once in BROKEN_LOOK_SECONDS, before anybody is refused."""
    launcher.send(link.READY)
    poll = select.poll()
    poll.register(launcher.fileno(), select.POLLIN)
    poll.register(listener.fileno(), select.POLLIN)
    asked, refuse_until_s = False, 0.0
    closing = Jobs(limits.CLOSING_THREADS, limits.STUCK_THREADS)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == launcher.fileno():
                data = launcher.receive()
                if data is None:
                    continue
                if not data or isinstance(LAUNCHER_TO_REFUSER.decode(data), link.Stop):
                    return
                asked, refuse_until_s = False, time.monotonic() + _LOOK_S
                poll.register(listener.fileno(), select.POLLIN)
                refuse_all(listener, closing)
            elif time.monotonic() < refuse_until_s:
                refuse_all(listener, closing)
            elif not asked:
                asked = True
                poll.unregister(listener.fileno())  # whoever comes waits for the answer
                launcher.send(LOOK)


def main() -> NoReturn:
    """Confine, then refuse."""
    order, descriptors = orders.read(sys.argv[1])
    orders.obey(order, descriptors["filter"])
    serve(socket.socket(fileno=descriptors["listener"]), Link(socket.socket(fileno=descriptors["launcher"])))
    orders.end(errors.EX_OK)  # threads may still close


def _account(uid: int) -> int:
    """Whose turn, and whose threads, closing takes. Nothing here knows owners: all uids from _OTHERS on are one."""
    return min(uid, _OTHERS)


def _has_more(sock: socket.socket) -> bool:
    """Whether something has come and was not read; nothing is read now."""
    try:
        return bool(sock.recv(1, sockets.DONT_WAIT | socket.MSG_PEEK))
    except BlockingIOError:
        return False
    except OSError:
        return True  # who knows

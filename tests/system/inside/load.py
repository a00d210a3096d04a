"""Honest load on the installed service: processes of several users, which say at the end what they got.

Each goes on after every error: with another connection where the broker is gone, with the same one where it refuses.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fdbroker
from fdbroker.errors import BrokerUnavailable, FdbrokerError

OPENERS = (4101, 4102, 4103)
SENDERS = (4111, 4112)
RECEIVER = 4121
NAMESPACER = 4131
POLICY = f"""\
version: 1
topics: {{mail: {{deliver: [queue]}}}}
limits: {{stored_messages: 1000000, stored_bytes: 1073741824, records_per_second: 100000, record_burst: 100000}}
users:
{"".join(f'  {uid}: {{devices: [{{path: "/dev/lab/zero*", access: rw, class: mem, device: "1:5"}}]}}' + chr(10) for uid in OPENERS)}
{"".join(f"  {uid}: {{send: [mail]}}" + chr(10) for uid in SENDERS)}
  {RECEIVER}: {{subscribe: [mail]}}
  {NAMESPACER}: {{namespaces: [{{type: net, create: true}}]}}
"""


class Load:
    """Runs from `with` to its end; afterwards `said` has what each user found, by uid."""

    def __init__(self, folder: Path, groups: list[int], address: str | None = None) -> None:
        self._folder, self._groups, self._address = folder, groups, address
        self._children: dict[int, int] = {}
        self.said: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Load:
        self._folder.mkdir(exist_ok=True)
        self._folder.chmod(0o777)
        for uid in OPENERS:
            self._start(uid, self._open)
        for uid in SENDERS:
            self._start(uid, self._send)
        self._start(RECEIVER, self._receive)
        self._start(NAMESPACER, self._namespace)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(*OPENERS, *SENDERS, NAMESPACER)
        self.stop(RECEIVER)  # last: what was stored must come to it

    def stop(self, *uids: int) -> None:
        """Tell these to come to their end, and wait for it."""
        for uid in uids:
            os.kill(self._children[uid], signal.SIGTERM)
        for uid in uids:
            status = os.waitpid(self._children[uid], 0)[1]
            text = (self._folder / str(uid)).read_text()
            self.said[uid] = json.loads(text) if status == 0 else {"error": text}

    def _start(self, uid: int, action: Callable[[Callable[[], bool]], dict[str, Any]]) -> None:
        child = os.fork()
        if child:
            self._children[uid] = child
            return
        going = [True]
        signal.signal(signal.SIGTERM, lambda *_: going.clear())
        out = self._folder / str(uid)
        try:
            os.setgroups(self._groups)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            out.write_text(json.dumps(action(lambda: bool(going))))
            os._exit(0)
        except BaseException:
            out.write_text(traceback.format_exc())
            os._exit(1)

    def _clients(self, going: Callable[[], bool], found: Counter[str]) -> Any:
        """One connection after the other, as long as it goes on."""
        while going():
            try:
                with fdbroker.connect(self._address, timeout_s=60) as client:
                    yield client
            except BrokerUnavailable:
                found["BrokerUnavailable"] += 1
                time.sleep(0.02)

    def _ask(self, what: Callable[[], Any], found: Counter[str]) -> Any:
        """What it returns, or None where it is refused; BrokerUnavailable goes on to the loop over connections."""
        try:
            return what()
        except BrokerUnavailable:
            raise
        except FdbrokerError as refusal:
            found[type(refusal).__name__] += 1
            time.sleep(0.02)
            return None

    def _rounds(
        self, going: Callable[[], bool], found: Counter[str], once: Callable[[Any], None], wait_s: float
    ) -> None:
        for client in self._clients(going, found):
            with contextlib.suppress(BrokerUnavailable):
                while going():
                    once(client)
                    time.sleep(wait_s)
                continue
            found["BrokerUnavailable"] += 1
            time.sleep(0.02)

    def _open(self, going: Callable[[], bool]) -> dict[str, Any]:
        found: Counter[str] = Counter()
        at_s: list[float] = []
        wrong = [0]

        def once(client: Any) -> None:
            node = self._ask(lambda: client.open("/dev/lab/zero", "rw"), found)
            if node is not None:
                at_s.append(round(time.monotonic(), 3))
                wrong[0] += os.fstat(node.fileno()).st_rdev != os.makedev(1, 5)
                node.close()

        self._rounds(going, found, once, 0.005)
        return {"found": found, "at_s": at_s, "wrong": wrong[0]}

    def _namespace(self, going: Callable[[], bool]) -> dict[str, Any]:
        found: Counter[str] = Counter()
        at_s: list[float] = []

        def once(client: Any) -> None:
            made = self._ask(lambda: client.open("net:new"), found)
            if made is not None:
                at_s.append(round(time.monotonic(), 3))
                made.close()

        self._rounds(going, found, once, 0.05)
        return {"found": found, "at_s": at_s}

    def _send(self, going: Callable[[], bool]) -> dict[str, Any]:
        found: Counter[str] = Counter()
        stored: list[int] = []
        number = [0]

        def once(client: Any) -> None:
            number[0] += 1  # each is sent once, whatever comes of it
            text = str(number[0])
            if self._ask(lambda: client.send("mail", text, to=RECEIVER) or True, found):
                stored.append(number[0])

        self._rounds(going, found, once, 0.005)
        return {"found": found, "stored": stored}

    def _receive(self, going: Callable[[], bool]) -> dict[str, Any]:
        found: Counter[str] = Counter()
        received: dict[int, list[int]] = {uid: [] for uid in SENDERS}
        confirmed: set[int] = set()
        last: list[int] = []
        again = [0]
        empty = [0]

        def once(client: Any) -> None:
            messages = self._ask(lambda: client.receive(500, last), found)
            if messages is None:
                return
            confirmed.update(last)
            last[:] = [one.number for one in messages]
            again[0] += len(confirmed.intersection(last))
            for one in messages:
                received[one.uid].append(int(one.payload))
            empty[0] = 0 if messages else empty[0] + 1

        # when it is told to end it goes on until nothing comes any more
        self._rounds(lambda: going() or empty[0] < 5, found, once, 0.02)
        return {
            "found": found,
            "received": {uid: sorted(set(numbers)) for uid, numbers in received.items()},
            "again": again[0],
        }

"""T27: the inbox is taken over, and sends opener, keeper and launcher what it likes."""

from __future__ import annotations

import contextlib
import os

import pytest
from harness import BOB, MEM, Console, Raw, as_user, descriptors_of, node, outcome, running, taken_over

POLICY = f"version: 1\nusers: {{{BOB}: {{devices: [{{path: /dev/bobs}}]}}}}\n"
# In the place of the inbox: the first client tells it what to do; it has what any inbox has.
INBOX = """
class Inbox:
    def __init__(self, launcher, opener, keeper, policy, topics, unit_s):
        self.launcher, self.opener, self.keeper = launcher, opener, keeper

    def serve(self):
        self.launcher.send(link.READY)
        self.clients = {}
        while not self.clients:
            self.hear()
        console(self.clients[1], {"self": self, "link": link, "Device": Device})

    def hear(self, seconds=5):
        # the next thing that the opener says, and with how many descriptors
        poll = select.poll()
        poll.register(self.opener.fileno(), select.POLLIN)
        while not poll.poll(seconds * 1000):
            return None
        data, descriptors = self.opener.receive_with_descriptors(5)
        said = link.OPENER_TO_INBOX.decode(data) if data else "gone"
        if isinstance(said, Came):
            self.clients[said.connection] = socket.socket(fileno=descriptors[0])
        return type(said).__name__, getattr(said, "connection", 0), type(getattr(said, "refusal", None)).__name__, len(descriptors)

    def ask(self, number, *paths):
        self.opener.send(link.INBOX_TO_OPENER.encode(link.Open(number, tuple(Device(path, "ro") for path in paths))))
        return self.hear()

    def listed(self, number):
        # what the keeper shows of a client's nodes, and with how many descriptors
        self.keeper.send(lists.INBOX_TO_KEEPER.encode(lists.List(number, False)))
        poll = select.poll()
        poll.register(self.keeper.fileno(), select.POLLIN)
        poll.poll(5000)
        data, descriptors = self.keeper.receive_with_descriptors(5)
        return [one.resource.path for one in lists.KEEPER_TO_INBOX.decode(data).offers], len(descriptors)
"""


@pytest.fixture
def taken(dev):
    """A broker whose inbox is ours, and the client that controls it: connection 1, for which there is no rule."""
    node("/dev/bobs", MEM["zero"])
    node("/dev/other", MEM["full"])
    with taken_over("inbox/service.py", INBOX), running(POLICY) as broker:
        broker.expected_code = None
        with Console(broker.socket) as console:
            yield broker, console


def _wait_for_grant(address, go, done):
    """A client that asks for nothing: what comes all the same."""
    with Raw(address) as client:
        os.write(go, b"x")
        got = [outcome(client.reply()), *(os.fstat(number).st_rdev for number in client.descriptors)]
        os.read(done, 1)
        return got


def test_it_asks_in_the_name_of_a_client_and_that_client_alone_gets_the_descriptor(taken):
    broker, console = taken
    go, done = os.pipe(), os.pipe()
    bob = os.fork()
    if bob == 0:
        code = 1
        with contextlib.suppress(BaseException):
            got = as_user(BOB, [], _wait_for_grant, broker.socket, go[1], done[0])
            code = 0 if got == ["granted", MEM["zero"]] else 2
        os._exit(code)
    os.read(go[0], 1)
    assert console.say("self.hear()[:2]") == "('Came', 2)"
    # its own client has no rule; another one's rights do not become larger, and it gets no descriptor itself
    assert console.say("self.ask(1, '/dev/bobs')") == "('Outcome', 1, 'Denied', 0)"
    assert console.say("self.ask(2, '/dev/other')") == "('Outcome', 2, 'Denied', 0)"
    assert console.say("self.ask(2, '/dev/bobs', '/dev/other')") == "('Outcome', 2, 'Denied', 0)"
    assert console.say("self.ask(2, '/dev/bobs')") == "('Outcome', 2, 'NoneType', 0)"
    # and of what each may open, the names
    assert [console.say(f"self.listed({number})") for number in (1, 2)] == ["([], 0)", "(['/dev/bobs'], 0)"]
    os.write(done[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(bob, 0)[1]) == 0
    for number in (*go, *done):
        os.close(number)
    assert [record["FDBROKER_UID"] for record in broker.records("granted")] == [str(BOB)]
    assert {record["FDBROKER_UID"] for record in broker.records("refused")} == {"0", str(BOB)}


def test_descriptors_that_it_sends_are_not_taken(taken):
    broker, console = taken
    assert console.say("1") == "1"  # it is connected
    before = descriptors_of(broker.pids["opener"])
    send = "self.opener.send_with_descriptors(link.INBOX_TO_OPENER.encode(link.Open(1, (Device('/dev/none', 'ro'),))), [0] * 100)"
    for _ in range(50):
        assert console.say(f"({send}, self.hear())") == "(True, ('Outcome', 1, 'Denied', 0))"
    assert descriptors_of(broker.pids["opener"]) == before


OPEN = "link.INBOX_TO_OPENER.encode(link.Open(1, (Device('/dev/x', 'ro'),)))"


@pytest.mark.parametrize(
    ("sends", "why"),
    [
        (["b'\\xff'"], "unknown message type"),
        ([f"{OPEN}[:-1]"], "cut at"),
        (["b'x' * 140000"], "at most 131072"),
        (["link.INBOX_TO_OPENER.encode(link.Shutdown(99))"], "does not exist"),
        (["link.INBOX_TO_OPENER.encode(link.Closed(1, 0))", OPEN], "does not exist"),
    ],
    ids=range(5),
)
def test_whatever_breaks_its_rules_ends_the_service_and_is_recorded(taken, sends, why):
    broker, console = taken
    console.say(f"[self.opener.send(one) for one in [{', '.join(sends)}]]")
    assert broker.process.wait(60) == 70
    (record,) = [one for one in broker.records() if one["MESSAGE"].startswith("violation: ")]
    assert why in record["FDBROKER_REASON"]
    assert record["PRIORITY"] == "2"
    assert console.say("1") is None  # and it does not live on


LIST = "lists.INBOX_TO_KEEPER.encode(lists.List({}, watch={}))"


@pytest.mark.parametrize(
    ("sends", "why"),
    [
        (["b'\\xff'"], "unknown message type"),
        ([f"{LIST.format(1, True)}[:-1]"], "cut at"),
        (["b'x' * 140000"], "at most 131072"),
        ([LIST.format(99, False)], "does not exist"),
        ([LIST.format(1, True)] * 2, "which is watching"),
        ([LIST.format(1, True), LIST.format(1, False)], "which is watching"),
    ],
    ids=range(6),
)
def test_whatever_breaks_its_rules_with_the_keeper_ends_the_service_too(taken, sends, why):
    broker, console = taken
    assert console.say("1") == "1"
    console.say(f"[self.keeper.send(one) for one in [{', '.join(sends)}]]")
    assert broker.process.wait(60) == 70
    assert why in broker.text()
    assert console.say("1") is None  # and it does not live on


@pytest.mark.parametrize("word", ["link.OPENER_TO_LAUNCHER.encode(link.StopAsked())", "link.WORKER_STUCK"])
def test_it_cannot_speak_to_the_launcher_for_the_opener(taken, word):
    broker, console = taken
    console.say(f"self.launcher.send({word})")
    assert broker.process.wait(60) == 70
    assert "asks to stop" not in broker.text()
    assert "reloaded" not in broker.text()

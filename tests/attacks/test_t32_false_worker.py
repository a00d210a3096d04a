"""T32: the namespaces worker is taken over, and sends the opener what it likes."""

from __future__ import annotations

import os

import pytest
from harness import ALICE, BOB, CAROL, MEM, Raw, as_user, ask, descriptors_of, node, outcome, running, taken_over

POLICY = f"""
version: 1
users:
  {ALICE}: {{namespaces: [{{type: net, name: "*"}}, {{type: net, of: caller}}, {{type: uts, create: true}}]}}
  {BOB}: {{devices: [{{path: /dev/zero}}], namespaces: [{{type: net, name: "*"}}]}}
"""
# In the place of the worker: the name that is asked for says what it does.
WORKER = """
class Worker:
    def __init__(self, opener, permitted):
        self.opener = opener

    def serve(self):
        poll = select.poll()
        poll.register(self.opener.fileno(), select.POLLIN)
        while True:
            poll.poll()
            data, descriptors = self.opener.receive_with_descriptors(1)
            if not data:
                return
            self.answer(worker.TO_WORKER.decode(data))
            for number in descriptors:
                os.close(number)

    def answer(self, ask):
        null = os.open("/dev/null", os.O_RDONLY)
        resource = ask.wanted[0].resource
        how = getattr(resource, "name", "") or str(resource.pid)
        send = self.opener.send_with_descriptors
        made = worker.FROM_WORKER.encode(worker.Made(ask.request, (worker.Opened(7, 0),), ask.known))
        other = worker.FROM_WORKER.encode(worker.Made(ask.request + 1000, (worker.Opened(7, 0),)))
        granted = link.OPENER_TO_INBOX.encode(link.Outcome(ask.request, None))
        match how:
            case "nothing":
                send(made, [])
            case "two":
                send(made, [null, null])
            case "many":
                send(made, [null] * 129)
            case "one" | "1":
                send(made, [null])
            case "short":
                send(made[:-1], [null])
            case "type":
                send(bytes([9]) + made[1:], [null])
            case "huge":
                self.opener.send(b"x" * 140000)
            case "living":
                send(made[:-2] + bytes([0, 200]), [null])
            case "reason":
                send(made[:15] + bytes([200]) + made[16:], [null])
            case "granted":
                self.opener.send(granted)
            case "others":
                for _ in range(50):
                    send(other, [null])
                send(made, [null])
                for _ in range(50):
                    send(made, [null])
        os.close(null)
"""


def _ask(address, resource):
    with Raw(address) as client:
        reply = client.ask(resource)
        return [outcome(reply), [os.fstat(number).st_rdev for number in client.descriptors]]


def named(name):
    return {"namespace": {"type": "net", "name": name}}


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("nothing", "0 descriptors for net:nothing"),
        ("two", "2 descriptors for net:two"),
        ("many", "cut"),
        ("short", "cut at"),
        ("type", "unknown message type"),
        ("huge", "cut"),
        ("living", "values, at least 0, at most"),
        ("reason", "a number of value 200, at most 5"),
        ("granted", "unknown message type 3"),
    ],
)
def test_whatever_it_must_not_send_ends_the_service_and_nobody_gets_anything(dev, how, why):
    with taken_over("namespaces/service.py", WORKER), running(POLICY) as broker:
        broker.expected_code = None
        assert as_user(ALICE, [], _ask, broker.socket, named(how)) == ["disconnected", []]
        assert broker.process.wait(60) == 70
        (record,) = [one for one in broker.records() if one["MESSAGE"].startswith("violation: ")]
        assert why in record["FDBROKER_REASON"]
        assert not broker.records("granted")


def test_one_descriptor_is_not_enough_for_a_namespace_of_a_process(dev):
    with taken_over("namespaces/service.py", WORKER), running(POLICY) as broker:
        broker.expected_code = None
        assert as_user(ALICE, [], _ask, broker.socket, {"namespace": {"type": "net", "pid": 1}}) == ["disconnected", []]
        assert broker.process.wait(60) == 70


def test_answers_to_what_was_not_asked_reach_nobody_and_leave_nothing(dev):
    """Who asked gets what the worker sends, one descriptor of it, and the record names who asked."""
    node("/dev/bobs", MEM["full"])
    with taken_over("namespaces/service.py", WORKER), running(POLICY) as broker:
        before = descriptors_of(broker.pids["opener"])
        with Raw(broker.socket) as silent:
            for _ in range(20):
                assert as_user(ALICE, [], _ask, broker.socket, named("others")) == ["granted", [MEM["null"]]]
                assert as_user(BOB, [], ask, broker.socket, "/dev/zero") == "granted"
            assert silent.descriptors == []
        assert as_user(CAROL, [], _ask, broker.socket, named("one")) == ["Denied", []]
        broker.wait_idle()
        assert set(descriptors_of(broker.pids["opener"])) == set(before)
        assert {record["FDBROKER_UID"] for record in broker.records("granted")} == {str(ALICE), str(BOB)}

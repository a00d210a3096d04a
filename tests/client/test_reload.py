"""`fdbroker reload` and both clients against a running broker: what a script is told, and when; and `explain` beside it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time

import pytest
from harness import ALICE, BOB, EVERYONE_NULL, MEM, Raw, as_user, command, node, outcome, running

import fdbroker.aio
from fdbroker.errors import PolicyError
from fdbroker.limits.opener import POLICY_FINDINGS

BROKEN = "version: 1\nevrybody: {}\n"
# net:new needs the namespaces worker, which this broker did not start
BEYOND = "version: 1\neveryone: {namespaces: [{type: net, create: true}]}\n"
ADMINISTRATOR = f"administrators: {{users: [{BOB}]}}\n"


def generation(address):
    with fdbroker.connect(address) as client:
        return client.about().generation


def by_sync(address):
    with fdbroker.connect(address) as client:
        try:
            client.reload()
        except PolicyError as error:
            return [str(finding) for finding in error.findings]
    return []


def by_asyncio(address):
    async def ask():
        async with await fdbroker.aio.connect(address) as client:
            try:
                await client.reload()
            except PolicyError as error:
                return [str(finding) for finding in error.findings]
        return []

    return asyncio.run(ask())


# two policies that allow the same to nobody: the node and the topic of each. What a service may open at all is the same.
TWO = (("/dev/lab/a", "news"), ("/dev/lab/b", "weather"))


def allowing(path, topic):
    return f"""version: 1
topics: {{news: {{}}, weather: {{}}}}
everyone: {{devices: [{{path: {path}, access: rw, class: mem}}], send: [{topic}]}}
users: {{{ALICE}: {{devices: [{{path: "/dev/lab/*", access: rw, class: mem}}]}}}}
"""


def opened(client):
    return [path for path, _ in TWO if outcome(client.open(path, access="rw")) == "granted"]


def sent(client):
    send = [(topic, {"topic": topic, "payload": "eA=="}) for _, topic in TWO]
    return [topic for topic, said in send if outcome(client.call("io.fdbroker.Inbox.Send", said)) == "granted"]


def listed(client):
    offers = client.call("io.fdbroker.Broker.List")["parameters"]["resources"]
    return [one["resource"]["device"] for one in offers]


@pytest.mark.parametrize("by", [lambda address: command(address, "reload")[0], by_sync], ids=["command", "library"])
@pytest.mark.parametrize("first", [opened, sent, listed], ids=["opener", "inbox", "keeper"])
def test_the_first_request_afterwards_is_judged_by_the_new_policy(dev, first, by):
    """By each of the three: what a rule of it allows is granted, and nothing that the policy before it allowed.

    For a client that was connected already, whose request is the first of all, and for one that connects now.
    """
    for path, _ in TWO:
        node(path, MEM["zero"], 0o666)
    with running(allowing(*TWO[0])) as broker, Raw(broker.socket) as before:
        assert [opened(before), sent(before), listed(before)] == [["/dev/lab/a"], ["news"], ["/dev/lab/a"]]
        for path, topic in TWO[::-1] * 3:
            broker.policy.write_text(allowing(path, topic))
            assert not by(broker.socket)
            assert first(before) == [topic if first is sent else path]
            with Raw(broker.socket) as after:
                for client in (after, before):
                    assert [opened(client), sent(client), listed(client)] == [[path], [topic], [path]]


def test_the_command_ends_when_the_new_policy_is_in_force(dev):
    """Whoever may administer: its number is the one that the command names."""
    with running(EVERYONE_NULL + ADMINISTRATOR) as broker:
        for number, uid in ((2, 0), (3, BOB)):
            broker.policy.write_text(EVERYONE_NULL + ADMINISTRATOR + f"# {number}\n")
            code, out, err = as_user(uid, [], command, broker.socket, "reload")
            assert (code, err, generation(broker.socket)) == (0, "", number)
            assert f"the number {number} since" in out


@pytest.mark.parametrize(
    ("policy", "said"),
    [(BROKEN, ["policy.yaml:2:1", "evrybody"]), (BEYOND, ["needs the namespaces worker", "restart fdbroker"])],
    ids=["broken", "needs-a-restart"],
)
def test_a_policy_that_is_refused_ends_the_command_with_78_and_all_that_is_wrong(dev, policy, said):
    with running(EVERYONE_NULL) as broker:
        broker.policy.write_text(policy)
        code, out, err = command(broker.socket, "reload")
        assert (code, out) == (78, "")
        assert err.startswith("fdbroker: the policy is NOT reloaded, the old one stays in force\nfdbroker: ")
        assert all(word in err for word in said), err
        for client in (by_sync, by_asyncio):
            (finding,) = client(broker.socket)
            assert all(word in finding for word in said)
        assert generation(broker.socket) == 1


def test_who_is_no_administrator_is_told_so_and_nothing_is_loaded(dev):
    with running(EVERYONE_NULL) as broker:
        code, out, err = as_user(ALICE, [], command, broker.socket, "reload")
        assert (code, out, generation(broker.socket)) == (77, "", 1)
        assert "administrator" in err


@pytest.mark.parametrize("client", [by_sync, by_asyncio], ids=lambda client: client.__name__)
def test_a_client_may_reload_again_and_again(dev, client):
    with running(EVERYONE_NULL) as broker:
        for number in (2, 3):
            assert client(broker.socket) == []
            assert generation(broker.socket) == number


def _reload_at_once(address, count):
    """How so many reloads of one administrator end: how many findings each has."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Raw(address)) for _ in range(count)]
        for client in clients:
            client.send_call("io.fdbroker.Admin.Reload")
        return [len(client.reply()["parameters"]["findings"]) for client in clients]


def test_all_who_reload_a_broken_policy_at_once_are_told_and_the_service_hears_everybody_afterwards(dev):
    """Each answer is as long as the launcher's link takes at a time: what found no room there waited for good."""
    with running(EVERYONE_NULL + ADMINISTRATOR) as broker:
        broker.policy.write_text(EVERYONE_NULL + "".join(f"wrong_{'x' * 200}_{number}: 1\n" for number in range(250)))
        assert as_user(BOB, [], _reload_at_once, broker.socket, 60) == [POLICY_FINDINGS] * 60
        broker.reload(EVERYONE_NULL)
        assert "is reloaded" in broker.text().splitlines()[-1]
        assert command(broker.socket, "reload")[0] == 0


def _reload_until_the_end(address):
    with contextlib.suppress(OSError), Raw(address) as client:
        while client.call("io.fdbroker.Admin.Reload"):
            pass


@pytest.mark.parametrize("_", range(4))
def test_a_stop_beside_reloads_ends_in_order(dev, _):
    """With 0: the service manager would start a service again that failed."""
    with running(EVERYONE_NULL) as broker:
        thread = threading.Thread(target=as_user, args=(0, [], _reload_until_the_end, broker.socket))
        thread.start()
        broker.wait_for("is reloaded")
        while broker.text().count("reloading") <= broker.text().count("is reloaded"):
            time.sleep(0.001)
        assert broker.stop() == 0, broker.text()
        thread.join()


def test_explain_says_when_the_broker_uses_another_policy(dev):
    """It reads the files, and the broker may not have loaded these; after a reload it has."""
    with running(EVERYONE_NULL) as broker:

        def explained(*options):
            return command(broker.socket, "policy", "explain", "--policy", str(broker.policy), *options, "/dev/null")

        def other():
            return [
                json.loads(explained("--json")[1])[0]["otherPolicyInForce"],
                "does not use these files" in explained()[1],
            ]

        assert other() == [False, False]
        broker.policy.write_text(EVERYONE_NULL + "# changed\n")
        assert other() == [True, True]
        assert "fdbroker reload" in explained()[1]
        assert command(broker.socket, "reload")[0] == 0
        assert other() == [False, False]

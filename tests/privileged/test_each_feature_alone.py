"""Every verb, handler, resource kind and size on every policy with one feature alone: no answer depends on another."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import NamedTuple

import harness
import pytest
from harness import (
    ALICE,
    BOB,
    GROUP,
    Raw,
    as_user,
    folder,
    ip,
    need_root,
    outcome,
    own_network,
    private_dev,
    replaced_file,
    running,
)
from messaging import SEND, SUBSCRIBE, temporary

from fdbroker.kernel.sealed import sealed_memfd
from fdbroker.limits import every as limits
from fdbroker.wire import varlink

SIZES = (0, 1, 49_000, 65_000, 65_536, 1 << 20)
COUNTS = (0, 1, 16)
# a text, and what is none
LETTERS = {"text": b"x", "binary": b"\xff"}
TYPES = ("net", "mnt", "pid", "user", "uts", "ipc", "cgroup", "time")
NEW_TYPES = ("net", "mnt", "uts", "ipc", "cgroup", "time")
JOURNAL = "/run/systemd/journal/socket"

RESOURCES = {
    "device": {"device": "/dev/null", "access": "rw"},
    **{f"{kind} new": {"namespace": {"type": kind, "create": True}} for kind in NEW_TYPES},
    **{f"{kind} of": {"namespace": {"type": kind, "pid": 0}} for kind in TYPES},
    "net named": {"namespace": {"type": "net", "name": "vpn"}},
    "socket": {"socket": {"namespace": "vpn"}},
    "socket bound": {"socket": {"namespace": "vpn", "family": "inet6", "type": "dgram", "bind": 443}},
}


class Feature(NamedTuple):
    """A policy with one feature; which resources it grants, and the handlers of topic `inbox`, if it has one."""

    policy: str
    grants: tuple[str, ...] = ()
    deliver: tuple[str, ...] = ()
    journal: bool = False  # records go to a journal, and not to standard error
    administrator: int = 0  # who has the policy loaded again, and stops the service


def _rule(text: str, *grants: str) -> Feature:
    return Feature(f"everyone: {{{text}}}", grants)


def _topic(*deliver: str, journal: bool = False) -> Feature:
    listens = "" if deliver == ("journal",) else ", subscribe: [inbox]"
    rights = f"users: {{{ALICE}: {{send: [inbox]{listens}}}}}"
    return Feature(f"topics: {{inbox: {{deliver: [{', '.join(deliver)}]}}}}\n{rights}", (), deliver, journal)


FEATURES = {
    "nothing": Feature(""),
    "a device": _rule('devices: [{path: /dev/null, access: rw, class: mem, device: "1:3"}]', "device"),
    "new namespaces": _rule(
        f"namespaces: [{{type: [{', '.join(NEW_TYPES)}], create: true}}]", *(f"{kind} new" for kind in NEW_TYPES)
    ),
    "the caller's namespaces": _rule(
        f"namespaces: [{{type: [{', '.join(TYPES)}], of: caller}}]", *(f"{kind} of" for kind in TYPES)
    ),
    "connected namespaces": _rule(
        "namespaces: [{type: net, create: true, link: {bridge: br0, address: 10.88.0.0/24}}]", "net new"
    ),
    "named namespaces": _rule("namespaces: [{type: net, name: vpn}]", "net named"),
    "sockets": _rule("sockets: [{namespace: vpn}]", "socket"),
    "bound sockets": _rule("sockets: [{namespace: vpn, bind: [443]}]", "socket", "socket bound"),
    "the journal": _topic("journal", journal=True),
    "standard error": _topic("journal"),
    "subscribers": _topic("subscribers"),
    "a queue": _topic("queue"),
    # the group database has ALICE in it, her processes have not
    "a group of the database": Feature(
        f"groups: {{{GROUP}: {{devices: [{{path: /dev/null, access: rw, class: mem, membership: nss}}]}}}}", ("device",)
    ),
    # whatever confines this machine's programs, none of it is called so
    "labels": Feature(
        "topics: {inbox: {}}\n"
        "everyone: {devices: [{path: /dev/null, access: rw, label: nobody}], namespaces: [{type: uts, create: true, "
        "label: nobody}], sockets: [{namespace: vpn, label: nobody}], send: [{topic: inbox, label: nobody}]}"
    ),
    # a program without a label is denied, and so is one with any
    "denied labels": Feature(
        "everyone: {devices: [{path: /dev/null, access: rw, class: mem}], namespaces: [{type: net, name: vpn}]}\n"
        'deny: [{everyone: true, label: ["*", "*/*", "/*/*", "/*/*/*"], devices: [/dev/null]}]',
        ("net named",),
    ),
    "an administrator": Feature(f"administrators: {{users: [{BOB}]}}", administrator=BOB),
}
# what this machine's subscribers and journals are given must not be refused for its rate or for what waits
LIMITS = (
    "limits: {requests_per_second: 1000000, burst: 1000000, records_per_second: 1000000, record_burst: 1000000, "
    "stored_bytes: 1073741824, stored_messages: 1000000, namespaces: 64}\n"
)


@pytest.fixture(scope="module")
def machine():
    need_root()
    with own_network(), private_dev():
        ip("netns", "add", "vpn")
        ip("link", "add", "br0", "type", "bridge")
        ip("addr", "add", "10.88.0.1/24", "dev", "br0")
        ip("link", "set", "br0", "up")
        with replaced_file(
            "/etc/group", Path("/etc/group").read_text() + f"fdbroker-test:x:{GROUP}:fdbroker-test-{ALICE}\n"
        ):
            yield


@contextlib.contextmanager
def _journal():
    """A journal that takes everything, in an own /run."""
    netns = os.open("/run/netns", os.O_PATH | os.O_DIRECTORY)
    try:
        harness.mount("run", "/run", "tmpfs", 0, "mode=0755")
        try:
            os.makedirs(os.path.dirname(JOURNAL))
            os.mkdir("/run/netns")
            harness.mount(f"/proc/self/fd/{netns}", "/run/netns", "none", harness.MS_BIND | harness.MS_REC)
            # ip-netns(8) shares its folder: the end of this view would unmount the namespaces everywhere
            harness.mount("none", "/run/netns", "none", harness.MS_REC | harness.MS_PRIVATE)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.bind(JOURNAL)
                taken = []
                thread = threading.Thread(target=_take, args=(sock, taken))
                thread.start()
                try:
                    yield taken
                finally:
                    sock.shutdown(socket.SHUT_RD)
                    thread.join()
        finally:
            harness.unmount("/run")
    finally:
        os.close(netns)


@pytest.mark.parametrize("name", FEATURES)
def test_each_answer_is_the_documented_one_and_the_service_lives(machine, name):
    feature = FEATURES[name]
    policy = f"version: 1\n{LIMITS}{feature.policy}\n"
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(_journal()) if feature.journal else None
        where = stack.enter_context(folder())
        broker = stack.enter_context(running(policy, "--state", str(where / "state")))
        for turn in ("before a reload", "after it"):
            wrong = as_user(ALICE, [], _try_all, broker.socket, feature)
            assert not wrong, "\n".join([turn, *wrong, broker.text()[-2000:]])
            assert broker.process.poll() is None, broker.text()
            if turn == "before a reload":
                broker.reload(policy)
                assert as_user(feature.administrator, [], _reload, broker.socket) == {"applied": True, "findings": []}
            if journal is not None:
                assert any(b"FDBROKER_PAYLOAD" in record for record in journal)
                journal.clear()
        assert not [record for record in broker.records("refused") if "FDBROKER_CAUSE" not in record]
        for process, pid in broker.pids.items():
            assert not harness.status_of(pid)["State"].startswith("Z"), (process, broker.text())
        assert as_user(feature.administrator, [], _shut_down, broker.socket) == ""
        assert broker.process.wait(harness.PATIENCE_S) == 0, broker.text()


def _reload(address):
    with Raw(address) as client:
        return client.call("io.fdbroker.Admin.Reload")["parameters"]


def _shut_down(address):
    """What comes until the end of the connection."""
    with Raw(address) as client:
        client.sock.sendall(struct.pack("!I", 0))
        return _exactly(client.sock, 4).decode(errors="replace")


def _take(sock, taken):
    while record := sock.recv(1 << 20):
        taken.append(record)


def _try_all(address, feature):
    """All that was not as documented: a line each."""
    wrong = []
    for what, found, expected in _tried(address, feature):
        if found not in expected if isinstance(expected, tuple) else found != expected:
            wrong.append(f"{what}: {found}, not {expected}")
            if found in ("ended", "no service"):
                break
    return wrong


def _tried(address, feature):
    try:
        yield from _verbs(address, feature)
        yield from _resources(address, feature)
        yield from _frames(address, feature)
        yield from _messages(address, feature)
    except (ConnectionRefusedError, FileNotFoundError):
        yield "connect", "no service", "a service"


# ---- verbs


def _verbs(address, feature):
    """Every method that exists, each as it is meant and with a parameter that it does not have."""
    listens = bool(feature.deliver) and feature.deliver != ("journal",)
    asked = {
        "org.varlink.service.GetInfo": ({}, "granted"),
        "org.varlink.service.GetInterfaceDescription": ({"interface": "io.fdbroker.Inbox"}, "granted"),
        "io.fdbroker.Broker.Open": ({"resources": [{"device": "/dev/none"}]}, "Denied"),
        "io.fdbroker.Broker.List": ({}, "granted"),
        "io.fdbroker.Broker.About": ({}, "granted"),
        "io.fdbroker.Admin.Reload": ({}, "Denied"),
        "io.fdbroker.Inbox.Send": ({"topic": "none", "payload": ""}, "Denied"),
        "io.fdbroker.Inbox.Receive": ({"maximum": 10, "acknowledge": [1, 2]}, "granted"),
        SUBSCRIBE: ({"topics": ["none"]}, "Denied"),
    }
    methods = [f"{interface}.{method}" for interface, names in varlink.METHODS.items() for method in names]
    yield "methods", sorted(methods), sorted(asked)
    for method, (parameters, expected) in asked.items():
        with Raw(address) as client:
            more = {"more": True} if method == SUBSCRIBE else {}
            yield method, outcome(client.call(method, parameters, **more)), expected
            yield method, outcome(client.call(method, {**parameters, "other": 1}, **more)), "InvalidParameter"
    with Raw(address) as client:  # a watch, which nothing ends but its client
        yield "watch", outcome(client.call("io.fdbroker.Broker.List", {}, more=True)), "granted"
    if listens:
        with Raw(address) as client:
            client.send_call(SUBSCRIBE, {"topics": ["inbox"], "after": 0}, more=True)


def _resources(address, feature):
    for name, resource in RESOURCES.items():
        asked = json.loads(json.dumps(resource))
        if "pid" in asked.get("namespace", {}):
            asked["namespace"]["pid"] = os.getpid()
        for times in (1,) if "bind" in asked.get("socket", {}) else (1, 16):  # a port is bound once
            with Raw(address) as client:
                reply = client.ask(*[asked] * times)
                yield f"{times} of {name}", outcome(reply), "granted" if name in feature.grants else "Denied"
                yield f"descriptors of {name}", len(client.descriptors), times if name in feature.grants else 0


# ---- messages


def _frames(address, feature):
    sends = bool(feature.deliver)
    with Raw(address) as client:
        client.sock.sendall(struct.pack("!I", 4) + b"PING")
        yield "PING", _exactly(client.sock, 8), struct.pack("!I", 4) + b"PONG"
    with Raw(address) as client:
        client.sock.sendall(struct.pack("!I", 0))
        yield "SHUTDOWN", _exactly(client.sock, 4), struct.pack("!I", errno.EPERM)
    for size in (one for one in SIZES if one):
        for count in COUNTS:
            status = 0 if sends else errno.EACCES
            if count and sends and "subscribers" not in feature.deliver:
                status = errno.EOPNOTSUPP
            if size > limits.MESSAGE_BYTES:
                status = errno.EMSGSIZE
            for kind, letter in LETTERS.items():
                what = f"a frame of {size} bytes of {kind}, {count} descriptors"
                yield what, _frame(address, letter * size, count, sends), status


def _messages(address, feature):
    for size in SIZES:
        for kind, letter in LETTERS.items():
            for count in COUNTS:
                for in_file in (False, True):
                    expected = _answer(feature, size, kind, count, in_file=in_file)
                    with _listening(address, feature, expected) as next_size:
                        found = _send(address, feature, letter * size, kind, count, in_file=in_file)
                        what = f"{size} bytes of {kind}{' in a file' if in_file else ''}, {count} descriptors"
                        yield what, found, expected
                        if next_size is not None and found == "granted":
                            yield f"what is delivered: {what}", next_size(), [size, count + (in_file and count < 16)]


def _call(payload, kind, count, *, in_file):
    """The call, and how many descriptors go along: at most 16 with the one that has the payload."""
    others = min(count, 15) if in_file else count
    parameters = {"topic": "inbox", "fileDescriptors": list(range(int(in_file), int(in_file) + others))}
    if in_file:
        parameters["fileDescriptor"] = 0
    elif kind == "text":
        parameters["payload"] = payload.decode()
    else:
        parameters |= {"payload": base64.b64encode(payload).decode(), "encoding": "base64"}
    return json.dumps({"method": SEND, "parameters": parameters}).encode() + b"\0", others


def _answer(feature, size, kind, count, *, in_file):
    """What the documents say: protocol.md of the length of a call, policy.md of topics."""
    call, others = _call(LETTERS[kind] * size, kind, count, in_file=in_file)
    if len(call) - 1 > limits.MESSAGE_BYTES:
        return "disconnected"
    if not feature.deliver:
        # where the kernel takes no descriptor along, the call names one that did not come
        return ("Denied", "InvalidParameter") if others or in_file else "Denied"
    lasting = "subscribers" not in feature.deliver
    if others and lasting:
        return "DescriptorsRefused"
    return "TooLong" if lasting and size > limits.MESSAGE_BYTES else "granted"


def _send(address, feature, payload, kind, count, *, in_file):
    call, others = _call(payload, kind, count, in_file=in_file)

    def once():
        numbers = [*([sealed_memfd("x", payload)] if in_file else ()), *(temporary(b"x") for _ in range(others))]
        try:
            with Raw(address) as client:
                _send_all(client.sock, call, numbers, may_send=bool(feature.deliver))
                return outcome(client.reply())
        finally:
            for number in numbers:
                os.close(number)

    return _patient(once, "QuotaExceeded")


def _send_all(sock, data, numbers, *, may_send):
    """With descriptors, which the kernel refuses to take along to who lets none in (Linux 6.16): then without."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sent = 0
        if numbers:
            try:
                sent = socket.send_fds(sock, [data], numbers)
            except PermissionError:
                if may_send:
                    raise
        sock.sendall(data[sent:])


def _frame(address, payload, count, may_send):
    def once():
        numbers = [temporary(b"x") for _ in range(count)]
        try:
            with Raw(address) as client:
                _send_all(client.sock, struct.pack("!I", len(payload)) + payload, numbers, may_send=may_send)
                said = _exactly(client.sock, 4)
                return int.from_bytes(said, "big") if len(said) == 4 else "ended"
        finally:
            for number in numbers:
                os.close(number)

    return _patient(once, errno.EDQUOT)


def _patient(once, busy):
    """What came with messages before is closed by a thread, and counts until then."""
    end = time.monotonic() + 10
    while (found := once()) == busy and time.monotonic() < end:
        time.sleep(0.01)
    return found


def _exactly(sock, size):
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while len(data) < size and (part := sock.recv(size - len(data))):
            data += part
    return data


@contextlib.contextmanager
def _listening(address, feature, expected):
    """A subscriber, where there are some: how many bytes and descriptors its next message has; else None."""
    if "subscribers" not in feature.deliver or expected != "granted":
        yield None
        return
    with Raw(address) as client:
        client.send_call(SUBSCRIBE, {"topics": ["inbox"]}, more=True)
        _await_subscription(address, client)

        def next_size():
            message = client.reply()["parameters"]["message"]
            while message["payload"] == "are you there":
                message = client.reply()["parameters"]["message"]
            if "fileDescriptor" in message:
                return [os.fstat(client.descriptors[0]).st_size, len(client.descriptors)]
            text = message["payload"]
            size = len(base64.b64decode(text)) if message["encoding"] == "base64" else len(text.encode())
            return [size, len(client.descriptors)]

        yield next_size


def _await_subscription(address, client):
    client.sock.settimeout(0.02)
    try:
        while True:
            with Raw(address) as other:
                other.call(SEND, {"topic": "inbox", "payload": "are you there"})
            with contextlib.suppress(TimeoutError):
                client.reply()
                return
    finally:
        client.sock.settimeout(15)

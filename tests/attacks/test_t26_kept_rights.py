"""T26: a process keeps a right that it does not need, for who takes it over.

Opener and inbox as a running service has them, with a program of ours inside; tests/privileged/test_confinement.py has
more that it might try.
"""

from __future__ import annotations

import os

import pytest
from harness import ALICE, MEM, Console, node, running, status_of, taken_over

POLICY = f"version: 1\nusers: {{{ALICE}: {{devices: [{{path: /dev/snd/pcm, access: rw}}]}}}}\n"  # CAP_DAC_OVERRIDE
OPENER = """
class Opener:
    def __init__(self, listener, launcher, inbox, to_keeper, asking, policy, nodes, audit):
        self.listener, self.launcher, self.bracket = listener, launcher, nodes._bracket
        self.inbox, self.keeper = inbox, to_keeper

    def serve(self):
        self.launcher.send(link.READY)
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        poll.poll()
        console(self.listener.accept()[0], {"opening": self.opening})

    def opening(self, path, flags):
        with self.bracket:
            os.close(os.open(path, flags))
"""
INBOX = """
class Inbox:
    def __init__(self, launcher, opener, keeper, policy, topics, unit_s):
        self.launcher, self.opener, self.keeper = launcher, opener, keeper

    def serve(self):
        self.launcher.send(link.READY)
        poll = select.poll()
        poll.register(self.opener.fileno(), select.POLLIN)
        while True:
            poll.poll()
            _, descriptors = self.opener.receive_with_descriptors(1)
            if descriptors:
                break
        sock = socket.socket(fileno=descriptors[0])
        console(sock, {"opening": lambda path, flags: os.close(os.open(path, flags))})
"""
PROGRAMS = {"opener": OPENER, "inbox": INBOX}
WRITING = os.O_WRONLY | os.O_CREAT
# what is tried -> what the kernel says in the opener, and in the inbox
REFUSED = {
    "opening('/etc/shadow', 0)": ("EACCES", "EPERM"),
    "opening('/dev/other', 0)": ("EACCES", "EPERM"),
    f"opening('/dev/snd/evil', {WRITING})": ("EACCES", "EPERM"),
    f"opening('/mnt/evil', {WRITING})": ("EACCES", "EPERM"),
    "opening('/proc/sys/kernel/core_pattern', 1)": ("EACCES", "EPERM"),
    "opening('/proc/LAUNCHER/mem', 2)": ("EACCES", "EPERM"),
    "opening('/proc/LAUNCHER/mem', 0)": ("EACCES", "EPERM"),
    "opening('/proc/self/mem', 2)": ("EACCES", "EPERM"),
    "os.kill(LAUNCHER, 0)": ("EPERM", "EPERM"),
    "os.fork()": ("EPERM", "EPERM"),
    "opening('/dev/snd/pcm', 2)": ("None", "EPERM"),  # what it is there for
}
DEADLY = [
    "os.execv('/bin/true', ['true'])",
    "ctypes.CDLL(None).unshare(0x10000000)",
    "socket.socket(socket.AF_INET)",
]


@pytest.fixture
def nodes(dev):
    node("/dev/snd/pcm", MEM["zero"])
    node("/dev/other", MEM["zero"])


@pytest.mark.parametrize("process", PROGRAMS)
def test_it_opens_what_its_rules_name_and_nothing_else(nodes, process):
    with taken_over(f"{process}/service.py", PROGRAMS[process]), running(POLICY) as broker:
        broker.expected_code = None
        with Console(broker.socket) as console:
            said = {text: console.say(text.replace("LAUNCHER", str(broker.pids["launcher"]))) for text in REFUSED}
            assert said == {text: expected[process == "inbox"] for text, expected in REFUSED.items()}
            status = status_of(broker.pids[process])
            assert {status[kind] for kind in ("CapEff", "CapInh", "CapBnd", "CapAmb")} == {"0" * 16}
            assert int(status["CapPrm"], 16) == (1 << 1 if process == "opener" else 0)  # CAP_DAC_OVERRIDE
            assert not os.path.exists("/mnt/evil")


@pytest.mark.parametrize("process", PROGRAMS)
def test_what_neither_of_them_needs_ends_it_and_the_service(nodes, process):
    for text in DEADLY:
        with taken_over(f"{process}/service.py", PROGRAMS[process]), running(POLICY) as broker:
            broker.expected_code = None
            with Console(broker.socket) as console:
                assert console.say(text) is None, text
            assert broker.process.wait(60) == 70
            said = f"the {process} was killed by its seccomp filter (SIGSYS)"
            assert said in broker.text(), text
            assert f"'pid={broker.pids[process]} .*syscall='" in broker.text(), text

"""What stands on a command line: an access behind a path, and no option twice."""

from __future__ import annotations

import asyncio
import json
import os

import click
import pytest
from harness import MEM, command, node, running

import fdbroker
import fdbroker.aio
from fdbroker.cli.commands import app
from fdbroker.errors import Denied
from fdbroker.terms import ACCESS_NAMES
from fdbroker.typed import join_access, split_access

BY_PATH = "/dev/input/by-path/pci-0000:00:14.0-usb-0:3:1.0-event-kbd"


@pytest.mark.parametrize(
    ("word", "resource", "access"),
    [
        ("/dev/x", "/dev/x", "wo"),
        ("/dev/x:rw", "/dev/x", "rw"),
        ("/dev/x:ro", "/dev/x", "ro"),
        ("/dev/x:rw:ro", "/dev/x:rw", "ro"),
        ("/dev/x:RW", "/dev/x:RW", "wo"),
        ("/dev/x:w", "/dev/x:w", "wo"),
        ("/dev/x:", "/dev/x:", "wo"),
        (BY_PATH, BY_PATH, "wo"),
        (f"{BY_PATH}:rw", BY_PATH, "rw"),
        ("net:vpn:rw", "net:vpn:rw", "wo"),
        ("net:ro", "net:ro", "wo"),
        ("socket:net:a:ro", "socket:net:a:ro", "wo"),
    ],
)
def test_only_a_path_has_an_access_behind_it(word, resource, access):
    assert split_access(word, "wo") == (resource, access)


@pytest.mark.parametrize("resource", ["/dev/x", "/dev/x:rw", "/dev/x:rw:ro", BY_PATH, "net:ro", "net:new"])
@pytest.mark.parametrize("access", ACCESS_NAMES)
@pytest.mark.parametrize("default", ACCESS_NAMES)
def test_what_is_written_is_read_again(resource, access, default):
    text, read = split_access(join_access(resource, access, default), default)
    assert text == resource
    assert read == access or not resource.startswith("/")


POLICY = """
version: 1
everyone: {devices: [{path: "/dev/pool/a", access: rw}, {path: "/dev/pool/q*", access: ro}, {path: /dev/zero}]}
"""


@pytest.fixture
def broker(dev):
    for name in ("a", "q", "q:rw", "q:0"):
        node(f"/dev/pool/{name}", MEM["zero"])
    with running(POLICY) as made:
        yield made
        made.wait_idle()


def test_each_resource_of_a_call_has_its_own_access(broker):
    pairs = [("/dev/pool/a", "rw"), ("/dev/pool/q:rw", "ro"), "/dev/zero"]
    expected = [("/dev/pool/a", "rw"), ("/dev/pool/q:rw", "ro"), ("/dev/zero", "ro")]

    def use(found):
        for descriptor, (resource, access) in zip(found, expected, strict=True):
            with descriptor:
                assert (descriptor.resource, descriptor.access) == (resource, access)
                flags = {"ro": os.O_RDONLY, "rw": os.O_RDWR}[access]
                with open(f"/proc/self/fdinfo/{descriptor.fileno()}") as info:
                    assert int(info.read().split("flags:")[1].split()[0], 8) & os.O_ACCMODE == flags

    async def talk():
        async with await fdbroker.aio.connect(broker.socket) as client:
            use(await client.open_all(pairs))
            with pytest.raises(Denied):
                await client.open_all(pairs, "rw")

    with fdbroker.connect(broker.socket) as client:
        use(client.open_all(pairs))
        with pytest.raises(Denied, match="/dev/zero"):
            client.open_all(pairs, "rw")
        with pytest.raises(ValueError, match="access is one of"):
            client.open_all([("/dev/pool/a", "r")])
    asyncio.run(talk())


def test_open_takes_the_access_behind_each_path_and_what_list_prints(broker):
    def opened(*words):
        code, out, err = command(broker.socket, "open", "--json", *words)
        assert code == 0, err
        return [(one["resource"], one["access"]) for one in json.loads(out)]

    assert opened("/dev/pool/a:rw", "/dev/pool/q:ro", "/dev/pool/q:rw:ro") == [
        ("/dev/pool/a", "rw"),
        ("/dev/pool/q", "ro"),
        ("/dev/pool/q:rw", "ro"),
    ]
    assert opened("--access", "wo", "/dev/pool/a", "/dev/pool/q:0:ro") == [
        ("/dev/pool/a", "wo"),
        ("/dev/pool/q:0", "ro"),
    ]
    code, out, _ = command(broker.socket, "list")
    listed = [line.split("\t")[0] for line in out.splitlines()]
    assert (code, listed) == (0, ["/dev/pool/a", "/dev/pool/q", "/dev/pool/q:0", "/dev/pool/q:rw:ro", "/dev/zero"])
    assert [resource for resource, _ in opened(*listed)] == [
        *("/dev/pool/a", "/dev/pool/q", "/dev/pool/q:0"),
        *("/dev/pool/q:rw", "/dev/zero"),
    ]


def test_list_as_json_says_which_node_it_is(broker):
    """A program that runs `list --json` sees that a node was replaced, as those on the socket do."""
    code, out, _ = command(broker.socket, "list", "--json")
    listed = json.loads(out)
    with fdbroker.connect(broker.socket) as client:
        offers = client.offers()
    assert code == 0
    assert [set(one) for one in listed] == [{"resource", "access", "rule", "generation"}] * len(offers)
    assert [one["generation"] for one in listed] == [offer.generation for offer in offers]
    assert all(one["generation"] > 0 for one in listed)


def test_a_denial_names_a_command_that_asks_for_the_same(broker):
    code, out, err = command(broker.socket, "open", "--access", "rw", "/dev/pool/a", "/dev/pool/q:0", "/dev/zero:ro")
    assert (code, out) == (77, "")
    words = err.splitlines()[-1].split("fdbroker policy explain ")[1].split()
    assert words == ["/dev/pool/a:rw", "/dev/pool/q:0:rw", "/dev/zero"]
    code, out, err = command(broker.socket, "policy", "explain", "--policy", str(broker.policy), "--json", *words)
    assert [one["decision"] for one in json.loads(out)] == ["allow", "deny", "allow"], err


def test_close_without_a_command_is_a_mistake():
    code, _, err = command("/nonexistent", "open", "--close", "/dev/null")
    assert code == 64
    assert "--close is for a COMMAND" in err


# ---- options


def _commands(group, path=()):
    for name, one in group.commands.items():
        if isinstance(one, click.Group):
            yield from _commands(one, (*path, name))
        else:
            yield (*path, name), one


COMMANDS = dict(_commands(app))
ONCE = [
    (path, option)
    for path, one in COMMANDS.items()
    for option in one.params
    if isinstance(option, click.Option) and not option.multiple
]


@pytest.mark.parametrize(
    ("path", "option"), ONCE, ids=lambda one: " ".join(one) if isinstance(one, tuple) else one.name
)
def test_an_option_that_is_given_twice_is_an_error(path, option):
    value = [] if option.is_flag else [option.type.choices[0] if isinstance(option.type, click.Choice) else "1"]
    arguments = ["/dev/x"] * sum(isinstance(one, click.Argument) and one.required for one in COMMANDS[path].params)
    words = [option.opts[0], *value, *arguments, option.opts[0], *value]
    with pytest.raises(click.UsageError, match=f"^{option.opts[0]} is given more than once$"):
        COMMANDS[path].make_context(path[-1], words)


def test_what_is_meant_for_several_and_words_of_a_command_are_none():
    words = ["--match", "a", "--topic", "x", "--match", "b", "--topic", "y"]
    assert COMMANDS["bridge", "dbus"].make_context("dbus", words).params["rules"] == ("a", "b")
    words = ["--access", "rw", "/dev/x", "--", "program", "--access", "x", "--access", "y"]
    assert COMMANDS["open",].make_context("open", words).params["access"] == "rw"
    assert len(ONCE) > 30
    code, _, err = command("/nonexistent", "list", "--socket", "/a", "--socket", "/b")
    assert code == 64
    assert "--socket is given more than once" in err

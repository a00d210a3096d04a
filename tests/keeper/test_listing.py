"""Listings: a few nodes at a time, of each owner one, each node once and charged."""

from __future__ import annotations

import os

import pytest

from fdbroker.bucket import Bucket
from fdbroker.keeper import listing
from fdbroker.keeper.connections import Connection
from fdbroker.keeper.listing import Lister
from fdbroker.limits import every as limits
from fdbroker.nodes.find import Finder
from fdbroker.policy.decide import View
from fdbroker.terms import DeviceRule, NamespaceRule, Subject
from fdbroker.wire import lists
from fdbroker.wire.launcher import Given

MAXIMA = {name: limit.default for name, limit in limits.USER_LIMITS.items()}
FITS = DeviceRule("/dev/many/*", "rw", "mem", "1:3", False, "everyone", "f:1")
NOT = DeviceRule("/dev/many/*", "rw", "sound", "", False, "everyone", "f:1")
AT_ONCE = limits.LOOKED_AT_ONCE
COUNT = AT_ONCE * 5 + 1


class Counted(Finder):
    looked = 0

    def look(self, path, seen, index=None):
        self.looked += 1
        return super().look(path, seen, index)


@pytest.fixture
def world(dev):
    os.mkdir("/dev/many")
    for number in range(COUNT):
        os.mknod(f"/dev/many/{number}", 0o20600, os.makedev(1, 3))
        os.chmod(f"/dev/many/{number}", 0o666)  # else the opener could not open it
    nodes = Counted()

    class World:
        lister = Lister(nodes, -1)
        owners: dict[int, Bucket] = {}
        last = 0

        def connect(self, owner, rule=FITS, state="listing"):
            """Each connection of an owner is one of another uid."""
            self.last += 1
            work = self.owners.setdefault(owner, Bucket(MAXIMA["burst"], 0.0))
            uid = owner * 1000 + self.last
            subject = Subject(uid, frozenset(), uid, 1, "", "", foreign=True, owner=owner)
            seen = View((rule,), (), (), MAXIMA, administrator=False)
            connection = Connection(self.last, subject, seen, work)
            connection.state = state
            return connection

    world = World()
    world.nodes = nodes
    yield world
    nodes.close()


def offers(parts):
    return [one for part in parts for one in lists.KEEPER_TO_INBOX.decode(part).offers]


def test_so_many_nodes_are_looked_at_in_one_step(world):
    """LOOKED_AT_ONCE, of which the first is the folder itself; the listing comes with the last of them."""
    world.lister.add(world.connect(5))
    for step in range(1, 6):
        assert list(world.lister.step(0.0)) == []
        assert world.nodes.looked == AT_ONCE * step - 1
    ((_, parts),) = world.lister.step(0.0)
    assert len(offers(parts)) == COUNT
    assert {one.resource.access for one in offers(parts)} == {"rw"}
    assert not world.lister.busy
    assert world.nodes.looked == COUNT  # each once


def test_nodes_that_do_not_fit_are_looked_at_once_and_charged(world):
    one = world.connect(5, NOT)
    world.lister.add(one)
    before = one.work.tokens
    while world.lister.busy:
        for _, parts in world.lister.step(0.0):
            assert offers(parts) == []
    assert world.nodes.looked == COUNT
    assert before - one.work.tokens == COUNT + 1  # the folder


def test_rules_that_name_nothing_are_charged_and_take_several_steps(world):
    """Each is matched with all names of its folder: that took 10 ms at one go, and cost nothing."""
    rules = tuple(NOT._replace(pattern=f"/dev/nothing{number}*") for number in range(AT_ONCE * 5))
    one = world.connect(5)
    one.view = one.view._replace(devices=rules)
    world.lister.add(one)
    before = one.work.tokens
    steps = 0
    while world.lister.busy:
        steps += 1
        for _, parts in world.lister.step(0.0):
            assert offers(parts) == []
    assert steps > 5
    assert before - one.work.tokens == len(rules)


def test_owners_take_turns_and_each_has_one_at_a_time(world):
    asked = [world.connect(owner) for owner in (5, 5, 5, 6)]
    for one in asked:
        one.view = one.view._replace()  # each has one of its own
    for one in asked:
        world.lister.add(one)
    done = []
    while world.lister.busy:
        done += [connection for connection, _ in world.lister.step(0.0)]
        assert len(world.lister._jobs) <= 2
    assert done.index(asked[3]) <= 1
    assert [one for one in done if one is not asked[3]] == asked[:3]


def test_a_watch_is_told_what_is_new_and_a_change_is_nothing_that_it_pays_for(world):
    one = world.connect(5, state="watching")
    world.lister.add(one)

    def again():
        return [offers(parts) for _ in range(20) if world.lister.busy for _, parts in world.lister.step(0.0)]

    assert [len(found) for found in again()] == [COUNT]
    tokens = one.work.tokens
    world.lister.list_again()
    assert again() == []  # nothing has changed
    os.unlink("/dev/many/0")
    world.lister.list_again()
    assert [len(found) for found in again()] == [COUNT - 1]
    assert one.work.tokens == tokens
    world.lister.drop(one)
    assert not world.lister.watched


def test_connections_of_an_owner_for_which_the_policy_says_the_same_share_a_listing(world):
    """One user with 64 watches made the opener look at each node 64 times for every change."""
    first = world.connect(5, state="watching")
    watching = [first, *(world.connect(5, state="watching") for _ in range(7))]
    for one in watching[1:]:
        one.view = first.view
    other, asking = world.connect(5, NOT, state="watching"), world.connect(5)
    asking.view = first.view
    for one in (*watching, other):
        world.lister.add(one)

    def again():
        world.nodes.looked = 0
        return [
            (one, len(offers(parts))) for _ in range(40) if world.lister.busy for one, parts in world.lister.step(0.0)
        ]

    assert again() == [*((one, COUNT) for one in watching), (other, 0)]
    assert world.nodes.looked == COUNT * 2
    os.unlink("/dev/many/0")
    world.lister.list_again()
    tokens = asking.work.tokens
    world.lister.add(asking)
    world.lister.drop(first)
    assert again() == [(one, COUNT - 1) for one in (*watching[1:], asking)]
    assert world.nodes.looked == (COUNT - 1) * 2
    assert tokens - asking.work.tokens == COUNT  # and the folder: once


def test_a_listing_is_handed_on_to_one_connection_at_a_time_and_other_owners_are_served_between(world):
    """All at once they were more messages than a link may hold, which ended the service; and nobody else was let in."""
    mine = [world.connect(5, state="watching") for _ in range(9)]
    for one in mine:
        one.view = mine[0].view
        world.lister.add(one)
    other = world.connect(6)
    world.lister.add(other)
    turns = []
    while world.lister.busy:
        turns.append([connection for connection, _ in world.lister.step(0.0)])
    assert max(map(len, turns)) == 1
    assert [one for turn in turns for one in turn].index(other) < 3
    assert sum(map(len, turns)) == len(mine) + 1


def test_what_waits_to_be_handed_on_is_dropped_with_its_connection_and_made_again_by_another_policy(world):
    one, two, three = mine = [world.connect(5) for _ in range(3)]
    for each in mine:
        each.view = one.view
        world.lister.add(each)
    told = []
    while not told:
        told += [connection for connection, _ in world.lister.step(0.0)]
    world.lister.drop(two)
    looked = world.nodes.looked
    three.view = three.view._replace()
    while world.lister.busy:
        told += [connection for connection, _ in world.lister.step(0.0)]
    assert told == [one, three]
    assert world.nodes.looked == 2 * looked


def test_whoever_comes_while_a_listing_is_made_gets_one_of_its_own(world):
    """What has been looked at already may have changed before that connection asked."""
    one, late = world.connect(5), world.connect(5)
    late.view = one.view
    world.lister.add(one)
    list(world.lister.step(0.0))
    os.unlink("/dev/many/0")
    world.lister.add(late)
    found = {}
    while world.lister.busy:
        found |= {connection: len(offers(parts)) for connection, parts in world.lister.step(0.0)}
    assert found[late] == COUNT - 1
    assert found[one] <= COUNT


def test_listings_that_name_processes_are_shared_by_none_but_the_same(world):
    own = NamespaceRule(("net",), "", True, False, None, "everyone", "f:2")
    one, same, other = (world.connect(5) for _ in range(3))
    one.view = same.view = other.view = one.view._replace(others=(own,))
    other.subject = other.subject._replace(pid=2)
    for connection in (one, same, other):
        world.lister.add(connection)
    found = {}
    while world.lister.busy:
        found |= {connection: offers(parts) for connection, parts in world.lister.step(0.0)}
    assert [found[each][-1].resource.pid for each in (one, same, other)] == [1, 1, 2]
    assert world.nodes.looked == COUNT * 2


def test_a_change_while_a_listing_is_made_begins_it_anew(world):
    """The watch waits once, and the new listing looks again at the nodes that the old one had seen."""
    world.lister.add(world.connect(5, state="watching"))
    while world.lister.busy:
        list(world.lister.step(0.0))
    for name in ("0", "1"):
        os.unlink(f"/dev/many/{name}")
        world.lister.list_again()
        list(world.lister.step(0.0))
    told = []
    while world.lister.busy:
        told += [len(offers(parts)) for _, parts in world.lister.step(0.0)]
    assert told == [COUNT - 2]


def test_a_change_and_then_a_policy_before_a_listing_is_handed_on_leave_nothing_of_who_goes(world):
    """The watch waited twice, left once, and was then listed and watched for ever."""
    one, other = (world.connect(5, state="watching") for _ in range(2))
    other.view = one.view
    for each in (one, other):
        world.lister.add(each)
    while world.lister.busy:
        list(world.lister.step(0.0))
    os.unlink("/dev/many/0")
    world.lister.list_again()
    while [connection for connection, _ in world.lister.step(0.0)] != [one]:
        pass
    world.lister.list_again()  # as with a policy, for which each comes again
    one.view = other.view = one.view._replace()
    assert list(world.lister.step(0.0)) == []  # of the other, by the policy that is no more
    for each in (other, one):
        world.lister.drop(each)
    assert not world.lister.busy
    assert not world.lister.watched


def test_who_goes_is_not_listed(world):
    one, other = world.connect(5), world.connect(5)
    world.lister.add(one)
    world.lister.add(other)
    list(world.lister.step(0.0))
    world.lister.drop(one)
    done = []
    while world.lister.busy:
        done += [connection for connection, _ in world.lister.step(0.0)]
    assert done == [other]
    world.lister.add(one)
    world.lister.drop(one)
    assert not world.lister.busy


# ---- what the opener can open


def allowed(given, mode, gid=0):
    """The accesses with which the opener, given that, can open a node of that mode and group."""
    status = os.stat_result((0o20000 | mode, *[0] * 4, gid, *[0] * 4))
    return [access for access in ("ro", "wo", "rw") if listing._can_open(given, status, access)]


NOTHING, IN_GROUP = Given(False, False, ()), Given(False, False, (7, 29))


@pytest.mark.parametrize(
    ("mode", "accesses"),
    [
        (0o000, []),
        (0o004, ["ro"]),
        (0o002, ["wo"]),
        (0o006, ["ro", "wo", "rw"]),
        (0o001, []),
        (0o770, []),  # its owner is never the opener, and its group is none of the opener's
        (0o774, ["ro"]),
    ],
    ids=str,
)
def test_without_groups_and_capabilities_the_bits_of_others_count(mode, accesses):
    assert allowed(NOTHING, mode, gid=29) == accesses


@pytest.mark.parametrize(
    ("mode", "accesses"),
    [
        (0o060, ["ro", "wo", "rw"]),
        (0o040, ["ro"]),
        (0o020, ["wo"]),
        (0o606, []),  # of its group, and not of others: whatever they may is nothing to a member
        (0o646, ["ro"]),
        (0o700, []),
    ],
    ids=str,
)
def test_in_its_group_the_bits_of_the_group_count_and_no_others(mode, accesses):
    assert allowed(IN_GROUP, mode, gid=29) == accesses
    assert allowed(IN_GROUP, mode, gid=30) == allowed(NOTHING, mode)


def test_whoever_may_read_all_may_read_and_for_the_rest_the_bits_count():
    given = Given(True, False, ())
    assert [allowed(given, mode) for mode in (0o000, 0o002, 0o006)] == [["ro"], ["ro", "wo"], ["ro", "wo", "rw"]]


def test_whoever_may_write_all_may_do_all():
    assert allowed(Given(False, True, ()), 0) == ["ro", "wo", "rw"]
    assert allowed(Given(True, True, ()), 0) == ["ro", "wo", "rw"]


def test_a_node_is_listed_with_the_most_that_both_rule_and_mode_allow(world):
    """What the opener could not open is not listed, whatever rules say."""
    os.makedirs("/dev/few")
    rule = FITS._replace(pattern="/dev/few/node")
    os.mknod("/dev/few/node", 0o20000, os.makedev(1, 3))
    found = []
    for given, mode, gid in (
        (NOTHING, 0o600, 0),
        (NOTHING, 0o604, 0),
        (NOTHING, 0o602, 0),
        (NOTHING, 0o660, 29),
        (IN_GROUP, 0o660, 29),
        (IN_GROUP, 0o640, 29),
        (Given(True, False, ()), 0o600, 0),
        (Given(True, True, ()), 0o600, 0),
    ):
        os.chmod("/dev/few/node", mode)
        os.chown("/dev/few/node", 0, gid)
        world.lister.given = given
        world.lister.add(world.connect(5, rule))
        made = []
        while world.lister.busy:
            made += [one.resource.access for _, parts in world.lister.step(0.0) for one in offers(parts)]
        found.append("".join(made))
    assert found == ["", "ro", "wo", "", "rw", "ro", "ro", "rw"]

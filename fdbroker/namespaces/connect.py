"""A new net namespace on a bridge that the admin named: a veth pair, an address, a way out.

Runs in: a child of the namespaces worker. Who owns the new namespace may change everything inside it, from its first
moment; so nothing in there is believed, and what must hold is said on the bridge's side.
"""

from __future__ import annotations

import errno
import ipaddress
import os

from fdbroker.errors import NotWhatItWas, OpenFailed, QuotaExceeded
from fdbroker.kernel import namespaces
from fdbroker.kernel.capabilities import Bracket
from fdbroker.kernel.rtnetlink import Interface, Link, RtNetlink
from fdbroker.terms import Uplink, owner_text

_INSIDE = "eth0"
# One for all ends on bridges: a bridge takes the lowest of its ports' addresses, and that must not change with each.
_OURS = bytes.fromhex("feffffffffff")
_MARK = "fdbroker uid "  # then the owner's uid or `others`, a space, and the address: written at our end of each pair
_TRIES = 4096


def connect(namespace: int, uplink: Uplink, owner: int, maximum: int, enter: Bracket, change: Bracket) -> None:
    """Connect the borrowed net namespace, made for `owner`; `lo` comes up as well.

    It goes with the namespace: when one end of a pair is destroyed, so is the other. Enters the namespace, so the
    process is good for nothing else afterwards. Raises QuotaExceeded when the user has `maximum` of them already,
    NotWhatItWas when there is no such bridge, OpenFailed when no address is left, OSError.
    """
    with change:
        here = RtNetlink()
    with here:
        _connect(here, namespace, uplink, owner, maximum, enter, change)


def _connect(
    here: RtNetlink, namespace: int, uplink: Uplink, owner: int, maximum: int, enter: Bracket, change: Bracket
) -> None:
    with change:
        bridge = _bridge(here, uplink.bridge)
        addresses = here.addresses(bridge.number)
        if len([link for link in here.links() if link.alias.startswith(f"{_MARK}{owner_text(owner)} ")]) >= maximum:
            raise QuotaExceeded("namespaces", maximum)
        # not after the namespace's number: the kernel gives that again while eth0 may live on elsewhere
        name = f"fdb{os.urandom(6).hex()}"
        inside_mac = bytes([2, *os.urandom(5)])
        here.add_veth(name, _OURS, _INSIDE, inside_mac, namespace)
        ours = here.link(name)
        address = _claim(here, ours, uplink.address, owner, addresses)
    with enter:
        namespaces.setns(namespace, namespaces.CLONE["net"])
    with change, RtNetlink() as inside:
        inside.set_up(inside.link("lo").number)
        theirs = inside.link(_INSIDE)
        inside.add_address(theirs.number, address)
        inside.set_up(theirs.number)
        ways = [one.ip for one in addresses if one.ip in address.network]
        if ways:
            inside.add_default_route(theirs.number, ways[0])
    with change:  # last: one that could not be finished reaches nothing, whoever has kept it
        here.add_to_bridge(ours.number, bridge.number, inside_mac, isolated=uplink.isolated)
        here.set_up(ours.number)


def _bridge(here: RtNetlink, name: str) -> Link:
    try:
        found = here.link(name)
    except OSError:
        raise NotWhatItWas(f"there is no bridge {name}") from None
    if found.kind != "bridge":
        raise NotWhatItWas(f"{name} is no bridge")
    return found


def _claim(here: RtNetlink, ours: Link, wanted: str, owner: int, bridge: list[Interface]) -> Interface:
    """An address that no other namespace of ours has: noted at our end first, then looked whether others have it too.

    So two that are made at the same time cannot keep the same one: one of them at least sees the other's note.
    """
    tried: set[str] = set()
    while True:
        address = _free(wanted, tried | _taken(here, ours) | {str(one.ip) for one in bridge})
        here.set_alias(ours.number, f"{_MARK}{owner_text(owner)} {address.ip}")
        if str(address.ip) not in _taken(here, ours):
            return address
        tried.add(str(address.ip))


def _taken(here: RtNetlink, ours: Link) -> set[str]:
    marks = (link.alias for link in here.links() if link.number != ours.number)
    return {alias.rpartition(" ")[2] for alias in marks if alias.startswith(_MARK)}


def _free(wanted: str, taken: set[str]) -> Interface:
    """The address itself, or one of the network's; not always the first, so that two at once seldom meet."""
    given = ipaddress.ip_interface(wanted)
    network = given.network
    if given.ip != network.network_address:
        if str(given.ip) in taken:
            raise OpenFailed(errno.EADDRINUSE)
        return given
    hosts = network.num_addresses - 2  # neither the network's own, nor the last one, where IPv4 has its broadcast
    first = int.from_bytes(os.urandom(8), "big")
    for offset in range(min(hosts, _TRIES)):
        address = network[1 + (first + offset) % hosts]
        if str(address) not in taken:
            return ipaddress.ip_interface(f"{address}/{network.prefixlen}")
    raise OpenFailed(errno.EADDRNOTAVAIL)

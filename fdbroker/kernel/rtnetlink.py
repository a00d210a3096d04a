"""rtnetlink(7): the few requests that connect a network namespace to a bridge.

Runs in: namespaces worker. Nobody but the kernel writes what is read here, but interface names and aliases are set by
whoever administers the namespace that is asked.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/veth.h
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP, _EXCL, _CREATE = 0x1, 0x4, 0x300, 0x200, 0x400
_NEWLINK, _GETLINK, _SETLINK, _NEWADDR, _GETADDR, _NEWROUTE, _NEWNEIGH = 16, 18, 19, 20, 22, 24, 28
_IFLA_IFNAME, _IFLA_MASTER, _IFLA_PROTINFO, _IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_NET_NS_FD = 3, 10, 12, 18, 20, 28
_IFLA_ADDRESS = 1
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_BRPORT_GUARD, _BRPORT_LEARNING, _BRPORT_UNICAST_FLOOD, _BRPORT_ISOLATED = 5, 8, 9, 33
_NDA_LLADDR, _NTF_MASTER, _NUD_STATIC = 2, 0x04, 0x42
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_NODAD = 0x02
_RTA_OIF, _RTA_GATEWAY = 4, 5
_RT_TABLE_MAIN, _RTPROT_STATIC, _RTN_UNICAST = 254, 4, 1
_IFF_UP = 1
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF
_AF_BRIDGE = 7

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # rtattr: length, type
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, prefixes, tos, table, protocol, scope, type, flags
_BUFFER_BYTES = 65536

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Link(NamedTuple):
    """One network interface, its ifindex `number`. `kind` is "bridge", "veth" …, or ""; `alias` a note at it."""

    number: int
    name: str
    kind: str
    master: int
    alias: str


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[_ATTRIBUTE.size : length]
        data = data[length + -length % 4 :]


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


class RtNetlink:
    """A socket to the network namespace in which it was made.

    It may change what its maker and its user both may: the capability must be raised at both times. Every method raises
    OSError with the kernel's errno. Leave the `with` block to close it.
    """

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._sock.close()

    # ---- what there is

    def links(self) -> list[Link]:
        """All interfaces."""
        found = []
        for data in self._ask(_GETLINK, _DUMP, _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
            index = _LINK.unpack_from(data)[2]
            values = dict(_attributes(data[_LINK.size :]))
            info = dict(_attributes(values.get(_IFLA_LINKINFO, b"")))
            master = int.from_bytes(values.get(_IFLA_MASTER, b""), sys.byteorder)
            kind, alias = _text(info.get(_INFO_KIND, b"")), _text(values.get(_IFLA_IFALIAS, b""))
            found.append(Link(index, _text(values.get(_IFLA_IFNAME, b"")), kind, master, alias))
        return found

    def link(self, name: str) -> Link:
        """The interface of that name."""
        for link in self.links():
            if link.name == name:
                return link
        raise OSError(errno.ENODEV, f"there is no interface {name}")

    def addresses(self, index: int) -> list[Interface]:
        """The addresses of an interface."""
        found: list[Interface] = []
        for data in self._ask(_GETADDR, _DUMP, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
            _, prefix, _, _, of = _ADDRESS.unpack_from(data)
            values = dict(_attributes(data[_ADDRESS.size :]))
            value = values.get(_IFA_LOCAL) or values.get(_IFA_ADDRESS)
            if of == index and value:
                found.append(ipaddress.ip_interface((value, prefix)))
        return found

    # ---- changes

    def set_up(self, index: int) -> None:
        """Bring an interface up."""
        self._change(_NEWLINK, 0, _LINK.pack(socket.AF_UNSPEC, 0, index, _IFF_UP, _IFF_UP))

    def add_veth(self, name: str, address: bytes, peer: str, peer_address: bytes, namespace: int) -> None:
        """Make a pair of interfaces, both down: `name` here, `peer` in the net namespace of a borrowed descriptor."""
        there = (
            _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
            + _attribute(_IFLA_IFNAME, peer.encode() + b"\0")
            + _attribute(_IFLA_ADDRESS, peer_address)
            + _number(_IFLA_NET_NS_FD, namespace)
        )
        data = _attribute(_INFO_DATA | _NESTED, _attribute(_VETH_PEER | _NESTED, there))
        info = _attribute(_IFLA_LINKINFO | _NESTED, _attribute(_INFO_KIND, b"veth") + data)
        message = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _attribute(_IFLA_IFNAME, name.encode() + b"\0") + info
        message += _attribute(_IFLA_ADDRESS, address)
        self._change(_NEWLINK, _CREATE | _EXCL, message)

    def set_alias(self, index: int, alias: str) -> None:
        """Write a note of at most 255 bytes at an interface."""
        self._change(_SETLINK, 0, _LINK.pack(0, 0, index, 0, 0) + _attribute(_IFLA_IFALIAS, alias.encode()))

    def add_to_bridge(self, index: int, bridge: int, behind: bytes, *, isolated: bool) -> None:
        """Make an interface a port of a bridge, without a say in its spanning tree; see Uplink for `isolated`.

        Just the address `behind` is behind it: the bridge learns no others there, however many are used.
        """
        self._change(_SETLINK, 0, _LINK.pack(0, 0, index, 0, 0) + _number(_IFLA_MASTER, bridge))
        port = _attribute(_BRPORT_GUARD, b"\1") + _attribute(_BRPORT_ISOLATED, bytes([isolated]))
        port += _attribute(_BRPORT_LEARNING, b"\0") + _attribute(_BRPORT_UNICAST_FLOOD, b"\0")
        info = _attribute(_IFLA_PROTINFO | _NESTED, port)
        self._change(_SETLINK, 0, _LINK.pack(_AF_BRIDGE, 0, index, 0, 0) + info)
        entry = _NEIGHBOUR.pack(_AF_BRIDGE, index, _NUD_STATIC, _NTF_MASTER, 0) + _attribute(_NDA_LLADDR, behind)
        self._change(_NEWNEIGH, _CREATE | _EXCL, entry)

    def add_address(self, index: int, address: Interface) -> None:
        """Give an interface an address, for use at once."""
        packed = address.ip.packed
        message = _ADDRESS.pack(_family(address.version), address.network.prefixlen, _IFA_F_NODAD, 0, index)
        message += _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed)
        self._change(_NEWADDR, _CREATE | _EXCL, message)

    def add_default_route(self, index: int, gateway: Address) -> None:
        """Send what is for nobody nearby to `gateway`."""
        message = _ROUTE.pack(_family(gateway.version), 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, 0, _RTN_UNICAST, 0)
        message += _attribute(_RTA_GATEWAY, gateway.packed) + _number(_RTA_OIF, index)
        self._change(_NEWROUTE, _CREATE | _EXCL, message)

    # ---- messages

    def _change(self, kind: int, flags: int, message: bytes) -> None:
        for _ in self._ask(kind, _ACK | flags, message):
            pass

    def _ask(self, kind: int, flags: int, message: bytes) -> Iterator[bytes]:
        """Send a request; the answers to it, without their headers, until the kernel says that it was all."""
        self._sequence += 1
        length = _HEADER.size + len(message)
        self._sock.send(_HEADER.pack(length, kind, _REQUEST | flags, self._sequence, 0) + message)
        while True:
            data, _, received, _ = self._sock.recvmsg(_BUFFER_BYTES)
            if received & socket.MSG_TRUNC:
                raise OSError(errno.EMSGSIZE, "rtnetlink: an answer was cut")
            while len(data) >= _HEADER.size:
                length, answer, _, sequence, _ = _HEADER.unpack_from(data)
                body = data[_HEADER.size : length]
                data = data[length + -length % 4 :]
                if sequence != self._sequence:
                    continue  # to a request before this one, which failed half-way
                if answer == _DONE:
                    return
                if answer == _ERROR:
                    (number,) = struct.unpack_from("=i", body)
                    if number:
                        raise OSError(-number, f"rtnetlink({kind}): {os.strerror(-number)}")
                    return
                yield body

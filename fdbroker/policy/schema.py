"""The shape of a policy file, said once: `load` judges by it, `policy schema` prints it, the reference is made of it.

Runs in: launcher, command line. No attacker controls anything here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fdbroker.limits import policy as limits
from fdbroker.limits.inbox import MESSAGE_BYTES
from fdbroker.terms import (
    ACCESS_NAMES,
    FAMILIES,
    NAMESPACE_TYPES,
    NEW_NAMESPACE_TYPES,
    PORT_MAX,
    SOCKET_TYPES,
)

HANDLERS = ("journal", "subscribers", "queue")


class Text(NamedTuple):
    """A string, taken as it is written: 13:32 and no stay strings."""

    what: str
    pattern: str = ""


class Integer(NamedTuple):
    """A decimal number from `least` to `most`."""

    least: int
    most: int


class Flag(NamedTuple):
    """`true` or `false`, no other spelling."""


class Choice(NamedTuple):
    """One word of several."""

    words: tuple[str, ...]


class Sequence(NamedTuple):
    """A list of at least one item."""

    item: Kind


class OneOrMore(NamedTuple):
    """One item, or a list of them."""

    item: Kind


class Short(NamedTuple):
    """A mapping, or, in its place, what stands at one of its keys."""

    mapping: Mapping
    key: str


class Field(NamedTuple):
    """One key of a mapping."""

    kind: Kind
    doc: str
    required: bool = False


class Mapping(NamedTuple):
    """A mapping with these keys and no others. `one_of`: at least one of these must be there; exactly one if `only`."""

    what: str
    fields: dict[str, Field]
    one_of: tuple[str, ...] = ()
    only: bool = False


class Named(NamedTuple):
    """A mapping whose keys are names of users or groups."""

    what: str
    value: Kind


class Later(NamedTuple):
    """A key of the design that this version does not serve: refused, for an admin would rely on it."""


Kind = Text | Integer | Flag | Choice | Sequence | OneOrMore | Short | Mapping | Named | Later

# leases, conditions on devices and on sessions, passwords: the design has them
_LATER = Field(Later(), "Of a later version.")
_KEEP = f"{limits.KEEP_SECONDS // 86_400}d"
_GLOB = Text("an absolute path below /dev; * ? [..] never match a slash", "^/dev/[^/](.|\n)*$")
_NAME = Text("a name or a number")
_NAMES = Sequence(_NAME)
_ACCESS = Choice(ACCESS_NAMES)

_LABELS = OneOrMore(Text("a MAC label without its mode; * ? [..] never match a slash"))
_LABEL = Field(
    _LABELS,
    "Only for programs that AppArmor or SELinux confines with this label, or one of these; not for those whose label "
    "is not known.",
)

_DEVICE = {
    "path": Field(_GLOB, "The nodes: an absolute path below /dev; `*`, `?` and `[..]` never match a slash.", True),
    "access": Field(_ACCESS, "The most that may be asked for. Default: `ro`."),
    "class": Field(
        Text("the name of a kernel subsystem, as in /sys/class", "^[A-Za-z0-9_-]+$"),
        "The kernel subsystem that the opened node must belong to, e.g. `sound` or `input`.",
    ),
    "device": Field(
        Text(
            "MAJOR:MINOR, each a number without leading zeros or *", r"^(0|[1-9][0-9]{0,7}|\*):(0|[1-9][0-9]{0,7}|\*)$"
        ),
        "The device number that the opened node must have, e.g. `116:*`.",
    ),
    "dangerous": Field(
        Flag(),
        "Needed for terminals, block devices and other nodes that give power over the machine. Default: `false`.",
    ),
    **dict.fromkeys(
        (
            *("revoke", "require", "remember", "leases", "for", "until", "session", "exclusive"),
            *("kind", "bus", "usb", "serial"),
        ),
        _LATER,
    ),
}
_NETNS = Text("a name in /run/netns; * ? [..] match any part of it", "^[^/]+$")
_NAMESPACE = {
    "type": Field(OneOrMore(Choice(NAMESPACE_TYPES)), "The kind of namespace, or a list of them.", True),
    "name": Field(
        _NETNS, "Namespaces by name: those in `/run/netns`, which `ip netns add` makes, hence of type `net`."
    ),
    "of": Field(
        Choice(("caller",)), "`caller`: the namespaces of processes of the caller's own uid, which it asks for by pid."
    ),
    "create": Field(
        Flag(),
        f"New ones, owned by the caller's user namespace: {', '.join(f'`{name}`' for name in NEW_NAMESPACE_TYPES)}.",
    ),
    "link": Field(
        Mapping(
            "a link",
            {
                "bridge": Field(
                    Text("the name of a network interface", r"^(?!\.{1,2}$)[^\s/:%]{1,15}$"), "The bridge.", True
                ),
                "address": Field(
                    Text("ADDRESS/PREFIX", r"^[0-9A-Fa-f.:]+/[0-9]{1,3}$"),
                    "A network, such as `10.88.0.0/24`: each new namespace gets an address of its own in it. Or one "
                    "address with its prefix: one namespace at a time.",
                    True,
                ),
                "isolated": Field(
                    Flag(),
                    "Whether it reaches the host and what else is on the bridge, but no other isolated namespace "
                    "there. Default: `true`.",
                ),
            },
        ),
        "Connect new `net` namespaces: a veth pair, one end on this bridge of the machine, the other, `eth0`, inside.",
    ),
}
_SOCKET = {
    "namespace": Field(_NETNS, "The network namespaces, by name, in which sockets may be made.", True),
    "families": Field(Sequence(Choice(FAMILIES)), "Default: all of them."),
    "types": Field(Sequence(Choice(SOCKET_TYPES)), "Default: all of them."),
    "bind": Field(
        Sequence(Integer(1, PORT_MAX)),
        "Ports that the broker may bind the socket to, on all addresses. A program binds others itself, as far as the "
        "namespace's `ip_unprivileged_port_start` lets everybody. Default: none.",
    ),
}
_TOPIC = Text("a topic; * ? [..] match any part of its name", "^[^/]+$")
_TOPICS = Sequence(
    Short(
        Mapping("a topic rule", {"topic": Field(_TOPIC, "The topics, by name.", True), "label": _LABEL}),
        "topic",
    )
)
_MEMBERSHIP = Field(
    Choice(("kernel", "nss")),
    "Whose word counts for who is in the group: the kernel's (the groups of the process), or the group database's "
    "(`nss`), read when the policy is loaded. Default: `kernel`.",
)
_LIMITS = Mapping(
    "limits",
    {
        name: Field(Integer(limit.least, limit.most), f"{limit.meaning[:1].upper()}{limit.meaning[1:]}.")
        for name, limit in limits.USER_LIMITS.items()
    },
)


def _entry(more: dict[str, Field]) -> Mapping:
    return Mapping(
        "rules",
        {
            "devices": Field(
                Sequence(Mapping("a device rule", {**_DEVICE, "label": _LABEL, **more})),
                "Device nodes that may be opened.",
            ),
            "limits": Field(
                _LIMITS, "Maxima in place of the top ones: of several groups the largest, and a user's own before all."
            ),
            "namespaces": Field(
                Sequence(
                    Mapping(
                        "a namespace rule",
                        {**_NAMESPACE, "label": _LABEL, **more},
                        ("name", "of", "create"),
                        only=True,
                    )
                ),
                "Namespaces whose descriptors may be had.",
            ),
            "sockets": Field(
                Sequence(Mapping("a socket rule", {**_SOCKET, "label": _LABEL, **more})),
                "Sockets inside namespaces that may be had.",
            ),
            "secrets": _LATER,
            "send": Field(_TOPICS, "Topics that messages may be sent to."),
            "subscribe": Field(_TOPICS, "Topics whose messages may be had."),
        },
    )


POLICY = Mapping(
    "a policy",
    {
        "version": Field(Integer(1, 1), "The version of this format.", True),
        "administrators": Field(
            Mapping(
                "administrators",
                {"users": Field(_NAMES, "Users."), "groups": Field(_NAMES, "Groups.")},
                one_of=("users", "groups"),
            ),
            "Who may administer the broker; uid 0 always may.",
        ),
        "limits": Field(_LIMITS, "Maxima for each user."),
        "groups": Field(Named("a group", _entry({"membership": _MEMBERSHIP})), "Rules for members of groups."),
        "users": Field(Named("a user", _entry({})), "Rules for users."),
        "everyone": Field(_entry({}), "Rules for all who can connect."),
        "deny": Field(
            Sequence(
                Mapping(
                    "a deny rule",
                    {
                        "groups": Field(_NAMES, "Members of these groups."),
                        "users": Field(_NAMES, "These users."),
                        "everyone": Field(Flag(), "All, root too."),
                        "units": _LATER,
                        "label": Field(
                            _LABELS,
                            "Of these only programs with this label, or one of these, in whatever mode; and all whose "
                            "label is not known.",
                        ),
                        "devices": Field(Sequence(_GLOB), "The nodes, as in a device rule."),
                        "namespaces": Field(
                            Sequence(
                                Mapping(
                                    "a namespace rule",
                                    {name: _NAMESPACE[name] for name in ("type", "name", "of", "create")},
                                    ("name", "of", "create"),
                                    only=True,
                                )
                            ),
                            "Namespaces, as in a namespace rule.",
                        ),
                        "sockets": Field(
                            Sequence(Mapping("a socket rule", _SOCKET)),
                            "Sockets, as in a socket rule; without `bind` those that are to be bound as well.",
                        ),
                    },
                    one_of=("groups", "users", "everyone"),
                )
            ),
            "What nobody of these gets, whatever else allows it. Devices: by path, and by that to which links lead.",
        ),
        "tests": Field(
            Sequence(
                Mapping(
                    "a test",
                    {
                        "as": Field(
                            Mapping(
                                "a subject",
                                {
                                    "user": Field(_NAME, "The user.", True),
                                    "groups": Field(_NAMES, "All its groups. Default: those of the group database."),
                                    "label": Field(
                                        Text("a MAC label"),
                                        "Its program's MAC label, as the kernel says it. Default: it is not known.",
                                    ),
                                },
                            ),
                            "Who asks.",
                            True,
                        ),
                        "open": Field(
                            Text("a resource, as on the command line"),
                            "What is asked for: a path, `net:NAME`, `TYPE:pid:PID`, `TYPE:new`, `socket:net:NAME`, "
                            "`send:TOPIC` or `subscribe:TOPIC`.",
                            True,
                        ),
                        "access": Field(_ACCESS, "Default: `ro`."),
                        "expect": Field(Choice(("allow", "deny")), "What must come out.", True),
                    },
                )
            ),
            "Run by `fdbroker policy test`, at the start, and before a reload takes effect.",
        ),
        **dict.fromkeys(("authentication", "leases", "require", "revoke", "secrets", "socket", "units"), _LATER),
        "topics": Field(
            Named(
                "a topic",
                Mapping(
                    "a topic",
                    {
                        "deliver": Field(
                            Sequence(Choice(HANDLERS)),
                            "What happens to its messages: `journal`, each is a record of the journal; `subscribers`, "
                            "each goes to who has subscribed; `queue`, each is stored for every user that may "
                            "subscribe, until that user has acknowledged it. Default: `[subscribers]`.",
                        ),
                        "maximum_bytes": Field(
                            Integer(1, limits.ATTACHED_BYTES_MAX),
                            f"How long a message may be; above {MESSAGE_BYTES:,}, the default where it goes to "
                            "the journal or the queue, only in a memfd and to subscribers alone. Default for these: "
                            f"{limits.ATTACHED_BYTES:,}.",
                        ),
                        "keep": Field(
                            Text("a number and one of s, m, h, d, w, such as 7d", "^[1-9][0-9]{0,4}[smhdw]$"),
                            f"How long the queue keeps a message that nobody acknowledges. Default: `{_KEEP}`.",
                        ),
                    },
                ),
            ),
            "Message topics. Those of the inbox framing, which names none, go to `inbox`.",
        ),
    },
)


def _json(kind: Kind) -> dict[str, Any]:
    match kind:
        case Text(_, pattern):
            # an unquoted number is the same text to the loader, but not to an editor's YAML
            return {"type": "string", "pattern": pattern} if pattern else {"type": ["string", "integer"]}
        case Integer(least, most):
            return {"type": "integer", "minimum": least, "maximum": most}
        case Flag():
            return {"type": "boolean"}
        case Choice(words):
            return {"enum": list(words)}
        case Sequence(item):
            return {"type": "array", "minItems": 1, "items": _json(item)}
        case OneOrMore(item):
            return {"anyOf": [_json(item), {"type": "array", "minItems": 1, "items": _json(item)}]}
        case Short(mapping, key):
            return {"anyOf": [_json(mapping.fields[key].kind), _json(mapping)]}
        case Named(_, value):
            return {"type": "object", "additionalProperties": _json(value)}
        case Mapping(_, fields, one_of, only):
            shape: dict[str, Any] = {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    name: {**_json(field.kind), "description": field.doc}
                    for name, field in fields.items()
                    if not isinstance(field.kind, Later)
                },
            }
            required = [name for name, field in fields.items() if field.required]
            if required:
                shape["required"] = required
            if one_of:
                shape["oneOf" if only else "anyOf"] = [{"required": [name]} for name in one_of]
            return shape
        case Later():
            return {"not": {}}


def json_schema() -> dict[str, Any]:
    """The policy's JSON Schema, draft 2020-12. It knows the shape; `fdbroker policy check` knows the meaning too."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fdbroker policy",
        **_json(POLICY),
    }

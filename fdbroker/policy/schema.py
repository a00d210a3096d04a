"""The shape of a policy file, said once: `load` judges by it, `policy schema` prints it, the reference is made of it.

Runs in: launcher, command line. No attacker controls anything here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fdbroker import limits
from fdbroker.terms import ACCESS_NAMES


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


class Field(NamedTuple):
    """One key of a mapping."""

    kind: Kind
    doc: str
    required: bool = False


class Mapping(NamedTuple):
    """A mapping with these keys and no others. `one_of`: at least one of these must be there."""

    what: str
    fields: dict[str, Field]
    one_of: tuple[str, ...] = ()


class Named(NamedTuple):
    """A mapping whose keys are names of users or groups."""

    what: str
    value: Kind


class Later(NamedTuple):
    """A key of the design that this version does not serve: refused, for an admin would rely on it."""


Kind = Text | Integer | Flag | Choice | Sequence | Mapping | Named | Later

_GLOB = Text("an absolute path below /dev; * ? [..] never match a slash", "^/dev/[^/](.|\n)*$")
_NAME = Text("a name or a number")
_NAMES = Sequence(_NAME)
_ACCESS = Choice(ACCESS_NAMES)

_DEVICE = {
    "path": Field(_GLOB, "The nodes: an absolute path below /dev; `*`, `?` and `[..]` never match a slash.", True),
    "access": Field(_ACCESS, "The most that may be asked for. Default: `ro`."),
    "class": Field(
        Text("the name of a kernel subsystem, as in /sys/class", "^[A-Za-z0-9_-]+$"),
        "The kernel subsystem that the opened node must belong to, e.g. `sound` or `input`.",
    ),
    "device": Field(
        Text("MAJOR:MINOR, each a number or *", r"^(0|[1-9][0-9]{0,7}|\*):(0|[1-9][0-9]{0,7}|\*)$"),
        "The device number that the opened node must have, e.g. `116:*`.",
    ),
    "dangerous": Field(
        Flag(), "Needed for block devices and for nodes that give power over the machine. Default: `false`."
    ),
    "revoke": Field(Later(), "Take the descriptor back when the client disconnects."),
    "require": Field(Later(), "Ask for a password first."),
}
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


def _entry(device: dict[str, Field]) -> Mapping:
    return Mapping(
        "rules",
        {
            "devices": Field(Sequence(Mapping("a device rule", device)), "Device nodes that may be opened."),
            "limits": Field(
                _LIMITS, "Maxima in place of the top ones: of several groups the largest, and a user's own before all."
            ),
            "namespaces": Field(Later(), "Namespaces."),
            "sockets": Field(Later(), "Sockets inside namespaces."),
            "secrets": Field(Later(), "Secrets."),
            "send": Field(Later(), "Topics to send to."),
            "subscribe": Field(Later(), "Topics to subscribe to."),
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
        "groups": Field(
            Named("a group", _entry({**_DEVICE, "membership": _MEMBERSHIP})), "Rules for members of groups."
        ),
        "users": Field(Named("a user", _entry(_DEVICE)), "Rules for users."),
        "everyone": Field(_entry(_DEVICE), "Rules for all who can connect."),
        "deny": Field(
            Sequence(
                Mapping(
                    "a deny rule",
                    {
                        "groups": Field(_NAMES, "Members of these groups."),
                        "users": Field(_NAMES, "These users."),
                        "everyone": Field(Flag(), "All, root too."),
                        "devices": Field(Sequence(_GLOB), "The nodes, as in a device rule.", True),
                    },
                    one_of=("groups", "users", "everyone"),
                )
            ),
            "What nobody of these gets, whatever else allows it: by its path, and by the path that links lead to.",
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
                                },
                            ),
                            "Who asks.",
                            True,
                        ),
                        "open": Field(Text("an absolute path"), "What is asked for.", True),
                        "access": Field(_ACCESS, "Default: `ro`."),
                        "expect": Field(Choice(("allow", "deny")), "What must come out.", True),
                    },
                )
            ),
            "Run by `fdbroker policy test`, at the start, and before a reload takes effect.",
        ),
        "topics": Field(Later(), "Message topics."),
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
        case Named(_, value):
            return {"type": "object", "additionalProperties": _json(value)}
        case Mapping(_, fields, one_of):
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
                shape["anyOf"] = [{"required": [name]} for name in one_of]
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

"""`fdbroker policy check | explain | test | schema`: everything about a policy that needs no running service.

Runs in: an admin's or a user's shell, without any right but to read the policy.
"""

from __future__ import annotations

import json
import os
from datetime import datetime
from typing import Any

import click

from fdbroker import errors
from fdbroker.cli import here, show
from fdbroker.cli.here import own_label
from fdbroker.cli.usable import usable
from fdbroker.cli.words import Group
from fdbroker.errors import PolicyError
from fdbroker.policy import names
from fdbroker.policy.compile import Loaded, load_policy
from fdbroker.policy.compiled import Policy
from fdbroker.policy.decide import well_formed
from fdbroker.policy.explain import Explanation, explain
from fdbroker.policy.files import distrusted
from fdbroker.policy.lint import warnings
from fdbroker.policy.load import in_order
from fdbroker.policy.ranges import known_owner
from fdbroker.policy.rules import all_rules, rule_text
from fdbroker.policy.schema import json_schema
from fdbroker.policy.tried import failed_tests
from fdbroker.terms import ACCESS_NAMES, Device, Namespace, Resource, Subject
from fdbroker.topics import TopicUse
from fdbroker.typed import parse_asked, split_access
from fdbroker.wire.journal import escaped

DEFAULT_POLICY = "/etc/fdbroker/policy.yaml"

_file = click.option("--policy", "policy_file", default=DEFAULT_POLICY, show_default=True, help="The policy file.")
_as_json = click.option("--json", "json_", is_flag=True, help="Print JSON.")


@click.group("policy", cls=Group)
def group() -> None:
    """Check, test and explain a policy, without a running broker."""


def _load_argument(policy_file: str) -> Loaded:
    return load_policy(policy_file, trusted=False, another="an argument names another file")


@group.command()
@click.argument("policy_file", metavar="[FILE]", default=DEFAULT_POLICY)
@_as_json
def check(policy_file: str, json_: bool) -> None:
    """Whether a policy file, and the policy.d beside it, have any error; all of them at once.

    Warnings name rules that are probably not meant, judged by the nodes and users of this machine now, and files that
    `serve` would refuse.
    """
    try:
        loaded = _load_argument(policy_file)
    except PolicyError as error:
        if json_:
            show.as_json([{**finding._asdict(), "severity": "error"} for finding in error.findings])
        else:
            for finding in error.findings:
                click.echo(show.typable(str(finding)), err=True)
        raise click.exceptions.Exit(error.exit_code) from None
    warned = in_order([*distrusted(loaded.files), *warnings(loaded.policy, here.machine(), loaded.idle)], "warnings")
    if json_:
        show.as_json([{**finding._asdict(), "severity": "warning"} for finding in warned])
        return
    for finding in warned:
        click.echo(show.typable(f"warning: {finding}"), err=True)
    for file in loaded.files:
        show.line(show.typable(f"read: {file}"))
    counts = (
        (len([*all_rules(loaded.policy), *loaded.idle]), "rule"),
        (len(loaded.policy.deny), "deny rule"),
        (len(loaded.tests), "test"),
    )
    said = ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts)
    show.line(show.typable(f"{policy_file}: valid, {said}"), "green")


@group.command()
@click.argument("policy_file", metavar="[FILE]", default=DEFAULT_POLICY)
@_as_json
def test(policy_file: str, json_: bool) -> None:
    """Run the tests that stand in the policy. Exits with 1 when one fails, with 78 when the policy has errors."""
    loaded = _load_argument(policy_file)
    failed = failed_tests(loaded)
    if json_:
        show.as_json({"tests": len(loaded.tests), "failed": [finding._asdict() for finding in failed]})
    else:
        for finding in failed:
            click.echo(show.typable(str(finding)), err=True)
        show.line(f"{len(loaded.tests) - len(failed)} passed, {len(failed)} failed", "red" if failed else "green")
    if failed:
        raise click.exceptions.Exit(1)


@group.command("explain")
@click.argument("words", metavar="RESOURCE[:ACCESS]...", nargs=-1, required=True)
@click.option("--user", help="For whom: a name or a uid. Default: you.")
@click.option("--groups", help="All its groups, with commas between. Default: those of the group database.")
@click.option(
    "--label",
    help="The program's MAC label, as the kernel says it. Default: not known with --user, else this program's.",
)
@click.option("--access", type=click.Choice(ACCESS_NAMES), default="ro", show_default=True, help="What is asked for.")
@_file
@_as_json
def explain_(
    words: tuple[str, ...],
    user: str | None,
    groups: str | None,
    label: str | None,
    access: str,
    policy_file: str,
    json_: bool,
) -> None:
    """Why a resource is allowed or denied to a user, what came near, and the smallest change that would allow it.

    The answer for a device also describes the node that is there now, and says whether the broker would refuse that
    node. The answer for a namespace says whether its descriptor would be of use: without --user to this very program,
    else to a program of that user that has no capabilities. If the user cannot connect to the broker, a line says
    why. If a broker answers that uses another policy than these files, such as the one before a change, the last line
    says so.

    Exits with 0 when all are allowed, with 77 when one is denied.
    """
    loaded = load_policy(policy_file, trusted=False)
    subject = _subject(loaded.policy, user, groups, label)
    name = user or str(subject.uid)
    explained = []
    for word in words:
        try:
            resource = parse_asked(*split_access(word, access))
        except ValueError as error:
            raise click.BadParameter(f"{escaped(word)}: {error}", param_hint="RESOURCE") from None
        look = here.look(resource.path) if isinstance(resource, Device) and well_formed(resource) else None
        nodes = here.beside(resource.text) if look and not look.facts else ()
        trees, idle = loaded.documents, loaded.idle
        one = explain(
            loaded.policy, subject, resource, show.typable(name), look, documents=trees, idle=idle, nodes=nodes
        )
        explained.append((resource, one))
    use = [usable(asked, subject, itself=user is None) if said.allowed else None for asked, said in explained]
    cannot = here.connect(subject.uid, subject.gids)
    used = here.in_service()
    other = used is not None and used.digest != loaded.policy.digest
    if json_:
        said = [_plain(*both, subject, why) for both, why in zip(explained, use, strict=True)]
        show.as_json([{**one, "cannotConnect": cannot, "otherPolicyInForce": other} for one in said])
    else:
        for both, why in zip(explained, use, strict=True):
            _print(*both, name, why)
        if cannot:
            show.line(show.typable(f"{name} cannot connect: {cannot}"), "red")
        if used is not None and other:
            at = datetime.fromtimestamp(used.loaded_us // 1_000_000).astimezone().isoformat(" ")
            show.line(
                f"the broker does not use these files as they are now, but a policy that it loaded {at}; if these are"
                " the files of the broker, `fdbroker reload` puts them in force",
                "red",
            )
    if not all(one.allowed for _, one in explained):
        raise click.exceptions.Exit(errors.EX_NOPERM)


def _subject(policy: Policy, user: str | None, groups: str | None, label: str | None) -> Subject:
    uid = os.getuid() if user is None else names.uid_of(user)
    if uid is None:
        raise click.BadParameter(f"there is no user {user!r}", param_hint="--user")
    if user is None and groups is None:
        gid, gids = os.getgid(), frozenset({os.getgid(), *os.getgroups()})
    else:
        gid, gids = names.groups_of(uid)
    if groups is not None:
        found = {word: names.gid_of(word) for word in groups.split(",") if word}
        unknown = [word for word, number in found.items() if number is None]
        if unknown:
            raise click.BadParameter(f"there is no group {unknown[0]!r}", param_hint="--groups")
        gids = frozenset(number for number in found.values() if number is not None)
    if label is None:
        label = own_label() if user is None else ""
    return Subject(uid, gids, gid, 0, "", label, foreign=False, owner=known_owner(policy.owners, uid))


def _plain(resource: Resource | TopicUse, one: Explanation, subject: Subject, why: str | None) -> dict[str, Any]:
    return {
        "resource": resource.text,
        "access": resource.access,
        "uid": subject.uid,
        "gids": sorted(subject.gids),
        "label": subject.label or None,
        "decision": "allow" if one.allowed else "deny",
        "reason": one.reason,
        "rules": [rule.where for rule in one.rules],
        "deniedBy": one.denied_by.where if one.denied_by else None,
        "near": [{"rule": near.rule.where, "missing": near.missing, "change": near.change} for near in one.near],
        "change": one.change or None,
        "now": one.now or None,
        "refused": one.refused,
        **({} if why is None else {"usable": not why, "why": why}),
    }


def _print(resource: Resource | TopicUse, one: Explanation, name: str, why: str | None) -> None:
    verdict = "allow" if one.allowed else "deny"
    what = f"{resource.access} {escaped(resource.text)}"
    show.line(f"{verdict}: {what} for {escaped(name)}", "green" if one.allowed else "red")
    show.line(f"  because {show.typable(one.reason)}")
    for rule in one.rules[1:]:
        show.line(f"  also {rule.where} ({rule.source})")
    for near in one.near:
        show.line(
            f"  near: {near.rule.where} {rule_text(near.rule)} ({near.rule.source}): {show.typable(near.missing)}"
        )
    if one.change:
        show.line(f"  to allow it: {show.typable(one.change)}")
    if one.now:
        show.line(f"  {show.typable(one.now)}", "red" if one.refused else "")
    if why is not None:
        show.line(f"  usable: false: {why}" if why else "  usable: true")
    if why and isinstance(resource, Namespace) and resource.name:
        show.line(f"  a socket inside it needs no right: socket:net:{escaped(resource.name)}, if a rule allows that")


@group.command()
def schema() -> None:
    """Print the policy's JSON Schema, for editors."""
    click.echo(json.dumps(json_schema(), indent=2))

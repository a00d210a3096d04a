"""`fdbroker policy check | explain | test | schema`: everything about a policy that needs no running service.

Runs in: an admin's or a user's shell, without any right but to read the policy.
"""

from __future__ import annotations

import json
import os
from typing import Any

import click

from fdbroker import errors
from fdbroker.cli import show
from fdbroker.cli.usable import usable
from fdbroker.errors import PolicyError
from fdbroker.kernel.sockets import own_label
from fdbroker.policy import names
from fdbroker.policy.compile import Loaded, failed_tests, load_policy
from fdbroker.policy.explain import Explanation, explain
from fdbroker.policy.schema import json_schema
from fdbroker.terms import ACCESS_NAMES, Namespace, Resource, Subject, TopicUse, parse_asked
from fdbroker.wire.journal import escaped

DEFAULT_POLICY = "/etc/fdbroker/policy.yaml"

_file = click.option("--policy", "policy_file", default=DEFAULT_POLICY, show_default=True, help="The policy file.")
_as_json = click.option("--json", "json_", is_flag=True, help="Print JSON.")


@click.group("policy")
def group() -> None:
    """Check, test and explain a policy, without a running broker."""


def _load(policy_file: str) -> Loaded:
    return load_policy(policy_file, trusted=False)


@group.command()
@click.argument("policy_file", metavar="[FILE]", default=DEFAULT_POLICY)
@_as_json
def check(policy_file: str, json_: bool) -> None:
    """Whether a policy file, and the policy.d beside it, have any error; all of them at once."""
    try:
        loaded = _load(policy_file)
    except PolicyError as error:
        if json_:
            show.as_json([finding._asdict() for finding in error.findings])
        else:
            for finding in error.findings:
                click.echo(escaped(str(finding)), err=True)
        raise click.exceptions.Exit(error.exit_code) from None
    rules = len(list(loaded.policy.all_rules()))
    if json_:
        show.as_json([])
    else:
        show.line(f"{policy_file}: valid, {rules} rules, {len(loaded.tests)} tests", "green")


@group.command()
@click.argument("policy_file", metavar="[FILE]", default=DEFAULT_POLICY)
@_as_json
def test(policy_file: str, json_: bool) -> None:
    """Run the tests that stand in the policy."""
    loaded = _load(policy_file)
    failed = failed_tests(loaded)
    if json_:
        show.as_json({"tests": len(loaded.tests), "failed": [finding._asdict() for finding in failed]})
    else:
        for finding in failed:
            click.echo(escaped(str(finding)), err=True)
        show.line(f"{len(loaded.tests) - len(failed)} passed, {len(failed)} failed", "red" if failed else "green")
    if failed:
        raise click.exceptions.Exit(errors.EX_CONFIG)


@group.command("explain")
@click.argument("words", metavar="RESOURCE...", nargs=-1, required=True)
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

    Of a namespace also whether its descriptor would be of use: without --user to this very program, else to a program
    of that user that has no capabilities.

    Exits with 0 when all are allowed, with 77 when one is denied.
    """
    loaded = _load(policy_file)
    subject = _subject(user, groups, label)
    name = user or str(subject.uid)
    explained = []
    for word in words:
        try:
            resource = parse_asked(word, access)
        except ValueError as error:
            raise click.BadParameter(f"{escaped(word)}: {error}", param_hint="RESOURCE") from None
        explained.append((resource, explain(loaded.policy, subject, resource, name)))
    use = [usable(resource, subject, itself=user is None) if one.allowed else None for resource, one in explained]
    if json_:
        show.as_json([_plain(*both, subject, why) for both, why in zip(explained, use, strict=True)])
    else:
        for both, why in zip(explained, use, strict=True):
            _print(*both, name, why)
    if not all(one.allowed for _, one in explained):
        raise click.exceptions.Exit(errors.EX_NOPERM)


def _subject(user: str | None, groups: str | None, label: str | None) -> Subject:
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
    return Subject(uid, gids, gid, 0, "", label, foreign=False)


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
        **({} if why is None else {"usable": not why, "why": why}),
    }


def _print(resource: Resource | TopicUse, one: Explanation, name: str, why: str | None) -> None:
    verdict = "allow" if one.allowed else "deny"
    what = f"{resource.access} {escaped(resource.text)}"
    show.line(f"{verdict}: {what} for {escaped(name)}", "green" if one.allowed else "red")
    show.line(f"  because {escaped(one.reason)}")
    for rule in one.rules[1:]:
        show.line(f"  also {rule.where} ({rule.source})")
    for near in one.near:
        show.line(f"  near: {near.rule.where} {near.rule.text} ({near.rule.source}): {escaped(near.missing)}")
    if one.change:
        show.line(f"  to allow it: {escaped(one.change)}")
    if why is not None:
        show.line(f"  usable: false: {why}" if why else "  usable: true")
    if why and isinstance(resource, Namespace) and resource.name:
        show.line(f"  a socket inside it needs no right: socket:net:{escaped(resource.name)}, if a rule allows that")


@group.command()
def schema() -> None:
    """Print the policy's JSON Schema, for editors."""
    click.echo(json.dumps(json_schema(), indent=2))

"""What may stand on a command line: each option once, and a resource with its access.

Runs in: the command line.
"""

from __future__ import annotations

import click

from fdbroker.terms import ACCESS_NAMES

_ENDINGS = tuple(f":{name}" for name in ACCESS_NAMES)


class Command(click.Command):
    """A command that takes no option twice, unless the option is meant for several: the last one would win unseen."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As in click. Raises UsageError for an option that is there twice."""
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        for one in order:
            if isinstance(one, click.Option) and not one.multiple and order.count(one) > 1:
                raise click.UsageError(f"{one.opts[0]} is given more than once", ctx)
        return super().parse_args(ctx, args)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


def split_access(word: str, access: str) -> tuple[str, str]:
    """RESOURCE[:ACCESS] as the resource and its access, which is `access` where the word says none.

    Only a path has an access, and a path may have colons: only a final :ro, :wo or :rw is one. A path that ends so
    itself must be written with its access.
    """
    if word.startswith("/") and word.endswith(_ENDINGS):
        return word[:-3], word[-2:]
    return word, access


def join_access(resource: str, access: str, default: str) -> str:
    """The word that `split_access` with `default` takes apart again; without the access where none is needed."""
    if resource.startswith("/") and (access != default or resource.endswith(_ENDINGS)):
        return f"{resource}:{access}"
    return resource

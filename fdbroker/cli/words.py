"""What may stand on a command line: each option once.

Runs in: the command line.
"""

from __future__ import annotations

import click


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

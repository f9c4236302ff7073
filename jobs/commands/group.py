"""Groups of commands: help without a command, and the nearest command for a wrong one."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from jobs.commands.output import print_text
from jobs.spec.nearest import did_you_mean


class CommandGroup(TyperGroup):
    """A group of commands. Without a command it prints its help, which is no error."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Return the words of the command. Print the help if there are none."""
        if not args and not ctx.resilient_parsing:
            print_text(ctx.get_help())
            raise typer.Exit
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return name, command and its words. A name that is not known is a wrong command line."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            if name.endswith((".yaml", ".yml")):
                fix = f"did you mean `rzen run {name}`?"
            else:
                fix = did_you_mean(name, [known for known in self.commands if not self.commands[known].hidden])
            ctx.fail(f"no such command {name!r}; {fix}")
        return super().resolve_command(ctx, args)

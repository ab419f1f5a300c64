"""How arguments may be typed: abbreviated as for MMS, and with several values after one `--models`."""

from __future__ import annotations

from collections.abc import Sequence

import click

# MMS's own flags: an abbreviation that fits one of them alone means it, whatever else begins like it.
_MMS_FLAGS = (
    "--start",
    "--stop",
    "--foreground",
    "--mms-config",
    "--model-store",
    "--models",
    "--log-config",
    "--help",
)


class Command(click.Command):
    """A command whose arguments are read so. The context's meta keeps them as `arguments`, written out."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments once they are written out."""
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        flags = [flag for option in options if not option.hidden for flag in option.opts]
        ctx.meta["arguments"] = expand_flags(args, flags)
        return super().parse_args(ctx, spread_models(ctx.meta["arguments"]))


def expand_flags(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Write out abbreviated long flags, as Python's argparse does for MMS.

    Raises:
        click.UsageError: an abbreviation fits several flags.
    """
    expanded = []
    for argument in arguments:
        typed, equals, value = argument.partition("=")
        expanded.append((_whole_flag(typed, flags) if len(typed) > 2 else typed) + equals + value)
    return expanded


def _whole_flag(typed: str, flags: Sequence[str]) -> str:
    if not typed.startswith("--") or typed in flags:
        return typed
    for group in (_MMS_FLAGS, flags):
        fitting = [flag for flag in group if flag.startswith(typed)]
        if len(fitting) > 1:
            raise click.UsageError(f"ambiguous option: {typed} could match {', '.join(fitting)}")
        if fitting:
            return fitting[0]
    return typed


def spread_models(arguments: Sequence[str]) -> list[str]:
    """Repeat `--models` before each of its values, as users type several after one flag.

    Raises:
        click.UsageError: the flag has no value.
    """
    spread: list[str] = []
    in_models = empty = False
    for argument in [*arguments, "--"]:
        if argument.startswith("-"):
            if empty:
                raise click.UsageError("Option '--models' requires an argument.")
            empty = argument == "--models"
            in_models = empty or argument.startswith("--models=")
        elif in_models:
            spread.append("--models")
            empty = False
        if argument != "--models":
            spread.append(argument)
    return spread[:-1]

"""The flags of plan and compile: those that decide which programs there are, and for what."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from absl import flags

import xlinfer.flags
from xlinfer.commands.sizing import Wish, plan_for
from xlinfer.deployment import Sizes
from xlinfer.flags import ALIASES, UsageError, define_program_flags
from xlinfer.setup import Setup


def define(values: flags.FlagValues) -> None:
    text = partial(flags.DEFINE_string, flag_values=values)
    text("model", None, "Folder with a config.json, or that file. Weights are not read.")
    text("target", None, "What it is to run on: v6e-8, h200, cpu, ...; local: what is here.")
    flags.DEFINE_integer(
        "tensor_parallel_size",
        None,
        "Devices that share each layer. Default: what plan chooses; the others are replicas.",
        1,
        flag_values=values,
    )
    define_program_flags(values)
    flags.DEFINE_bool("help", False, "Show these flags.", short_name="h", flag_values=values)


def setup_of(values: flags.FlagValues) -> Setup:
    """What `python -m xlinfer.plan` plans for these flags. Raises UsageError for flags that do not
    go together, and what `sizing.plan_for` does."""
    return plan_for(wish_of(values)).setup


def wish_of(values: flags.FlagValues) -> Wish:
    valued: dict[str, Any] = {name: values[name].value for name in values}
    sizes = {name: valued[name] for name in Sizes.__dataclass_fields__ if name in valued}
    others = {name: valued[name] for name in Wish.__dataclass_fields__ if name != "sizes"}
    return Wish(sizes=Sizes(**sizes), **others)


def parse(values: flags.FlagValues, argv: Sequence[str], *, required: Sequence[str] = ()) -> None:
    """Fill `values` from `argv`, program name first; a lone argument is the model. Raises
    UsageError."""
    rest = xlinfer.flags.read(values, argv)
    if values["help"].value:
        return
    if len(rest) > 1 or (rest and values["model"].value is not None):
        raise UsageError(f"unexpected argument {rest[-1]!r}; write --flag=value")
    if rest:
        values["model"].value = rest[0]
    for name in required:
        if values[name].value is None:
            raise UsageError(f"--{name} is required")


def help_text(values: flags.FlagValues) -> str:
    return xlinfer.flags.help_text(values, {*ALIASES, "h"})

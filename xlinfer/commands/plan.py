"""python -m xlinfer.plan --model=DIR --target=v6e-8: whether and how a model runs there.

Reads config.json alone; needs neither weights nor the hardware nor a compiler for it. What does
not fit is said by how much, with changes that would make it fit: then the exit code is 1, as for
a model or target that is not known, and 2 for a wrong command line.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from xlinfer.commands.changes import changes_for
from xlinfer.commands.flags import define, help_text, parse, wish_of
from xlinfer.commands.plan_report import report
from xlinfer.commands.plan_text import as_text
from xlinfer.commands.sizing import CONTEXT, plan_for
from xlinfer.flags import UsageError, show

FAILED, MISUSED = 1, 2  # exit codes


def main(argv: Sequence[str]) -> int:
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_integer(
        "context", CONTEXT, "Tokens at which each sequence stands in the rates of decode.",
        lower_bound=1, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=values)
    flags.DEFINE_string(
        "plot", None, "PNG file to write: memory, and decode against batch.", flag_values=values
    )
    try:
        parse(values, argv, required=("model", "target"))
        if values["help"].value:
            show(f"{__doc__}\n{help_text(values)}")
            return 0
        wish = wish_of(values)
        context, picture = int(values.context), values.plot
        draw = _drawing(picture)
    except UsageError as error:
        print(f"xlinfer.plan: {error}", file=sys.stderr)
        return MISUSED
    try:
        if wish.target.strip() != "local":
            jax.config.update("jax_platforms", "cpu")  # a chip that is here is left to others
        planned = plan_for(wish)
        changes = [] if planned.fit.fits else changes_for(wish, planned)
        made = report(planned, changes, wish, context=context)
        show(json.dumps(made, indent=2) if values["json"].value else as_text(made))
        if draw is not None:
            draw(planned, made, Path(picture).expanduser())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"xlinfer.plan: {error}", file=sys.stderr)
        return FAILED
    return 0 if planned.fit.fits else FAILED


def _drawing(file: str | None):
    """The function that draws `file`; None where none is asked for. Raises UsageError, early."""
    if file is None:
        return None
    path = Path(file).expanduser()
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UsageError(f"--plot={file} must be a .png file in a folder that exists")
    try:
        from xlinfer.commands.plot import draw
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--plot needs {error.name}: pip install 'xlinfer[plot]', or leave it out"
        ) from None
    return draw

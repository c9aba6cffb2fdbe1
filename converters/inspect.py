"""python -m converters.inspect PATH: what a checkpoint is, layer by layer, without loading it.

PATH is a folder with a config.json and safetensors, or a GGUF. Headers alone are read. What cannot
be loaded is shown as far as it is understood, with the reason; then the exit code is 1, and 2 for
a wrong command line.
"""

import json
import sys
from collections.abc import Sequence

from absl import flags

from converters.errors import CheckpointError
from converters.report import report
from converters.report_text import as_text
from xlinfer.flags import UsageError, define_text_only, help_text, read, show

FAILED, MISUSED = 1, 2  # exit codes


def main(argv: Sequence[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=values)
    define_text_only(values)
    flags.DEFINE_bool("help", False, "Show these flags.", short_name="h", flag_values=values)
    try:
        rest = read(values, argv)
        if not values.help and len(rest) != 1:
            raise UsageError("name one folder or GGUF")
    except UsageError as error:
        print(f"converters.inspect: {error}", file=sys.stderr)
        return MISUSED
    if values.help:
        show(f"{__doc__}\n{help_text(values, {'h'})}")
        return 0
    try:
        made = report(rest[0], text_only=values.text_only)
    except (CheckpointError, OSError) as error:
        print(f"converters.inspect: {error}", file=sys.stderr)
        return FAILED
    show(json.dumps(made, indent=1) if values["json"].value else as_text(made))
    if made["refused"] is not None:
        print(f"converters.inspect: {made['refused']}", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""python -m xlinfer.eval: lm-evaluation-harness's own command, with the model `xlinfer`.

python -m xlinfer.eval --model_args pretrained=FOLDER --tasks hellaswag
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """`argv` as the harness's, the program's name first. Exits with 1 where the model or a task
    cannot be had."""
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("error: lm-evaluation-harness is not installed: pip install 'xlinfer[eval]'")
    from lm_eval.__main__ import cli_evaluate

    importlib.import_module("xlinfer.score.evaluation")  # registers the model
    sys.argv = with_model(argv)
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def with_model(argv: Sequence[str]) -> list[str]:
    """`argv` naming the model where it runs one and names none."""
    program, *rest = argv
    commands, names = ("ls", "validate", "-h", "--help"), ("--model", "-M")
    if not rest or rest[0] in commands or any(a.split("=")[0] in names for a in rest):
        return [program, *rest]
    given = rest[1:] if rest[0] == "run" else rest
    return [program, "run", "--model", "xlinfer", *given]


if __name__ == "__main__":
    main(sys.argv)

"""python -m xlinfer.convert --model=SRC --output=DIR: a checkpoint, once, into Orbax.

The weights keep the checkpoint's dtype unless --dtype says otherwise. It runs on the CPU, with
host memory for the whole model.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from converters import open_checkpoint
from xlinfer.converted import Manifest, refuse_output, save_converted
from xlinfer.flags import UsageError, define_text_only, help_text, read, show
from xlinfer.mesh import make_mesh
from xlinfer.progress import show_progress
from xlinfer.weights import DTYPES, load_model, stored_dtype

FAILED, MISUSED = 1, 2  # exit codes


def convert(model: str, output: str, dtype: str, *, text_only: bool) -> Manifest:
    """Write the checkpoint `model`, converted, into the new directory `output`."""
    checkpoint = open_checkpoint(model, text_only=text_only)
    refuse_output(checkpoint, Path(output).expanduser())
    kept = stored_dtype(checkpoint) if dtype == "auto" else dtype
    with show_progress() as progress:
        cpu = make_mesh(1, jax.devices("cpu"))
        loaded = load_model(
            checkpoint.path, dtype=kept, mesh=cpu, text_only=text_only, progress=progress
        )
    return save_converted(loaded, checkpoint.path, output, text_only=text_only)


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The flags of `argv`, program name first. Raises UsageError for wrong ones."""
    values = flags.FlagValues()
    flags.DEFINE_string("model", None, "Folder of the checkpoint to read.", flag_values=values)
    flags.DEFINE_string("output", None, "Directory to write; must not exist.", flag_values=values)
    flags.DEFINE_enum(
        "dtype", "auto", ["auto", *DTYPES], "auto: the checkpoint's own.", flag_values=values
    )
    define_text_only(values)
    flags.DEFINE_bool("help", False, "Show these flags.", short_name="h", flag_values=values)
    extra = read(values, argv)
    if extra:
        raise UsageError(f"unexpected argument {extra[0]!r}; write --model=... --output=...")
    missing = [name for name in ("model", "output") if not values[name].value]
    if missing and not values.help:
        raise UsageError(f"--{missing[0]} is required")
    return values


def main(argv: Sequence[str]) -> int:
    try:
        values = parse(argv)
    except UsageError as error:
        print(f"xlinfer.convert: {error}", file=sys.stderr)
        return MISUSED
    if values.help:
        show(f"{__doc__}\n{help_text(values, {'h'})}")
        return 0
    output = values.output
    try:
        written = convert(values.model, output, values.dtype, text_only=values.text_only)
    except (ValueError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        print(f"xlinfer.convert: {first}", file=sys.stderr)
        return FAILED
    sizes = [math.prod(p["shape"]) for p in written.parameters.values()]
    size = sum(sizes) * DTYPES[written.dtype].itemsize
    print(f"{output}: {sum(sizes):,} parameters, {size:,} bytes, {written.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

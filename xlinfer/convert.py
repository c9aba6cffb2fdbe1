"""python -m xlinfer.convert --model=SRC --output=DIR: a checkpoint, once, into Orbax, which loads
faster; or with --to=hf into safetensors that transformers loads, from a converted one too.

The weights keep the checkpoint's dtype unless --dtype says otherwise. It runs on the CPU. Orbax
takes host memory for the whole model, --to=hf for its largest parameter. --dry_run prints what
would be made of what, and reads headers alone.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import flags

from converters import TensorInfo, open_checkpoint
from xlinfer.convert_plan import plan_hf, plan_orbax
from xlinfer.converted import Manifest, refuse_converted, refuse_output, save_converted
from xlinfer.export import export
from xlinfer.flags import UsageError, define_revision, define_text_only, help_text, read, show
from xlinfer.hub import fetch
from xlinfer.mesh import make_mesh
from xlinfer.progress import show_progress
from xlinfer.weights import DTYPES, load_model, stored_dtype

FAILED, MISUSED = 1, 2  # exit codes


def convert(model: str | Path, output: str, dtype: str, *, text_only: bool) -> Manifest:
    """Write the checkpoint `model`, converted, into the new directory `output`."""
    checkpoint = open_checkpoint(model, text_only=text_only)
    refuse_converted(checkpoint)
    refuse_output(checkpoint, Path(output).expanduser())
    kept = stored_dtype(checkpoint) if dtype == "auto" else dtype
    with show_progress() as progress:
        cpu = make_mesh(1, jax.devices("cpu"))
        loaded = load_model(
            checkpoint.path, dtype=kept, mesh=cpu, text_only=text_only, progress=progress
        )
    return save_converted(loaded, checkpoint.path, output, text_only=text_only)


def write_hf(
    model: str | Path, output: str, dtype: str, *, text_only: bool
) -> dict[str, TensorInfo]:
    """Write the checkpoint `model`, or what was converted of it, as safetensors into `output`."""
    checkpoint = open_checkpoint(model, text_only=text_only)
    with show_progress() as progress:
        directory = Path(output).expanduser().absolute()
        return export(checkpoint, directory, DTYPES.get(dtype), progress)


def plan(model: str | Path, output: str, dtype: str, *, to: str, text_only: bool) -> Iterator[str]:
    """What either would do, line by line."""
    checkpoint = open_checkpoint(model, text_only=text_only)
    directory = Path(output).expanduser()
    refuse_output(checkpoint, directory)
    if to == "hf":
        return plan_hf(checkpoint, directory, DTYPES.get(dtype))
    refuse_converted(checkpoint)
    return plan_orbax(checkpoint, DTYPES.get(dtype) or stored_dtype(checkpoint))


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The flags of `argv`, program name first. Raises UsageError for wrong ones."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "model", None, "Folder of the checkpoint to read, or ORG/NAME of the hub.",
        flag_values=values,
    )  # fmt: skip
    define_revision(values)
    flags.DEFINE_string("output", None, "Directory to write; must not exist.", flag_values=values)
    flags.DEFINE_enum(
        "dtype", "auto", ["auto", *DTYPES], "auto: the checkpoint's own.", flag_values=values
    )
    flags.DEFINE_enum(
        "to", "orbax", ["orbax", "hf"],
        "What to write. hf: safetensors, config.json and tokenizer, as save_pretrained does.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "dry_run", False, "Print what would be made of what; write nothing.", flag_values=values
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
    output, text_only = values.output, values.text_only
    try:
        with show_progress() as progress:
            model = fetch(values.model, values.revision, progress)
        if values.dry_run:
            made = plan(model, output, values.dtype, to=values.to, text_only=text_only)
            show("\n".join(made))
            return 0
        if values.to == "hf":
            tensors = write_hf(model, output, values.dtype, text_only=text_only).values()
            show(
                f"{output}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors):,} bytes, "
                + ", ".join(sorted({t.dtype.name for t in tensors}))
            )
            return 0
        written = convert(model, output, values.dtype, text_only=text_only)
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

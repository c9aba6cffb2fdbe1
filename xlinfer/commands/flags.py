"""The flags that decide which programs there are, for every command that takes them.

Their names and words are the server's (xlinfer.serve.flags).
"""

import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any

from absl import flags

from xlinfer.commands.sizing import Wish, plan_for
from xlinfer.deployment import Sizes
from xlinfer.setup import Setup

# vLLM's name -> ours.
ALIASES = {"block_size": "page_size", "gpu_memory_utilization": "hbm_utilization"}


class UsageError(ValueError):
    """The command line is wrong; the message says how."""


def define(values: flags.FlagValues) -> None:
    text = partial(flags.DEFINE_string, flag_values=values)
    one_of = partial(flags.DEFINE_enum, flag_values=values)
    whole = partial(flags.DEFINE_integer, flag_values=values)
    text("model", None, "Folder with a config.json, or that file. Weights are not read.")
    text("target", None, "What it is to run on: v6e-8, h200, cpu, ...; local: what is here.")
    whole(
        "tensor_parallel_size",
        None,
        "Devices that share each layer. Default: what plan chooses; the others are replicas.",
        1,
    )
    one_of(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16", "float16"],
        "Type of weights and activations. auto: the checkpoint's; float32 on CPU.",
    )
    one_of(
        "quantization",
        None,
        ["int4", "int8", "fp8"],
        "Keep the layers' weights in fewer bits. int4: groups of 128 inputs share a scale; int8: "
        "output channels; fp8: blocks of 128 x 128, activations too. Default: as they are.",
    )
    one_of(
        "matmul_impl",
        None,
        ["reference", "xla", "mosaic_gpu", "mosaic_tpu"],
        "How quantized weights are multiplied. Default: what is best for the weights and device.",
    )
    whole("max_model_len", None, "Tokens of one sequence, prompt and answer.", 1)
    whole("max_num_seqs", None, "Sequences that run at once.", 1)
    whole("max_num_batched_tokens", None, "Tokens of one engine step.", 1)
    whole("page_size", None, "Tokens of one KV cache page. Also --block_size.", 1)
    whole("num_pages", None, "KV cache pages. Default: as many as the memory holds.", 1)
    flags.DEFINE_float(
        "hbm_utilization",
        0.9,
        "Part of the device's memory to use. Also --gpu_memory_utilization.",
        0.01,
        1.0,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "deterministic", False, "Equal answers under any load, for some speed.", flag_values=values
    )
    one_of(
        "attention_impl",
        None,
        ["reference", "mosaic_gpu", "mosaic_tpu"],
        "How attention is computed. Default: the device's kernel.",
    )
    whole("max_logprobs", 20, "Most logprobs a request may ask for.", 0)
    flags.DEFINE_bool("help", False, "Show these flags.", short_name="h", flag_values=values)
    for alias, name in ALIASES.items():
        flags.DEFINE_alias(alias, name, flag_values=values)


def setup_of(values: flags.FlagValues) -> Setup:
    """What `python -m xlinfer.plan` plans for these flags. Raises UsageError for flags that do not
    go together, and what `sizing.plan_for` does."""
    return plan_for(wish_of(values)).setup


def wish_of(values: flags.FlagValues) -> Wish:
    """Raises UsageError."""
    if values.matmul_impl is not None and values.quantization is None:
        raise UsageError(
            f"--matmul_impl={values.matmul_impl} chooses how quantized weights are multiplied, "
            "and there are none: name a --quantization too, or leave it out"
        )
    valued: dict[str, Any] = {name: values[name].value for name in values}
    sizes = {name: valued[name] for name in Sizes.__dataclass_fields__ if name in valued}
    others = {name: valued[name] for name in Wish.__dataclass_fields__ if name != "sizes"}
    return Wish(sizes=Sizes(**sizes), **others)


def parse(values: flags.FlagValues, argv: Sequence[str], *, required: Sequence[str] = ()) -> None:
    """Fill `values` from `argv`, program name first; a lone argument is the model. Dashes and
    underscores are the same. Raises UsageError."""
    try:
        arguments = values.read_flags_from_files(list(argv[1:]), force_gnu=False)
        rest = values([argv[0], *map(_underscored, arguments)])[1:]
    except (flags.Error, OSError) as error:
        raise UsageError(str(error)) from None
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
    lines = ["Flags:"]
    for name in sorted(set(values) - ALIASES.keys() - {"h"}):
        flag = values[name]
        default = f" (default: {flag.default})" if flag.default not in (None, False, "") else ""
        lines.append(f"  --[no]{name}" if flag.boolean else f"  --{name}")
        lines += textwrap.wrap(
            f"{flag.help}{default}", 98, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


def _underscored(argument: str) -> str:
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"

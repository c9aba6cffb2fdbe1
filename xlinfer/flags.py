"""What every command line has in common: the flags that decide which programs there are, under
vLLM's names, and how flags are read and shown. absl alone: the server reads its flags before it
imports jax.
"""

import os
import sys
import textwrap
from collections.abc import Collection, Sequence
from functools import partial

from absl import flags

# vLLM's name -> ours.
ALIASES = {"block_size": "page_size", "gpu_memory_utilization": "hbm_utilization"}
# vLLM's switches for what is not switched here, and what to write instead.
REFUSED = {
    "enable_expert_parallel": "experts have devices of their own as far as they divide: leave it "
    "out, or say --expert_parallel_size",
    "no_enable_expert_parallel": "write --expert_parallel_size=1",
}


class UsageError(ValueError):
    """The command line is wrong; the message says how."""


def define_program_flags(values: flags.FlagValues) -> None:
    one_of = partial(flags.DEFINE_enum, flag_values=values)
    whole = partial(flags.DEFINE_integer, flag_values=values)
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
    one_of(
        "attention_impl",
        None,
        ["reference", "mosaic_gpu", "mosaic_tpu"],
        "How attention is computed. Default: the device's kernel.",
    )
    one_of(
        "kv_cache_dtype",
        "auto",
        ["auto", "fp8", "fp8_e4m3", "bfloat16", "float16", "float32"],
        "Type of the KV cache: that of the activations, or fp8 (e4m3), half of 16 bits. auto: the "
        "activations', or fp8 where the checkpoint's quantization_config says so.",
    )
    define_text_only(values)
    whole(
        "expert_parallel_size",
        None,
        "Of the devices that share each layer, those that have experts of their own; the others "
        "share these. Must divide tensor_parallel_size. Default: the most that divides it and the "
        "experts, which is what vLLM's --enable_expert_parallel asks for; 1 splits every expert "
        "over all devices.",
        1,
    )
    whole(
        "sequence_parallel_size",
        1,
        "Parts that the tokens of each step are split into, for long prompts. Takes so many times "
        "the devices of tensor_parallel_size, with all weights and the KV cache in each part.",
        1,
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
    whole("max_logprobs", 20, "Most logprobs a request may ask for.", 0)
    for alias, name in ALIASES.items():
        flags.DEFINE_alias(alias, name, flag_values=values)


def define_text_only(values: flags.FlagValues) -> None:
    about = "Of a model that reads images beside text, take its text model alone."
    flags.DEFINE_bool("text_only", False, about, flag_values=values)


def define_revision(values: flags.FlagValues) -> None:
    about = "Branch, tag or commit of a --model that is a repository of the hub. Default: main's."
    flags.DEFINE_string("revision", None, about, flag_values=values)


def read(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Fill `values` from `argv`, program name first, and from what --flagfile names; what is no
    flag. Dashes and underscores are the same. Raises UsageError."""
    try:
        arguments = values.read_flags_from_files(list(argv[1:]), force_gnu=False)
        return values([argv[0], *(_underscored(argument, values) for argument in arguments)])[1:]
    except (flags.Error, OSError) as error:
        raise UsageError(str(error)) from None


def show(text: str) -> None:
    """Print it. A reader who has seen enough (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text(values: flags.FlagValues, hidden: Collection[str]) -> str:
    """Every flag but the `hidden`, by name."""
    lines = ["Flags:"]
    for name in sorted(set(values) - set(hidden)):
        flag = values[name]
        silent = flag.default is False or flag.default in (None, "", [])
        default = "" if silent else f" (default: {flag.default})"
        lines.append(f"  --[no]{name}" if flag.boolean else f"  --{name}")
        about = flag.help.partition(";\n    repeat this option")[0]
        lines += textwrap.wrap(
            f"{about}{default}", 98, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


def _underscored(argument: str, values: flags.FlagValues) -> str:
    """--max-model-len=1 as --max_model_len=1, and vLLM's --no-flag as absl's --noflag."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    if name in REFUSED:
        raise UsageError(f"there is no --{name}: {REFUSED[name]}")
    if name.startswith("no_") and name[3:] in values and values[name[3:]].boolean:
        name = "no" + name[3:]
    return f"--{name}{equals}{value}"

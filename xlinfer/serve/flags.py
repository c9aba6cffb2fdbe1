"""The server's command line: vLLM's flag names. Dashes and underscores are the same."""

import textwrap
from collections.abc import Sequence
from functools import partial

from absl import flags

import xlinfer

# vLLM's name -> ours.
ALIASES = {
    "block_size": "page_size",
    "gpu_memory_utilization": "hbm_utilization",
    "max_num_queued_reqs": "max_queued_requests",
    "max_num_queued_tokens": "max_queued_tokens",
    "shutdown_timeout": "drain_timeout_s",
}
USAGE = """\
python -m xlinfer.serve [MODEL] [--flag=value ...]

Serves a model through the OpenAI API. Without MODEL, the demo model.
Flags may also stand in a file, one a line: --flagfile=FILE. Dashes and underscores are the same.
"""


class UsageError(ValueError):
    """The command line is wrong; the message says how."""


def define() -> flags.FlagValues:
    values = flags.FlagValues()
    text = partial(flags.DEFINE_string, flag_values=values)
    names = partial(flags.DEFINE_list, flag_values=values)
    strings = partial(flags.DEFINE_multi_string, flag_values=values)
    one_of = partial(flags.DEFINE_enum, flag_values=values)
    switch = partial(flags.DEFINE_bool, flag_values=values)
    whole = partial(flags.DEFINE_integer, flag_values=values)
    number = partial(flags.DEFINE_float, flag_values=values)
    text("model", None, "Checkpoint folder (safetensors). Default: the demo model.")
    text("tokenizer", None, "Folder to take the tokenizer from. Default: the model's.")
    text("chat_template", None, "Jinja file to use instead of the model's chat template.")
    names(
        "served_model_name",
        [],
        "Names that requests may call the model; answers carry the first. Default: the folder's.",
    )
    text("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all networks.")
    whole("port", 8000, "Port to listen on; 0 picks a free one.", 0, 65535)
    strings(
        "api_key",
        [],
        "Key that requests must bear; repeat it or separate keys by commas. Also read from the "
        "environment variable XLINFER_API_KEY, where other users do not see it. Guards every "
        "route but /live and /ready.",
    )
    one_of(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16", "float16"],
        "Type of weights and activations. auto: the checkpoint's; float32 on CPU.",
    )
    whole("max_model_len", None, "Tokens of one sequence, prompt and answer.", 1)
    whole("max_num_seqs", None, "Sequences that run at once.", 1)
    whole("max_num_batched_tokens", None, "Tokens of one engine step.", 1)
    whole("page_size", None, "Tokens of one KV cache page. Also --block_size.", 1)
    whole("num_pages", None, "KV cache pages. Default: as many as the memory holds.", 1)
    number(
        "hbm_utilization",
        0.9,
        "Part of the device's memory to use. Also --gpu_memory_utilization.",
        0.01,
        1.0,
    )
    one_of(
        "quantization",
        None,
        ["int4", "int8", "fp8"],
        "Keep the layers' weights in fewer bits. int4: groups of 128 inputs share a scale; int8: "
        "output channels; fp8: blocks of 128 x 128, activations too. Default: as they are.",
    )
    one_of(
        "attention_impl",
        None,
        ["reference", "mosaic_gpu", "mosaic_tpu"],
        "How attention is computed. Default: the device's kernel.",
    )
    one_of(
        "matmul_impl",
        None,
        ["reference", "xla", "mosaic_gpu", "mosaic_tpu"],
        "How quantized weights are multiplied. Default: what is best for the weights and device.",
    )
    whole("tensor_parallel_size", 1, "Devices that share each layer.", 1)
    switch("enable_prefix_caching", True, "Reuse the KV of equal prefixes.")
    switch("deterministic", False, "Equal answers under any load, for some speed.")
    whole("seed", 0, "Seed of sampling for requests without one.")
    one_of(
        "generation_config",
        "auto",
        ["auto", "none"],
        "Defaults of requests: auto takes the model's generation_config.json, none the API's.",
    )
    whole("max_logprobs", 20, "Most logprobs a request may ask for.", 0)
    whole("max_queued_requests", 1024, "Sequences that may wait; more are answered 429.", 0)
    whole("max_queued_tokens", 4 * 2**20, "Prompt tokens that may wait.", 0)
    whole("max_request_bytes", 32 * 2**20, "Largest request body.", 1)
    number("drain_timeout_s", 30.0, "Seconds that answers have to finish on SIGTERM.", 0.0)
    switch("strict_fields", False, "Refuse request fields that no API defines.")
    text(
        "compile_cache_dir",
        xlinfer.COMPILE_CACHE_DIR,
        "Where compiled programs are kept for the next start; empty: nowhere.",
    )
    text(
        "artifact",
        None,
        "What python -m xlinfer.compile wrote: start without tracing or compiling. With its own "
        "weights it needs no model beside it.",
    )
    switch("allow_recompile", False, "Compile anew where the artifact does not fit.")
    one_of("log_format", "text", ["text", "json"], "How log lines are written.")
    for alias, name in ALIASES.items():
        flags.DEFINE_alias(alias, name, flag_values=values)
    return values


def parse(argv: Sequence[str]) -> flags.FlagValues | None:
    """Flags from `argv` (program name first); None when it asks for help. Raises UsageError."""
    values = define()
    try:
        arguments = values.read_flags_from_files(list(argv[1:]), force_gnu=False)
        arguments = [_underscored(argument, values) for argument in arguments]
        if {"--help", "--helpfull", "-h", "-help"} & set(arguments):
            return None
        rest = values([argv[0], *arguments])[1:]
    except flags.Error as error:
        raise UsageError(str(error)) from None
    if len(rest) > 1 or (rest and values.model is not None):
        raise UsageError(f"Only one model can be served, got also: {' '.join(rest)}")
    if rest:
        values.model = rest[0]
    return values


def help_text() -> str:
    values = define()
    lines = [USAGE, "Flags:"]
    for name in sorted(name for name in values if name not in ALIASES):
        flag = values[name]
        default = f" (default: {flag.default})" if flag.default not in (None, [], "") else ""
        shown = f"--[no]{name}" if flag.boolean else f"--{name}"
        lines.append(f"  {shown}")
        about = flag.help.partition(";    repeat this option")[0]
        lines += _wrapped(f"{about}{default}")
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 98, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _underscored(argument: str, values: flags.FlagValues) -> str:
    """--max-model-len=1 as --max_model_len=1, and vLLM's --no-flag as absl's --noflag."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    if name.startswith("no_") and name[3:] in values and values[name[3:]].boolean:
        name = "no" + name[3:]
    return f"--{name}{equals}{value}"

"""The server's command line: vLLM's flag names. Dashes and underscores are the same."""

import os
from collections.abc import Sequence
from functools import partial

from absl import flags

import xlinfer
import xlinfer.flags
from xlinfer.flags import UsageError, define_program_flags, define_revision
from xlinfer.serve.build import DEMO_MODEL, EngineOptions

# vLLM's name -> ours, of those that the server alone has.
ALIASES = {
    "max_num_queued_reqs": "max_queued_requests",
    "max_num_queued_tokens": "max_queued_tokens",
    "shutdown_timeout": "drain_timeout_s",
}
USAGE = """\
python -m xlinfer.serve [MODEL] [--flag=value ...]

Serves a model through the OpenAI API. Without MODEL, the demo model.
Flags may also stand in a file, one a line: --flagfile=FILE. Dashes and underscores are the same.
"""


def define_engine_flags(values: flags.FlagValues) -> None:
    """The fields of EngineOptions: of every command that runs a model."""
    text = partial(flags.DEFINE_string, flag_values=values)
    switch = partial(flags.DEFINE_bool, flag_values=values)
    whole = partial(flags.DEFINE_integer, flag_values=values)
    text("model", None, "Checkpoint folder, GGUF, or ORG/NAME of the hub. Default: the demo model.")
    define_revision(values)
    text("tokenizer", None, "Folder to take the tokenizer from. Default: the model's.")
    text("chat_template", None, "Jinja file to use instead of the model's chat template.")
    define_program_flags(values)
    whole("tensor_parallel_size", 1, "Devices that share each layer.", 1)
    whole(
        "data_parallel_size",
        1,
        "Replicas of the model, each on so many devices; a request goes to the one that has least "
        "to compute for it.",
        1,
    )
    switch("enable_prefix_caching", True, "Reuse the KV of equal prefixes.")
    whole("seed", 0, "Seed of sampling for requests without one.")
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


def engine_options(values: flags.FlagValues) -> EngineOptions:
    same = EngineOptions.__dataclass_fields__.keys() - {"model", "compile_cache_dir", "artifact"}
    cache = os.path.expanduser(values.compile_cache_dir) if values.compile_cache_dir else None
    return EngineOptions(
        model=values.model or (None if values.artifact else str(DEMO_MODEL)),
        compile_cache_dir=cache,
        artifact=values.artifact,
        **{name: getattr(values, name) for name in same},
    )


def define() -> flags.FlagValues:
    values = flags.FlagValues()
    names = partial(flags.DEFINE_list, flag_values=values)
    text = partial(flags.DEFINE_string, flag_values=values)
    strings = partial(flags.DEFINE_multi_string, flag_values=values)
    one_of = partial(flags.DEFINE_enum, flag_values=values)
    switch = partial(flags.DEFINE_bool, flag_values=values)
    whole = partial(flags.DEFINE_integer, flag_values=values)
    number = partial(flags.DEFINE_float, flag_values=values)
    define_engine_flags(values)
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
        "generation_config",
        "auto",
        ["auto", "none"],
        "Defaults of requests: auto takes the model's generation_config.json, none the API's.",
    )
    whole("max_queued_requests", 1024, "Sequences that may wait; more are answered 429.", 0)
    whole("max_queued_tokens", 4 * 2**20, "Prompt tokens that may wait.", 0)
    whole("max_request_bytes", 32 * 2**20, "Largest request body.", 1)
    number("drain_timeout_s", 30.0, "Seconds that answers have to finish on SIGTERM.", 0.0)
    switch("strict_fields", False, "Refuse request fields that no API defines.")
    _define_hosts(values)
    one_of("log_format", "text", ["text", "json"], "How log lines are written.")
    for alias, name in ALIASES.items():
        flags.DEFINE_alias(alias, name, flag_values=values)
    return values


def _define_hosts(values: flags.FlagValues) -> None:
    """Of one model over several hosts."""
    text = partial(flags.DEFINE_string, flag_values=values)
    whole = partial(flags.DEFINE_integer, flag_values=values)
    flags.DEFINE_bool(
        "multihost",
        False,
        "Serve one model from the devices of several hosts, which all run this command. Cloud TPU, "
        "GKE, Slurm and Open MPI say which; elsewhere the next three flags do, and imply this one.",
        flag_values=values,
    )
    text("coordinator_address", None, "HOST:PORT where the other processes reach process 0.")
    whole("num_processes", None, "How many processes serve the model, one a host.", 1)
    whole("process_id", None, "Which of them this is, from 0.", 0)
    text(
        "coordinator_bind_address",
        None,
        "Address that process 0 listens on for the others. Default: that of coordinator_address.",
    )
    text(
        "plan_key_file",
        None,
        "File of a secret, at least 32 bytes, by which the processes know each other. Also read "
        "from the environment variable XLINFER_PLAN_KEY. Without one, whoever hears the network "
        "can take a process's place.",
    )
    flags.DEFINE_float(
        "heartbeat_timeout_s",
        20.0,
        "Seconds without a sign of life after which a process is lost, and all end.",
        0.5,
        flag_values=values,
    )


def is_multihost(values: flags.FlagValues) -> bool:
    named = ("coordinator_address", "num_processes", "process_id")
    return values.multihost or any(getattr(values, name) is not None for name in named)


def parse(argv: Sequence[str]) -> flags.FlagValues | None:
    """Flags from `argv` (program name first); None when it asks for help. Raises UsageError."""
    values = define()
    if {"--help", "--helpfull", "-h", "-help"} & set(argv):
        return None
    rest = xlinfer.flags.read(values, argv)
    if len(rest) > 1 or (rest and values.model is not None):
        raise UsageError(f"Only one model can be served, got also: {' '.join(rest)}")
    if rest:
        values.model = rest[0]
    return values


def help_text() -> str:
    return f"{USAGE}\n{xlinfer.flags.help_text(define(), {*ALIASES, *xlinfer.flags.ALIASES})}"

"""python -m xlinfer.serve: an OpenAI-compatible server."""

import asyncio
import ipaddress
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from xlinfer.flags import UsageError, show
from xlinfer.hub import is_repository
from xlinfer.progress import show_progress
from xlinfer.serve.build import DEMO_NAME, Built, build
from xlinfer.serve.flags import engine_options, help_text, is_multihost, parse
from xlinfer.serve.lifecycle import end, listen, new_server, run
from xlinfer.serve.server import ServerOptions

logger = logging.getLogger("xlinfer.serve")


def main(argv: Sequence[str]) -> None:
    """Exits: 0 after a drain, 1 when it cannot serve, 2 when the command line is wrong."""
    cluster = None
    try:
        values = parse(argv)
        if values is not None and is_multihost(values):
            # Servers of one host know nothing of others.
            from xlinfer.serve.multihost import cluster_from

            cluster = cluster_from(values)
    except UsageError as error:
        print(f"error: {error}\nTry: python -m xlinfer.serve --help", file=sys.stderr)
        sys.exit(2)
    if values is None:
        show(help_text())
        return
    _set_up_logging(values.log_format)
    options, server_options = engine_options(values), server_options_of(values)

    try:
        listener = listen(values.host, values.port)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if cluster is None or cluster.leads:
        _warn_of_open_doors(values.host, server_options.api_keys)
    if cluster is not None:
        from xlinfer.serve.multihost import follow, lead

        if not cluster.leads:
            follow(cluster, options, listener)
        lead(cluster, options, server_options, listener, values.drain_timeout_s)

    def make() -> Built:
        with show_progress() as progress:
            return build(options, progress)

    server = new_server(server_options, make)
    code = asyncio.run(run(server, listener, drain_timeout_s=values.drain_timeout_s))
    end(server, code)


def server_options_of(values: flags.FlagValues) -> ServerOptions:
    named = values.model or values.artifact
    name = DEMO_NAME if named is None else Path(named).resolve().name
    if named is not None and is_repository(named):
        name = named  # as vLLM calls it
    names = tuple(values.served_model_name) or (name,)
    given = [*values.api_key, os.environ.get("XLINFER_API_KEY", "")]
    keys = [key.strip() for several in given for key in several.split(",")]
    return ServerOptions(
        model_root=name,
        served_model_names=names,
        created=int(time.time()),
        api_keys=tuple(key for key in keys if key),
        generation_config=values.generation_config,
        max_queued_requests=values.max_queued_requests,
        max_queued_tokens=values.max_queued_tokens,
        max_request_bytes=values.max_request_bytes,
        strict_fields=values.strict_fields,
    )


def _warn_of_open_doors(host: str, api_keys: Sequence[str]) -> None:
    if not api_keys and not _is_loopback(host):
        logger.warning("Listening on %s without --api_key: anyone who reaches it can use it.", host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _set_up_logging(log_format: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(_JsonLines())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("xlinfer").setLevel(logging.INFO)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": record.created, "level": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


if __name__ == "__main__":
    main(sys.argv)

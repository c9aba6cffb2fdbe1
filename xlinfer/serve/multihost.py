"""A server of several hosts: what rank 0 and the others do beside what a server of one host does.

Rank 0 answers requests. The others answer /live, /ready and /health, for whoever watches them.
"""

import asyncio
import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

import jax
from absl import flags
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from xlinfer.engine.worker import Worker
from xlinfer.flags import UsageError
from xlinfer.multihost.calls import Calls, difference, facts_of, file_digests
from xlinfer.multihost.cluster import Cluster, cluster_of, join, least_memory, share
from xlinfer.multihost.follower import Follower
from xlinfer.multihost.leader import Leader
from xlinfer.multihost.member import first_line, leave_process
from xlinfer.progress import Progress, show_progress
from xlinfer.serve.build import Built, EngineOptions, Prepared, prepare, start
from xlinfer.serve.lifecycle import STEP_S, explain, http_server, new_server, on_signals, run
from xlinfer.serve.server import ServerOptions

logger = logging.getLogger("xlinfer.serve")
# Options that name what lies on a host, each its own.
OWN = frozenset({"model", "tokenizer", "chat_template", "compile_cache_dir", "artifact"})
KEY_BYTES = 32  # fewest of a plan key
KEY_VARIABLE = "XLINFER_PLAN_KEY"


def cluster_from(values: flags.FlagValues) -> Cluster:
    """Raises UsageError saying what is missing or wrong."""
    try:
        return cluster_of(
            coordinator_address=values.coordinator_address,
            coordinator_bind_address=values.coordinator_bind_address,
            num_processes=values.num_processes,
            process_id=values.process_id,
            key=_key(values.plan_key_file),
            heartbeat_timeout_s=values.heartbeat_timeout_s,
        )
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def lead(
    cluster: Cluster,
    options: EngineOptions,
    server_options: ServerOptions,
    listener: socket.socket,
    drain_timeout_s: float,
) -> NoReturn:
    """Rank 0's whole life: exits as a server of one host does, and the other ranks with it."""
    if not cluster.key:
        logger.warning(
            "Without --plan_key_file, whoever hears the network between the hosts can take a "
            "process's place."
        )
    leader = Leader(cluster)
    server = new_server(server_options, lambda: _build(leader, cluster, options))
    stops = leader.when_asked_to_stop
    code = asyncio.run(
        run(server, listener, drain_timeout_s=drain_timeout_s, when_asked_to_stop=stops)
    )
    ready = server.engine.ready
    server.engine.join(STEP_S if ready.done() else 0)
    error = ready.exception() if ready.done() else None
    why = f"rank 0 could not start: {first_line(error)}" if error else ""
    leave_process(leader.end(code, why))


def _build(leader: Leader, cluster: Cluster, options: EngineOptions) -> Built:
    """Once every rank is ready. Raises ValueError or OSError saying what is wrong."""
    leader.gather()
    join(cluster, leader.coordinator)
    with show_progress() as progress:
        prepared = _prepare(cluster, options, progress)
    facts = facts_of(prepared.ready, prepared.source)
    executor = leader.lead(Worker(prepared.ready), Calls(prepared.ready, facts), facts)
    return start(prepared, options, executor)


def follow(cluster: Cluster, options: EngineOptions, listener: socket.socket) -> NoReturn:
    """Another rank's: exits with code 0 when rank 0 says so, with 1 when the group has failed."""
    follower = Follower(cluster)

    def work() -> None:
        try:
            follower.connect()
            join(cluster, follower.open_coordinator())
            prepared = _prepare(cluster, options, lambda phase, done, total: None)
            facts = facts_of(prepared.ready, prepared.source)
            follower.follow(Worker(prepared.ready), Calls(prepared.ready, facts), facts)
        except Exception as error:
            explain(error)
            follower.fail(f"rank {cluster.process_id} could not start: {first_line(error)}")

    asyncio.run(_attend(follower, work, listener))
    leave_process(follower.code)


async def _attend(follower: Follower, work: Callable[[], None], listener: socket.socket) -> None:
    """Answer who asks how it goes, until the work is done."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def work_and_tell() -> None:
        work()
        loop.call_soon_threadsafe(done.set)

    def trouble() -> str | None:
        return None if follower.following and not done.is_set() else "This rank does not follow."

    on_signals(loop, follower.ask_to_stop)
    http = http_server(_health_app(trouble))
    serving = asyncio.ensure_future(http.serve(sockets=[listener]))
    threading.Thread(target=work_and_tell, name="follower", daemon=True).start()
    await done.wait()
    http.should_exit = True
    await serving


def _health_app(trouble: Callable[[], str | None]) -> Starlette:
    async def live(request: Request) -> PlainTextResponse:
        return PlainTextResponse("")

    async def ready(request: Request) -> PlainTextResponse:
        why = trouble()
        return PlainTextResponse(why or "", 503 if why else 200)

    paths = {"/live": live, "/ready": ready, "/health": ready}
    return Starlette(routes=[Route(path, answer) for path, answer in paths.items()])


def _prepare(cluster: Cluster, options: EngineOptions, progress: Progress) -> Prepared:
    devices, here = jax.devices(), len(jax.local_devices())
    if options.data_parallel_size != 1:
        raise ValueError(
            f"data_parallel_size is {options.data_parallel_size}: over several hosts there is one "
            "replica. Start a group of hosts for each, behind a load balancer"
        )
    shared, split = options.tensor_parallel_size, options.sequence_parallel_size
    if options.artifact is None and shared * split != len(devices):
        times = f" x sequence_parallel_size {split}" if split > 1 else ""
        raise ValueError(
            f"tensor_parallel_size is {shared}{times}; the {cluster.num_processes} "
            f"processes have {len(devices)} devices ({here} on this host), all of which one model "
            f"takes: give --tensor_parallel_size={len(devices)}"
        )
    if options.artifact is not None and devices[0].platform == "cpu":
        raise ValueError(
            f"{options.artifact}: what is compiled for a CPU is for one process. Leave the "
            "artifact out: programs are kept in compile_cache_dir for the next start"
        )
    _check_options(cluster, options)
    prepared = prepare(options, progress, partial(least_memory, cluster))
    if (size := prepared.ready.mesh.size) != len(devices):
        raise ValueError(
            f"{options.artifact} is for {size} devices; the {cluster.num_processes} processes have "
            f"{len(devices)}, all of which one model takes"
        )
    return prepared


def _check_options(cluster: Cluster, options: EngineOptions) -> None:
    """Raise ValueError where they are not rank 0's. Loading takes minutes, and ranks that load
    different things may wait for each other for ever."""
    mine = {name: value for name, value in asdict(options).items() if name not in OWN}
    if options.model is not None and os.path.exists(options.model):
        files = file_digests(Path(options.model))
        mine |= {f"file {name}": digest for name, digest in files.items()}
    first = json.loads(share(cluster, "options", json.dumps(mine))[0])
    if (what := difference(mine, first)) is not None:
        raise ValueError(
            f"Rank 0 was started with another command, or has other weights: {what}. Run the same "
            "command on every host."
        )


def _key(file: str | None) -> bytes:
    """From the file or the environment; b"" where neither names one. Raises ValueError, OSError."""
    if file is not None:
        with open(os.path.expanduser(file), "rb") as held:
            key, where = held.read().strip(), f"plan_key_file {file}"
    elif given := os.environ.get(KEY_VARIABLE):
        key, where = given.encode().strip(), KEY_VARIABLE
    else:
        return b""
    if len(key) < KEY_BYTES:
        raise ValueError(
            f"{where} holds {len(key)} bytes; a key must have at least {KEY_BYTES}, such as "
            "`openssl rand -hex 32` prints"
        )
    return key

"""Which processes serve together, and jax's own acquaintance of them."""

import socket
from dataclasses import dataclass
from typing import Any

JOIN_S = 300  # for all ranks to come


@dataclass(frozen=True, kw_only=True)
class Cluster:
    host: str  # where the ranks reach rank 0
    port: int
    bind: str  # the address that rank 0 listens on
    num_processes: int
    process_id: int
    key: bytes  # b"": the group agrees on one that is as secret as its network
    heartbeat_timeout_s: float
    local_device_ids: tuple[int, ...] | None = None  # None: all devices of the host

    @property
    def leads(self) -> bool:
        return self.process_id == 0


def cluster_of(
    *,
    coordinator_address: str | None,
    coordinator_bind_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    key: bytes,
    heartbeat_timeout_s: float,
) -> Cluster:
    """What was not given is asked of the environment: Cloud TPU, GKE, Slurm, Open MPI, as
    jax.distributed does. Raises ValueError saying what is missing or wrong."""
    given = coordinator_address, num_processes, process_id
    local: Any = None
    if None in given:
        coordinator_address, num_processes, process_id, local = _detect(*given)
    asked = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if missing := [f"--{name}" for name, value in asked.items() if value is None]:
        raise ValueError(
            f"{' and '.join(missing)} must be given: this is none of the clusters that describe "
            "themselves (Cloud TPU, GKE, Slurm, Open MPI)"
        )
    assert coordinator_address is not None and num_processes is not None and process_id is not None
    if num_processes < 2:
        raise ValueError(f"num_processes is {num_processes}: leave it out to serve from one host")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id is {process_id}; with num_processes={num_processes} it must be at least "
            f"0 and below {num_processes}"
        )
    host, port = _split("coordinator_address", coordinator_address)
    bind = coordinator_bind_address or host
    return Cluster(
        host=host, port=port, bind=bind, num_processes=num_processes, process_id=process_id,
        key=key, heartbeat_timeout_s=heartbeat_timeout_s,
        local_device_ids=None if local is None else tuple(local),
    )  # fmt: skip


def join(cluster: Cluster, coordinator: str) -> None:
    """Make jax see the devices of all ranks; `coordinator`, an address of this host, is rank 0's
    coordinator or a tunnel to it. Before anything asks jax for devices."""
    import jax

    # It would take SIGTERM, which asks for a drain here.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=coordinator,
        coordinator_bind_address=coordinator,
        num_processes=cluster.num_processes,
        process_id=cluster.process_id,
        local_device_ids=cluster.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=JOIN_S,
        # Jax ends a process without saying which rank was lost, so it is to notice late.
        heartbeat_timeout_seconds=max(100, int(10 * cluster.heartbeat_timeout_s)),
    )


def share(cluster: Cluster, name: str, value: str) -> list[str]:
    """What every rank, in their order, has to say by this name; waits for all."""
    from jax._src.distributed import global_state

    store = global_state.client
    assert store is not None
    store.key_value_set(f"xlinfer/{name}/{cluster.process_id}", value)
    return [
        store.blocking_key_value_get(f"xlinfer/{name}/{rank}", JOIN_S * 1000)
        for rank in range(cluster.num_processes)
    ]


def least_memory(cluster: Cluster, memory: tuple[int, int]) -> tuple[int, int]:
    """Bytes of a device and of those in use that hold for the devices of all ranks, so that all
    make the same plan of them."""
    told = share(cluster, "memory", "{} {}".format(*memory))
    sizes, held = zip(*(map(int, line.split()) for line in told), strict=True)
    return min(sizes), max(held)


def free_port() -> int:
    """Of this host's loopback."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def _detect(address: str | None, count: int | None, rank: int | None) -> tuple:
    from jax._src.clusters import ClusterEnv

    return ClusterEnv.auto_detect_unset_distributed_params(address, count, rank, None, None, JOIN_S)


def _split(name: str, address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"{name} is {address!r}; it must be HOST:PORT")
    return host.strip("[]"), int(port)

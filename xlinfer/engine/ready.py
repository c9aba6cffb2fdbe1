"""A module and its arrays -> what an engine runs: programs compiled, parameters in place."""

import logging
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from pallas_kernels.devices import Impl, device_of_kind
from xlinfer.compile import Executables, compile_all
from xlinfer.compile.store import Store
from xlinfer.deployment import Sizes, deploy, facts_of
from xlinfer.mesh import device_of, make_mesh
from xlinfer.plan import Plan
from xlinfer.progress import Progress
from xlinfer.target import CHIPS

logger = logging.getLogger("xlinfer.engine")


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What an engine runs: parameters in place, programs compiled for them."""

    params: tuple[jax.Array, ...]
    paths: tuple[str, ...]  # of the parameters, in the model's state
    executables: Executables
    plan: Plan
    mesh: Mesh
    vocab_size: int
    attention_impl: Impl
    kv_cache_dtype: str
    kv_scales: bool  # among the parameters


def make_ready(
    model: nnx.Module,
    sizes: Sizes,
    *,
    mesh: Mesh | None = None,
    memory: tuple[int, int] | None = None,
    kept: Store | None = None,
    progress: Progress | None = None,
) -> Ready:
    """Plan and compile for the arrays that `model` holds, as `Engine` says. `memory`: bytes of a
    device, and of those in use; by default what the mesh's first device says."""
    facts = facts_of(model)
    graph, state = nnx.split(model)
    params = tuple(jax.tree.leaves(state))
    mesh = mesh or _mesh_of(params)
    device_bytes, held_bytes = memory or memory_of(mesh.devices.flat[0])
    deployment = deploy(
        graph, state, facts, mesh=mesh, device=device_of(mesh),
        device_bytes=device_bytes, held_bytes=held_bytes, sizes=sizes,
    )  # fmt: skip
    return Ready(
        params=params,
        paths=deployment.paths,
        executables=compile_all(deployment, kept, progress, logger.info),
        plan=deployment.plan,
        mesh=mesh,
        vocab_size=facts.vocab_size,
        attention_impl=deployment.spec.impl,
        kv_cache_dtype=jnp.dtype(deployment.spec.dtype).name,
        kv_scales=facts.kv_scales,
    )


def memory_of(device: Any) -> tuple[int, int]:
    """Bytes of `device`, which is here, and of those in use; a CPU's memory is not counted."""
    if device.platform == "cpu":
        return 0, 0
    if facts := device.memory_stats():
        return facts["bytes_limit"], facts["bytes_in_use"]
    return CHIPS[device_of_kind(device.device_kind).name].memory_bytes, 0


def _mesh_of(params: tuple[jax.Array, ...]) -> Mesh:
    sharding = params[0].sharding
    if isinstance(sharding, NamedSharding):
        return sharding.mesh  # type: ignore[return-value]
    return make_mesh(1, devices=sorted(sharding.device_set, key=lambda d: d.id)[:1])

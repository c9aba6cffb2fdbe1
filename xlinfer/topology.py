"""Devices that need not be here: meshes described by name, and lowering for them.

XLA compiles for a GPU or a TPU from a description of it: libtpu brings those of TPUs, a GPU's is
written below. `jax.experimental.topologies` turns a description into device objects that can
stand in shardings but hold no data.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from jax.stages import Lowered

from pallas_kernels.devices import Device

# xla/stream_executor/device_description.proto. ACCELERATED_FEATURES asks for sm_90a, which has
# wgmma and TMA; without the runtime's version XLA leaves out the FP8 products of cuBLASLt.
GPU_CONFIG = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: {scratch}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_address_bits: 64 name: "{kind}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{kind}"
"""
GPU_MEMORY = {  # bytes, bytes per second (NVIDIA's data sheets; memory as the driver reports it)
    "h100": (85_520_809_984, 3_350_000_000_000),
    "h200": (151_397_597_184, 4_800_000_000_000),
}


def described_mesh(
    device: Device,
    axes: dict[str, int] | None = None,
    *,
    slice_shape: str | None = None,
    one_host: bool = False,
) -> Mesh:
    """A mesh of devices that need not be here; `axes` are names and sizes, none for one device.

    TPUs are those of a slice of `slice_shape` ("2x4"; None: the smallest that libtpu has without
    being told), whose hosts have four chips each, or which is `one_host`'s.

    Raises ValueError for the CPU, which is always here, and when the smallest slice that `device`
    names has fewer devices than the mesh.
    """
    axes = axes or {"tensor": 1}
    count = int(np.prod(list(axes.values())))
    match device.platform:
        case "cuda":
            memory, bandwidth = GPU_MEMORY[device.name]
            config = GPU_CONFIG.format(
                cores=device.cores, memory=memory, bandwidth=bandwidth,
                scratch=device.scratch_bytes, kind=device.kind,
            )  # fmt: skip
            found = topologies.get_topology_desc(
                platform="cuda", target_config=config, topology=f"1x1x{count}"
            )
        case "tpu":
            # libtpu asks the metadata server of a cloud machine who it is; there is none.
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
            # Any will do: `topology_name` says which slice it is.
            os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-8")
            # Its lock is for the chips; compilers may run side by side.
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
            name, bounds = device.topology, {}
            if slice_shape is not None:
                name = f"{device.name}:{slice_shape}"
                if one_host:
                    sizes = [int(n) for n in slice_shape.split("x")]
                    bounds["chips_per_host_bounds"] = (*sizes, *[1] * (3 - len(sizes)))
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds)
        case _:
            raise ValueError(f"{device.name} needs no description: its devices are here")
    if count > len(found.devices):
        raise ValueError(
            f"a mesh of {count} devices, but {device.topology} has {len(found.devices)}"
        )
    # In the order that makes neighbours of a mesh neighbours on the wire, as make_mesh does for
    # devices that are here.
    types = (AxisType.Auto,) * len(axes)
    devices = found.devices[:count]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=devices)


def lower(function: Callable, args: tuple, device: Device, mesh: Mesh, **jit: Any) -> Lowered:
    """`jax.jit(function, **jit)` of abstract, placed `args`, lowered for `device`.

    Kernels are lowered for the chip that the mesh in context describes, not for one that is here.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, **jit).trace(*args).lower(lowering_platforms=(device.platform,))

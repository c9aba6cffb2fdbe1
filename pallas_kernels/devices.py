"""The chips that kernels are written for, as far as a kernel needs to know them."""

from typing import Literal, NamedTuple

Platform = Literal["cpu", "cuda", "tpu"]
Impl = Literal["reference", "mosaic_gpu", "mosaic_tpu", "xla", "cudnn"]
MOSAIC: dict[Platform, Impl] = {"cpu": "reference", "cuda": "mosaic_gpu", "tpu": "mosaic_tpu"}
MiB = 2**20


class Device(NamedTuple):
    """One device as jax counts them."""

    name: str
    platform: Platform
    kind: str  # jax's device_kind
    cores: int  # streaming multiprocessors of a GPU, TensorCores of a TPU device
    scratch_bytes: int  # memory on the core that one kernel may use: SMEM of a block, VMEM
    topology: str  # what jax.experimental.topologies calls the smallest slice; empty for cpu


DEVICES = {
    d.name: d
    for d in (
        Device("cpu", "cpu", "cpu", 1, 0, ""),
        Device("h100", "cuda", "NVIDIA H100 80GB HBM3", 132, 227 * 1024, "1x1x1"),
        Device("h200", "cuda", "NVIDIA H200", 132, 227 * 1024, "1x1x1"),
        Device("v5e", "tpu", "TPU v5 lite", 1, 128 * MiB, "v5e:2x2"),
        Device("v5p", "tpu", "TPU v5", 2, 64 * MiB, "v5p:2x2x1"),
        Device("v6e", "tpu", "TPU v6 lite", 1, 128 * MiB, "v6e:2x2x1"),
        Device("tpu7x", "tpu", "TPU7x", 1, 64 * MiB, "tpu7x:2x2x1"),
    )
}
GPUS = tuple(d for d in DEVICES.values() if d.platform == "cuda")
TPUS = tuple(d for d in DEVICES.values() if d.platform == "tpu")


def device_of_kind(kind: str) -> Device:
    """The device that jax calls `kind`. Raises ValueError for one that no kernel knows."""
    for device in DEVICES.values():
        # An H100 comes with several memories, which its kind's last words tell.
        if kind == device.kind or (device.name == "h100" and kind.startswith("NVIDIA H100")):
            return device
    known = ", ".join(repr(d.kind) for d in DEVICES.values())
    raise ValueError(f"device kind {kind!r} has no kernels here; there are some for {known}")


def mosaic(device: Device) -> Impl:
    """The Pallas implementation for a device; the reference on CPU."""
    return MOSAIC[device.platform]


def check_runs(name: str, impl: str, device: Device) -> None:
    """Raise ValueError, calling `impl` the argument `name`, for another platform's kernels."""
    others = {"mosaic_gpu": "cuda", "cudnn": "cuda", "mosaic_tpu": "tpu"}
    if others.get(impl, device.platform) != device.platform:
        raise ValueError(
            f"{name} is {impl!r}, which runs on {others[impl]}; {device.name} has "
            f"{mosaic(device)!r}"
        )

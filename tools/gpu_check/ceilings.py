"""What this machine can do at most: bandwidth of a copy, and the rate of large matrix products.

Measured as everything else is (measure.py), on random numbers: a product of zeros runs faster.
"""

import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import jax
import jax.numpy as jnp

from tools.gpu_check.job import Job, device_here, progress, record, why
from tools.gpu_check.measure import Chain, time_chain

BF16, FP8 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float8_e4m3fn)
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy", "torch", "flashinfer-python")
SMI = "name,driver_version,clocks.sm,clocks.mem,power.limit"
# XLA multiplies through its own Triton kernels or through cuBLASLt; it chooses by measuring, from
# one run of each, so both are asked for.
GEMMS = {"XLA": {}, "cuBLASLt": {"xla_gpu_enable_triton_gemm": False}}


def main(job: Job) -> None:
    device = device_here(job.dry_run)
    record(machine=machine(), device=device.name)
    size = 2**20 if job.dry_run else 2**32  # bytes copied
    side = 256 if job.dry_run else 8192
    seconds = 0.02 if job.dry_run else 0.5
    found: dict[str, Any] = {}
    for name, measure in (
        ("copy_GB_per_s", lambda: copy(size, seconds)),
        ("read_GB_per_s", lambda: read(size, seconds)),
        ("bf16_TFLOP_per_s", lambda: product(side, BF16, seconds, job.dry_run)),
        ("fp8_TFLOP_per_s", lambda: product(side, FP8, seconds, job.dry_run)),
    ):
        try:
            found[name] = measure()
            progress(f"{name} {found[name]:.1f}")
        except Exception as error:
            progress(f"{name}: {why(error)}")
            record(failed=name, why=why(error))
        record(ceilings=found)


def copy(size: int, seconds: float) -> float:
    """Bytes read and bytes written, per second: by a kernel or by the copy engine, the faster."""
    x = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    ways = (lambda x: x ^ jnp.uint32(1), lambda x: jnp.copy(x))
    ms = min(time_chain(Chain(way, [(x,)], calls=2).compile(), [(x,)], seconds).ms for way in ways)
    return 2 * size / ms / 1e6


def read(size: int, seconds: float) -> float:
    """Bytes read per second by a sum of all."""
    x = jax.random.bits(jax.random.key(0), (size // 2**14, 2**12), jnp.uint32)
    add = lambda x: jnp.bitwise_xor.reduce(x, axis=1)
    return size / time_chain(Chain(add, [(x,)], calls=2).compile(), [(x,)], seconds).ms / 1e6


def product(side: int, dtype: Any, seconds: float, dry_run: bool) -> float:
    """Of square matrices, 2 operations per multiply-add; weights [N, K], as checkpoints lie."""
    keys = jax.random.split(jax.random.key(0), 4)
    sets = [
        tuple(jax.random.normal(k, (side, side), BF16).astype(dtype) for k in pair)
        for pair in (keys[:2], keys[2:])
    ]
    dot = lambda x, w: jnp.einsum("mk,nk->mn", x, w, preferred_element_type=BF16)
    times, errors = [], []
    for options in [{}] if dry_run else GEMMS.values():
        try:
            program = Chain(dot, sets, calls=4).compile(**options)
            times.append(time_chain(program, sets, seconds).ms)
        except Exception as error:
            errors.append(error)
    if not times:
        raise errors[0]
    return 2 * side**3 / min(times) / 1e9


def machine() -> dict[str, Any]:
    """What a number depends on besides the code."""
    here = jax.devices()[0]
    return {
        "kind": here.device_kind,
        "count": jax.device_count(),
        "platform_version": getattr(here.client, "platform_version", ""),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "nvidia_smi": output("nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"),
        "ptxas": output("ptxas", "--version"),
        "commit": output("git", "rev-parse", "HEAD"),
        "changed_files": output("git", "status", "--porcelain").splitlines(),
    }  # fmt: skip


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output(*command: str) -> str:
    """What a command that may not be there prints, at most."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip()[:2000] if done.returncode == 0 else ""

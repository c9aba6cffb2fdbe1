"""A deployment -> executables, all of them before the first request arrives.

The engine holds `jax.stages.Compiled` objects: a shape that was not planned raises instead of
compiling quietly. What was compiled once is kept in a Store, whoever compiled it.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
from jax._src.config import enable_compilation_cache
from jax.stages import Compiled, Lowered

from pallas_kernels.devices import Device
from xlinfer.compile.executable import ExecutableError, load, serialize
from xlinfer.compile.store import Origin, Store, origin_of
from xlinfer.deployment import Deployment, Job
from xlinfer.progress import Progress
from xlinfer.topology import lower

COMPILER_OPTIONS: Mapping[str, Mapping[str, Any]] = {  # by platform, then by device
    # A lower effort of LLVM's compiles a seventh faster and runs as fast: the time goes to XLA's
    # own products and to memory (docs/LOG.md).
    "cpu": {"xla_backend_optimization_level": 1},
    "cuda": {
        # Where no GPU is, XLA's own kernels get tiles of 8 x 16, whatever the product. cuBLASLt
        # picks its kernel where it runs; and one that is not timed is the same at every start.
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_autotune_level": 0,
        # Products of one input are merged by writing their weights side by side, at every call.
        "xla_gpu_dot_merger_threshold_mb": 0,
        # It computes values again to save memory, always: XLA counts the donated cache two more
        # times. What fits is xlinfer's plan to say.
        "xla_disable_hlo_passes": "rematerialization",
    },
    # Arguments come in tiles of 8 x 128, and XLA wants 16 x 128 for what it multiplies in 16 bits:
    # it would copy all weights at every call (docs/LOG.md).
    "tpu7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": False},
}

SINGLE = ("sample", "score", "pool", "admit", "allocate")  # programs of one bucket
Key = tuple[str, int]  # a program's name and its bucket, 0 where there is one
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Executables:
    forward: dict[int, Compiled]  # by token bucket
    decode: dict[int, Compiled]  # by row bucket; empty without a decode window
    encode: dict[int, Compiled]  # by token bucket; empty without an encoder
    sample: Compiled
    score: Compiled
    pool: Compiled
    admit: Compiled
    allocate: Compiled

    @classmethod
    def of(cls, programs: Mapping[Key, Compiled]) -> "Executables":
        by_bucket = lambda kind: {size: p for (name, size), p in programs.items() if name == kind}
        one = {name: programs[name, 0] for name in SINGLE}
        return cls(
            forward=by_bucket("forward"),
            decode=by_bucket("decode"),
            encode=by_bucket("encode"),
            **one,
        )


def title(key: Key) -> str:
    """ "decode-64", "sample"."""
    return "-".join(str(part) for part in key if part)


def compile_all(
    deployment: Deployment, kept: Store | None, progress: Progress | None, say: Say
) -> Executables:
    """For the devices of the deployment's mesh, which are here.

    Lowering holds Python's lock and compiling does not, so one thread lowers while the others
    compile. `progress("compile", done, total)` is called at first and after each program. `say`
    hears a line for each program that was looked for in `kept`: whether it was there, and why not.
    """
    jobs = deployment.jobs()
    if progress:
        progress("compile", 0, len(jobs))
    workers = max(1, min(8, os.cpu_count() or 1))
    with ThreadPoolExecutor(workers, thread_name_prefix="xlinfer-compile") as pool:
        waiting = {}
        for key, job in jobs.items():
            lowered = lower_job(job, deployment)
            waiting[key] = pool.submit(_ready, key, job, lowered, deployment, kept, say)
        done = {}
        for i, (key, ready) in enumerate(waiting.items()):
            done[key] = ready.result()
            if progress:
                progress("compile", i + 1, len(jobs))
    return Executables.of(done)


def lower_job(job: Job, deployment: Deployment) -> Lowered:
    """For the devices of the mesh, here or described. Unused arguments stay, so that a stored
    program is called with all of them."""
    programs = deployment.programs
    how = {"donate_argnums": job.donated, "out_shardings": job.placed, "keep_unused": True}
    if deployment.described:
        return lower(job.run, job.args, programs.device, programs.mesh, **how)
    return jax.jit(job.run, **how).lower(*job.args)


def options_for(device: Device) -> dict[str, Any]:
    """Of XLA's compiler."""
    of = lambda name: COMPILER_OPTIONS.get(name, {})
    return {**of(device.platform), **of(device.name)}


def _ready(
    key: Key, job: Job, lowered: Lowered, deployment: Deployment, kept: Store | None, say: Say
) -> Compiled:
    options = options_for(deployment.programs.device)
    if kept is None:
        return lowered.compile(options)
    origin = origin_of(lowered, deployment.programs.mesh, options)
    name, why = label(key, deployment), None
    if (found := kept.get(origin)) is not None:
        try:
            compiled = load(found, deployment.programs.mesh)
            say(f"program {title(key)}: hit")
            return compiled
        except ExecutableError as error:
            why = str(error)
    say(f"program {title(key)}: miss, {why or kept.why_missed(name, origin)}")
    with enable_compilation_cache(False):  # it is kept here, and not by jax too
        compiled = lowered.compile(options)
    kept.put(name, origin, serialize(compiled, job.args, job.donated))
    return compiled


def label(key: Key, deployment: Deployment) -> str:
    """What a program is called from one version of it to the next: same model, same bucket."""
    shapes = [(p.shape, p.dtype.name) for p in deployment.params]
    return f"{title(key)}-{Origin.digest(shapes)[:16]}"

"""Programs and a plan -> executables, all of them before the first request arrives.

The engine holds `jax.stages.Compiled` objects: a shape that was not planned raises instead of
compiling quietly.
"""

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled

from xlinfer.kvcache import Cache
from xlinfer.plan import PlanError
from xlinfer.programs import Programs, decode_shapes, forward_shapes, sample_shapes
from xlinfer.progress import Progress
from xlinfer.sampling import Slots, empty_slots

# On CPU a lower effort of LLVM's compiles a seventh faster and runs as fast: the time goes to
# XLA's own products and to memory (docs/LOG.md).
COMPILER_OPTIONS = {"cpu": {"xla_backend_optimization_level": 1}}


@dataclass(frozen=True, kw_only=True)
class Executables:
    forward: dict[int, Compiled]  # by token bucket
    decode: dict[int, Compiled]  # by row bucket; empty without a decode window
    sample: Compiled
    score: Compiled
    admit: Compiled


class Job(NamedTuple):
    run: Callable
    args: tuple  # abstract
    donated: tuple[int, ...]
    placed: Any  # the results' shardings, so that one program's fit the next one's arguments


def compile_all(
    programs: Programs, params: tuple, vocab_size: int, kv: Cache, progress: Progress | None
) -> Executables:
    """Compile for the mesh the parameters live on; `params` and `kv` may be abstract.

    Lowering holds Python's lock and compiling does not, so one thread lowers while the others
    compile. `progress("compile", done, total)` is called after each program.
    """
    jobs = jobs_of(programs, params, vocab_size, kv)
    options = COMPILER_OPTIONS.get(programs.mesh.devices.flat[0].platform, {})
    done = _compile_jobs(jobs, options, progress)
    of = lambda kind: {size: p for (name, size), p in done.items() if name == kind}
    return Executables(
        forward=of("forward"), decode=of("decode"), sample=done["sample", 0],
        score=done["score", 0], admit=done["admit", 0],
    )  # fmt: skip


def jobs_of(
    programs: Programs, params: tuple, vocab_size: int, kv: Cache
) -> dict[tuple[str, int], Job]:
    """Every program of the plan by name and bucket (0 where there is one), with abstract
    arguments placed on the programs' mesh, which need not be here."""
    plan, whole = programs.plan, NamedSharding(programs.mesh, PartitionSpec())
    place = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree
    )
    params = tuple(jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding) for p in params)
    slots = place(jax.eval_shape(partial(empty_slots, plan.max_num_seqs + 1, vocab_size)))
    packed = lambda shapes: jax.ShapeDtypeStruct(
        (sum(x.size for x in jax.tree.leaves(shapes)),), jnp.int32, sharding=whole
    )
    largest = plan.token_buckets[-1]
    forward_in = packed(forward_shapes(plan, largest))
    hidden = jax.eval_shape(
        partial(programs.forward, tokens=largest), params, kv, slots, forward_in
    )[2]
    states = lambda rows: jax.ShapeDtypeStruct(
        (rows, hidden.shape[1]), hidden.dtype, sharding=whole
    )
    last_RD = states(plan.max_num_seqs)

    cache = jax.tree.map(lambda x: x.sharding, kv)
    jobs: dict[tuple[str, int], Job] = {}
    for rows in plan.decode_buckets:
        step, out = packed(decode_shapes(plan, rows)), (cache, whole, whole)
        run = partial(programs.decode, rows=rows)
        jobs["decode", rows] = Job(run, (params, kv, slots, step), (1, 2), out)
    for tokens in plan.token_buckets:
        step = packed(forward_shapes(plan, tokens))
        run = partial(programs.forward, tokens=tokens)
        out = (cache, whole, whole)
        jobs["forward", tokens] = Job(run, (params, kv, slots, step), (1,), out)
    sample_in = packed(sample_shapes(plan))
    jobs["sample", 0] = Job(programs.sample, (params, slots, last_RD, sample_in), (1,), whole)
    target_T, one = (jax.ShapeDtypeStruct(s, jnp.int32, sharding=whole) for s in ((largest,), ()))
    jobs["score", 0] = Job(programs.score, (params, states(largest), target_T, one), (), whole)
    jobs["admit", 0] = Job(programs.admit, _admit_args(slots, whole), (0,), whole)
    return jobs


def _admit_args(slots: Slots, whole: NamedSharding) -> tuple:
    one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=whole)
    slot = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = slots.state
    row = jax.tree.map(one, slots.params)
    return slots, slot, row, slot, one(state.recent_ZC), one(state.output_count_ZV)


def _compile_jobs(
    jobs: dict[tuple[str, int], Job], options: dict, progress: Progress | None
) -> dict:
    workers = max(1, min(8, os.cpu_count() or 1))
    with ThreadPoolExecutor(workers, thread_name_prefix="xlinfer-compile") as pool:
        waiting = {}
        for key, job in jobs.items():
            jitted = jax.jit(job.run, donate_argnums=job.donated, out_shardings=job.placed)
            lowered = jitted.lower(*job.args)
            waiting[key] = pool.submit(lowered.compile, options)
        done = {}
        for i, (key, compiled) in enumerate(waiting.items()):
            done[key] = compiled.result()
            if progress:
                progress("compile", i + 1, len(jobs))
        return done


def use_compile_cache(directory: str | os.PathLike) -> None:
    """Keep compiled programs in `directory`, made for the owner alone if it is not there.

    An executable read back is code that runs, so a directory that somebody else owns or may
    write to is refused with PlanError.
    """
    path = Path(directory).expanduser()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = path.stat()
    if facts.st_uid not in (os.geteuid(), 0) or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PlanError(
            f"The compile cache {path} must be owned by you and writable by nobody else; run "
            f"`chmod 700 {path}` or name another directory with compile_cache_dir."
        )
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

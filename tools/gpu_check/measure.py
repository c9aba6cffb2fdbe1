"""Device time of a function: a chain of calls in one program, over inputs larger than the cache.

Each call of the chain waits for the one before (an optimization barrier ties its inputs to that
one's outputs), so XLA neither merges nor reorders them, and takes the next of several sets of
inputs. The chain is dispatched m times and 2m times; the difference is m chains without what
dispatching and waiting cost. Where CUPTI answers, the kernels' own times are reported beside.
"""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.stages import Compiled, Lowered

L2_BYTES = 60e6  # the larger of what is told of an H200: 50 MB in its papers, 60 MB by its driver
ROTATED_BYTES = 5 * L2_BYTES
MAX_COPIES = 32
MIN_CALLS = 8  # of a chain
SAMPLES = 5
CHAIN = "chain"  # the method, as results name it


class Measured(NamedTuple):
    ms: float  # of a call
    spread: float  # (largest - smallest) / median of the samples
    kernel_ms: float | None  # of a call, the sum over its kernels by CUPTI; None without
    kernels: dict[str, float]  # the slowest, ms of a call


def copies_for(input_bytes: int, dry_run: bool) -> int:
    """How many sets of inputs are rotated, so that a set has left the cache when its turn comes."""
    if dry_run:
        return 2
    return int(min(max(-(-ROTATED_BYTES // max(input_bytes, 1)), 2), MAX_COPIES))


def nbytes(tree: Any) -> int:
    bits = lambda x: x.size * jax.dtypes.itemsize_bits(x.dtype)
    return sum(bits(x) for x in jax.tree.leaves(tree)) // 8


class Chain:
    """`calls` calls of `function` in one program. `sets` hold arguments, arrays or what describes
    them; `donated` arguments are updated in place and are the last outputs."""

    def __init__(
        self,
        function: Callable,
        sets: Sequence[tuple],
        *,
        calls: int | None = None,
        donated: tuple[int, ...] = (),
    ):
        abstract = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
        self._sets = [abstract(tuple(s)) for s in sets]
        self.calls = calls or len(sets) * -(-MIN_CALLS // len(sets))
        self._function, self.donated = jax.jit(function), donated

    def run(self, given: list[tuple], kept: list[tuple]) -> tuple[list[tuple], list]:
        """The donated arguments as the last calls left them, and all other outputs."""
        given, outputs = list(given), []
        barrier: Any = ()
        for i in range(self.calls):
            s = i % len(kept)
            (args, held), barrier = lax.optimization_barrier(((kept[s], given[s]), barrier))
            if i:
                outputs.append(barrier)
            out = self._function(*_joined(args, held, self.donated))
            if self.donated:
                given[s] = tuple(out[-len(self.donated) :])
                out = out[: -len(self.donated)]
            barrier = out
        outputs.append(barrier)
        return given, outputs

    def lower(self) -> Lowered:
        split = [_split(s, self.donated) for s in self._sets]
        given, kept = [g for g, _ in split], [k for _, k in split]
        return jax.jit(self.run, donate_argnums=0).lower(given, kept)

    def finish(self, lowered: Lowered, options: Mapping[str, Any]) -> "Program":
        """Compiled with these options of XLA's."""
        return Program(lowered.compile(dict(options)), self.calls, self.donated)

    def compile(self, **options: Any) -> "Program":
        return self.finish(self.lower(), options)


class Program(NamedTuple):
    compiled: Compiled
    calls: int
    donated: tuple[int, ...]


def _split(args: tuple, donated: tuple[int, ...]) -> tuple[tuple, tuple]:
    given = tuple(args[i] for i in donated)
    return given, tuple(a for i, a in enumerate(args) if i not in donated)


def _joined(kept: tuple, given: tuple, donated: tuple[int, ...]) -> list:
    args = list(kept)
    for i, g in sorted(zip(donated, given, strict=True), key=lambda pair: pair[0]):
        args.insert(i, g)
    return args


def time_chain(program: Program, sets: Sequence[tuple], seconds: float) -> Measured:
    """About `seconds` of measuring. Arrays of donated arguments are used up."""
    split = [_split(tuple(s), program.donated) for s in sets]
    state, kept = [g for g, _ in split], [k for _, k in split]

    def dispatch(times: int) -> float:
        nonlocal state
        out = None
        started = time.perf_counter()
        for _ in range(times):
            state, out = program.compiled(state, kept)
        jax.block_until_ready((state, out))
        return time.perf_counter() - started

    dispatch(1)
    once = dispatch(1)
    m = max(int(seconds / (3 * SAMPLES * once)), 1)
    if once > seconds:  # what dispatching costs is nothing beside it
        samples = [1e3 * dispatch(1) / program.calls, 1e3 * once / program.calls]
    else:
        pairs = [(dispatch(m), dispatch(2 * m)) for _ in range(SAMPLES)]
        # A disturbed pair is judged by its longer half alone.
        chains = [two - one if two > 1.1 * one else two / 2 for one, two in pairs]
        samples = [1e3 * seconds / (m * program.calls) for seconds in chains]
    ms = median(samples)
    kernels = _kernels(partial(dispatch, 1))
    per_call = {name: t / program.calls for name, t in kernels.items()}
    slowest = sorted(per_call.items(), key=lambda item: -item[1])[:6]
    return Measured(
        ms=ms,
        spread=(max(samples) - min(samples)) / ms,
        kernel_ms=sum(per_call.values()) if per_call else None,
        kernels={name[:80]: t for name, t in slowest},
    )


def _kernels(run: Callable[[], Any]) -> dict[str, float]:
    """ms of each kernel that `run` starts, by name, from CUPTI; empty where that is not there."""
    if jax.default_backend() != "gpu":
        return {}
    try:
        # What jax.experimental.mosaic.gpu.profiler wraps, which cannot run donating programs.
        profiler: Any = importlib.import_module("jax.experimental.mosaic.gpu.profiler")
        cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
        cupti._cupti_init()
    except (ImportError, AttributeError, RuntimeError):
        return {}
    try:
        run()
    finally:
        try:  # True lets CUPTI go: it slows what runs under it
            timings = cupti._cupti_get_timings(True)
        except RuntimeError:
            timings = None
    total: dict[str, float] = {}
    for name, ms in timings or ():
        total[name] = total.get(name, 0.0) + ms
    return total

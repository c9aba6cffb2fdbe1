"""What is timed against each other on one case: each an op's implementation or another library's,
compiled as a chain, checked against the op's reference, and then timed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.stages import Compiled, Lowered

from pallas_kernels.cases import widened
from pallas_kernels.devices import DEVICES, Device
from tools.gpu_check import job as jobs
from tools.gpu_check.measure import Chain, Program, copies_for, nbytes, time_chain

# Largest error over the largest value of the float32 reference, by the dtype of the result.
# 16 bits: one rounding of the result is up to 2^-9 = 2e-3 of the value, and softmax's
# probabilities are rounded before their product. float32: sums run in another order.
TOLERANCE = {"bfloat16": 5e-3, "float16": 5e-3, "float32": 1e-5}
# Of others' results, ‖out - ref‖ / ‖ref‖: they may round their operands to 16 bits, which gives
# 1e-3 to 1e-2; another function gives 1.
OTHERS = 3e-2


def as_given(*args: Any) -> tuple:
    """Inputs that need no preparing."""
    return args


class Entrant(NamedTuple):
    """`run` of what `prepare` makes of the op's inputs. `prepare` is off the clock."""

    name: str
    run: Callable[..., Any]
    impl: str = "reference"  # whose inputs it takes
    prepare: Callable[..., tuple] = as_given
    options: Mapping[str, Any] = {}  # of XLA's compiler
    donated: tuple[int, ...] = ()
    whole: bool = False  # it returns what the op does; else the first of its comparable arrays
    same: bool = True  # it computes the op's result; False: a yardstick of the same size
    calls: int | None = None  # of its chain; None: measure.py's choice


class Compiling(NamedTuple):
    entrant: Entrant
    copies: int  # sets of inputs
    maker: Future  # a key -> one set of them
    program: Future


class Starter:
    """Lowers the programs of one case here, which holds Python's lock, and compiles them in
    `pool`, which does not. What entrants share is lowered once."""

    def __init__(self, op: str, case: Any, pool: ThreadPoolExecutor, dry_run: bool):
        self._op, self._case, self._pool, self._dry_run = op, case, pool, dry_run
        self._makers: dict[tuple, tuple[Any, Future]] = {}
        self._chains: dict[tuple, tuple[Chain, Lowered]] = {}

    def _maker(self, impl: str, prepare: Callable[..., tuple]) -> tuple[Any, Future]:
        """The shapes of prepared inputs, and the program that makes them."""
        if (impl, prepare) not in self._makers:
            make = jax.jit(maker_of(self._op, self._case, impl, prepare))
            lowered = make.lower(key_of(self._op, self._case, 0))
            self._makers[impl, prepare] = lowered.out_info, self._pool.submit(lowered.compile)
        return self._makers[impl, prepare]

    def entrant(self, entrant: Entrant) -> Compiling:
        try:
            shapes, maker = self._maker(entrant.impl, entrant.prepare)
            copies = copies_for(nbytes(shapes), self._dry_run)
            calls = copies if self._dry_run else entrant.calls
            key = (entrant.impl, entrant.prepare, entrant.run, calls)
            if key not in self._chains:
                chain = Chain(entrant.run, [shapes] * copies, calls=calls, donated=entrant.donated)
                self._chains[key] = chain, chain.lower()
            program = self._pool.submit(self._finish, *self._chains[key], entrant.options)
            return Compiling(entrant, copies, maker, program)
        except Exception as error:
            return Compiling(entrant, 0, failed(error), failed(error))

    def reference(self) -> tuple[Future, Future]:
        """What makes the reference's inputs, and the op's definition of them in float32."""
        try:
            shapes, maker = self._maker("reference", as_given)
            function = jobs.cases_of(self._op).call(self._case, "reference", DEVICES["cpu"])
            with jax.default_matmul_precision("highest"):
                definition = jax.jit(lambda *args: function(*widened(args))).lower(*shapes)
            return maker, self._pool.submit(definition.compile)
        except Exception as error:
            return failed(error), failed(error)

    @staticmethod
    def _finish(chain: Chain, lowered: Lowered, options: Mapping[str, Any]) -> Program:
        return chain.finish(lowered, options)


def failed(error: BaseException) -> Future:
    future: Future = Future()
    future.set_exception(error)
    return future


def maker_of(
    op: str, case: Any, impl: str, prepare: Callable[..., tuple] = as_given
) -> Callable[[jax.Array], tuple]:
    """Fresh random inputs for each key, the same ones for every implementation."""
    cases = jobs.cases_of(op)

    def make(key):
        args = cases.inputs(case, key, impl)
        # Fused with what follows, inputs would keep more bits than their dtype has.
        return tuple(prepare(*jax.lax.optimization_barrier(tuple(args))))

    return make


def key_of(op: str, case: Any, copy: int) -> jax.Array:
    """Of the generator that is quick to compile, and to fill gigabytes with."""
    return jax.random.key(sum(map(ord, op + case.name)) + copy, impl="unsafe_rbg")


def inputs(maker: Compiled, op: str, case: Any, copy: int) -> tuple:
    return maker(key_of(op, case, copy))


def reference(op: str, case: Any, started: tuple[Future, Future]) -> list[jax.Array]:
    """What every implementation must give for copy 0 of the inputs."""
    maker, definition = (future.result() for future in started)
    output = definition(*inputs(maker, op, case, 0))
    return jobs.comparable(jobs.cases_of(op), case, output)


def measure(
    op: str, case: Any, compiling: Compiling, wanted: Sequence[jax.Array] | None, seconds: float
) -> dict[str, Any]:
    """Check one entrant and time it; what went wrong where something did."""
    entrant, copies = compiling.entrant, compiling.copies
    report: dict[str, Any] = {"name": entrant.name}
    try:
        maker, program = compiling.maker.result(), compiling.program.result()
        make = lambda: [inputs(maker, op, case, copy) for copy in range(copies)]
        sets = make()
        report |= {"copies": copies, "input_MB": nbytes(sets[0]) / 1e6}
        if entrant.same and wanted is not None:
            output = first_output(program, sets)
            cases = jobs.cases_of(op)
            if entrant.whole:
                got = jobs.comparable(cases, case, output)
            else:  # padding rows, which the op's comparable leaves out, come last
                got = [output[: wanted[0].shape[0]]]
            report |= errors(got, wanted[: len(got)])
            del output, got
            sets = make() if entrant.donated else sets  # which the check has used up
        found = time_chain(program, sets, seconds)
        report |= {"ms": found.ms, "spread": found.spread}
        report |= {"kernel_ms": found.kernel_ms, "kernels": found.kernels}
    except Exception as error:
        report["why"] = jobs.why(error)
    return report


def first_output(program: Program, sets: Sequence[tuple]) -> Any:
    """What the first call of the chain returned."""
    given = [tuple(s[i] for i in program.donated) for s in sets]
    kept = [tuple(a for i, a in enumerate(s) if i not in program.donated) for s in sets]
    given, outputs = program.compiled(given, kept)
    return (*outputs[0], *given[0]) if program.donated else outputs[0]


@jax.jit
def _errors(got: jax.Array, want: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    g, w = got.astype(jnp.float32), want.astype(jnp.float32)
    off, most = jnp.abs(g - w), jnp.maximum(jnp.abs(w).max(), 1e-30)
    norm = lambda x: jnp.sqrt((x * x).sum())
    return off.max() / most, norm(g - w) / jnp.maximum(norm(w), 1e-30), jnp.isfinite(w).all()


def errors(got: Iterable[jax.Array], want: Iterable[jax.Array]) -> dict[str, float]:
    """The worst of all outputs; nan where something is not finite."""
    largest, l2, over = 0.0, 0.0, 0.0
    for g, w in zip(got, want, strict=True):
        if g.shape != w.shape:
            raise ValueError(f"a result of shape {g.shape}; the reference's is {w.shape}")
        off, norm, finite = (float(x) for x in _errors(g, w))
        bad = not finite or off != off or norm != norm
        largest, l2 = (float("nan"),) * 2 if bad else (max(largest, off), max(l2, norm))
        over = float("nan") if bad else max(over, off / TOLERANCE[g.dtype.name])
        if bad:
            break
    return {"max_error": largest, "l2_error": l2, "of_tolerance": over}


def own(op: str, case: Any, impl: str, device: Device, tiles: Any = None) -> Entrant:
    cases = jobs.cases_of(op)
    chosen = {} if tiles is None else {"tiles": tiles}
    return Entrant(
        name=impl,
        run=cases.call(case, impl, device, **chosen),
        impl=impl,
        whole=True,
        donated=tuple(getattr(cases, "DONATED", ())),
    )


def passes(report: Mapping[str, Any], ours: bool) -> bool:
    """Whether a checked result is the op's; nan is in no range."""
    return report["of_tolerance"] <= 1 if ours else report["l2_error"] <= OTHERS

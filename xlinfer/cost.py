"""What a program must do at least: operations of its products, and bytes of device memory.

XLA's own `cost_analysis` has nothing to say for GPUs that are described, and counts the body of a
scan once; so this counts from the jaxpr, by one rule for each primitive.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from xlinfer.deployment import Job


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one call, over all devices of the mesh together; of `decode`, for one token a row.

    `flops` are operations of products, two for a multiplication and an addition, by the dtype of
    the operands: the wider one; a kernel's widest float of less than 32 bits, if it has any, since
    scales are float32. Nothing else is counted.

        dot_general, ragged_dot   2 M N K of every batch; each row of a ragged_dot meets one group
        a kernel                  its cost_estimate; without one (GPUs), see `_from_shapes`
        scan, fori_loop           the body times the length, where that is a constant
        while                     the body once, since nobody knows: the cost is an iteration's
        cond                      the branch with the most operations, then the most bytes
        shard_map                 what one device does, times the devices

    `bytes` are those of a program whose every value but arguments and results stays on the chip:

        an argument               its size, once, if any operation reads it, however often; a
                                  reshape or transpose of it is the argument still
        what a scan slices        an iteration's slice times the length: its size, if it is read
        gather, slices            of an argument: what comes out, times the loops' lengths, up to
                                  the argument's size
        scatter, updates          of an argument: the update, twice for those that add
        a kernel                  its cost_estimate's bytes, in place of its operands and results
        a result                  its size; a donated argument that comes back, updated or not,
                                  counts what the updates did, and one not donated is a copy

    Constants are not counted, and an argument that several devices hold counts as one.
    """

    flops: Mapping[str, int]
    bytes: int
    flops_once: int  # with every scan's body counted once, as XLA counts

    @property
    def flops_total(self) -> int:
        return sum(self.flops.values())


def cost_of(job: Job) -> Cost:
    """Traces `job`; compiles nothing."""
    traced = jax.make_jaxpr(job.run)(*job.args)
    leaves = [jax.tree.leaves(arg) for arg in job.args]
    donated = [i in job.donated for i, arg in enumerate(leaves) for _ in arg]
    tally, results = _walk(traced.jaxpr, range(len(donated)))
    read, moved = tally.read, tally.moved
    for var, place in zip(traced.jaxpr.outvars, results, strict=True):
        if place is None or not donated[place]:
            moved += _bytes(var)
            read = read + _reading([var], [place])
    moved += sum(min(read[i], _bytes(var)) for i, var in enumerate(traced.jaxpr.invars))
    return Cost(flops=dict(tally.flops), bytes=moved, flops_once=tally.flops_once)


def multiplied(flops: float, cost: Cost) -> float:
    """The flops of XLA's `cost_analysis` of a program for one device, of which `cost` is the cost,
    with the products in a scan's body as often as they run."""
    return flops + cost.flops_total - cost.flops_once


Place = int | None  # the number of the argument that a value is, or is a part of


@dataclass(frozen=True)
class Tally:
    flops: Counter[str] = field(default_factory=Counter)
    read: Counter[int] = field(default_factory=Counter)  # of each argument, maybe more than it has
    moved: int = 0  # other bytes
    flops_once: int = 0

    def plus(self, other: "Tally") -> "Tally":
        return Tally(
            self.flops + other.flops, self.read + other.read,
            self.moved + other.moved, self.flops_once + other.flops_once,
        )  # fmt: skip

    def times(self, n: int) -> "Tally":
        many = lambda counts: Counter({key: n * count for key, count in counts.items()})
        return Tally(many(self.flops), many(self.read), n * self.moved, self.flops_once)


Outcome = tuple[Tally, Sequence[Place]]  # the places of the results


def _walk(jaxpr: Any, places: Sequence[Place]) -> Outcome:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    where: dict[Any, Place] = dict(zip(jaxpr.invars, places, strict=True))
    place_of = lambda var: None if isinstance(var, Literal) else where.get(var)
    total = Tally()
    for eqn in jaxpr.eqns:
        rule = RULES.get(eqn.primitive.name, _reads_all)
        tally, results = rule(eqn, [place_of(var) for var in eqn.invars])
        total = total.plus(tally)
        where.update(zip(eqn.outvars, results, strict=True))
    return total, [place_of(var) for var in jaxpr.outvars]


def _bytes(var: Any) -> int:
    return var.aval.size * jax.dtypes.itemsize_bits(var.aval.dtype) // 8


def _reading(variables: Sequence[Any], places: Sequence[Place]) -> Counter[int]:
    read: Counter[int] = Counter()
    for var, place in zip(variables, places, strict=True):
        if place is not None:
            read[place] += _bytes(var)
    return read


def _flops(dtype: Any, count: int) -> Tally:
    return Tally(flops=Counter({dtype.name: count} if count else {}), flops_once=count)


def _reads_all(eqn, places) -> Outcome:
    return Tally(read=_reading(eqn.invars, places)), [None] * len(eqn.outvars)


def _is_same(eqn, places) -> Outcome:
    return Tally(), places[: len(eqn.outvars)]


def _product(eqn, places) -> Outcome:
    x, y, *sizes = (var.aval for var in eqn.invars)
    ragged = eqn.params.get("ragged_dot_dimension_numbers")
    dims = ragged.dot_dimension_numbers if ragged else eqn.params["dimension_numbers"]
    (contracted, _), _ = dims
    count = 2 * eqn.outvars[0].aval.size * math.prod(x.shape[axis] for axis in contracted)
    if ragged and set(ragged.lhs_ragged_dimensions) & set(contracted):  # a result for each group
        count //= sizes[0].shape[-1]
    tally, results = _reads_all(eqn, places)
    return tally.plus(_flops(max(x.dtype, y.dtype, key=jax.dtypes.itemsize_bits), count)), results


def _picks(eqn, places) -> Outcome:
    tally, results = _reads_all(eqn, [None, *places[1:]])
    return tally.plus(Tally(read=_reading(eqn.outvars, places[:1]))), results


def _puts(eqn, places, *, update: int, times: int) -> Outcome:
    tally, _ = _reads_all(eqn, [None, *places[1:]])
    moved = 0 if places[0] is None else times * _bytes(eqn.invars[update])
    return tally.plus(Tally(moved=moved)), places[:1]


def _calls(eqn, places, *, name: str) -> Outcome:
    return _walk(eqn.params[name], places)


def _carried(before: Sequence[Place], after: Sequence[Place]) -> list[Place]:
    return [a if a == b else None for a, b in zip(before, after, strict=True)]


def _scan(eqn, places) -> Outcome:
    _, carry, _ = map(list, eqn.params["ft_in"].update(places).unpack())
    tally, results = _walk(eqn.params["jaxpr"], places)
    carried = _carried(carry, results[: len(carry)])
    return tally.times(eqn.params["length"]), [*carried, *[None] * (len(results) - len(carry))]


def _while(eqn, places) -> Outcome:
    of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = places[of_cond + of_body :]
    cond, _ = _walk(eqn.params["cond_jaxpr"], [*places[:of_cond], *carry])
    body, results = _walk(eqn.params["body_jaxpr"], places[of_cond:])
    return cond.plus(body), _carried(carry, results)


def _cond(eqn, places) -> Outcome:
    outcomes = [_walk(branch, places[1:]) for branch in eqn.params["branches"]]
    each = zip(*(results for _, results in outcomes), strict=True)
    same = [p[0] if len(set(p)) == 1 else None for p in each]
    size = lambda t: (t.flops.total(), t.read.total() + t.moved)
    return max((tally for tally, _ in outcomes), key=size), same


def _shard_map(eqn, places) -> Outcome:
    mesh, axes = eqn.params["mesh"], eqn.params["newly_manual_axes"]
    devices = math.prod(mesh.shape[axis] for axis in axes)
    tally, results = _walk(eqn.params["jaxpr"], places)
    return replace(tally.times(devices), flops_once=devices * tally.flops_once), results


def _kernel(eqn, places) -> Outcome:
    estimate, results = eqn.params["cost_estimate"], [None] * len(eqn.outvars)
    grid = eqn.params.get("grid_mapping")
    sizes = grid.num_dynamic_grid_bounds if grid else 0  # operands that come before all others
    for operand, result in dict(eqn.params["input_output_aliases"]).items():
        results[result] = places[sizes + operand]
    if estimate is None:
        count, tally = _from_shapes(eqn, places)
    else:
        count, tally = estimate.flops, Tally(moved=estimate.bytes_accessed)
    floats = {d for v in eqn.invars if jnp.issubdtype(d := v.aval.dtype, jnp.floating)}
    bits = jax.dtypes.itemsize_bits
    narrow = {d for d in floats if bits(d) < 32} or floats or {jnp.dtype("int32")}
    return tally.plus(_flops(max(narrow, key=bits), count)), results


def _from_shapes(eqn, places) -> tuple[int, Tally]:
    """Operations and bytes of a kernel without an estimate, by its operands' shapes.

    x [M, K] and later weights [.., N, K]: 2 M N K, and at most M of the matrices are read. Queries,
    then k and v [L, P, K, S, H], then page tables [R, M]: as in the TPU's estimate every page table
    is full, and where queries [K, X, H] are not by row, which is prefill, one row has them all;
    heads count with their padding. Others: none. Operands that are arguments are read.
    """
    avals = [var.aval for var in eqn.invars]
    of = lambda rank, kind: [a for a in avals if a.ndim == rank and jnp.issubdtype(a.dtype, kind)]
    if caches := of(5, jnp.floating):
        queries, (R, M), S = avals[0], of(2, jnp.integer)[-1].shape, caches[0].shape[3]
        pages = (R if queries.ndim == 4 else 1) * M
        page = sum(_bytes(v) // math.prod(v.aval.shape[:2]) for v in eqn.invars if v.aval.ndim == 5)
        others = [None if a.ndim == 5 else place for a, place in zip(avals, places, strict=True)]
        return 4 * queries.size * M * S, _reads_all(eqn, others)[0].plus(Tally(moved=pages * page))
    x = next((a for a in of(2, jnp.floating)), None)
    fits = lambda a: x is not None and a.ndim > 2 and a.shape[-1] == x.shape[1]
    at = next((i for i, a in enumerate(avals) if fits(a)), None)
    if x is None or at is None:
        return 0, _reads_all(eqn, places)[0]
    matrix = math.prod(avals[at].shape[-2:])
    read = _reading(eqn.invars, places)
    if (place := places[at]) is not None:
        read[place] = min(
            read[place], x.shape[0] * _bytes(eqn.invars[at]) * matrix // avals[at].size
        )
    return 2 * x.shape[0] * matrix, Tally(read=read)


def _table(rule: Callable, *names: str, **options: Any) -> dict[str, Callable]:
    return dict.fromkeys(names, partial(rule, **options))


# primitive -> rule; any other reads what it is given.
RULES: Mapping[str, Callable[[Any, Sequence[Place]], Outcome]] = {
    **_table(_is_same, "reshape", "squeeze", "transpose", "optimization_barrier"),
    **_table(_is_same, "with_memory_space_constraint", "sharding_constraint", "copy"),
    **_table(_product, "dot_general", "ragged_dot_general"),
    **_table(_picks, "gather", "dynamic_slice", "slice"),
    **_table(_puts, "dynamic_update_slice", update=1, times=1),
    **_table(_puts, "scatter", update=2, times=1),
    **_table(_puts, "scatter-add", "scatter-mul", "scatter-min", "scatter-max", update=2, times=2),
    **_table(_calls, "jit", "remat2", name="jaxpr"),
    **_table(_calls, "closed_call", "custom_jvp_call", "custom_vjp_call", name="call_jaxpr"),
    **_table(_calls, "custom_vmap_call", name="call"),
    **_table(_scan, "scan"),
    **_table(_while, "while"),
    **_table(_cond, "cond"),
    **_table(_shard_map, "shard_map"),
    **_table(_kernel, "pallas_call", "mpmd_map"),
}

"""Which tensors of a checkpoint make which parameter, as data. No jax.

A row reads like the table in a paper: target, source, and `axes`, the way from the source's
axes to the target's: "(K H) -> K H" splits the source's one axis into kv heads and head_dim, and
"(N H) D -> D (N H)" moves D to the front. Letters of the target that the source lacks count
sources: "I D -> E (P I) D" stacks the experts, and within each of them its parts, one after the
other along one axis. The letters:

D hidden  F ffw hidden  N query heads  K kv heads  H head_dim  V vocabulary  1 one
X groups of query heads, one for each kv head  G query heads of a group: N is X by G
E experts  R experts as the router scores them  P parts  I an expert's ffw hidden
S the shared expert's ffw hidden   M positions   B buckets of distances
Of latent attention: Q query's rank  C latent  L latent and rope part  U head_dim without rope
W head_dim of values

An axis of the source may hold several pieces, one after the other: "(N|K|K H) D -> D (K H)" has
the heads of q, k and v, of which the row says which piece is its own. Where they lie by turns,
each group of query heads before its kv head, q is "(X G|1|1 H)", and k and v are "(K G|1|1 H)".
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xlinfer.config import LayerKind, ModelConfig
from xlinfer.stacks import stacks

STACKED = "layers"  # a name of a target that has sources in each layer
# The second name of targets that not every layer has.
ONLY: Mapping[str, Callable[[LayerKind], bool]] = {
    "mlp": lambda kind: not kind.experts,
    "moe": lambda kind: kind.experts,
}
COUNTED = {"E": "expert", "P": "part"}  # letters that count sources, by their name in `source`
Axes = tuple[tuple[str, ...], ...]  # one group of letters for each axis


@dataclass(frozen=True)
class Row:
    """`source` holds "{layer}" where, and only where, "layers" is a name in `target`; "{expert}"
    and "{part}", one of `parts`, where E and P count sources."""

    target: str  # dotted path in the module; of all stacks of layers, without the stack's number
    source: str
    axes: str  # a letter that counts is the first of its axis
    parts: tuple[str, ...] = ()
    piece: int = 0  # of the source's axis that has several
    inputs: str | None = None  # of a matrix, which may be quantized: the axis that a product sums
    floats: str = ""  # why it is kept in floats even so
    # Of a scale, which a file has for each place of its axis, or one for all, or none: what else
    # files call it.
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The piece of a source that is meant: of the source seen as `view`, `start` to `stop` of
    `axis`."""

    view: tuple[int, ...]
    axis: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The way from a source's axes to its target's. Rules of one layout share one program."""

    source_axes: Axes
    sizes: tuple[int, ...]  # of the source's letters, groups opened
    target_axes: Axes  # the source's letters alone; an axis that counts may have none
    slot: tuple[int, ...]  # the shape that one source has in the target
    kv_replicas: int  # how often each kv head (K) stands in the target


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One parameter: `shape` (layers first where stacked) from `sources`, whose places begin at
    `starts`."""

    target: tuple[str | int, ...]  # the path in the module: "layers", then the stack's number
    axes: Axes  # without the layers
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    starts: tuple[tuple[int, ...], ...]
    source_shape: tuple[int, ...]
    cut: Cut | None  # None: the whole source
    layout: Layout  # of what is cut
    inputs: tuple[str, ...] | None = None  # of a matrix: the letters of the axis that is summed
    floats: str = ""
    # Of a scale: every name of each of `sources`, of which a file has one or none.
    names: tuple[tuple[str, ...], ...] = ()


def expand(rows: Iterable[Row], config: ModelConfig, kv_replicas: int = 1) -> tuple[Rule, ...]:
    """The rows with every shape worked out for `config`, the checkpoint's own."""
    sizes = {
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "X": config.num_kv_heads,
        "G": config.num_heads // config.num_kv_heads,
        "H": config.head_dim,
        "V": config.vocab_size,
        "M": config.max_position_embeddings,
        "P": 2,  # where a source holds gate and up by turns
        "1": 1,
    }
    if (moe := config.moe) is not None:
        sizes |= {"E": moe.num_experts, "R": moe.num_experts, "I": moe.intermediate_size}
        sizes |= {"S": moe.shared_intermediate_size or 0}
    if (encoder := config.encoder) is not None and encoder.relative_positions is not None:
        sizes["B"] = encoder.relative_positions.num_buckets
    if (mla := config.mla) is not None:
        sizes |= {"Q": mla.query_rank or 0, "C": mla.latent_dim, "U": mla.nope_dim}
        sizes |= {"L": mla.latent_dim + config.rotary_dim, "W": mla.value_dim}
    rules, kinds = [], config.kinds
    stacked = stacks(kinds)
    for row in rows:
        first, *rest = path = tuple(row.target.split("."))
        if STACKED not in path:
            rules.append(_rule(row, path, None, sizes, kv_replicas))
            continue
        if encoder is not None:  # a stack of its own for the encoder, and for the decoder
            layers = range(encoder.num_layers if first == "encoder" else config.num_layers)
            rules.append(_rule(row, path, layers, sizes, kv_replicas))
            continue
        has = ONLY.get(rest[0], lambda kind: True)
        for number, layers in enumerate(stacked):
            if has(kinds[layers.start]):
                rules.append(_rule(row, (first, number, *rest), layers, sizes, kv_replicas))
    return tuple(rules)


def _rule(
    row: Row,
    target: tuple[str | int, ...],
    layers: Sequence[int] | None,
    sizes: Mapping[str, int],
    kv_replicas: int,
) -> Rule:
    """`layers`: of the stack that the target is in."""
    of_source, of_target = row.axes.split(" -> ")
    source_axes, whole_sizes, cut = _pieces(_groups(of_source), row.piece, sizes)
    letters = tuple(letter for group in source_axes for letter in group)
    of_n = ("X", "G") if "X" in letters else ("N",)
    axes = tuple(
        tuple(a for letter in group for a in (of_n if letter == "N" else (letter,)))
        for group in _groups(of_target)
    )
    counted = [letter for group in axes for letter in group if letter not in letters]
    target_axes = tuple(tuple(a for a in group if a in letters) for group in axes)
    repeated = {**sizes, "K": sizes["K"] * kv_replicas}
    if row.parts:
        repeated["P"] = len(row.parts)
    shape, slot = (
        tuple(math.prod(repeated[letter] for letter in group) for group in groups)
        for groups in (axes, target_axes)
    )
    counts = {
        COUNTED[letter]: row.parts if letter == "P" else range(repeated[letter])
        for letter in counted
    }
    if layers is not None:
        counts = {"layer": layers, **counts}
        shape, slot, target_axes = (len(layers), *shape), (1, *slot), ((), *target_axes)
    named = lambda name: tuple(
        name.format(**dict(zip(counts, of_source, strict=True)))
        for of_source in itertools.product(*counts.values())
    )
    sources = named(row.source)
    return Rule(
        target=target,
        axes=axes,
        shape=shape,
        sources=sources,
        starts=tuple(
            itertools.product(*(range(0, n, one) for n, one in zip(shape, slot, strict=True)))
        ),
        source_shape=tuple(map(math.prod, whole_sizes)),
        cut=cut,
        layout=Layout(
            source_axes=source_axes,
            sizes=tuple(sizes[letter] for letter in letters),
            target_axes=target_axes,
            slot=slot,
            kv_replicas=kv_replicas,
        ),
        inputs=_groups(row.inputs)[0] if row.inputs else None,
        floats=row.floats,
        names=tuple(zip(sources, *map(named, row.aliases), strict=True)) if row.aliases else (),
    )


def _groups(axes: str) -> Axes:
    """ "(N H) D" as (("N", "H"), ("D",))."""
    return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\w", axes))


def _pieces(
    groups: Axes, piece: int, sizes: Mapping[str, int]
) -> tuple[Axes, list[list[int]], Cut | None]:
    """The axes with the piece that is meant in place of "N|K|K", the sizes of each group's axes in
    the whole source, and what to cut out of it."""
    letters = tuple(
        tuple(letter for axis in group for letter in _piece(axis, piece)) for group in groups
    )
    of = lambda axis: sum(sizes[letter] for letter in axis.split("|"))
    whole = [[of(axis) for axis in group] for group in groups]
    flat = [axis for group in groups for axis in group]
    for at, axis in enumerate(flat):
        if "|" in axis:
            ends = list(itertools.accumulate((sizes[a] for a in axis.split("|")), initial=0))
            view = tuple(itertools.chain(*whole))
            return letters, whole, Cut(view=view, axis=at, start=ends[piece], stop=ends[piece + 1])
    return letters, whole, None


def _piece(axis: str, piece: int) -> tuple[str, ...]:
    """Of an axis, the letter that is meant; none where that is one of several and has size 1."""
    if "|" not in axis:
        return (axis,)
    letter = axis.split("|")[piece]
    return () if letter == "1" else (letter,)


def cut_out(source: np.ndarray, rule: Rule) -> np.ndarray:
    """What `rule` takes of its source: a view of it, [...] as the layout's source_axes."""
    if (cut := rule.cut) is None:
        return source
    index = (slice(None),) * cut.axis + (slice(cut.start, cut.stop),)
    part = source.reshape(cut.view)[index]
    sizes = iter(rule.layout.sizes)
    return part.reshape([math.prod(next(sizes) for _ in g) for g in rule.layout.source_axes])


def put_back(source: np.ndarray, value: np.ndarray, rule: Rule) -> None:
    """Write into `source` what `rule` takes of it, given as it lies in the target: `value`, of the
    layout's slot. The inverse of what loading does; kv heads must not be repeated."""
    if (cut := rule.cut) is not None:
        source = source.reshape(cut.view)  # of a whole tensor, so a view
        source = source[(slice(None),) * cut.axis + (slice(cut.start, cut.stop),)]
    layout = rule.layout
    letters = [letter for group in layout.source_axes for letter in group]
    order = [letter for group in layout.target_axes for letter in group]
    sizes = dict(zip(letters, layout.sizes, strict=True))
    opened = value.reshape([sizes[letter] for letter in order])
    moved = opened.transpose([order.index(letter) for letter in letters])
    source[...] = moved.reshape(source.shape)

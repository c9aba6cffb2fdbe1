"""Which tensors of a checkpoint make which parameter, as data; proven before any is read. No jax.

A row reads like the table in a paper: target, source, and `axes`, the way from the source's
axes to the target's: "(K H) -> K H" splits the source's one axis into kv heads and head_dim, and
"(N H) D -> D (N H)" moves D to the front. The letters:

D hidden  F ffw hidden  N query heads  K kv heads  H head_dim  V vocabulary
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.errors import CheckpointError, listing
from converters.formats.safetensors import TensorInfo
from xlinfer.config import ModelConfig

STACKED = "layers"  # the first name of a target that has one source a layer
Axes = tuple[tuple[str, ...], ...]  # one group of letters for each axis


@dataclass(frozen=True)
class Row:
    """`source` holds "{layer}" where, and only where, `target` begins with "layers."."""

    target: str  # dotted path in the module
    source: str
    axes: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The way from a source's axes to its target's. Rules of one layout share one program."""

    source_axes: Axes
    sizes: tuple[int, ...]  # of the source's letters, groups opened
    target_axes: Axes  # without the layers
    kv_replicas: int  # how often each kv head (K) stands in the target


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One parameter: `shape` (layers first where stacked) from `sources`, in order of layer."""

    target: tuple[str, ...]
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source_shape: tuple[int, ...]
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class Step:
    """Write `tensor` into `rule`'s parameter, at `layer` where that is stacked."""

    tensor: TensorInfo
    rule: Rule
    layer: int


def expand(rows: Iterable[Row], config: ModelConfig, kv_replicas: int = 1) -> tuple[Rule, ...]:
    """The rows with every shape worked out for `config`, the checkpoint's own."""
    sizes = {
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "V": config.vocab_size,
    }
    return tuple(_rule(row, config.num_layers, sizes, kv_replicas) for row in rows)


def _rule(row: Row, layers: int, sizes: Mapping[str, int], kv_replicas: int) -> Rule:
    source_axes, target_axes = map(_groups, row.axes.split(" -> "))
    path = tuple(row.target.split("."))
    stacked = path[0] == STACKED
    repeated = {**sizes, "K": sizes["K"] * kv_replicas}
    shape = tuple(math.prod(repeated[axis] for axis in group) for group in target_axes)
    names = range(layers) if stacked else range(1)
    return Rule(
        target=path,
        shape=(layers, *shape) if stacked else shape,
        sources=tuple(row.source.format(layer=layer) for layer in names),
        source_shape=tuple(math.prod(sizes[axis] for axis in group) for group in source_axes),
        layout=Layout(
            source_axes=source_axes,
            sizes=tuple(sizes[axis] for group in source_axes for axis in group),
            target_axes=target_axes,
            kv_replicas=kv_replicas,
        ),
    )


def _groups(axes: str) -> Axes:
    """ "(N H) D" as (("N", "H"), ("D",))."""
    return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\w", axes))


def schedule(
    rules: Iterable[Rule],
    tensors: Mapping[str, TensorInfo],
    ignored: Iterable[str],
    where: Path,
) -> tuple[Step, ...]:
    """Every tensor with its place, in the order of files and bytes.

    `ignored` are patterns of names that a checkpoint may hold beside them; `where` begins an
    error. Raises CheckpointError naming the tensors that are missing, left over or of another
    shape than the config asks for.
    """
    steps = [(source, rule, layer) for rule in rules for layer, source in enumerate(rule.sources)]
    wanted = {source for source, _, _ in steps}
    missing = [source for source, _, _ in steps if source not in tensors]
    patterns = [re.compile(pattern) for pattern in ignored]
    left_over = [
        name
        for name in tensors
        if name not in wanted and not any(pattern.fullmatch(name) for pattern in patterns)
    ]
    wrong = [
        f"{source} has shape {list(tensors[source].shape)} where the config asks for "
        f"{list(rule.source_shape)}"
        for source, rule, _ in steps
        if source in tensors and tensors[source].shape != rule.source_shape
    ]
    faults = [
        *([f"missing: {listing(missing)}"] if missing else []),
        *(
            [f"left over, without a place in this family: {listing(left_over)}"]
            if left_over
            else []
        ),
        *([listing(wrong)] if wrong else []),
    ]
    if faults:
        raise CheckpointError(f"{where}: tensors do not fit config.json: " + "; ".join(faults))
    found = [Step(tensor=tensors[source], rule=rule, layer=layer) for source, rule, layer in steps]
    return tuple(sorted(found, key=lambda step: (step.tensor.file, step.tensor.offset)))

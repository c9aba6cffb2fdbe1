"""A rule for float weights, as it holds for weights that a quantized format has.

Unpacked, a matrix is [N, K], or of all experts [E, N, K], with its outputs in the order of the
source. Its numbers and scales then take the way that the rule has for floats: what the rule does
to the outputs, pieces and all, is done to each of them; inputs stay as they are.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from converters.errors import CheckpointError
from converters.formats.packing import Matrix, Packing, Round, Scheme
from converters.rules import STACKED, Axes, Cut, Layout, Rule, cut_out
from xlinfer.config import ModelConfig
from xlinfer.forms import FP8_BLOCK, Form
from xlinfer.stacks import stacks

EXPERTS = ("E",)
OUT, IN, WHOLE = "out", "in", "whole"  # the axes of a form's arrays; WHOLE: as IN, never split


def matrix_of(rule: Rule, source: str) -> Matrix:
    """What a format is to hold. Raises CheckpointError where the rule reorders the inputs."""
    groups = rule.layout.source_axes
    order = _order(rule)
    if groups[order[-1]] not in rule.axes and not rule.floats:
        raise CheckpointError(f"{source}: its inputs are reordered; quantized ones cannot be")
    stored = rule.source_shape
    return Matrix(tensor=source, shape=tuple(stored[i] for i in order), stored=stored, axes=order)


def _order(rule: Rule) -> tuple[int, ...]:
    """The source's axes as experts, outputs, inputs."""
    groups, inputs = rule.layout.source_axes, rule.inputs
    assert inputs is not None
    lead = [i for i, group in enumerate(groups) if group == EXPERTS]
    inside = groups.index(inputs)
    (outside,) = (i for i in range(len(groups)) if i not in (*lead, inside))
    return (*lead, outside, inside)


def packings(rule: Rule, scheme: Scheme | None) -> Mapping[str, Packing]:
    """By its sources; empty for what has float weights."""
    if scheme is None or rule.inputs is None:
        return {}
    if STACKED not in rule.target and rule.target[0] not in scheme.outside:
        return {}
    found = {source: scheme.packing(matrix_of(rule, source)) for source in rule.sources}
    held = {source: packing for source, packing in found.items() if packing is not None}
    if not rule.floats:
        return held
    rounded = [s for s, packing in held.items() if isinstance(packing.code, Round)]
    return {
        source: replace(packing, form=None, why=rule.floats)
        for source, packing in held.items()
        if source not in rounded
    }


def form_of_rule(rule: Rule, held: Mapping[str, Packing], where: str) -> Form | None:
    """The form of the rule's parameter; None: floats. Raises CheckpointError where its sources
    differ."""
    forms = {source: held[source].form if source in held else None for source in rule.sources}
    (first, form), *others = forms.items()
    for source, other in others:
        if other != form:
            say = lambda f: "float" if f is None else f.describe()
            raise CheckpointError(
                f"{where}: {source} is {say(other)} and {first} {say(form)}; they are parts of one "
                "parameter, so they must be alike"
            )
    if form is None:
        return None
    # The kernels for experts round inputs by token, and take no scale of a whole expert whose gate
    # and up may have one each.
    if form.scales == "tensor" and (EXPERTS in rule.axes or rule.cut):
        form = replace(form, scales="channel", input_scale=False)
    if EXPERTS in rule.axes:
        form = replace(form, input_scale=False)
    rounds = all(isinstance(packing.code, Round) for packing in held.values())
    if form.scales == "block" and not _keeps_blocks(rule, rounds):
        inputs = matrix_of(rule, first).shape[-1]
        form = None if inputs % FP8_BLOCK else replace(form, scales="group", group=FP8_BLOCK)
    return form


def with_weight_forms(config: ModelConfig, rules: Iterable[Rule], scheme: Scheme) -> ModelConfig:
    """`config` with layers told apart whose weights `scheme` holds in different forms; `rules` are
    those of `config`."""
    all_layers = stacks(config.kinds)
    found: list[dict[str, Form | None]] = [{} for _ in range(config.num_layers)]
    for rule in rules:
        if rule.target[0] != STACKED or rule.inputs is None or config.encoder is not None:
            continue
        held = packings(rule, scheme)
        layers = all_layers[int(rule.target[1])]
        each = len(rule.sources) // len(layers)
        name = ".".join(map(str, rule.target[2:]))
        for i, layer in enumerate(layers):
            sources = rule.sources[i * each : (i + 1) * each]
            forms = {held[s].form if s in held else None for s in sources}
            found[layer][name] = forms.pop() if len(forms) == 1 else None
    kinds = [tuple(forms.items()) for forms in found]
    numbers = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    return replace(config, weight_forms=tuple(numbers[kind] for kind in kinds))


def _keeps_blocks(rule: Rule, rounds: bool) -> bool:
    """Whether each block of 128 outputs is one of the source's: what is rounded here is rounded
    in its place, so there it only has to begin with a block."""
    rows = array_rule(rule, (OUT,), 0)
    if any(start[-1] % FP8_BLOCK for start in rows.starts):
        return False
    if rounds:
        return True
    outputs = np.broadcast_to(np.arange(rows.source_shape[-1]), rows.source_shape)
    moved = placed(cut_out(outputs, rows), rows.layout).reshape(-1, rows.layout.slot[-1])[0]
    first = moved[::FP8_BLOCK]
    block = np.repeat(first, FP8_BLOCK)[: len(moved)] + np.arange(len(moved)) % FP8_BLOCK
    return bool((first % FP8_BLOCK == 0).all() and (moved == block).all())


def placed(value: np.ndarray, layout: Layout) -> np.ndarray:
    """`value` as it lies in the target: what weights.py does on the device."""
    letters = [letter for group in layout.source_axes for letter in group]
    order = [letter for group in layout.target_axes for letter in group]
    value = value.reshape(layout.sizes).transpose([letters.index(letter) for letter in order])
    if layout.kv_replicas > 1 and "K" in order:
        value = value.repeat(layout.kv_replicas, axis=order.index("K"))
    return value.reshape(layout.slot)


def array_rule(rule: Rule, axes: tuple[str, ...], size: int) -> Rule:
    """`rule` for an array of a form with these `axes` for each matrix, where IN and WHOLE have
    `size`; its source has the experts, if it has them in one tensor, then OUT, then IN."""
    order, old = _order(rule), rule.layout
    at = list(itertools.accumulate((len(g) for g in old.source_axes), initial=0))
    letters_of = lambda i: old.source_axes[i]
    whole = list(rule.cut.view) if rule.cut else list(old.sizes)
    groups, sizes, view, cut = [], [], [], None
    kept = [i for i in order[:-1] if OUT in axes or letters_of(i) == EXPERTS]
    for i in kept:
        groups.append(letters_of(i))
        for j in range(at[i], at[i + 1]):
            if rule.cut and j == rule.cut.axis:
                cut = replace(rule.cut, axis=len(view))
            sizes.append(old.sizes[j])
            view.append(whole[j])
    if IN in axes or WHOLE in axes:
        groups.append((IN,))
        sizes.append(size)
        view.append(size)
    if cut is not None:
        cut = replace(cut, view=tuple(view))
    source_shape = tuple(
        math.prod(view[sum(map(len, groups[:i])) : sum(map(len, groups[: i + 1]))])
        for i in range(len(groups))
    )
    return _targeted(rule, axes, size, tuple(groups), tuple(sizes), source_shape, cut)


def _targeted(
    rule: Rule, axes: tuple[str, ...], size: int, groups: Axes, sizes: tuple[int, ...],
    source_shape: tuple[int, ...], cut: Cut | None,
) -> Rule:  # fmt: skip
    old, stacked = rule.layout, STACKED in rule.target
    skip = 1 if stacked else 0  # the target's axes begin with the layers
    lead = list(range(skip + (EXPERTS in rule.axes)))
    outside = next(i + skip for i, g in enumerate(rule.axes) if g not in (EXPERTS, rule.inputs))
    where = {OUT: outside}
    shape, slot, target_axes = [], [], []
    starts: list[list[int]] = [[] for _ in rule.starts]
    for i in (*lead, *axes):
        if isinstance(i, str) and i != OUT:
            shape.append(size)
            slot.append(size)
            target_axes.append((IN,))
            for start in starts:
                start.append(0)
            continue
        j = where[i] if isinstance(i, str) else i
        shape.append(rule.shape[j])
        slot.append(old.slot[j])
        target_axes.append(old.target_axes[j])
        for start, whole in zip(starts, rule.starts, strict=True):
            start.append(whole[j])
    return replace(
        rule, axes=rule.axes, shape=tuple(shape), starts=tuple(map(tuple, starts)),
        source_shape=source_shape, cut=cut, inputs=None,
        layout=Layout(
            source_axes=groups, sizes=sizes, target_axes=tuple(target_axes), slot=tuple(slot),
            kv_replicas=old.kv_replicas,
        ),
    )  # fmt: skip

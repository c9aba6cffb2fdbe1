"""Every tensor of a checkpoint with its place among the parameters, proven before any is read."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.errors import CheckpointError, listing
from converters.formats.packing import FLOATS, Code, Matrix, Packing, Part, Parts, Scheme
from converters.formats.safetensors import TensorInfo
from converters.kv_scales import check_scale, is_kv_scale
from converters.packed import matrix_of, packings
from converters.rules import Rule


@dataclass(frozen=True, kw_only=True)
class Step:
    """Write `tensor` into `rule`'s parameter, where source number `source` belongs."""

    tensor: TensorInfo
    rule: Rule
    source: int

    @property
    def start(self) -> tuple[int, ...]:
        return self.rule.starts[self.source]

    @property
    def nbytes(self) -> int:
        """Of what is written: the tensor's, or of the piece that is meant."""
        return math.prod(self.rule.layout.sizes) * self.tensor.dtype.itemsize

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {"weight": self.tensor}


@dataclass(frozen=True, kw_only=True)
class PackedStep:
    """Make numbers of `tensors`, as `packing` says, and write them into the arrays of `rule`'s
    parameter, where source number `source` belongs."""

    matrix: Matrix
    scheme: Scheme
    packing: Packing
    tensors: Mapping[str, TensorInfo]  # by what each is in the packing
    rule: Rule
    source: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def settle(self, parts: Parts) -> tuple[Code, Parts]:
        """What `tensors` hold, checked: raises CheckpointError naming the file and the matrix."""
        file = next(iter(self.tensors.values())).file
        return self.scheme.settle(self.packing.code, parts, f"{file}: {self.matrix.module}")


@dataclass(frozen=True, kw_only=True)
class ScaleStep:
    """Write what `tensor` holds, one number or one for each kv head, into `rule`'s parameter, from
    index `start` on; 1 where there is no tensor."""

    tensor: TensorInfo | None
    rule: Rule
    start: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return 0 if self.tensor is None else self.tensor.nbytes

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {} if self.tensor is None else {"weight": self.tensor}

    def settle(self, held: np.ndarray | None) -> np.ndarray:
        """What is to be written, float32: as the tensor's data `held` say, which are checked.
        Raises CheckpointError."""
        heads, replicas = self.rule.layout.sizes, self.rule.layout.kv_replicas
        scale = np.ones(1, np.float32)
        if held is not None:
            assert self.tensor is not None
            scale = check_scale(held, f"{self.tensor.file}: {self.tensor.name}")
        return np.broadcast_to(scale, heads).repeat(replicas)


AnyStep = Step | PackedStep | ScaleStep


def schedule(
    rules: Iterable[Rule],
    scheme: Scheme | None,
    tensors: Mapping[str, TensorInfo],
    ignored: Iterable[str],
    where: Path,
) -> tuple[AnyStep, ...]:
    """Every tensor with its place, in the order of files and bytes.

    `ignored` are patterns of names that a checkpoint may hold beside them; `where` begins an
    error. Raises CheckpointError naming the tensors that are missing, left over, or of another
    shape or dtype than the config asks for.
    """
    rules = tuple(rules)
    held = {rule.target: packings(rule, scheme) for rule in rules}
    faults = _Faults()
    wanted: set[str] = set()
    steps: list[AnyStep] = []
    for rule in rules:
        if rule.names:
            for names, start in zip(rule.names, rule.starts, strict=True):
                wanted.update(names)
                tensor = faults.one(rule, tensors, names)
                steps.append(ScaleStep(tensor=tensor, rule=rule, start=start))
            continue
        for i, source in enumerate(rule.sources):
            packing = held[rule.target].get(source)
            parts = {"weight": _plain(rule)} if packing is None else packing.parts
            found = {}
            for role, part in parts.items():
                name = _name(source, part)
                wanted.add(name)
                if (tensor := tensors.get(name)) is not None:
                    found[role] = tensor
                    faults.check(tensor, part, packing is not None)
                elif not part.optional:
                    faults.missing.append(name)
            if packing is None and "weight" in found:
                steps.append(Step(tensor=found["weight"], rule=rule, source=i))
            elif packing is not None and found:
                assert scheme is not None
                step = PackedStep(
                    matrix=matrix_of(rule, source), scheme=scheme, packing=packing, tensors=found,
                    rule=rule, source=i,
                )  # fmt: skip
                steps.append(step)
    patterns = [re.compile(pattern) for pattern in ignored]
    faults.left_over = [
        name
        for name in tensors
        if name not in wanted and not any(pattern.fullmatch(name) for pattern in patterns)
    ]
    faults.raise_for(where, scheme)
    place = lambda step: min(
        ((t.file, t.offset) for t in step.tensors.values()), default=(where, 0)
    )
    return tuple(sorted(steps, key=place))


def _plain(rule: Rule) -> Part:
    return Part(suffix=None, shapes=(rule.source_shape,), dtypes=FLOATS)


def _name(source: str, part: Part) -> str:
    return source if part.suffix is None else source.removesuffix(".weight") + part.suffix


class _Faults:
    """What is wrong with a checkpoint's tensors, collected to be said at once."""

    def __init__(self):
        self.missing: list[str] = []
        self.left_over: list[str] = []
        self.shapes: list[str] = []
        self.dtypes: list[str] = []
        self.twice: list[str] = []

    def check(self, tensor: TensorInfo, part: Part, packed: bool) -> None:
        if part.shapes and tensor.shape not in part.shapes:
            asked = " or ".join(str(list(shape)) for shape in part.shapes)
            self.shapes.append(
                f"{tensor.name} has shape {list(tensor.shape)} where the config asks for {asked}"
            )
        if tensor.dtype.name not in part.dtypes:
            self.dtypes.append(
                f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype.name}; "
                + (
                    f"in this format it must be {' or '.join(part.dtypes)}"
                    if packed
                    else "without a quantization_config a weight must be F64, F32, F16 or BF16"
                )
            )

    def one(
        self, rule: Rule, tensors: Mapping[str, TensorInfo], names: tuple[str, ...]
    ) -> TensorInfo | None:
        """The tensor that has one of a scale's names."""
        found = [tensors[name] for name in names if name in tensors]
        if len(found) > 1:
            self.twice.append(" and ".join(tensor.name for tensor in found))
        (heads,) = rule.source_shape
        part = Part(suffix=None, shapes=((), (1,), (heads,), (heads, 1, 1)), dtypes=FLOATS)
        for tensor in found:
            self.check(tensor, part, False)
        return found[0] if found else None

    def raise_for(self, where: Path, scheme: Scheme | None) -> None:
        of = "config.json" if scheme is None else f"config.json, whose format is {scheme.name}"
        said = {
            "missing: ": self.missing,
            "left over, without a place in this family: ": self.left_over,
            "of which one is meant: ": self.twice,
            "": self.shapes,
        }
        faults = [
            intro + listing(list(dict.fromkeys(names))) for intro, names in said.items() if names
        ]
        if any(is_kv_scale(name) for name in self.left_over):
            faults.append(
                "scales of a KV cache are read where the quantization_config says kv_cache_scheme "
                "or kv_cache_quant_algo"
            )
        if faults:
            raise CheckpointError(f"{where}: tensors do not fit {of}: " + "; ".join(faults))
        if self.dtypes:
            raise CheckpointError(self.dtypes[0])

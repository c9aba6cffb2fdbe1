"""What every quantized format says of a matrix: the tensors that hold it, how their bytes are to be
read, and the form in which it stays in memory. No jax; xlinfer/unpack.py does what a Code says.

K inputs   N outputs   G groups of K/G inputs each
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

import numpy as np

from converters.errors import CheckpointError, listing
from xlinfer.forms import Form, form_of

FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """What a family's table asks for where a format is to say how it is held."""

    tensor: str  # the name of float weights
    shape: tuple[int, ...]  # [N, K], or of all experts [E, N, K]
    stored: tuple[int, ...]  # of float weights
    axes: tuple[int, ...]  # of `stored`, in the order of `shape`

    @property
    def module(self) -> str:
        return self.tensor.removesuffix(".weight")

    def two_axes(self, where: str, name: str) -> tuple[int, int]:
        """N and K. Raises CheckpointError for experts in one tensor."""
        if len(self.shape) != 2:
            raise CheckpointError(
                f"{where}: {self.tensor} holds all experts, {list(self.shape)}, and {name} "
                "has no layout for that"
            )
        return self.shape[0], self.shape[1]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the tensors that hold a matrix; its name is the module's with `suffix`, or where that
    is None the float weights'."""

    suffix: str | None
    shapes: tuple[tuple[int, ...], ...]  # any of them
    dtypes: tuple[str, ...]  # any of them
    optional: bool = False


Code = Any  # one of the frozen dataclasses that the formats define: how parts become numbers
Parts = Mapping[str, np.ndarray]  # by what each is in the code


@dataclass(frozen=True, kw_only=True)
class Packing:
    """A Matrix as a format has it."""

    form: Form | None  # None: no form of ours holds it, and `why`; it becomes floats as it is read
    code: Code
    parts: Mapping[str, Part]
    why: str = ""


class Scheme(Protocol):
    """What a checkpoint's quantization_config says."""

    @property
    def name(self) -> str:
        """The format, in the words of its users."""
        ...

    @property
    def listed(self) -> tuple[str, ...]:
        """The modules that it leaves as they are, as it names them."""
        ...

    @property
    def outside(self) -> frozenset[str]:
        """The parameters outside of the layers that it may hold; those in layers it may hold."""
        ...

    def packing(self, matrix: Matrix) -> Packing | None:
        """None: it has float weights. Raises CheckpointError where the format cannot hold such a
        matrix."""
        ...

    def settle(self, code: Code, parts: Parts, where: str) -> tuple[Code, Parts]:
        """What only the data says, checked: raises CheckpointError, beginning with `where`, for
        data that the format does not allow."""
        ...


@dataclass(frozen=True)
class Round:
    """A float matrix, to be rounded: its axes in the order `axes` are [E, N, K] or [N, K]."""

    method: str
    axes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class OnLoad:
    """Float weights that the user wants in few bits: every matrix of the layers."""

    method: str
    name: str = "float"
    listed: tuple[str, ...] = ()
    outside: frozenset[str] = frozenset()

    def packing(self, matrix: Matrix) -> Packing | None:
        part = Part(suffix=None, shapes=(matrix.stored,), dtypes=FLOATS)
        form = form_of(self.method, matrix.shape[-1])
        return Packing(form=form, code=Round(self.method, matrix.axes), parts={"weight": part})

    def settle(self, code: Code, parts: Parts, where: str) -> tuple[Code, Parts]:
        return code, parts


def check_known(where: str, name: str, values: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise CheckpointError for a key of a quantization_config that might change what weights are,
    and is not known."""
    if unknown := sorted(values.keys() - set(known)):
        raise CheckpointError(f"{where}: xlinfer does not know {', '.join(unknown)} of {name}")


KINDS: Mapping[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
}


def check_kind(where: str, values: Mapping[str, Any], kind: type, *names: str) -> None:
    """Raise CheckpointError for one of the `names` whose value is neither null nor of `kind`."""
    for name in names:
        if (value := values.get(name)) is not None and not isinstance(value, kind):
            raise CheckpointError(f"{where}: {name!r} is {value!r}; it must be {KINDS[kind]}")


def check_finite(name: str, scale: np.ndarray, where: str) -> None:
    """Raise CheckpointError for scales of which some are infinite or no numbers."""
    _check_none(~np.isfinite(scale.astype(np.float32)), name, where)


def check_powers(name: str, scale: np.ndarray, where: str) -> None:
    """The same for powers of two (E8M0), of which 255 is no number."""
    _check_none(scale == 255, name, where)


def _check_none(bad: np.ndarray, name: str, where: str) -> None:
    if count := int(bad.sum()):
        raise CheckpointError(f"{where}: {count} of {bad.size} numbers of {name} are not finite")


def covers(pattern: str, module: str) -> bool:
    """Whether an entry of a list of modules means `module`: "re:" and a regular expression that
    its name begins with; or parts of the name that follow each other, as "lm_head", "mlp.gate" and
    "model.layers.0" do, where "*" stands for any letters of one part."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    wanted, parts = pattern.strip(".").split("."), module.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(fnmatchcase, parts[i:], wanted)) for i in starts)


def check_patterns(patterns: Any, where: str) -> tuple[str, ...]:
    """The list, if it is one of names, or null; raises CheckpointError for another, and for a wrong
    regular expression."""
    if not isinstance(patterns, list | None):
        raise CheckpointError(f"{where} is {patterns!r}; it must be a list of module names")
    for pattern in patterns or ():
        if not isinstance(pattern, str):
            raise CheckpointError(f"{where} holds {pattern!r}; it must be a list of module names")
        if pattern.startswith("re:"):
            check_expression(pattern.removeprefix("re:"), f"{where} holds {pattern!r}")
    return tuple(patterns or ())


def check_expression(expression: str, where: str) -> None:
    """Raise CheckpointError for a wrong regular expression."""
    try:
        re.compile(expression)
    except re.error as error:
        raise CheckpointError(f"{where}, no regular expression: {error}") from None


def check_all_match(patterns: Iterable[str], modules: Iterable[str], where: str) -> None:
    """Raise CheckpointError naming entries that mean none of `modules`: a list that was written
    for other names would leave what it means in another format than the file has."""
    known = tuple(modules)
    lost = [p for p in patterns if not any(covers(p, module) for module in known)]
    if lost:
        raise CheckpointError(
            f"{where} names what the checkpoint does not have: {listing(lost)}. Its modules have "
            f"names like {listing(list(known[:2]))}"
        )

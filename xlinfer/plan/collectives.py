"""What a step's devices exchange: which collectives there are to be, and of how many bytes.

From the model's sizes and the mesh alone. Tests hold programs that XLA compiled to it, for CPUs and
for TPU slices. What sampling exchanges, some numbers of each row, is not counted. No jax.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["all-reduce", "all-gather"]


@dataclass(frozen=True, kw_only=True)
class Collective:
    kind: Kind
    of: str
    devices: int  # that exchange it
    layers: int | None  # it happens once in each of so many; None: once in a step
    token_bytes: int  # of a token, in the result
    parts: int  # of a step's tokens, of which the result has one; 1: it has all

    @property
    def times(self) -> int:
        return 1 if self.layers is None else self.layers

    def result_bytes(self, tokens: int) -> int:
        """Of one of them, on each device, in a step of so many tokens."""
        return self.token_bytes * -(-tokens // self.parts)

    def sent_bytes(self, tokens: int) -> float:
        """By each device in a step. A ring sends every part around once to spread it, and once
        more where it is to be added up before."""
        rounds = 2 if self.kind == "all-reduce" else 1
        once = self.result_bytes(tokens) * rounds * (self.devices - 1) / self.devices
        return self.times * once


@dataclass(frozen=True, kw_only=True)
class Layers:
    """How many layers have what; bytes are of a token, on one device."""

    attention: int
    cross_attention: int  # to an encoder's output
    mlp: int
    experts: int
    gated_experts: int  # a shared expert, whose output is multiplied before it is added
    norms_of_heads: int  # vectors of a token that are normalized over all heads together
    hidden_bytes: int
    kept_bytes: tuple[int, ...]  # of each array that goes into the cache


def collectives(
    layers: Layers, *, devices: int, parts: int, embedding_is_split: bool
) -> tuple[Collective, ...]:
    """`devices` share each layer, and there are so many for each of `parts` of a step's tokens."""
    reduced = [
        *((of, count, layers.hidden_bytes) for of, count in (
            ("attention", layers.attention), ("attention to the prompt", layers.cross_attention),
            ("MLP", layers.mlp), ("experts", layers.experts),
            ("shared expert", layers.gated_experts),
        )),
        *[("mean square of heads", layers.attention, 4)] * layers.norms_of_heads,
        *[("embedding", None, layers.hidden_bytes)] * embedding_is_split,
    ]  # fmt: skip
    gathered = [
        *(("keys and values", layers.attention, size) for size in layers.kept_bytes),
        ("hidden states", None, layers.hidden_bytes),
    ]
    make = lambda kind, devices, parts, rows: [
        Collective(
            kind=kind, of=of, devices=devices, layers=count, token_bytes=size, parts=parts
        )
        for of, count, size in rows
        if count != 0 and devices > 1
    ]  # fmt: skip
    return (
        *make("all-reduce", devices, parts, reduced),
        *make("all-gather", parts, 1, gathered),
    )

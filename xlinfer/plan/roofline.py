"""How long a step takes at the least, from the bytes that it moves and the sums that it does.

A bound, not a forecast: every resource runs at its data sheet's peak, device memory and
arithmetic overlap, what goes between devices overlaps neither, and starting a program or a
transfer takes no time. No jax.

L layers   T tokens of a step
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from xlinfer.plan.collectives import Collective

LOGIT_BYTES = 4  # float32
Resource = Literal["memory", "compute", "link"]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one device, per second."""

    memory: float  # bytes
    products: float  # operations of products with weights
    attention: float  # operations of attention, in the activations' dtype
    link: float  # bytes to the other devices


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one of the `devices` that share each layer reads and computes."""

    devices: int
    parts: int  # of a step's tokens, with so many devices each
    layer_bytes: int  # weights of all layers but experts: read once a step
    head_bytes: int  # read once where tokens are sampled; the embedding is read by row
    layer_flops: int  # of a token in all layers, experts and attention apart
    head_flops: int  # of a row
    num_experts: int  # of a layer, over all devices; 0: there are none
    expert_devices: int  # that have experts of their own, which the other devices share
    experts_per_token: int
    expert_bytes: int  # of this device's part of one expert in all layers
    expert_flops: int  # of a token in that
    windows: tuple[int | None, ...]  # per layer: tokens seen; None sees all
    # Per layer: of those, the ones of a token's own chunk; None: sequences are not cut.
    attention_chunk_sizes: tuple[int | None, ...]
    kv_bytes: float  # of a token in one layer: this device's heads
    pair_flops: int  # of a query and a key in one layer: this device's heads
    hidden_bytes: int  # of a token
    collectives: tuple[Collective, ...]
    vocab_size: int  # this device's part of it

    @property
    def reaches(self) -> tuple[tuple[int | None, int | None], ...]:
        """Of each layer, the window and the chunk's size."""
        return tuple(zip(self.windows, self.attention_chunk_sizes, strict=True))


class Step(NamedTuple):
    """Of one device. Bytes and operations of a step, and the least time of each, in seconds."""

    weight_bytes: float
    kv_bytes: float
    logit_bytes: float
    link_bytes: float
    flops: float
    memory_s: float
    compute_s: float
    link_s: float

    @property
    def seconds(self) -> float:
        return max(self.memory_s, self.compute_s) + self.link_s

    @property
    def limit(self) -> Resource:
        times: dict[Resource, float] = {
            "memory": self.memory_s, "compute": self.compute_s, "link": self.link_s
        }  # fmt: skip
        return max(times, key=lambda name: times[name])


def decode_step(work: Work, rates: Rates, *, batch: int, context: int) -> Step:
    """A token for each of `batch` sequences, which stand at `context` tokens each."""
    seen = sum(pairs(context - 1, context, *reach) for reach in work.reaches)
    return _step(
        work, rates, tokens=batch, sampled=batch, pairs=batch * seen,
        kv_tokens=-(-batch // work.parts) * seen + batch * len(work.windows),
    )  # fmt: skip


def prefill_steps(work: Work, rates: Rates, *, prompt: int, chunk: int) -> list[Step]:
    """One prompt, `chunk` tokens a step, of which the last is sampled from. A step reads the keys
    and values of earlier ones once, and writes its own."""
    steps = []
    for start in range(0, prompt, chunk):
        end = min(start + chunk, prompt)
        read = sum(
            min(start % size if size else start, window or start) for window, size in work.reaches
        )
        steps.append(
            _step(
                work, rates, tokens=end - start, sampled=int(end == prompt),
                pairs=sum(pairs(start, end, *reach) for reach in work.reaches),
                kv_tokens=read + 2 * (end - start) * len(work.windows),
            )
        )  # fmt: skip
    return steps


def total_seconds(steps: Iterable[Step]) -> float:
    return sum(step.seconds for step in steps)


def limit_of(steps: list[Step]) -> Resource:
    """What limits most of the time."""
    names: tuple[Resource, ...] = ("memory", "compute", "link")
    spent = {name: sum(s.seconds for s in steps if s.limit == name) for name in names}
    return max(names, key=lambda name: spent[name])


def pairs(start: int, end: int, window: int | None, attention_chunk_size: int | None = None) -> int:
    """Keys that the causal queries at positions start..end-1 see, itself included, together."""
    size = attention_chunk_size or max(end, 1)

    def in_chunk(n: int) -> int:
        short = min(n, window or n)  # whose window reaches past the chunk's first token
        return short * (short + 1) // 2 + (n - short) * short

    upto = lambda n: n // size * in_chunk(size) + in_chunk(n % size)
    return upto(end) - upto(start)


def distinct_experts(work: Work, tokens: int) -> float:
    """Of this device's experts of a layer, how many `tokens` are expected to choose, each with
    equal chances."""
    if not work.num_experts:
        return 0.0
    missed = (1 - work.experts_per_token / work.num_experts) ** tokens
    return work.num_experts / work.expert_devices * (1 - missed)


def _step(
    work: Work, rates: Rates, *, tokens: int, sampled: int, pairs: int, kv_tokens: int
) -> Step:
    """`pairs` are of all parts, `kv_tokens` what one reads or writes; both summed over layers."""
    own = tokens / work.parts
    weights = (
        work.layer_bytes
        + work.head_bytes * (sampled > 0)
        + work.expert_bytes * distinct_experts(work, -(-tokens // work.parts))
        + own * work.hidden_bytes  # rows of the embedding
    )
    kv = kv_tokens * work.kv_bytes
    # Every device samples from its part of the vocabulary, whose logits it writes and reads.
    logits = sampled * work.vocab_size * LOGIT_BYTES
    link = sum(one.sent_bytes(tokens) for one in work.collectives)
    products = (
        own * work.layer_flops
        + sampled * work.head_flops
        + own * work.experts_per_token / work.expert_devices * work.expert_flops
    )
    attention = pairs / work.parts * work.pair_flops
    return Step(
        weight_bytes=weights, kv_bytes=kv, logit_bytes=2 * logits, link_bytes=link,
        flops=products + attention,
        memory_s=(weights + kv + 2 * logits) / rates.memory,
        compute_s=products / rates.products + attention / rates.attention,
        link_s=link / rates.link,
    )  # fmt: skip

"""Whether a model fits a target, and among how many devices its layers are best shared."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from converters import read_model
from xlinfer.commands.costs import rates_of, work_of
from xlinfer.deployment import CPU_CACHE_BYTES, Deployment, Sizes
from xlinfer.plan import Memory, PlanError
from xlinfer.plan.roofline import Rates, Work, decode_step
from xlinfer.setup import (
    Setup,
    deployment_of,
    find_target,
    model_config,
    read_config,
    setup,
    shapes_for,
)
from xlinfer.target import Target, TargetError

CONTEXT = 2048  # tokens of a sequence, where throughput is compared
UNBOUNDED = 2**40  # pages: more than any memory holds


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a user asks for: the arguments of `setup`."""

    model: str
    target: str
    text_only: bool
    tensor_parallel_size: int | None  # None: the best
    expert_parallel_size: int | None  # None: the most that divides experts and devices
    sequence_parallel_size: int
    dtype: str
    quantization: str | None
    matmul_impl: str | None
    sizes: Sizes

    def but(self, **changes) -> "Wish":
        """With those; Sizes' among them."""
        names = Sizes.__dataclass_fields__
        sizes = {name: value for name, value in changes.items() if name in names}
        others = {name: value for name, value in changes.items() if name not in names}
        return replace(self, **others, sizes=replace(self.sizes, **sizes))


class Fit(NamedTuple):
    """Bytes of one device."""

    needed: int
    allowed: int

    @property
    def short(self) -> int:
        return max(0, self.needed - self.allowed)

    @property
    def fits(self) -> bool:
        return self.needed <= self.allowed


@dataclass(frozen=True, kw_only=True)
class Planned:
    setup: Setup
    target: Target
    deployment: Deployment  # where it does not fit: with the fewest pages that would do
    fit: Fit

    @property
    def replicas(self) -> int:
        return self.target.devices // self.setup.devices

    @property
    def work(self) -> Work:
        return work_of(self.deployment, model_config(self.setup))

    @property
    def rates(self) -> Rates:
        return rates_of(self.deployment, self.target.chip)

    @property
    def memory(self) -> Memory:
        return self.deployment.memory

    def concurrency(self, context: int) -> int:
        """Sequences of so many tokens each that one replica runs at once."""
        plan = self.deployment.plan
        each = plan.pages_at(min(context, plan.max_model_len))
        return min(plan.max_num_seqs, (plan.num_pages - 1) // each)

    def longest(self) -> int:
        """Tokens of the longest sequence whose keys and values fit, at most what the model was
        made for."""
        pages = cache_room(self.memory, self.target) // self.memory.page_bytes - 1
        facts, page_size = self.deployment.facts, self.deployment.plan.page_size
        pages //= 2 if facts.has_encoder else 1  # as many for the prompt
        return max(0, min(facts.max_position_embeddings, pages * page_size))


def plan_for(wish: Wish) -> Planned:
    """With the best `tensor_parallel_size` where none is asked for: of those that fit, the one
    whose replicas together decode most tokens per second, each with as many sequences of CONTEXT
    tokens as it runs at once, and of equals the smallest. Where none fits, the largest.

    Raises CheckpointError, TargetError, or ValueError for what does not go together.
    """
    target = find_target(wish.target)
    read_model(Path(wish.model), read_config(wish.model, text_only=wish.text_only))
    if wish.tensor_parallel_size is not None:
        return _planned(_setup_of(wish, wish.tensor_parallel_size), target)
    best, most, largest = None, 0.0, None
    refused: ValueError | None = None
    for size in range(1, target.devices + 1):
        if target.devices % (size * wish.sequence_parallel_size):
            continue
        try:
            found = _planned(_setup_of(wish, size), target)
        except ValueError as error:  # the model's heads do not divide, for one
            refused = refused or error
            continue
        largest = found
        if found.fit.fits and (rate := throughput(found)) > most:
            best, most = found, rate
    if largest is None:
        raise refused or TargetError(
            f"sequence_parallel_size={wish.sequence_parallel_size} does not divide the "
            f"{target.devices} devices of {target.name}"
        )
    return best or largest


def throughput(planned: Planned) -> float:
    """Tokens per second of all replicas, as `plan_for` compares them."""
    context = min(CONTEXT, planned.deployment.plan.max_model_len)
    batch = planned.concurrency(context)
    step = decode_step(planned.work, planned.rates, batch=batch, context=context)
    return planned.replicas * batch / step.seconds


def cache_room(memory: Memory, target: Target) -> int:
    """Bytes of one device for pages, as many as may be had."""
    left = memory.usable_bytes - memory.fixed_bytes
    return min(left, CPU_CACHE_BYTES) if target.chip.platform == "cpu" else left


def _setup_of(wish: Wish, tensor_parallel_size: int) -> Setup:
    return setup(
        wish.model, wish.target, text_only=wish.text_only,
        tensor_parallel_size=tensor_parallel_size,
        expert_parallel_size=wish.expert_parallel_size,
        sequence_parallel_size=wish.sequence_parallel_size, dtype=wish.dtype,
        quantization=wish.quantization, matmul_impl=wish.matmul_impl, sizes=wish.sizes,
    )  # fmt: skip


def _planned(setup: Setup, target: Target) -> Planned:
    """Raises ValueError for what no memory would help."""
    shapes, asked = shapes_for(setup, planned_for=target), setup.sizes.num_pages
    try:
        deployment = deployment_of(shapes, setup.sizes)
    except PlanError:
        with_pages = lambda pages: deployment_of(shapes, replace(setup.sizes, num_pages=pages))
        fewest = with_pages(UNBOUNDED).plan.fewest_pages
        if asked is not None and asked >= fewest:
            raise
        deployment = with_pages(fewest)
    memory, pages = deployment.memory, deployment.plan.num_pages
    room = memory.usable_bytes - memory.fixed_bytes
    if asked is None:
        room = cache_room(memory, target)
    elif asked < pages:
        room = min(room, asked * memory.page_bytes)
    needed = memory.fixed_bytes + pages * memory.page_bytes
    fit = Fit(needed=needed, allowed=memory.fixed_bytes + room)
    return Planned(setup=setup, target=target, deployment=deployment, fit=fit)

"""What would make a model fit, each change tried by planning it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from xlinfer.commands.sizing import Planned, Wish, cache_room, plan_for
from xlinfer.target import CHIPS, Target, larger

MOST = 3
STEP = 256  # tokens: lengths are named in multiples of it
UTILIZATIONS = (0.92, 0.95)


class Change(NamedTuple):
    flags: str  # with which the same command fits
    planned: Planned


def changes_for(wish: Wish, failed: Planned, most: int = MOST) -> list[Change]:
    """At most so many, of different kinds as far as there are, the mildest first."""
    found: list[Change] = []
    for kind in KINDS:
        for change in kind(wish, failed):
            planned = _try(wish, change)
            if planned is not None:
                flags = [f"--{name}={value}" for name, value in change.items()]
                found.append(Change(" ".join(flags), planned))
                break
        if len(found) == most:
            return found
    held: set[str] = set()  # chips, each in its smallest slice that holds it
    for target in _other_chips(wish, failed):
        if len(found) == most:
            break
        if target.chip.name not in held and (planned := _try(wish, {"target": target.name})):
            held.add(target.chip.name)
            found.append(Change(f"--target={target.name}", planned))
    return found


def _try(wish: Wish, change: dict[str, Any]) -> Planned | None:
    try:
        planned = plan_for(wish.but(**change))
    except ValueError:
        return None
    return planned if planned.fit.fits else None


def _shorter(wish: Wish, failed: Planned) -> Iterator[dict[str, Any]]:
    memory, plan = failed.memory, failed.deployment.plan
    pages = cache_room(memory, failed.target) // memory.page_bytes
    if wish.sizes.num_pages is not None:
        pages = min(pages, wish.sizes.num_pages)
    length = (pages - 1) * plan.page_size // STEP * STEP
    if STEP <= length < plan.max_model_len:
        yield {"max_model_len": length}


def _pages(wish: Wish, failed: Planned) -> Iterator[dict[str, Any]]:
    """Where they are what is asked for, or on a CPU, where few are taken unless they are."""
    memory = failed.memory
    fewest = failed.deployment.plan.pages_per_seq + 1
    room = (memory.usable_bytes - memory.fixed_bytes) // memory.page_bytes
    if wish.sizes.num_pages is not None and wish.sizes.num_pages > room >= fewest:
        yield {"num_pages": room}
    elif room >= fewest:
        yield {"num_pages": fewest}


def _dtype(wish: Wish, failed: Planned) -> Iterator[dict[str, Any]]:
    if failed.setup.dtype == "float32" and failed.target.chip.platform != "cpu":
        yield {"dtype": "bfloat16"}


def _quantization(wish: Wish, failed: Planned) -> Iterator[dict[str, Any]]:
    if wish.quantization is None:
        yield from ({"quantization": method} for method in ("int8", "int4"))
    elif wish.quantization != "int4" and wish.matmul_impl is None:
        yield {"quantization": "int4"}


def _more_devices(wish: Wish, failed: Planned) -> Iterator[dict[str, Any]]:
    """Of those that are here, where the user named how many."""
    if wish.tensor_parallel_size is not None:
        for size in range(wish.tensor_parallel_size + 1, failed.target.devices + 1):
            if failed.target.devices % size == 0:
                yield {"tensor_parallel_size": size}


def _larger(wish: Wish, failed: Planned) -> Iterator[dict[str, Any]]:
    if wish.target != "local" and failed.target.chip.platform != "cpu":
        least = _least(wish)
        for target in larger(failed.target):
            if target.devices * target.chip.memory_bytes > least:
                yield {"target": target.name}


def _smaller_step(wish: Wish, failed: Planned) -> Iterator[dict[str, Any]]:
    plan, least = failed.deployment.plan, max(failed.deployment.plan.max_num_seqs, 64)
    tokens = plan.max_num_batched_tokens // 2
    while failed.fit.short < failed.memory.temporary_bytes and tokens >= least:
        yield {"max_num_batched_tokens": tokens}
        tokens //= 2


def _fewer_rows(wish: Wish, failed: Planned) -> Iterator[dict[str, Any]]:
    rows = failed.deployment.plan.max_num_seqs // 2
    while failed.fit.short < failed.memory.temporary_bytes + failed.memory.slot_bytes and rows:
        yield {"max_num_seqs": rows}
        rows //= 4


def _utilization(wish: Wish, failed: Planned) -> Iterator[dict[str, Any]]:
    for utilization in UTILIZATIONS:
        more = (utilization - wish.sizes.hbm_utilization) * failed.memory.device_bytes
        if more > failed.fit.short:
            yield {"hbm_utilization": utilization}


def _quantized_and_shorter(wish: Wish, failed: Planned) -> Iterator[dict[str, Any]]:
    """Where neither alone is enough."""
    for change in _quantization(wish, failed):
        try:
            tried = plan_for(wish.but(**change))
        except ValueError:
            continue
        if not tried.fit.fits:
            yield from (change | shorter for shorter in _shorter(wish, tried))


def _least(wish: Wish) -> float:
    """Bytes of weights and pages in one piece, where no kv head is held twice."""
    whole = plan_for(
        wish.but(tensor_parallel_size=1, expert_parallel_size=1, sequence_parallel_size=1)
    )
    memory, pages = whole.memory, whole.deployment.plan.num_pages
    return (memory.weight_bytes + pages * memory.page_bytes) / wish.sizes.hbm_utilization


def _other_chips(wish: Wish, failed: Planned) -> Iterator[Target]:
    """The slices of other chips that may hold it, for each chip the smallest first."""
    if wish.target == "local":
        return
    least = _least(wish)
    for chip in CHIPS.values():
        if chip.name != failed.target.chip.name and not chip.refused and chip.platform != "cpu":
            slices = (Target(chip=chip, chips=chips) for chips in sorted(chip.slices))
            yield from (t for t in slices if t.devices * chip.memory_bytes > least)


Kind = Callable[[Wish, Planned], Iterator[dict[str, Any]]]
KINDS: tuple[Kind, ...] = (
    _shorter, _pages, _dtype, _more_devices, _quantization, _larger, _utilization, _smaller_step,
    _fewer_rows, _quantized_and_shorter,
)  # fmt: skip

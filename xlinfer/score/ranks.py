"""Which of many equal processes this one is, as whatever has started them says."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from xlinfer.score.layout import Attempt

INDEXES = "JOB_COMPLETION_INDEX", "SLURM_PROCID", "TPU_WORKER_ID"


class Rank(NamedTuple):
    rank: int
    world_size: int

    def share(self, attempts: Sequence[Attempt]) -> list[Attempt]:
        """Every `world_size`-th shard, so that those of a long file are divided."""
        return [a for a in attempts if a.shard.index % self.world_size == self.rank]


def find_rank(environment: Mapping[str, str], rank: int | None, world_size: int | None) -> Rank:
    """What is given goes before what Slurm, TPU workers (also of several slices) and an Indexed
    Job's pods are told; an Indexed Job does not tell how many they are. Raises ValueError."""
    if rank is None or world_size is None:
        found = _told(environment)
        rank = found[0] if rank is None else rank
        world_size = found[1] if world_size is None else world_size
    if rank is None:
        raise ValueError(
            f"--runner=static: none of {', '.join(INDEXES)} is set; give --rank and --world_size"
        )
    if world_size is None:
        raise ValueError(
            "--runner=static: how many processes there are is not known; give --world_size"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"--rank={rank} must be from 0 to {world_size - 1}, as --world_size says")
    return Rank(rank, world_size)


def _told(environment: Mapping[str, str]) -> tuple[int | None, int | None]:
    def number(name: str) -> int | None:
        text = environment.get(name, "").strip()
        if text and not text.isdecimal():
            raise ValueError(f"{name}={text} in the environment is no number")
        return int(text) if text else None

    if (rank := number("SLURM_PROCID")) is not None:
        return rank, number("SLURM_NTASKS")
    worker = number("TPU_WORKER_ID")
    names = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if worker is not None and names:
        slices, which = number("MEGASCALE_NUM_SLICES") or 1, number("MEGASCALE_SLICE_ID") or 0
        return which * len(names) + worker, slices * len(names)
    index = number("JOB_COMPLETION_INDEX")
    return worker if index is None else index, None

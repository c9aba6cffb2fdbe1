import pytest

from xlinfer.score.layout import Attempt
from xlinfer.score.manifest import Shard
from xlinfer.score.ranks import Rank, find_rank

TOLD = {
    "flags before all": ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, 1, 2, Rank(1, 2)),
    "Slurm": ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, None, None, Rank(3, 4)),
    "TPU": ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, None, None, Rank(1, 2)),
    "TPU slices": (
        {
            "TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3",
            "MEGASCALE_SLICE_ID": "2", "JOB_COMPLETION_INDEX": "5",
        },
        None, None, Rank(5, 6),
    ),
    "JobSet": ({"JOB_COMPLETION_INDEX": "2"}, None, 3, Rank(2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_ranks_are_found(name):
    environment, rank, world_size, found = TOLD[name]
    assert find_rank(environment, rank, world_size) == found


@pytest.mark.parametrize(
    ("environment", "rank", "world_size", "said"),
    [
        ({}, None, None, "none of JOB_COMPLETION_INDEX, SLURM_PROCID, TPU_WORKER_ID is set"),
        ({"JOB_COMPLETION_INDEX": "2"}, None, None, "give --world_size"),
        ({}, 4, 4, "--rank=4 must be from 0 to 3"),
        ({"SLURM_PROCID": "x"}, None, None, "SLURM_PROCID=x in the environment is no number"),
    ],
)
def test_what_is_not_known_is_asked_for(environment, rank, world_size, said):
    with pytest.raises(ValueError, match=said):
        find_rank(environment, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 7, 40])
def test_each_shard_is_one_ranks(world_size):
    attempts = [Attempt(shard=Shard(index=n, pieces=())) for n in range(20)]
    shares = [Rank(rank, world_size).share(attempts) for rank in range(world_size)]
    assert sorted(a.name for share in shares for a in share) == [a.name for a in attempts]

"""Which tiles the Hopper kernel takes: the cheapest by a count of the cycles of one SM.

The counts are instructions and bytes, not measurements; `cases.candidates` lists the tiles that
a measurement should compare.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.checks import check_multiple, check_one_of
from pallas_kernels.devices import Device
from pallas_kernels.grids import Grid
from pallas_kernels.hopper import WARPGROUP_ROWS
from pallas_kernels.tuning import key, tuned, up_to

PRODUCER_REGISTERS = 32
MAX_TOKENS = 256  # columns of one wgmma
MAX_STAGES = 8
IN_FLIGHT = 48 * 1024  # bytes that an SM must have asked for to be served at full bandwidth
STATIC_SMEM = 8 * 1024  # barriers and alignment
# Per SM and cycle, at 1.755 GHz:
HBM = 20  # bytes, when all SMs read
L2 = 28  # bytes from L2 to one SM, when all SMs ask
# Cycles:
WIDEN = 145  # instructions of a warp per 64 x 128 weights: shuffles, conversion
SCALE = 34  # more of them to scale (or to subtract a zero) in bfloat16
E2M1 = 192  # more of them for the numbers of 4-bit floats
IN_FLOAT32 = 130  # more of them to do that in float32
START = 2500  # of a block: launch, first loads, epilogue
SECOND_PASS = 3000  # a launch, beside the writing and reading of the parts
LATENCY = 150  # from one warpgroup's last widened weight to its product
OVERLAP = 0.8  # of the shorter of reading and computing, that the longer hides


class Problem(NamedTuple):
    M: int
    N: int
    K: int
    G: int
    bits: int  # of a weight
    x_dtype: Any
    scale_dtype: Any
    zeros: bool
    grid: Grid


def problem_of(x_MK, w_LNK, scale_LGN, zero_LGN, grid: Grid) -> Problem:
    (M, K), N, G = x_MK.shape, w_LNK.shape[1], scale_LGN.shape[1]
    bits = jnp.iinfo(w_LNK.dtype).bits
    zeros = zero_LGN is not None
    return Problem(M, N, K, G, bits, x_MK.dtype, scale_LGN.dtype, zeros, grid)


def op_of(p: Problem) -> str:
    """Whose tables serve it."""
    return {4: "int4_matmul", 8: "int8_matmul"}[p.bits]


def tuning_key(p: Problem) -> str:
    return key(
        M=up_to(p.M), N=p.N, K=p.K, group=p.K // p.G, x=jnp.dtype(p.x_dtype).name,
        scale=jnp.dtype(p.scale_dtype).name, zeros=int(p.zeros),
        **{"grid": "e2m1"} if p.grid == "e2m1" else {},
    )  # fmt: skip


class Tiles(NamedTuple):
    tokens: int  # of a block; a multiple of 8, at most 256
    wgs_n: int  # compute warpgroups side by side in N, 64 output features each
    wgs_k: int  # compute warpgroups per such 64 features, each with its part of a stage's K
    width: int  # input features that a warpgroup widens at once: 64 or 128
    chunks: int  # of `width` input features that one warpgroup takes from a stage
    stages: int
    splits: int  # blocks that share an output tile, each with its part of K
    cluster: int  # blocks neighbouring in N that share x by multicast
    scale_after: bool  # scale a group's product, not its weights


def scales_weights(t: Tiles, p: Problem) -> bool:
    """Else products are scaled: each group's, or once the sum over all of K."""
    return p.G > 1 and not t.scale_after


def in_float32(t: Tiles, p: Problem) -> bool:
    """Whether weights pass through float32 on their way to x's dtype; else through bfloat16."""
    arithmetic = p.zeros or scales_weights(t, p)
    return p.x_dtype != jnp.bfloat16 or (arithmetic and p.scale_dtype != p.x_dtype)


def compute_registers(wgs: int) -> int:
    """What a thread of `wgs` warpgroups may use beside the producer's; 512 are to be shared."""
    return min(256, (512 - PRODUCER_REGISTERS) // wgs) // 8 * 8


def step_k(t: Tiles) -> int:
    return t.width * t.chunks * t.wgs_k


def whole_groups(t: Tiles, p: Problem) -> bool:
    """Whether a stage is whole groups, or a group whole stages."""
    return max(step_k(t), p.K // p.G) % min(step_k(t), p.K // p.G) == 0


def scale_rows(t: Tiles, p: Problem) -> int:
    """Rows of scale_GN that a stage needs."""
    return max(step_k(t) * p.G // p.K, 1)


def epilogue_tokens(t: Tiles) -> int:
    """Tokens that a warpgroup writes out at once."""
    return next(n for n in range(64, 0, -8) if t.tokens % n == 0)


def stage_bytes(t: Tiles, p: Problem) -> int:
    rows, k = WARPGROUP_ROWS * t.wgs_n, step_k(t)
    scales = 0 if p.G == 1 else rows * scale_rows(t, p) * p.scale_dtype.itemsize
    return t.tokens * k * 2 + rows * k * p.bits // 8 + scales * (1 + p.zeros)


def smem_bytes(t: Tiles, p: Problem) -> int:
    rows = WARPGROUP_ROWS * t.wgs_n
    parts = (t.wgs_k - 1) * rows * t.tokens * 4
    return t.stages * stage_bytes(t, p) + epilogue_tokens(t) * rows * 2 + parts + STATIC_SMEM


def registers(t: Tiles, p: Problem) -> int:
    """About what a compute thread needs: accumulators, widened weights, the rest."""
    accumulators = t.tokens // 2 * (2 if t.scale_after and p.G > 1 else 1)
    wide = t.width // 2 if in_float32(t, p) else t.width // 4
    return accumulators + wide + t.width * p.bits // 64 + 40


def check(t: Tiles, p: Problem, device: Device) -> None:
    check_multiple("tiles.tokens", t.tokens, 8, why="wgmma has columns by eight")
    check_one_of("tiles.tokens", t.tokens, range(8, MAX_TOKENS + 1))
    check_one_of("tiles.width", t.width, (64, 128))
    check_multiple("N", p.N, WARPGROUP_ROWS * t.wgs_n * t.cluster, why="tiles cover it")
    check_multiple("K", p.K, step_k(t), why="stages cover it")
    if not whole_groups(t, p):
        raise ValueError(
            f"tiles take {step_k(t)} input features at once, of groups of {p.K // p.G}"
        )
    check_one_of("tiles.wgs_n * tiles.wgs_k", t.wgs_n * t.wgs_k, range(1, 5))
    check_one_of("tiles.splits", t.splits, range(1, p.K // step_k(t) + 1))
    if smem_bytes(t, p) > device.scratch_bytes:
        raise ValueError(
            f"tiles need {smem_bytes(t, p)} bytes of SMEM; {device.name} has {device.scratch_bytes}"
        )


def candidates(p: Problem, device: Device) -> Iterator[Tiles]:
    """Everything worth measuring."""
    blocks = -(-p.M // MAX_TOKENS)
    unit = 8 if p.M <= 64 else 32
    even = -(-p.M // (unit * blocks)) * unit  # few blocks of equal size
    for tokens in sorted({even, *(128, 256)[: 2 * (p.M > MAX_TOKENS)]}):
        for (wgs_n, wgs_k), width, chunks, splits in itertools.product(
            ((4, 1), (3, 1), (2, 1), (1, 1), (2, 2), (1, 2), (1, 3), (1, 4)),
            (128, 64),
            (2, 1),
            (1, 2, 3, 4, 6, 8),
        ):
            after = p.G > 1 and p.K // p.G <= width and tokens * width * p.G <= 32 * p.K
            for cluster in (1, 2) if p.M > 64 else (1,):
                t = Tiles(tokens, wgs_n, wgs_k, width, chunks, 0, splits, cluster, after)
                t = t._replace(stages=stages(t, p, device))
                if fits(t, p, device):
                    yield t


def stages(t: Tiles, p: Problem, device: Device) -> int:
    room = device.scratch_bytes - smem_bytes(t._replace(stages=0), p)
    return max(min(room // stage_bytes(t, p), MAX_STAGES, -(-p.K // (step_k(t) * t.splits))), 0)


def fits(t: Tiles, p: Problem, device: Device) -> bool:
    tiled = p.N % (WARPGROUP_ROWS * t.wgs_n * t.cluster) == 0 and p.K % step_k(t) == 0
    tiled = tiled and whole_groups(t, p)
    deep = t.stages >= min(3, -(-p.K // (step_k(t) * t.splits)))
    long = t.splits == 1 or p.K >= 4 * step_k(t) * t.splits
    return tiled and deep and long and registers(t, p) <= compute_registers(t.wgs_n * t.wgs_k)


def cycles(t: Tiles, p: Problem, device: Device) -> float:
    wgs, rows = t.wgs_n * t.wgs_k, WARPGROUP_ROWS * t.wgs_n
    blocks = -(-p.M // t.tokens) * (p.N // rows) * t.splits
    steps = p.K / step_k(t) / t.splits
    units = t.chunks * t.width / 128  # of 64 x 128 weights, per warpgroup and step
    groups = 0 if p.G == 1 else 128 * p.G / p.K
    widen = WIDEN + SCALE * (p.zeros + scales_weights(t, p)) + IN_FLOAT32 * in_float32(t, p)
    widen += E2M1 * (p.grid == "e2m1")
    widen += groups * t.tokens * t.scale_after
    multiply = 8 * max(t.tokens / 2, 16)
    waits = max(groups, 1) if t.scale_after else 1 / t.chunks
    alone = (widen + multiply + LATENCY * waits) * units
    loaded = stage_bytes(t, p) - t.tokens * step_k(t) * 2 * (1 - 1 / t.cluster)
    in_flight = min(1.0, t.stages * stage_bytes(t, p) / IN_FLIGHT)
    busy = max(wgs * units * widen, wgs * units * multiply, alone, loaded / (L2 * in_flight))
    waves = -(-blocks // device.cores)
    computing = waves * (steps * busy + START)
    reading = p.N * p.K * p.bits / 8 / (HBM * device.cores) + START
    parts = t.splits * p.M * p.N * 8 / (HBM * device.cores)
    second = SECOND_PASS + parts if t.splits > 1 else 0
    return max(computing, reading) + (1 - OVERLAP) * min(computing, reading) + second


def choose(p: Problem, device: Device) -> Tiles:
    found = list(candidates(p, device))
    if not found:
        raise ValueError(f"K is {p.K} and N is {p.N}: no tiles of the kernel cover them")
    return min(found, key=lambda t: cycles(t, p, device))


def best_tiles(p: Problem, device: Device) -> Tiles:
    """Those measured fastest, else the cheapest by the count."""
    return tuned(op_of(p), device, tuning_key(p), Tiles) or choose(p, device)

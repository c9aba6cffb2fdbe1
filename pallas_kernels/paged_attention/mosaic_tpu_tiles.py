"""Which tiles the TPU programs take: blocks that keep HBM busy and leave VMEM to the compiler."""

from itertools import product

from pallas_kernels.devices import Device
from pallas_kernels.paged_attention.mosaic_tpu_program import Program, Tiles
from pallas_kernels.paged_attention.mosaic_tpu_words import LANES
from pallas_kernels.paged_attention.tiles import Shape, tuning_key
from pallas_kernels.tuning import tuned

RING = 2**23  # bytes of decode's blocks in VMEM


def reach(program: Program, window) -> int:
    """Tokens of a row that a query may see."""
    whole = program.M * program.S
    return min(whole, window + program.S) if isinstance(window, int) else whole


def key_of(program: Program, count: int, window) -> str:
    """As `tuning_key`; a static window that cuts rows short decides too."""
    pg = program
    shape = Shape(pg.N, pg.kv.K, pg.kv.H, pg.S, pg.dtype, pg.kv_dtype)
    cut = reach(program, window) < pg.M * pg.S
    return tuning_key("decode" if pg.decode else "prefill", count, shape, window if cut else None)


def best_decode(program: Program, rows: int, window, device: Device) -> Tiles:
    """Those measured fastest, else what seems so. `program` is decode's."""
    measured = tuned("paged_attention", device, key_of(program, rows, window), Tiles)
    return measured or decode_tiles(program, reach(program, window))


def best_prefill(program: Program, tokens: int, window, device: Device) -> Tiles:
    """Those measured fastest, else what seems so. `program` is prefill's."""
    measured = tuned("paged_attention", device, key_of(program, tokens, window), Tiles)
    return measured or prefill_tiles(program, reach(program, window), tokens, device.scratch_bytes)


def decode_tiles(program: Program, reach: int) -> Tiles:
    """Blocks of 2 MiB, but at most 1024 tokens and no more than the `reach` of a query, in a ring
    of 8 MiB: what is in flight covers HBM's latency, also where a row is one small block."""
    token = LANES * 4 * program.kv.C
    tokens = min(_power_of_two(2**21 // token), 1024, _at_least(reach))
    tokens = max(tokens, LANES, program.S)
    return Tiles(1, tokens, min(tokens, 512), _stages(tokens * token, RING))


def prefill_tiles(program: Program, reach: int, T: int, vmem: int) -> Tiles:
    """The most query rows of a kv head, up to 1024, that leave half of VMEM to the compiler, by
    chunks of 512 tokens."""
    tokens = max(min(1024, _at_least(reach)), LANES, program.S)
    queries = max(min(_power_of_two(1024 // program.G), 256, _at_least(T)), 16)
    while True:
        tiles = Tiles(queries, tokens, min(tokens, 512), 2)
        if queries == 16 or _fits(program, tiles, vmem):
            return tiles
        queries //= 2


def decode_candidates(program: Program, window, device: Device) -> tuple[Tiles, ...]:
    own = decode_tiles(program, reach(program, window))
    token = LANES * 4 * program.kv.C
    others = (
        Tiles(1, tokens, min(tokens, chunk), _stages(tokens * token, ring))
        for ring, tokens, chunk in product(
            (RING, RING * 2), (own.tokens, own.tokens * 2, own.tokens // 2), (512, 256)
        )
        if tokens >= max(LANES, program.S)
    )
    fit = (t for t in others if _fits(program, t, device.scratch_bytes))
    return tuple(dict.fromkeys((own, *fit)))


def prefill_candidates(program: Program, tokens: int, window, device: Device) -> tuple[Tiles, ...]:
    own = prefill_tiles(program, reach(program, window), tokens, device.scratch_bytes)
    others = (
        Tiles(queries, block, min(block, chunk), 2)
        for queries, block, chunk in product(
            (own.queries, own.queries * 2, own.queries // 2), (own.tokens, own.tokens // 2),
            (512, 256),
        )
        if queries >= 16 and block >= max(LANES, program.S)
    )  # fmt: skip
    fit = (t for t in others if _fits(program, t, device.scratch_bytes))
    return tuple(dict.fromkeys((own, *fit)))


def _fits(program: Program, tiles: Tiles, vmem: int) -> bool:
    return program._replace(tiles=tiles).vmem_bytes() <= vmem // 2


def _stages(block_bytes: int, ring: int) -> int:
    return max(min(_power_of_two(ring // block_bytes), 16), 2)


def _power_of_two(n: int) -> int:
    """The largest up to n."""
    return 1 << max(n, 1).bit_length() - 1


def _at_least(n: int) -> int:
    """The smallest power of two from n."""
    return 1 << max(n - 1, 0).bit_length()

"""Which tiles the Hopper kernels take: as many bytes on their way as SMEM holds."""

from pallas_kernels.devices import Device
from pallas_kernels.paged_attention.layout import FP8
from pallas_kernels.paged_attention.mosaic_gpu_decode import DecodeTiles
from pallas_kernels.paged_attention.mosaic_gpu_prefill import TILE, PrefillTiles
from pallas_kernels.paged_attention.tiles import Shape, tuning_key
from pallas_kernels.tuning import tuned

BLOCKS = (64, 128)  # keys of a block that the matrix unit takes at once; whole pages
MOST_STAGES = 8
# Registers of a thread that scores, probabilities and the output may take.
DECODE_REGISTERS, PREFILL_REGISTERS, CONVERTING_REGISTERS = 160, 176, 152


def best_decode(shape: Shape, rows: int, device: Device) -> DecodeTiles:
    """Those measured fastest, else what seems so."""
    name = tuning_key("decode", rows, shape, None)
    return tuned("paged_attention", device, name, DecodeTiles) or decode_tiles(shape, device)


def best_prefill(shape: Shape, tokens: int, device: Device) -> PrefillTiles:
    """Those measured fastest, else what seems so."""
    name = tuning_key("prefill", tokens, shape, None)
    return tuned("paged_attention", device, name, PrefillTiles) or prefill_tiles(shape, device)


def decode_tiles(shape: Shape, device: Device) -> DecodeTiles:
    """Two thread blocks an SM where a block of keys is small enough, so that one's latencies hide
    behind the other. Not yet measured."""
    g, values = _padded(shape)
    return _decode(
        shape, device, each=2 if values * g <= 128 * 16 else 1,
        block=max(shape.S, 64 if shape.H > 64 else 128), chunks=2,
    )  # fmt: skip


def prefill_tiles(shape: Shape, device: Device) -> PrefillTiles:
    """128 keys between two rescalings of the output while its accumulator leaves registers for
    their scores. Not yet measured."""
    few = shape.H <= 128 and shape.kv_dtype != FP8
    return _prefill(shape, device, block=max(shape.S, 128 if few else 64))


def decode_candidates(shape: Shape, device: Device) -> tuple[DecodeTiles, ...]:
    g, values = _padded(shape)
    others = (
        _decode(shape, device, each=each, block=block, chunks=chunks)
        for chunks in (2, 1, 4)
        for each in (2, 1)
        for block in BLOCKS
        if block >= shape.S and (3 * block + values) * g // 128 <= DECODE_REGISTERS
    )
    deep = (t for t in others if t.stages >= 2 or (t.stages == 1 and t.raw_stages >= 2))
    return tuple(dict.fromkeys((decode_tiles(shape, device), *deep)))


def prefill_candidates(shape: Shape, device: Device) -> tuple[PrefillTiles, ...]:
    fp8 = shape.kv_dtype == FP8
    registers = CONVERTING_REGISTERS if fp8 else PREFILL_REGISTERS
    found = [prefill_tiles(shape, device)]
    for block in BLOCKS:
        if block >= shape.S and block * 3 // 4 + shape.H // 2 <= registers:
            deep = _prefill(shape, device, block=block)
            name = "raw_stages" if fp8 else "stages"
            most = getattr(deep, name)
            found += [deep._replace(**{name: n}) for n in (most, most // 2 + 1, 2) if n <= most]
    return tuple(dict.fromkeys(found))


def _decode(shape: Shape, device: Device, *, each: int, block: int, chunks: int) -> DecodeTiles:
    """For `each` thread blocks an SM. Beside its queries and probabilities one has 4 KB: what the
    system takes of each, barriers, alignment, and room for reductions across warps."""
    g, values = _padded(shape)
    room = device.scratch_bytes // each - 4096 - 2 * (2 * g * shape.H + g * block)
    stages = _stages(shape, room, block, shape.H + values)
    return DecodeTiles(each * device.cores, block, *stages, chunks)


def _prefill(shape: Shape, device: Device, *, block: int) -> PrefillTiles:
    """The queries' tile stays for the whole kernel."""
    room = device.scratch_bytes - 2048 - 2 * TILE * shape.H
    return PrefillTiles(block, *_stages(shape, room, block, 2 * shape.H))


def _padded(shape: Shape) -> tuple[int, int]:
    """Queries of a kv head, and columns of a value, as the decode kernel multiplies them."""
    return -(-shape.G // 8) * 8, -(-shape.H // 64) * 64


def _stages(shape: Shape, room: int, block: int, columns: int) -> tuple[int, int]:
    """(stages, raw stages) of blocks with keys and values of `columns` in all."""
    one = 2 * block * columns
    if shape.kv_dtype != FP8:
        return min(room // one, MOST_STAGES), 0
    raw = 2 * block * shape.H
    count = 2 if 2 * one + 2 * raw <= room else 1
    return count, min((room - count * one) // raw, MOST_STAGES)

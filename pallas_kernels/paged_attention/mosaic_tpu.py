"""Paged attention on TPU: a decode program and a prefill program, both with the write fused.

Decode is bound by the read of the cache, prefill by the exponents and the matrix unit; hence

    one contiguous copy per page, with k and v of all heads in it; pages are read once
    a ring of blocks in VMEM, filled across rows: short rows keep as many bytes in flight as long
    the step's tokens are attended to from the step's own k and v, and go to the cache by copies
    that nothing waits for

The last point is the order of reads and writes. The cache is read at positions before the step
and written at positions of the step: no copy reads what another writes, whatever their order and
whichever core starts them, and no page needs to be read to be written, because a token is a
whole number of words. It assumes that a page written in a step belongs to one row.

q and o are one buffer: a program overwrites the queries of its rows with their outputs and
leaves all others, so that padding stays finite and the second program finds its queries.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import checks
from pallas_kernels.devices import Device
from pallas_kernels.paged_attention import mosaic_tpu_words as layout
from pallas_kernels.paged_attention.layout import FP8, PackedPages, Pages, Ragged, Scales
from pallas_kernels.paged_attention.mosaic_tpu_body import body
from pallas_kernels.paged_attention.mosaic_tpu_program import Program, Tiles
from pallas_kernels.paged_attention.mosaic_tpu_words import LANES, packing
from pallas_kernels.paged_attention.reference import stored

DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), FP8)
MAX_HEAD_DIM = 256
MAX_TABLE = 2**17  # entries of the page table: half a MiB of SMEM, which has one


def refuse(*, page_size: int, head_dim: int, dtype: Any) -> str | None:
    """Why this kernel does not take a cache, or None."""
    if page_size < 8 or page_size & (page_size - 1):
        return f"page_size is {page_size}; it must be a power of two from 8"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim is {head_dim}; it must be at most {MAX_HEAD_DIM}"
    if jnp.dtype(dtype) not in DTYPES:
        return f"dtype is {jnp.dtype(dtype)}; it must be one of {', '.join(map(str, DTYPES))}"
    return None


def cache_shape(
    *,
    num_layers: int,
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: Any,
) -> tuple[int, ...]:
    pack = packing(num_kv_heads, head_dim, dtype)
    return (num_layers, num_pages, page_size, pack.C, pack.p, LANES)


def pack(pages: Pages) -> PackedPages:
    k_LPSKH, v_LPSKH = (jnp.moveaxis(x, 2, 3) for x in pages)
    how = packing(k_LPSKH.shape[3], k_LPSKH.shape[4], k_LPSKH.dtype)
    return PackedPages(layout.pack_kv(k_LPSKH, v_LPSKH, how))


def unpack(pages: PackedPages, *, num_kv_heads: int, head_dim: int) -> Pages:
    kv_LPSCpH = pages.kv_LPSCpH
    how = packing(num_kv_heads, head_dim, kv_LPSCpH.dtype)
    return Pages(*(jnp.moveaxis(x, 3, 2) for x in layout.unpack_kv(kv_LPSCpH, how)))


def decode_tiles(program: Program, reach: int) -> Tiles:
    """Blocks of 2 MiB, but at most 1024 tokens and no more than the `reach` of a query, in a ring
    of 8 MiB: what is in flight covers HBM's latency, also where a row is one small block."""
    token = LANES * 4 * program.kv.C
    tokens = min(_power_of_two(2**21 // token), 1024, _at_least(reach))
    tokens = max(tokens, LANES, program.S)
    stages = max(min(_power_of_two(2**23 // (tokens * token)), 16), 2)
    return Tiles(1, tokens, min(tokens, 512), stages)


def prefill_tiles(program: Program, reach: int, T: int, vmem: int) -> Tiles:
    """The most query rows of a kv head, up to 1024, that leave half of VMEM to the compiler, by
    chunks of 512 tokens."""
    tokens = max(min(1024, _at_least(reach)), LANES, program.S)
    queries = max(min(_power_of_two(1024 // program.G), 256, _at_least(T)), 16)
    while True:
        tiles = Tiles(queries, tokens, min(tokens, 512), 2)
        if queries == 16 or program._replace(tiles=tiles).vmem_bytes() <= vmem // 2:
            return tiles
        queries //= 2


def _power_of_two(n: int) -> int:
    """The largest up to n."""
    return 1 << max(n, 1).bit_length() - 1


def _at_least(n: int) -> int:
    """The smallest power of two from n."""
    return 1 << max(n - 1, 0).bit_length()


def write_and_attend(
    q_TNH,
    k_TKH,
    v_TKH,
    pages: PackedPages,
    layer,
    page_T,
    slot_T,
    ragged: Ragged,
    *,
    window,
    scale: float,
    decode_only: bool,
    softcap: float | None,
    sinks_N,
    alibi_N,
    kv_scales: Scales | None,
    device: Device,
    interpret: Any,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> tuple[jax.Array, PackedPages]:
    """As the op's write_and_attend. page_T and slot_T say what `ragged` says, and are not used.
    `tiles` are for decode and for prefill."""
    checks.check_dtype("q_TNH", q_TNH, DTYPES[:2])
    (T, N, H), K, (R, M) = q_TNH.shape, k_TKH.shape[1], ragged.pages_RM.shape
    cache = pages.kv_LPSCpH
    S = cache.shape[2]
    if R * M > MAX_TABLE:
        raise ValueError(f"pages_RM has {R} x {M} entries; {MAX_TABLE} fit the scalar memory")
    how = packing(K, H, cache.dtype)
    new_TC1H = layout.pack_words(*stored(k_TKH, v_TKH, cache.dtype, kv_scales), how)
    qo_TWpH = layout.pack_q(q_TNH)
    constants = {"sinks": sinks_N, "alibi": alibi_N}
    constants |= {"k_scale": kv_scales.k_K, "v_scale": kv_scales.v_K} if kv_scales else {}
    run = partial(
        _run, ragged, layer, window, {k: x for k, x in constants.items() if x is not None},
        decode_only=decode_only, device=device, interpret=interpret,
    )  # fmt: skip
    program = Program(
        tiles=Tiles(1, S, S, 1), N=N, kv=how, q=packing(K, H, q_TNH.dtype), S=S, M=M,
        cores=device.cores, dtype=q_TNH.dtype, kv_dtype=cache.dtype, scale=scale, softcap=softcap,
        sinks=sinks_N is not None, alibi=alibi_N is not None, kv_scales=kv_scales is not None,
        interpret=bool(interpret),
    )  # fmt: skip
    reach = min(M * S, window + S if isinstance(window, int) else M * S)
    of_decode, of_prefill = tiles or (
        decode_tiles(program, reach),
        prefill_tiles(program, reach, T, device.scratch_bytes),
    )
    if interpret:
        qo_TWpH, cache = map(layout.as_words, (qo_TWpH, cache))
    first, last = ragged.num_decodes, ragged.num_rows
    program = program._replace(tiles=of_decode)
    qo_TWpH, cache = run(program, new_TC1H, qo_TWpH, cache, 0, first)
    if not decode_only:
        program = program._replace(tiles=of_prefill)
        qo_TWpH, cache = run(program, new_TC1H, qo_TWpH, cache, first, last)
    if interpret:
        qo_TWpH = layout.from_words(qo_TWpH, q_TNH.dtype)
        cache = layout.from_words(cache, pages.kv_LPSCpH.dtype)
    return layout.unpack_o(qo_TWpH, N, how), PackedPages(cache)


def _run(
    ragged: Ragged, layer, window, constants: dict[str, Any], program: Program,
    new_TC1H, qo_TWpH, cache, first_row, end_row, *,
    decode_only: bool, device: Device, interpret: Any,
):  # fmt: skip
    """One program over rows first_row .. end_row: (q with their outputs, cache with their k, v)."""
    T, R = qo_TWpH.shape[0], ragged.pages_RM.shape[0]
    params = jnp.stack([jnp.asarray(x, jnp.int32) for x in (layer, window, first_row, end_row)])
    scalars = {"params": params, "pages": ragged.pages_RM.reshape(-1), "kv_len": ragged.kv_len_R}
    scratch = program.scratch()
    if not program.decode:
        scalars["start"] = ragged.start_R
        items = R + T // program.tiles.queries
        scratch |= {name: pltpu.SMEM((items,), jnp.int32) for name in ("item_row", "item_first")}
    scalars |= constants
    operands = {"new": new_TC1H, "q_in_hbm": qo_TWpH, "cache": cache}
    names = (*scalars, *operands, "o_hbm", "cache_out", *scratch)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    first = len(scalars) + 1
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (qo_TWpH, cache)]
    if not interpret:  # what is small would be copied to VMEM first, for the copies out of there
        operands["new"] = pltpu.with_memory_space_constraint(new_TC1H, pltpu.HBM)
        shapes = [pltpu.HBM(x.shape, x.dtype) for x in shapes]
    return pl.pallas_call(
        partial(body, program, names),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(program.cores,),
            in_specs=[hbm] * len(operands),
            out_specs=[hbm, hbm],
            scratch_shapes=list(scratch.values()),
        ),
        input_output_aliases={first: 0, first + 1: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=device.scratch_bytes * 3 // 4,
            disable_bounds_checks=True,
        ),
        cost_estimate=_cost(program, window, T, R if decode_only else R - 1),
        name="paged_attention_decode" if program.decode else "paged_attention_prefill",
        interpret=interpret,
    )(*scalars.values(), *operands.values())


def _cost(program: Program, window, T: int, decodes: int) -> pl.CostEstimate:
    """With every row's page table full: what a row really holds is not known to the compiler, nor
    is a traced window. Prefill is counted as one row, and `decodes` as all the others."""
    pg, length = program, program.M * program.S
    token = LANES * 4 * pg.kv.C
    queries, rows = (decodes, decodes) if pg.decode else (T, 1)
    sees = length if pg.decode else max(length - T // 2, 1)
    if isinstance(window, int):
        length = min(length, window + (1 if pg.decode else T))
        sees = min(sees, window)
    return pl.CostEstimate(
        flops=4 * pg.N * pg.kv.H * queries * sees,
        transcendentals=pg.N * queries * sees,
        bytes_accessed=rows * length * token + queries * (2 * LANES * 4 * pg.q_words + 2 * token),
    )

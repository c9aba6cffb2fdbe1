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
from pallas_kernels.paged_attention.mosaic_tpu_tiles import best_decode, best_prefill
from pallas_kernels.paged_attention.mosaic_tpu_words import LANES, packing
from pallas_kernels.paged_attention.reference import stored
from pallas_kernels.paged_attention.tiles import PhaseTiles
from pallas_kernels.reach import most

DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), FP8)
MAX_HEAD_DIM = 256
MAX_TABLE = 2**17  # entries of the page table: half a MiB of SMEM, which has one


def refuse(
    *, page_size: int, head_dim: int, dtype: Any, distance_bias: bool, apart: bool
) -> str | None:
    """Why this kernel does not take a cache, or what it is to do with it; None: it does."""
    if distance_bias:
        return "it adds no bias by distance (distance_bias_NX), as the reference does"
    if apart:
        return "it attends to keys and values as it writes them, and not to others alone"
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


def program(
    *, N: int, K: int, H: int, S: int, M: int, cores: int, dtype: Any, kv_dtype: Any, scale: float,
    attention_chunk_size: int | None, softcap: float | None, sinks: bool, alibi: bool,
    kv_scales: bool, interpret: bool,
) -> Program:  # fmt: skip
    """Decode's, before its tiles are chosen."""
    return Program(
        tiles=Tiles(1, S, S, 1), N=N, kv=packing(K, H, kv_dtype), q=packing(K, H, dtype), S=S, M=M,
        cores=cores, dtype=dtype, kv_dtype=kv_dtype, scale=scale,
        attention_chunk_size=attention_chunk_size, softcap=softcap, sinks=sinks, alibi=alibi,
        kv_scales=kv_scales, interpret=interpret,
    )  # fmt: skip


def prefill_of(decode: Program) -> Program:
    """The same call's, before its tiles are chosen."""
    return decode._replace(tiles=decode.tiles._replace(queries=16))


def write(
    k_TKH, v_TKH, pages: PackedPages, layer, page_T, slot_T, kv_scales: Scales | None
) -> PackedPages:
    """By XLA's scatter: a kernel's copies are worth it where they hide behind attention."""
    cache = pages.kv_LPSCpH
    how = packing(k_TKH.shape[1], k_TKH.shape[2], cache.dtype)
    new_TCpH = layout.pack_kv(*stored(k_TKH, v_TKH, cache.dtype, kv_scales), how)
    put = cache.at[layer, page_T, slot_T]
    return PackedPages(put.set(new_TCpH, mode="promise_in_bounds", unique_indices=True))


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
    attention_chunk_size: int | None,
    scale: float,
    decode_only: bool,
    softcap: float | None,
    sinks_N,
    alibi_N,
    kv_scales: Scales | None,
    device: Device,
    interpret: Any,
    tiles: PhaseTiles,
) -> tuple[jax.Array, PackedPages]:
    """As the op's write_and_attend. page_T and slot_T say what `ragged` says, and are not used."""
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
    bound = most(window, attention_chunk_size)
    run = partial(
        _run, ragged, layer, window, bound, {k: x for k, x in constants.items() if x is not None},
        decode_only=decode_only, device=device, interpret=interpret,
    )  # fmt: skip
    decode = program(
        N=N, K=K, H=H, S=S, M=M, cores=device.cores, dtype=q_TNH.dtype, kv_dtype=cache.dtype,
        scale=scale, attention_chunk_size=attention_chunk_size, softcap=softcap,
        sinks=sinks_N is not None, alibi=alibi_N is not None, kv_scales=kv_scales is not None,
        interpret=bool(interpret),
    )  # fmt: skip
    of_decode = tiles.decode or best_decode(decode, min(T, R), bound, device)
    if interpret:
        qo_TWpH, cache = map(layout.as_words, (qo_TWpH, cache))
    first, last = ragged.num_decodes, ragged.num_rows
    decode = decode._replace(tiles=of_decode)
    qo_TWpH, cache = run(decode, new_TC1H, qo_TWpH, cache, 0, first)
    if not decode_only:
        prefill = prefill_of(decode)
        of_prefill = tiles.prefill or best_prefill(prefill, T, bound, device)
        prefill = prefill._replace(tiles=of_prefill)
        qo_TWpH, cache = run(prefill, new_TC1H, qo_TWpH, cache, first, last)
    if interpret:
        qo_TWpH = layout.from_words(qo_TWpH, q_TNH.dtype)
        cache = layout.from_words(cache, pages.kv_LPSCpH.dtype)
    return layout.unpack_o(qo_TWpH, N, how), PackedPages(cache)


def _run(
    ragged: Ragged, layer, window, bound, constants: dict[str, Any], program: Program,
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
        cost_estimate=_cost(program, bound, T, R if decode_only else R - 1),
        name="paged_attention_decode" if program.decode else "paged_attention_prefill",
        interpret=interpret,
    )(*scalars.values(), *operands.values())


def _cost(program: Program, bound, T: int, decodes: int) -> pl.CostEstimate:
    """With every row's page table full: what a row really holds is not known to the compiler, nor
    is a traced `bound`, the most tokens that a query sees. Prefill is counted as one row, and
    `decodes` as all the others."""
    pg, length = program, program.M * program.S
    token = LANES * 4 * pg.kv.C
    queries, rows = (decodes, decodes) if pg.decode else (T, 1)
    sees = length if pg.decode else max(length - T // 2, 1)
    if (size := pg.attention_chunk_size) is not None and length > size:
        sees = min(sees, size // 2)  # whichever its chunk is, a query is halfway through it
    if isinstance(bound, int):
        length = min(length, bound + (1 if pg.decode else T))
        sees = min(sees, bound)
    return pl.CostEstimate(
        flops=4 * pg.N * pg.kv.H * queries * sees,
        transcendentals=pg.N * queries * sees,
        bytes_accessed=rows * length * token + queries * (2 * LANES * 4 * pg.q_words + 2 * token),
    )

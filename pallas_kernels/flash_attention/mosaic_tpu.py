"""TPU: one pallas_call over the pairs of a query tile and a key tile that see each other.

Bound by the matrix unit from about 512 tokens on; a head_dim of 128 fills half the depth of the
256-wide unit of v6e and 7x, which then give half their peak. The query heads of a kv head share
its tiles: their queries are rows of one product, so that a key tile of HBM is used by 1,024 rows.
The grid runs over a table of pairs instead of a square with holes: a skipped step would still
cost a third of a microsecond, about what a useful one takes. Where lengths or a traced window
decide at run time, a step that nobody sees repeats its neighbour's tile, which is not fetched
again, and computes nothing. Heads come before tokens inside: XLA transposes what goes in and out,
as part of what makes it where it can.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.devices import Device
from pallas_kernels.flash_attention.key import tuning_key
from pallas_kernels.reach import into_chunk, most, oldest
from pallas_kernels.tuning import tuned

MASKED = -1e30  # logit of a key that is not seen
FLOOR = -1e20  # as in mosaic_gpu.py: where a row's largest logit starts
LANES = 128
ROWS = 1024  # query rows of one product, of all heads together
FIRST, LAST, PARTIAL = 1, 2, 4  # of a pair: of its query tile, and whether it needs the mask


class Tiles(NamedTuple):
    heads: int  # query heads of one kv head in a block
    queries: int  # of each head; a multiple of 16
    keys: int  # a multiple of 128, and of `queries` or a divisor of it


def tiles(B: int, T: int, N: int, K: int, device: Device) -> Tiles:
    """Not yet measured. The logits of a block are 2 to 4 MiB in VMEM."""
    G = N // K
    heads = max(n for n in range(1, G + 1) if G % n == 0 and n <= 16)
    if B * N // heads < device.cores and heads % 2 == 0:
        heads //= 2  # something for the second core of a megacore
    # Short rows: finer tiles waste less on the diagonal.
    keys = 1024 if T >= 8192 else 512 if T >= 1024 else LANES
    return Tiles(heads, max(min(ROWS // _power_of_two(heads), keys), 16), keys)


def best_tiles(q_BTNH, v_BTKV, causal: bool, window, device: Device) -> Tiles:
    """Those measured fastest, else what seems so."""
    name = tuning_key(q_BTNH, v_BTKV, causal=causal, window=window)
    (B, T, N, _), K = q_BTNH.shape, v_BTKV.shape[2]
    return tuned("flash_attention", device, name, Tiles) or tiles(B, T, N, K, device)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def flash_attention(
    q_BTNH, k_BTKH, v_BTKV, *,
    scale, causal, window, attention_chunk_size, softcap, sinks_N, alibi_N, lengths_B, device,
    choice=None, interpret=False,
):  # fmt: skip
    """As pallas_kernels.flash_attention, whose checks have passed."""
    (B, T, N, H), (K, V) = q_BTNH.shape, v_BTKV.shape[2:]
    bound, size = most(window, attention_chunk_size), attention_chunk_size
    heads, queries, keys = choice or best_tiles(q_BTNH, v_BTKV, causal, bound, device)
    padded = -(-T // max(queries, keys)) * max(queries, keys)
    heads_first = lambda x: jnp.pad(
        jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padded - T), (0, 0))
    )
    constant = window if isinstance(window, int) else None
    table = pairs(padded, T, queries, keys, causal, constant, size)
    scalars = {  # read by index maps and kernel from scalar memory
        "table": jnp.asarray(table),
        "window": None if window is None or isinstance(window, int) else jnp.reshape(window, (1,)),
        "lengths": lengths_B,
        "sinks": sinks_N,
        "alibi": alibi_N,
    }
    scalars = {name: x for name, x in scalars.items() if x is not None}
    names = tuple(scalars)

    def query_tile(b, n, p, table, *_):
        return b, n, table[0, p], 0

    def key_tile(b, n, p, *refs):
        scalar = dict(zip(names, refs, strict=True))
        i, j = scalar["table"][0, p], scalar["table"][1, p]
        if "window" in scalar:
            j = jnp.maximum(j, lax.div(oldest(i * queries, scalar["window"][0], None), keys))
        if "lengths" in scalar:
            j = jnp.minimum(j, jnp.maximum(pl.cdiv(scalar["lengths"][b], keys) - 1, 0))
        return b, lax.div(n * heads, N // K), j, 0

    rows = heads * queries
    visible = seen(T, causal, constant, size) * B * N
    itemsize = q_BTNH.dtype.itemsize
    o_BNTV = pl.pallas_call(
        partial(
            _kernel, names=names, T=T, scale=scale, causal=causal, window=constant, size=size,
            softcap=softcap,
        ),
        out_shape=jax.ShapeDtypeStruct((B, N, padded, V), q_BTNH.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, N // heads, table.shape[1]),
            in_specs=[
                pl.BlockSpec((1, heads, queries, H), query_tile),
                pl.BlockSpec((1, 1, keys, H), key_tile),
                pl.BlockSpec((1, 1, keys, V), key_tile),
            ],
            out_specs=pl.BlockSpec((1, heads, queries, V), query_tile),
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, V), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=device.scratch_bytes // 4 * 3,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * (H + V) * visible,
            transcendentals=visible,
            bytes_accessed=itemsize * B * T * (N + K) * (H + V),
        ),
        name="flash_attention",
        interpret=interpret,
    )(*scalars.values(), *(heads_first(x) for x in (q_BTNH, k_BTKH, v_BTKV)))  # fmt: skip
    return jnp.swapaxes(o_BNTV[:, :, :T], 1, 2)


def seen(T: int, causal: bool, window: int | None, size: int | None) -> int:
    """Pairs of a query and a key that it sees, in a row of T tokens; `size` is the
    attention_chunk_size."""
    if not causal:
        return T * T
    whole, rest = divmod(T, size or T)

    def in_chunk(n: int) -> int:
        short = min(window or n, n)  # queries whose window reaches past the first token
        return short * (short + 1) // 2 + (n - short) * short

    return whole * in_chunk(size or T) + in_chunk(rest)


def pairs(padded, T, queries, keys, causal, window, size) -> np.ndarray:
    """[3, P] int32: query tile, key tile, and flags of each pair that may see each other."""
    found = []

    def oldest(query: int) -> int:
        in_window = 0 if window is None else query - window + 1
        return max(in_window, 0 if size is None else query // size * size, 0)

    for i in range(padded // queries):
        end = -(-min((i + 1) * queries, T) // keys) if causal else -(-T // keys)
        begin, last = oldest(i * queries) // keys, oldest((i + 1) * queries - 1)
        # A tile of padding alone still visits one key tile: its output must be written.
        begin, end = min(begin, max(end - 1, 0)), max(end, 1)
        for j in range(begin, end):
            cut = (j + 1) * keys > (i * queries + 1 if causal else T)
            cut |= j * keys < last
            flags = FIRST * (j == begin) | LAST * (j == end - 1) | PARTIAL * cut
            found.append((i, j, flags))
    return np.asarray(found, np.int32).T


def _kernel(*refs, names, T, scale, causal, window, size, softcap):
    scalar = dict(zip(names, refs, strict=False))
    q_ref, k_ref, v_ref, o_ref, peak_ref, total_ref, sum_ref = refs[len(names) :]
    b, n, p = (pl.program_id(axis) for axis in range(3))
    _, heads, queries, H = q_ref.shape
    keys, V = v_ref.shape[2:]
    rows = heads * queries
    i, j, flags = (scalar["table"][row, p] for row in range(3))
    length = scalar["lengths"][b] if "lengths" in scalar else None
    if "window" in scalar:
        window = scalar["window"][0]
    precision = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    product = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def by_head(name):
        """[heads, 1, 1]: this block's numbers of the query heads."""
        column = lax.broadcasted_iota(jnp.int32, (heads, 1, 1), 0)
        x = jnp.full((heads, 1, 1), scalar[name][n * heads], jnp.float32)
        for head in range(1, heads):
            x = jnp.where(column == head, scalar[name][n * heads + head], x)
        return x

    @pl.when(flags & FIRST > 0)
    def start():
        # A sink is a key of value zero; without one, it lies too low to count.
        sink = by_head("sinks") if "sinks" in scalar else jnp.full((heads, 1, 1), FLOOR)
        peak = jnp.broadcast_to(sink, (heads, queries, LANES)).reshape(rows, LANES)
        peak_ref[...] = peak
        total_ref[...] = jnp.ones_like(peak)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def visit(masked):
        q_rH = q_ref[0].reshape(rows, H)
        s = product(q_rH, k_ref[0, 0], (((1,), (1,)), ((), ()))) * scale
        if softcap is not None:
            s = softcap * jnp.tanh(s / softcap)
        if masked or "alibi" in scalar:
            s_hqk = s.reshape(heads, queries, keys)
            key = lax.broadcasted_iota(jnp.int32, (queries, keys), 1) + j * keys
            query = lax.broadcasted_iota(jnp.int32, (queries, keys), 0) + i * queries
            behind = query - key
            if "alibi" in scalar:
                ahead = jnp.broadcast_to((-behind).astype(jnp.float32)[None], s_hqk.shape)
                s_hqk = s_hqk + by_head("alibi") * ahead
            if masked:
                visible = behind >= 0 if causal else key < (T if length is None else length)
                if window is not None:
                    visible &= behind < window
                if size is not None:
                    visible &= behind <= into_chunk(query, size)
                s_hqk = jnp.where(jnp.broadcast_to(visible[None], s_hqk.shape), s_hqk, MASKED)
            s = s_hqk.reshape(rows, keys)
        peak = peak_ref[:, :1]
        new_peak = jnp.maximum(peak, s.max(axis=1, keepdims=True))
        shrink = jnp.exp(peak - new_peak)
        e = jnp.exp(s - new_peak)
        total = total_ref[:, :1] * shrink + e.sum(axis=1, keepdims=True)
        peak_ref[...] = jnp.broadcast_to(new_peak, peak_ref.shape)
        total_ref[...] = jnp.broadcast_to(total, total_ref.shape)
        added = product(e.astype(v_ref.dtype), v_ref[0, 0], (((1,), (0,)), ((), ())))
        sum_ref[...] = sum_ref[...] * shrink + added

    cut = flags & PARTIAL > 0
    some = flags >= 0
    if "window" in scalar:
        cut |= j * keys < (i + 1) * queries - window
        some &= (j + 1) * keys > oldest(i * queries, window, None)
    if length is not None:
        some &= (j * keys < length) & (i * queries < length)
        if not causal:
            cut |= (j + 1) * keys > length
    pl.when(some & cut)(partial(visit, masked=True))
    pl.when(some & ~cut)(partial(visit, masked=False))

    @pl.when(flags & LAST > 0)
    def finish():
        o_hqV = (sum_ref[...] / total_ref[:, :1]).reshape(heads, queries, V)
        if length is not None:
            query = lax.broadcasted_iota(jnp.int32, o_hqV.shape, 1) + i * queries
            o_hqV = jnp.where(query < length, o_hqV, 0.0)
        o_ref[0] = o_hqV.astype(o_ref.dtype)

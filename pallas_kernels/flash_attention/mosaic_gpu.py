"""Hopper: one producer warpgroup, two or three compute warpgroups of 64 query rows each.

Bound by the tensor cores from about 1k tokens on: 2·(H+V) operations per query and key, against
one exp2, which the MUFU unit makes at 1/256 of the wgmma rate at H = V = 128. Hence

    softmax hides under wgmma twice: inside a warpgroup (the product with K of the next tile and
    the product of p with V of this one are issued together, and p of the next tile is made while
    the latter runs), and between warpgroups, who take turns to issue;
    tiles are visited from the diagonal to the left, so that the mask is code of the first tiles
    (and of the last ones under a window or in chunks), and every row has met a visible key at once;
    the longest query tiles start first, and kv heads are visited in groups whose K and V fit in
    half of L2: many query tiles read them while they are there;
    logits are kept in units of log2, the scale folded into the one multiply-add before exp2.

Reads past T are zeros and writes past T are dropped by TMA.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.devices import Device
from pallas_kernels.flash_attention.key import tuning_key
from pallas_kernels.hopper import ACC, WARPGROUP_ROWS, accumulate_from_registers, swizzled
from pallas_kernels.reach import into_chunk, most, oldest
from pallas_kernels.tuning import tuned

LOG2_E = math.log2(math.e)
MASKED = -1e30  # logit of a key that is not seen
# Where a row's largest logit starts: far below any logit and far above MASKED, so that a row of
# a tile with no visible key gives exact zeros, and a row with none at all divides by 1.
FLOOR = -1e20
L2_BYTES = 24 * 2**20  # half of L2 on H100 and H200: what one group of kv heads may hold
RESERVED_BYTES = 4 * 1024  # of shared memory: barriers and the compiler's own scratch


class Tiles(NamedTuple):
    warpgroups: int  # that compute, of 64 query rows each
    keys: int  # of one tile of K and V; a multiple of 16
    stages: int  # tiles of K and of V in flight


def shared_bytes(tiles: Tiles, H: int, V: int) -> int:
    """What one block holds in shared memory: q, which o overwrites, and the stages."""
    rows = tiles.warpgroups * WARPGROUP_ROWS
    own_o = 0 if V <= H else rows * V
    return 2 * (rows * H + own_o + tiles.stages * tiles.keys * (H + V)) + RESERVED_BYTES


def tiles(H: int, V: int, device: Device, window: int | None) -> Tiles:
    """As many keys as registers allow (the logits, p and o of a row), then as many stages as
    shared memory allows. Not yet measured."""
    widest = max(H, V)
    if widest <= 64 and window is not None and window <= 512:
        choice = Tiles(warpgroups=3, keys=64, stages=2)  # finer tiles waste less at both ends
    elif widest <= 128 or (H <= 192 and V <= 128):
        choice = Tiles(warpgroups=2, keys=128, stages=2)
    else:
        choice = Tiles(warpgroups=2, keys=64, stages=2)
    while choice.stages < 4 and fits(
        deeper := choice._replace(stages=choice.stages + 1), H, V, device
    ):
        choice = deeper
    return choice


def best_tiles(q_BTNH, v_BTKV, causal: bool, window, device: Device) -> Tiles:
    """Those measured fastest, else what seems so."""
    name = tuning_key(q_BTNH, v_BTKV, causal=causal, window=window)
    constant = window if isinstance(window, int) else None
    return tuned("flash_attention", device, name, Tiles) or tiles(
        q_BTNH.shape[3], v_BTKV.shape[3], device, constant
    )


def fits(choice: Tiles, H: int, V: int, device: Device) -> bool:
    """Whether shared memory and registers are enough."""
    # A thread of three warpgroups has 160 registers, of two 240: 64 rows of `keys` logits, p of
    # 16 bits and V sums take their count over 128 threads, and the rest about 56.
    registers = (choice.keys * 3 // 2 + V) // 2 + 56
    return shared_bytes(choice, H, V) <= device.scratch_bytes and registers <= (
        240 if choice.warpgroups == 2 else 160
    )


def flash_attention(
    q_BTNH, k_BTKH, v_BTKV, *,
    scale, causal, window, attention_chunk_size, softcap, sinks_N, alibi_N, lengths_B, device,
    choice=None, interpret=False,
):  # fmt: skip
    """As pallas_kernels.flash_attention, whose checks have passed."""
    (B, T, N, H), (K, V) = q_BTNH.shape, v_BTKV.shape[2:]
    bound = most(window, attention_chunk_size)
    shape = choice or best_tiles(q_BTNH, v_BTKV, causal, bound, device)
    rows = shape.warpgroups * WARPGROUP_ROWS
    heads = _heads_together(T, N, K, H, V)
    scalars = {  # small arrays in device memory that the blocks read by index
        "window": None if window is None or isinstance(window, int) else jnp.reshape(window, (1,)),
        "sinks": sinks_N,
        "alibi": alibi_N,
        "lengths": lengths_B,
    }
    scalars = {name: x for name, x in scalars.items() if x is not None}
    body = partial(
        _body, names=tuple(scalars), heads=heads, scale=scale, causal=causal, window=window,
        size=attention_chunk_size, softcap=softcap, shape=shape,
    )  # fmt: skip
    dtype = q_BTNH.dtype
    smem = lambda *dims: plgpu.SMEM(dims, dtype, transforms=swizzled(dtype, dims[-1]))
    scratch = {
        "q_s": [smem(shape.warpgroups, WARPGROUP_ROWS, width) for width in _parts(H, V)],
        "k_s": [smem(shape.stages, shape.keys, width) for width in _parts(H, V)],
        "v_s": smem(shape.stages, shape.keys, V),
        "q_ready": plgpu.Barrier(num_arrivals=len(_parts(H, V)), num_barriers=shape.warpgroups),
        "k_ready": plgpu.Barrier(num_arrivals=len(_parts(H, V)), num_barriers=shape.stages),
        "v_ready": plgpu.Barrier(num_barriers=shape.stages),
        "k_free": plgpu.Barrier(num_arrivals=shape.warpgroups, num_barriers=shape.stages),
        "v_free": plgpu.Barrier(num_arrivals=shape.warpgroups, num_barriers=shape.stages),
        "turn": plgpu.Barrier(num_barriers=shape.warpgroups),
    }
    if V > H:
        scratch["o_s"] = smem(shape.warpgroups, WARPGROUP_ROWS, V)
    if interpret:
        scratch["sum_s"] = plgpu.SMEM((shape.warpgroups, WARPGROUP_ROWS, V), jnp.float32)
        scratch["p_s"] = plgpu.SMEM((shape.warpgroups, WARPGROUP_ROWS, shape.keys), dtype)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((B, T, N, V), dtype),
        # The last axis runs fastest. Of a group of heads, the longest query tiles come first.
        grid=(B * N // heads, pl.cdiv(T, rows), heads),
        grid_names=("group", "tile", "head"),
        num_threads=shape.warpgroups + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q_BTNH, k_BTKH, v_BTKV, *scalars.values())


def _parts(H: int, V: int) -> tuple[int, ...]:
    """q and k in SMEM by columns: o, as wide as v, takes the place of q's first part."""
    return (V, H - V) if V < H else (H,)


def _heads_together(T: int, N: int, K: int, H: int, V: int) -> int:
    """Query heads of the kv heads whose K and V fit in L2_BYTES together."""
    fit = max(L2_BYTES // (2 * T * (H + V)), 1)
    return N // K * max(n for n in range(1, K + 1) if K % n == 0 and n <= fit)


class _Range(NamedTuple):
    """The key tiles of a query tile, counted by step from the rightmost (step 0) leftwards."""

    last: jax.Array  # the rightmost key tile
    steps: jax.Array  # at least 1
    unmasked: jax.Array  # first step from which no key lies right of the diagonal, at least 1
    left: jax.Array  # first step whose keys a window or chunk may cut, at most `steps`


def _range(first_row, rows, keys, length, causal, window, size) -> _Range:
    """For query rows first_row to first_row + rows, of which those below `length` are valid."""
    end = pl.cdiv(length, keys)  # one past the rightmost tile
    whole = lax.div(length, keys)  # tiles left of it are unmasked on the right
    if causal:
        end = jnp.minimum(end, pl.cdiv(first_row + rows, keys))
        whole = lax.div(first_row + 1, keys)
    end = jnp.maximum(end, 1)
    begin, cut = jnp.int32(0), jnp.int32(0)
    if window is not None or size is not None:
        # A tile of padding rows alone still visits one key tile: its rows become zeros later.
        begin = jnp.minimum(lax.div(oldest(first_row, window, size), keys), end - 1)
        cut = pl.cdiv(oldest(first_row + rows - 1, window, size), keys)
    steps = end - begin
    unmasked = jnp.clip(end - whole, 1, steps)
    return _Range(end - 1, steps, unmasked, jnp.clip(end - cut, unmasked, steps))


def _body(
    q_g, k_g, v_g, *refs, names, heads, scale, causal, window, size, softcap, shape,
    q_s, k_s, v_s, q_ready, k_ready, v_ready, k_free, v_free, turn,
    o_s=None, sum_s=None, p_s=None,
):  # fmt: skip
    *scalars, o_g = refs
    scalar = dict(zip(names, scalars, strict=True))
    (_, T, N, H), (K, V), dtype = q_g.shape, v_g.shape[2:], q_g.dtype
    warpgroups, keys, stages = shape
    rows = warpgroups * WARPGROUP_ROWS
    wg = lax.axis_index("wg")
    per_row = N // heads
    b = lax.div(lax.axis_index("group"), jnp.int32(per_row))
    n = lax.rem(lax.axis_index("group"), jnp.int32(per_row)) * heads + lax.axis_index("head")
    first_row = (pl.cdiv(T, rows) - 1 - lax.axis_index("tile")) * rows
    if "window" in scalar:
        window = scalar["window"][0]
    length = scalar["lengths"][b] if "lengths" in scalar else jnp.int32(T)
    span = _range(first_row, rows, jnp.int32(keys), length, causal, window, size)
    slot = lambda step: lax.rem(step, jnp.int32(stages))

    @pl.when(wg == warpgroups)
    def produce():
        plgpu.set_max_registers(24 if warpgroups == 2 else 32, action="decrease")
        kv = lax.div(n, jnp.int32(N // K))
        columns = [pl.ds(at, width) for at, width in zip((0, V), _parts(H, V), strict=False)]
        for w in range(warpgroups):
            at = pl.ds(first_row + w * WARPGROUP_ROWS, WARPGROUP_ROWS)
            for part_s, cols in zip(q_s, columns, strict=True):
                plgpu.copy_gmem_to_smem(q_g.at[b, at, n, cols], part_s.at[w], q_ready.at[w])

        @pl.loop(0, span.steps)
        def _(step):
            at, to = pl.ds((span.last - step) * keys, keys), slot(step)
            pl.when(step >= stages)(partial(plgpu.barrier_wait, k_free.at[to]))
            for part_s, cols in zip(k_s, columns, strict=True):
                plgpu.copy_gmem_to_smem(k_g.at[b, at, kv, cols], part_s.at[to], k_ready.at[to])
            pl.when(step >= stages)(partial(plgpu.barrier_wait, v_free.at[to]))
            plgpu.copy_gmem_to_smem(v_g.at[b, at, kv], v_s.at[to], v_ready.at[to])

        @pl.loop(jnp.maximum(span.steps - stages, 0), span.steps)
        def _(step):  # nothing of this block may still be read when it ends
            plgpu.barrier_wait(k_free.at[slot(step)])
            plgpu.barrier_wait(v_free.at[slot(step)])

    @pl.when(wg < warpgroups)
    def compute():
        plgpu.set_max_registers(240 if warpgroups == 2 else 160, action="increase")
        row0 = first_row + wg * WARPGROUP_ROWS
        layout = plgpu.Layout.WGMMA
        wide = lambda x, columns: lax.broadcast_in_dim(x, (WARPGROUP_ROWS, columns), [0])
        next_wg = lax.rem(wg + 1, jnp.int32(warpgroups))
        detour_s = None if p_s is None else p_s.at[wg]
        slope = scalar["alibi"][n] * LOG2_E if "alibi" in scalar else None

        def logits(s, step, masked):
            """In units of log2, but for a factor that `peak` and `probability` bring in."""
            if softcap is not None:
                # softcap * tanh(s * scale / softcap): tanh.approx has but 11 bits.
                e = jnp.exp2(s * (-2 * LOG2_E * scale / softcap))
                s = (2 * softcap * LOG2_E) / (1 + e) - softcap * LOG2_E
            if slope is None and not masked:
                return s
            iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, s.shape, axis, layout=layout)
            # key position less query position: `behind` of the tile, plus this in the tile
            inside = iota(1) - iota(0)
            behind = (span.last - step) * keys - row0
            if slope is not None:
                s = s if softcap is not None else s * (scale * LOG2_E)
                s = s + slope * (inside + behind).astype(jnp.float32)
            if masked:
                seen = inside <= -behind if causal else iota(1) < length - behind - row0
                if window is not None:
                    seen &= inside > -behind - window
                if size is not None:
                    row = plgpu.broadcasted_iota(
                        jnp.int32, (WARPGROUP_ROWS,), 0, layout=layout.reduce(1)
                    )
                    seen &= inside >= -behind - wide(into_chunk(row + row0, size), keys)
                s = jnp.where(seen, s, MASKED)
            return s

        # What `logits` left to do: the scale, folded into the multiply-add before exp2.
        factor = scale * LOG2_E if softcap is None and slope is None else 1.0
        peak = lambda s: s.max(axis=1) * factor
        probability = lambda s, m: jnp.exp2(s * factor - wide(m, keys))

        def product_qk(s_ref, at):
            for q_part, k_part in zip(q_s, k_s, strict=True):
                plgpu.wgmma(s_ref, q_part.at[wg], k_part.at[at].T)

        def first(s_ref):
            product_qk(s_ref, 0)
            return s_ref[...]

        def attend(o_ref):
            plgpu.barrier_wait(q_ready.at[wg])
            plgpu.barrier_wait(k_ready.at[0])
            s = pl.run_scoped(first, ACC((WARPGROUP_ROWS, keys), jnp.float32))
            plgpu.barrier_arrive(k_free.at[0])
            s = logits(s, jnp.int32(0), masked=True)
            sink = scalar["sinks"][n] * LOG2_E if "sinks" in scalar else FLOOR
            sink = jnp.full((WARPGROUP_ROWS,), sink, jnp.float32)
            sink = plgpu.layout_cast(sink, layout.reduce(1))
            m = jnp.maximum(peak(s), sink)
            p = probability(s, m)
            total = p.sum(axis=1) + jnp.exp2(sink - m)
            # Warpgroup 0 has the first turn.
            pl.when(wg == warpgroups - 1)(partial(plgpu.barrier_arrive, turn.at[0]))

            def step_(step, carry, masked):
                m, total, p = carry
                old = slot(step - 1)
                plgpu.barrier_wait(k_ready.at[slot(step)])
                plgpu.barrier_wait(turn.at[wg])

                def products(s_ref):
                    product_qk(s_ref, slot(step))
                    plgpu.barrier_wait(v_ready.at[old])
                    accumulate_from_registers(o_ref, p, v_s.at[old], detour_s)
                    plgpu.barrier_arrive(turn.at[next_wg])
                    # The product with V goes on while the softmax below runs.
                    return plgpu.wgmma_accumulator_load(s_ref, wait_n=1)

                s = pl.run_scoped(products, ACC((WARPGROUP_ROWS, keys), jnp.float32))
                s = lax.optimization_barrier(s)  # nothing of the softmax moves above the wait
                plgpu.barrier_arrive(k_free.at[slot(step)])
                s = logits(s, step, masked)
                new_m = jnp.maximum(m, peak(s))
                shrink = jnp.exp2(m - new_m)
                new_p = probability(s, new_m)
                total = total * shrink + new_p.sum(axis=1)
                o = o_ref[...]  # waits for the product
                plgpu.barrier_arrive(v_free.at[old])
                # Rounding above the wait would write registers that the product still reads.
                new_p, total = lax.optimization_barrier((new_p, total))
                o_ref[...] = o * wide(shrink, V)
                return new_m, total, new_p.astype(dtype)

            carry = (m, total, p.astype(dtype))
            if causal and keys % rows:  # else the diagonal crosses but the first key tile
                carry = lax.fori_loop(1, span.unmasked, partial(step_, masked=True), carry)
            carry = lax.fori_loop(span.unmasked, span.left, partial(step_, masked=False), carry)
            if window is not None or size is not None:
                carry = lax.fori_loop(span.left, span.steps, partial(step_, masked=True), carry)
            m, total, p = carry
            pl.when(wg == 0)(partial(plgpu.barrier_wait, turn.at[0]))
            old = slot(span.steps - 1)
            plgpu.barrier_wait(v_ready.at[old])
            accumulate_from_registers(o_ref, p, v_s.at[old], detour_s)
            o = o_ref[...]
            plgpu.barrier_arrive(v_free.at[old])
            share = 1 / total
            if "lengths" in scalar:
                at = row0 + plgpu.broadcasted_iota(
                    jnp.int32, (WARPGROUP_ROWS,), 0, layout=layout.reduce(1)
                )
                share = jnp.where(at < length, share, 0.0)
            return o * wide(share, V)

        if sum_s is not None:
            sum_s[wg] = jnp.zeros((WARPGROUP_ROWS, V), jnp.float32)
            o = attend(sum_s.at[wg])
        else:
            o = pl.run_scoped(attend, ACC((WARPGROUP_ROWS, V), jnp.float32))
        out_s = q_s[0] if o_s is None else o_s
        out_s[wg] = o.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s.at[wg], o_g.at[b, pl.ds(row0, WARPGROUP_ROWS), n])
        plgpu.wait_smem_to_gmem(0)

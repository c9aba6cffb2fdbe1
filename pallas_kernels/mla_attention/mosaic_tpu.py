"""Latent attention on TPU: what the decode rows and the prefill chunks share, and the call.

A page of the cache is one [S, D] block, D filled up to whole registers (128 lanes), which one DMA
fetches. A token's row cannot be written alone, since 2 (bfloat16) or 4 (8 bits) tokens share a
32-bit word: kernels change it in VMEM and write the GRANULE of rows around it, 2 % of what
decoding reads at 1k tokens.

Decode is bound by reading the cache once for all heads up to N = 128, where the matrix units of a
v5e are as busy; prefill by the matrix units. Both kernels keep the next block's pages in flight
while they compute, and write the step's tokens into the cache, which is aliased: so is the output
with q, so that each writes its own tokens of one array.

Where a token goes follows from `ragged`; page_T and slot_T are not read.
"""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.devices import Device
from pallas_kernels.mla_attention import mosaic_tpu_decode as decode
from pallas_kernels.mla_attention import mosaic_tpu_prefill as prefill
from pallas_kernels.mla_attention import reference
from pallas_kernels.mla_attention.layout import FP8, LANES, Pages, tuning_key
from pallas_kernels.mla_attention.mosaic_tpu_common import Scalars, Shapes, Tiles
from pallas_kernels.tuning import tuned

LEAST_HEADS = 16  # of a register tile of 16-bit numbers; fewer are filled up


def tiles(heads: int, device: Device) -> Tiles:
    """A block of the cache takes longer to fetch than to ask for: 1 MB. Half of it in prefill,
    whose scores are prefill_rows times as large."""
    del device  # the same for all: VMEM is large enough
    return Tiles(decode_tokens=1024, prefill_tokens=512, prefill_rows=max(1024, heads))


def best_tiles(name: str, heads: int, device: Device) -> Tiles:
    """Those measured fastest for the key `name`, else what seems so."""
    return tuned("mla_attention", device, name, Tiles) or tiles(heads, device)


def candidates(N: int, C: int, decode_only: bool, device: Device) -> list[Tiles]:
    """Worth timing, the kernel's own choice first, of the phase's fields."""
    own = tiles(padded_heads(N), device)
    if decode_only:
        return [own, *(own._replace(decode_tokens=n) for n in (512, 2048))]
    # Of a row: queries, sum and output, and the scores of a block and their exponents.
    room = lambda t: t.prefill_rows * (8 * C + 2048 + 10 * t.prefill_tokens)
    sweep = [
        own._replace(prefill_rows=rows, prefill_tokens=tokens)
        for rows in (own.prefill_rows, own.prefill_rows // 2, own.prefill_rows * 2)
        for tokens in (512, 256, 1024)
    ]
    return list(dict.fromkeys((own, *(t for t in sweep if room(t) <= device.scratch_bytes // 2))))


def padded_heads(N: int) -> int:
    return -(-N // LEAST_HEADS) * LEAST_HEADS


def granule(dtype) -> int:
    return 32 // jnp.dtype(dtype).itemsize


def refuse(*, page_size: int, latent_dim: int, rope_dim: int, dtype) -> str | None:
    """Why not, or None."""
    if dtype not in (jnp.bfloat16, FP8):
        return f"dtype is {jnp.dtype(dtype).name}; it must be bfloat16 or {FP8}"
    if page_size % granule(dtype):
        return f"page_size is {page_size}; it must be a multiple of {granule(dtype)}"
    if latent_dim % LANES:
        return f"latent_dim is {latent_dim}; it must be a multiple of {LANES}"
    if rope_dim > LANES:
        return f"rope_dim is {rope_dim}; it must be at most {LANES}"
    return None


def write_and_attend(
    q_TNC, q_TNH, latent_TC, rope_TH, pages, layer, page_T, slot_T, ragged, *,
    scale, decode_only, kv_scale, device: Device, chosen: Tiles | None, interpret,
):  # fmt: skip
    del page_T, slot_T
    kv_LPSD = pages.kv_LPSD
    (N, C), H, (S, D) = q_TNC.shape[1:], q_TNH.shape[2], kv_LPSD.shape[2:]
    if q_TNC.dtype != jnp.bfloat16:
        raise ValueError(f"q_TNC is {q_TNC.dtype}; impl mosaic_tpu takes bfloat16")
    heads = padded_heads(N)
    name = tuning_key(q_TNC, q_TNH, kv_LPSD, ragged.pages_RM.shape[1], decode_only)
    # 8-bit numbers are scaled once, with q and the output.
    one = jnp.float32(1) if kv_scale is None else kv_scale
    widen = lambda x, lanes: jnp.pad(x, ((0, 0), (0, heads - N), (0, lanes)))
    q_TNC, q_TNH = widen(q_TNC, 0), widen(q_TNH, D - C - H)
    # Exact, and float32 rows can be moved one by one.
    new_TD = reference.token(latent_TC, rope_TH, kv_LPSD.dtype, kv_scale).astype(jnp.float32)
    new_TD = jnp.pad(new_TD, ((0, 0), (0, D - C - H)))
    shapes = Shapes(heads, C, D, S, ragged.pages_RM.shape[1], granule(kv_LPSD.dtype), scale)
    scalars = Scalars(
        jnp.stack([jnp.int32(layer), ragged.num_decodes, ragged.num_rows]),
        ragged.kv_len_R, ragged.start_R, ragged.pages_RM.reshape(-1), jnp.reshape(one, (1,)),
    )  # fmt: skip
    options: dict[str, Any] = {
        "shapes": shapes, "tiles": chosen or best_tiles(name, heads, device), "device": device,
        "interpret": interpret,
    }  # fmt: skip
    o_TNC, kv_LPSD = decode.run(scalars, q_TNC, q_TNH, new_TD, kv_LPSD, **options)
    if not decode_only:
        o_TNC, kv_LPSD = prefill.run(scalars, o_TNC, q_TNH, new_TD, kv_LPSD, **options)
    return o_TNC[:, :N], Pages(kv_LPSD)

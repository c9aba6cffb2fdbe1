from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.devices import DEVICES
from pallas_kernels.paged_attention import (
    PackedPages,
    Pages,
    PhaseTiles,
    Scales,
    cache_shapes,
    choose,
    heads_axis,
    reference,
    write_and_attend,
)
from pallas_kernels.paged_attention.cases import (
    CASES,
    CPU_CASES,
    FP8,
    KERNEL_CASES,
    Case,
    comparable,
    inputs,
    num_decodes,
    num_tokens,
)
from pallas_kernels.paged_attention.mosaic_gpu_decode import DecodeTiles
from pallas_kernels.paged_attention.mosaic_gpu_prefill import PrefillTiles
from tests.kernels.harness import GPU, check_case, once, plgpu_reset

# float32: sums in another order, over at most 400 terms of size 1.
# bfloat16: the output's own rounding.
ATOL = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}
CPU, H200 = DEVICES["cpu"], DEVICES["h200"]
# The CPU's path, which the engine's tests run on every commit too; each option once.
FAST_CPU = ("decode_many", "mixed", "window", "chunked", "softcap", "sinks", "alibi", "fp8")
FAST = ("all_at_once",)  # interpreted on every commit: both kernels, 8-bit pages, every option
by_name = lambda c: c.name


def named(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def arguments(case: Case, args: tuple) -> dict:
    """The op's, from `inputs`."""
    q, k, v, pages, layer, page_T, slot_T, ragged, window, sinks, alibi, scales = args
    return {
        "q_TNH": q, "k_TKH": k, "v_TKH": v, "pages": pages, "layer": layer, "page_T": page_T,
        "slot_T": slot_T, "ragged": ragged, "window": window,
        "attention_chunk_size": case.attention_chunk_size, "scale": case.scale or case.H**-0.5,
        "softcap": case.softcap, "sinks_N": sinks, "alibi_N": alibi, "kv_scales": scales,
        "decode_only": num_decodes(case) == len(case.queries), "device": CPU,
    }  # fmt: skip


STATIC = (
    "attention_chunk_size",
    "scale",
    "softcap",
    "decode_only",
    "device",
    "impl",
    "interpret",
    "tiles",
)


def run(case: Case, args: tuple, **changes):
    arrays = arguments(case, args) | changes
    static = {name: arrays.pop(name) for name in STATIC if name in arrays}
    compiled = once if static.get("interpret") else jax.jit
    return compiled(partial(write_and_attend, **static))(**arrays)


def on_gpu(case: Case, args: tuple, **changes):
    try:
        got = run(case, args, device=H200, interpret=GPU, **changes)
        return jax.block_until_ready(got)
    except BaseException:
        plgpu_reset()
        raise


@pytest.mark.parametrize(
    "dtype",
    [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)],
    ids=lambda d: d.__name__,
)
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c.name in FAST_CPU else [pytest.mark.slow]) for c in CPU_CASES],
    ids=by_name,
)
def test_blocks_equal_the_definition(case, dtype, keys):
    case = case._replace(dtype=jnp.dtype(dtype))
    args = inputs(case, next(keys), "reference")
    got, pages = run(case, args)
    assert isinstance(pages, Pages)
    window, sinks, alibi, scales = args[-4:]
    definition = partial(
        reference.definition, scale=case.H**-0.5, softcap=case.softcap,
        attention_chunk_size=case.attention_chunk_size,
    )  # fmt: skip
    want = once(definition)(
        args[0], *pages, args[4], *args[7], window=window, sinks_N=sinks, alibi_N=alibi,
        kv_scales=scales,
    )  # fmt: skip
    tokens = num_tokens(case)
    got, want = (np.asarray(x[:tokens], np.float32) for x in (got, want))
    np.testing.assert_allclose(got, want, atol=ATOL[dtype], rtol=0)
    assert np.abs(want).max() < 10  # nothing poisoned was read


@pytest.mark.parametrize("case", CPU_CASES, ids=by_name)
def test_decode_rows_may_go_the_prefill_way(case, keys):
    """With num_decodes = 0 every row is a prefill row: what deterministic serving relies on."""
    args = inputs(case, next(keys), "reference")
    want, _ = run(case, args)
    ragged = args[7]._replace(num_decodes=jnp.int32(0))
    got, _ = run(case, args, ragged=ragged, decode_only=False)
    tokens = num_tokens(case)
    np.testing.assert_allclose(got[:tokens], want[:tokens], atol=ATOL[jnp.float32], rtol=0)


def neighbours_changed(case: Case, args: tuple, row: int) -> dict:
    """Other lengths and queries for all rows but one."""
    q_TNH, ragged = args[0], args[7]
    others = np.delete(np.arange(len(case.queries)), row)
    lengths = np.asarray(ragged.kv_len_R).copy()
    lengths[others] = np.maximum(lengths[others] // 3, 1)
    q_TNH = q_TNH.at[others].set(-q_TNH[others])
    return {"q_TNH": q_TNH, "ragged": ragged._replace(kv_len_R=jnp.asarray(lengths))}


def test_a_row_does_not_see_its_neighbours(keys):
    """Bit for bit: other rows' lengths, queries and pages change nothing."""
    case = named("decode_many")
    args = inputs(case, next(keys), "reference")
    want, _ = run(case, args)
    got, _ = run(case, args, **neighbours_changed(case, args, 3))
    np.testing.assert_array_equal(got[3], want[3])
    assert not np.array_equal(got[4], want[4])


def test_the_cache_is_updated_in_place(keys):
    """Compiled for a cache far larger than the step: nothing of its size is copied."""
    case = named("mixed")
    args = inputs(case, next(keys), "reference")
    one = args[3].k_LPKSH
    big = jax.ShapeDtypeStruct((16, 4096, *one.shape[2:]), one.dtype)
    step = lambda kc, vc: run(case, args, pages=Pages(kc, vc))
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(big, big).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == 2 * big.size * 4
    assert memory.temp_size_in_bytes < 0.01 * big.size * 4


def test_an_8_bit_cache_holds_scaled_values_cut_to_its_range():
    k_TKH = jnp.asarray([[[1.0, -3.0]], [[1e4, -1e4]]])
    scales = Scales(jnp.asarray([2.0]), jnp.asarray([0.5]))
    k, v = reference.stored(k_TKH, k_TKH, FP8, scales)
    np.testing.assert_array_equal(k.astype(jnp.float32)[:, 0], [[0.5, -1.5], [448, -448]])
    np.testing.assert_array_equal(v.astype(jnp.float32)[:, 0], [[2, -6], [448, -448]])


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c.name in FAST else [pytest.mark.slow]) for c in KERNEL_CASES],
    ids=by_name,
)
def test_gpu_equals_the_reference(case, keys):
    check_case("paged_attention", case, "mosaic_gpu", next(keys), view=comparable)


def test_gpu_workers_take_chunks_of_many_rows(keys):
    """Two workers, a ring of two blocks: shares begin inside rows and heads, with a row of no
    tokens and one of padding between them. A row's bits do not depend on its neighbours'."""
    case = Case("", (1, 1, 1, 1), (300, 5, 700, 60), N=4, K=2, H=64, S=64, padding=1)
    args = inputs(case, next(keys), "mosaic_gpu")
    lengths = args[7].kv_len_R.at[1].set(0)
    args = (*args[:7], args[7]._replace(kv_len_R=lengths), *args[8:])
    tiles = PhaseTiles(DecodeTiles(2, 64, 2, 0, chunks=3), None)
    got, _ = on_gpu(case, args, tiles=tiles)
    want, _ = run(case, args)
    other, _ = on_gpu(case, args, tiles=tiles, **neighbours_changed(case, args, 2))
    got, want, other = (np.asarray(x, np.float32) for x in (got, want, other))
    np.testing.assert_allclose(got, want, atol=ATOL[jnp.bfloat16], rtol=0)
    np.testing.assert_array_equal(got[1], 0)
    np.testing.assert_array_equal(got[2], other[2])
    assert not np.array_equal(got[0], other[0])


@pytest.mark.slow
def test_gpu_prefill_takes_other_tiles(keys):
    """Blocks of 64 keys through a ring of two, where the kernel's own choice is 128."""
    case = Case("", (70,), (150,), N=2, K=1, H=64, S=64, padding=1)
    args = inputs(case, next(keys), "mosaic_gpu")
    got, _ = on_gpu(case, args, tiles=PhaseTiles(None, PrefillTiles(64, 2, 0)))
    want, _ = run(case, args)
    got, want = (np.asarray(x[:70], np.float32) for x in (got, want))
    np.testing.assert_allclose(got, want, atol=ATOL[jnp.bfloat16], rtol=0)


@pytest.mark.slow
def test_gpu_outputs_of_padding_are_finite(keys):
    case = named("chunks")
    got, _ = on_gpu(case, inputs(case, next(keys), "mosaic_gpu"))
    assert np.isfinite(np.asarray(got, np.float32)).all()


def test_what_a_device_runs():
    options: dict[str, Any] = {"page_size": 64, "head_dim": 128, "dtype": jnp.bfloat16}
    changed = lambda **cache: choose(H200, **{**options, **cache})
    assert choose(CPU, **options) == "reference"
    assert choose(H200, **options) == "mosaic_gpu"
    assert changed(page_size=8) == "reference"
    assert changed(head_dim=32) == "reference"
    assert changed(dtype=jnp.float32) == "reference"
    assert [heads_axis(i) for i in ("reference", "mosaic_gpu", "mosaic_tpu")] == [2, 2, 3]


def test_cache_shapes_are_those_the_op_takes():
    sizes = {"num_layers": 2, "num_pages": 7, "num_kv_heads": 4, "page_size": 64, "head_dim": 80}
    for impl in ("reference", "mosaic_gpu"):
        pages = cache_shapes(impl, **sizes, dtype=jnp.bfloat16)
        assert isinstance(pages, Pages)
        assert pages.k_LPKSH.shape == pages.v_LPKSH.shape == (2, 7, 4, 64, 80)
    with pytest.raises(ValueError, match="page_size is 5"):
        cache_shapes("mosaic_gpu", **(sizes | {"page_size": 5}), dtype=jnp.bfloat16)


STEP = Case("", (1, 1), (5, 9), N=4, K=2, H=64, S=16)
F32_2, F32_4 = jnp.ones(2, jnp.float32), jnp.ones(4, jnp.float32)
of = jax.ShapeDtypeStruct
cache = lambda *shape, dtype=jnp.bfloat16: Pages(of(shape, dtype), of(shape, dtype))
WRONG = {
    "q_TNH has shape": {"q_TNH": of((2, 256), jnp.bfloat16)},
    "q_TNH is int8": {"q_TNH": of((2, 4, 64), jnp.int8)},
    "k_TKH has shape": {"k_TKH": of((3, 2, 64), jnp.bfloat16)},
    "v_TKH has shape": {"v_TKH": of((2, 2, 32), jnp.bfloat16)},
    "N of q_TNH is 5": {"q_TNH": of((2, 5, 64), jnp.bfloat16)},
    "page_T has shape": {"page_T": of((3,), jnp.int32)},
    "slot_T has shape": {"slot_T": of((1,), jnp.int32)},
    "decode_only is True": {
        f"{x}_T{y}": of((3, *shape), dtype)
        for x, y, shape, dtype in (
            ("q", "NH", (4, 64), jnp.bfloat16), ("k", "KH", (2, 64), jnp.bfloat16),
            ("v", "KH", (2, 64), jnp.bfloat16), ("page", "", (), jnp.int32),
            ("slot", "", (), jnp.int32),
        )
    },
    "softcap is 0": {"softcap": 0.0},
    "attention_chunk_size is 0": {"attention_chunk_size": 0},
    "scale is -1": {"scale": -1.0},
    "sinks_N has shape": {"sinks_N": F32_2},
    "sinks_N is bfloat16": {"sinks_N": F32_4.astype(jnp.bfloat16)},
    "alibi_N has shape": {"alibi_N": F32_2},
    "kv_scales are given": {"kv_scales": Scales(F32_2, F32_2)},
    "kv_scales.v_K has shape": {
        "pages": cache(2, 3, 2, 16, 64, dtype=FP8), "kv_scales": Scales(F32_2, F32_4),
    },
    "pages are float16": {"pages": cache(2, 3, 2, 16, 64, dtype=jnp.float16)},
    "pages.k_LPKSH has shape": {"pages": cache(2, 3, 4, 16, 64)},
    "pages is PackedPages": {"pages": PackedPages(of((2, 3, 16, 2, 2, 128), jnp.bfloat16))},
    "impl is 'cudnn'": {"impl": "cudnn"},
}  # fmt: skip


def abstract(case: Case) -> tuple:
    return jax.eval_shape(lambda key: inputs(case, key, "reference"), jax.random.key(0))


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named(message):
    args = abstract(STEP)
    wrong = WRONG[message]
    arrays = {k: v for k, v in wrong.items() if k not in STATIC}
    options = {"impl": "reference"} | {k: v for k, v in wrong.items() if k not in arrays}
    checked = getattr(write_and_attend, "__wrapped__", write_and_attend)
    step = lambda args, arrays: checked(**(arguments(STEP, args) | options | arrays))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, args, arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"S": 8}, "page_size is 8"),
        ({"H": 48}, "head_dim is 48"),
        ({"H": 264}, "head_dim is 264"),
        ({"dtype": jnp.dtype(jnp.float32)}, "dtype is float32"),
        ({"N": 65, "K": 1}, "65 heads"),
    ],
    ids=str,
)
def test_what_the_gpu_kernel_does_not_take_is_named(change, message):
    case = STEP._replace(**change)
    step = lambda args: run(case, args, device=H200, impl="mosaic_gpu")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, abstract(case))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("page_T", 10**6, "page_T has 1000000; it must be in 0 to"),
        ("slot_T", -1, "slot_T has -1; it must be in 0 to 15"),
        ("pages_RM", 99, "pages_RM has 99; it must be in 0 to"),
    ],
)
def test_a_page_that_there_is_not_is_named(name, value, says, keys):
    """Where contents are at hand, outside of jit."""
    given: dict[str, Any] = arguments(STEP, inputs(STEP, next(keys), "reference"))
    wrong: dict[str, Any]
    if name == "pages_RM":
        ragged = given["ragged"]
        wrong = {"ragged": ragged._replace(pages_RM=ragged.pages_RM.at[0, 0].set(value))}
    else:
        wrong = {name: given[name].at[0].set(value)}
    wrong = {**given, "impl": "reference", **wrong}
    with pytest.raises(ValueError, match=says):
        write_and_attend(**wrong)

"""A bias by distance, and a cache that is written and read apart: the references alone do both."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention, paged_attention
from pallas_kernels.devices import DEVICES
from pallas_kernels.flash_attention import cases as flash_cases
from pallas_kernels.flash_attention import reference as flash_reference
from pallas_kernels.paged_attention import cases as paged_cases
from pallas_kernels.paged_attention import mosaic_gpu, mosaic_tpu
from pallas_kernels.paged_attention import reference as paged_reference
from tests.kernels.test_paged_attention import ATOL, arguments

CPU, H200, V6E = DEVICES["cpu"], DEVICES["h200"], DEVICES["v6e"]
FARTHEST = 24  # shorter than the rows, so that most keys have the last number
CACHE = {"page_size": 64, "head_dim": 128, "dtype": jnp.bfloat16}


def bias(heads: int) -> jax.Array:
    return 3 * jax.random.normal(jax.random.key(9), (heads, 2 * FARTHEST + 1), jnp.float32)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_equal_the_formula(causal, keys, monkeypatch):
    monkeypatch.setattr(flash_reference, "BLOCK", 32)
    case = flash_cases.Case("", 2, 70, 4, 2, 16, 8, causal=causal, lengths=(70, 41))
    case = case._replace(dtype=flash_cases.F32)
    q, k, v, *_, lengths = flash_cases.inputs(case, next(keys), "reference")
    b_NX = bias(4)
    got = flash_attention.flash_attention(
        q, k, v, scale=0.3, window=None, causal=causal, distance_bias_NX=b_NX, lengths_B=lengths,
        device=CPU,
    )  # fmt: skip
    # As it is written down: a row and a head at a time.
    want = np.zeros(got.shape)
    for b, length in enumerate(case.lengths or ()):
        ahead = np.arange(length)[None] - np.arange(length)[:, None]
        for n in range(4):
            x = np.asarray(q, np.float64)[b, :length, n] @ np.asarray(k)[b, :length, n // 2].T * 0.3
            x += np.asarray(b_NX)[n, np.clip(ahead, -FARTHEST, FARTHEST) + FARTHEST]
            x = np.where((ahead > 0) & causal, -np.inf, x)
            p = np.exp(x - x.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            want[b, :length, n] = p @ np.asarray(v)[b, :length, n // 2]
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def test_a_cache_equals_the_definition_which_equals_rows(keys):
    case = next(c for c in paged_cases.CPU_CASES if c.name == "mixed")
    args = arguments(case, paged_cases.inputs(case, next(keys), "reference"))
    args |= {"distance_bias_NX": bias(case.N)}
    static = {name: args.pop(name) for name in ("scale", "softcap", "decode_only", "device")}
    run = jax.jit(partial(paged_attention.write_and_attend, **static))
    got, pages = run(**args)
    ragged, n = args["ragged"], paged_cases.num_tokens(case)
    definition = lambda b_NX: paged_reference.definition(
        args["q_TNH"], pages.k_LPKSH, pages.v_LPKSH, args["layer"], *ragged, window=args["window"],
        scale=static["scale"], distance_bias_NX=b_NX,
    )  # fmt: skip
    want = definition(args["distance_bias_NX"])
    np.testing.assert_allclose(got[:n], want[:n], atol=ATOL[jnp.float32], rtol=0)
    assert np.abs(want[:n] - definition(None)[:n]).max() > 0.1
    # The third row is a whole prompt: dense attention over its own tokens gives the same.
    row = slice(int(ragged.start_R[2]), int(ragged.start_R[3]))
    own = lambda name: args[name][row][None]
    dense = flash_attention.flash_attention(
        own("q_TNH"), own("k_TKH"), own("v_TKH"), scale=static["scale"], window=None,
        distance_bias_NX=args["distance_bias_NX"], device=CPU,
    )[0]  # fmt: skip
    assert case.cached[2] == 0
    np.testing.assert_allclose(got[row], dense, atol=ATOL[jnp.float32], rtol=0)


def test_writing_and_attending_apart_is_both_at_once(keys):
    case = next(c for c in paged_cases.CPU_CASES if c.name == "mixed")
    args = arguments(case, paged_cases.inputs(case, next(keys), "reference"))
    want, pages = paged_attention.write_and_attend(**args)
    where = {name: args[name] for name in ("layer", "page_T", "slot_T")}
    got = paged_attention.write(args["k_TKH"], args["v_TKH"], args["pages"], **where, device=CPU)
    jax.tree.map(np.testing.assert_array_equal, got, pages)
    assert isinstance(got, paged_attention.Pages)
    o_TNH = paged_attention.attend(
        args["q_TNH"], got, args["layer"], args["ragged"], scale=args["scale"], decode_only=False,
        device=CPU,
    )  # fmt: skip
    n = paged_cases.num_tokens(case)
    np.testing.assert_array_equal(o_TNH[:n], want[:n])


def test_kernels_refuse_by_name_and_leave_it_to_the_reference():
    nothing = {"distance_bias": False, "apart": False}
    assert mosaic_gpu.refuse(**CACHE, **nothing) is mosaic_tpu.refuse(**CACHE, **nothing) is None
    for kernel, device in ((mosaic_gpu, H200), (mosaic_tpu, V6E)):
        refusal = kernel.refuse(**CACHE, **nothing | {"distance_bias": True})
        assert refusal is not None and "distance_bias_NX" in refusal
        assert paged_attention.choose(device, **CACHE, distance_bias=True) == "reference"
    assert paged_attention.choose(H200, **CACHE, apart=True) == "mosaic_gpu"
    assert "not to others alone" in str(mosaic_tpu.refuse(**CACHE, **nothing | {"apart": True}))
    assert paged_attention.choose(V6E, **CACHE, apart=True) == "reference"
    sizes = {"H": 64, "V": 64, "dtype": jnp.bfloat16}
    assert flash_attention.choose(H200, **sizes) == "mosaic_gpu"
    assert flash_attention.choose(H200, **sizes, distance_bias=True) == "reference"


@pytest.mark.parametrize("impl", ["mosaic_gpu", "mosaic_tpu"])
def test_a_named_kernel_never_falls_back(impl, keys):
    device = {"mosaic_gpu": H200, "mosaic_tpu": V6E}[impl]
    q = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    given = {"scale": 1.0, "window": None, "distance_bias_NX": bias(2), "device": device}
    with pytest.raises(ValueError, match=f"impl {impl} takes none"):
        flash_attention.flash_attention(q, q, q, **given, impl=impl)
    case = next(c for c in paged_cases.KERNEL_CASES if c.name == "gqa4")
    args = arguments(case, paged_cases.inputs(case, next(keys), impl))
    args |= {"distance_bias_NX": bias(case.N), "device": device, "impl": impl}
    with pytest.raises(ValueError, match=f"impl {impl} does not take this cache.*distance_bias_NX"):
        paged_attention.write_and_attend(**args)


def test_a_table_that_is_none_is_named():
    q = jnp.zeros((1, 8, 4, 64), jnp.float32)
    for wrong, message in (
        (jnp.zeros((4, 6)), "6 distances"),
        (jnp.zeros((2, 7)), r"must be \(4, 7\)"),
        (jnp.zeros((4, 7), jnp.bfloat16), "distance_bias_NX is bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(flash_attention.flash_attention)(  # not the tests' own shape checks
                q, q, q, scale=1.0, window=None, distance_bias_NX=wrong, device=CPU
            )

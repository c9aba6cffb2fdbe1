import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.devices import DEVICES, mosaic
from pallas_kernels.flash_attention import (
    choose,
    flash_attention,
    mosaic_gpu,
    mosaic_tpu,
    reference,
)
from pallas_kernels.flash_attention.cases import (
    CASES,
    F32,
    MODEL_CASES,
    SLOW_CASES,
    Case,
    candidates,
    impls,
    inputs,
    work,
)
from tests.kernels.harness import check_case

# float32: sums in another order, over at most 400 terms of size 1.
ATOL = 1e-5
# Gradients sum such errors over the row.
GRAD_ATOL = 1e-4
CPU, H200, V6E = DEVICES["cpu"], DEVICES["h200"], DEVICES["v6e"]
by_name = lambda c: c.name
slow = lambda cases: [pytest.param(c, marks=pytest.mark.slow) for c in cases]


def options(case: Case, args) -> dict:
    window, sinks, alibi, lengths = args[3:]
    return {
        "scale": case.scale or case.H**-0.5,
        "causal": case.causal,
        "window": window if case.traced else case.window,
        "attention_chunk_size": case.attention_chunk_size,
        "softcap": case.softcap,
        "sinks_N": sinks,
        "alibi_N": alibi,
        "lengths_B": lengths,
    }


@pytest.mark.parametrize("case", [*CASES, *slow(SLOW_CASES)], ids=by_name)
def test_the_reference_is_the_definition(case, keys, monkeypatch):
    """In blocks shorter than the rows, so that several are visited, cut and skipped."""
    monkeypatch.setattr(reference, "BLOCK", 64)
    case = case._replace(dtype=F32)
    args = inputs(case, next(keys), "reference")
    got = flash_attention(*args[:3], **options(case, args), device=CPU)
    want = reference.definition(*args[:3], **options(case, args))
    np.testing.assert_allclose(got, want, atol=ATOL, rtol=0)
    if case.lengths is not None:
        for row, length in enumerate(case.lengths):
            assert not np.asarray(got[row, length:]).any()


QUICK = {"gqa", "short_window", "wider_keys", "of_96", "all_at_once"}
GPU_CASES = (
    *(c for c in CASES if c.name in QUICK),
    *slow(c for c in (*CASES, *SLOW_CASES) if c.name not in QUICK and c.dtype != F32),
)


@pytest.mark.parametrize("case", GPU_CASES, ids=by_name)
def test_mosaic_gpu_equals_the_reference(case, keys):
    check_case("flash_attention", case, "mosaic_gpu", next(keys))


@pytest.mark.parametrize("case", [*CASES, *slow(SLOW_CASES)], ids=by_name)
def test_mosaic_tpu_equals_the_reference(case, keys):
    check_case("flash_attention", case, "mosaic_tpu", next(keys))


GRAD = Case("grad", 2, 100, 4, 2, 64, 80, window=37, softcap=3.0, sinks=True, alibi=True,
            lengths=(100, 61), dtype=F32)  # fmt: skip


def gradients(function, case, args):
    """Of a weighted sum of the outputs, by q, k, v, sinks and slopes."""
    weights = jnp.cos(jnp.arange(case.V, dtype=jnp.float32))

    def loss(q, k, v, sinks, alibi):
        given = options(case, args) | {"sinks_N": sinks, "alibi_N": alibi}
        o = function(q, k, v, **given).astype(jnp.float32)
        return (o * weights[None, None, None]).sum()

    return jax.grad(loss, argnums=(0, 1, 2, 3, 4))(*args[:3], args[4], args[5])


def test_grad_of_the_reference_is_that_of_the_definition(keys, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 32)
    args = inputs(GRAD, next(keys), "reference")
    attend = lambda *a, **o: flash_attention(*a, **o, device=CPU)
    got, want = (gradients(f, GRAD, args) for f in (attend, reference.definition))
    for g, w in zip(got, want, strict=True):
        assert np.abs(w).max() > 0.1
        np.testing.assert_allclose(g, w, atol=GRAD_ATOL * np.abs(w).max(), rtol=0)


@pytest.mark.parametrize(
    "device", [pytest.param(H200, marks=pytest.mark.slow), V6E], ids=lambda d: d.name
)
def test_grad_of_a_kernel_is_that_of_the_reference(device, keys, monkeypatch):
    """Of q, k, v, sinks, slopes, past a traced window and lengths, which have none."""
    kernel = mosaic_gpu if device == H200 else mosaic_tpu
    strip = lambda *a, device, choice, interpret, **o: reference.attend(*a, **o)
    monkeypatch.setattr(kernel, "flash_attention", strip)  # the forward pass is tested above
    case = GRAD._replace(traced=True, dtype=jnp.dtype(jnp.bfloat16))
    args = inputs(case, next(keys), "reference")
    of = lambda device: lambda *a, **o: flash_attention(*a, **o, device=device)
    got, want = (gradients(of(d), case, args) for d in (device, CPU))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


def test_vmap_of_the_reference(keys):
    case = GRAD._replace(lengths=None)
    args = inputs(case, next(keys), "reference")
    one = lambda q, k, v: flash_attention(
        q[None], k[None], v[None], **options(case, args), device=CPU
    )[0]
    want = flash_attention(*args[:3], **options(case, args), device=CPU)
    np.testing.assert_allclose(jax.vmap(one)(*args[:3]), want, atol=ATOL, rtol=0)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_the_reference_never_holds_the_square(grad):
    T = 16384
    x = jax.ShapeDtypeStruct((1, T, 1, 64), jnp.float32)
    run = lambda q, k, v: flash_attention(q, k, v, scale=0.125, window=None, device=CPU).sum()
    compiled = jax.jit(jax.grad(run, argnums=(0, 1, 2)) if grad else run).lower(x, x, x).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.1 * T * T * 4


def test_padding_may_hold_anything_finite(keys):
    case = next(c for c in CASES if c.name == "all_at_once")
    args = inputs(case, next(keys), "reference")
    want = flash_attention(*args[:3], **options(case, args), device=CPU)
    assert case.lengths is not None
    past = np.arange(case.T) >= np.asarray(case.lengths)[:, None]
    dirty = (jnp.where(past[..., None, None], jnp.asarray(1e4, x.dtype), x) for x in args[:3])
    got = flash_attention(*dirty, **options(case, args), device=CPU)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("H", "V", "dtype", "cpu", "h200", "v6e"),
    [
        (128, 128, "bfloat16", "reference", "mosaic_gpu", "mosaic_tpu"),
        (192, 128, "float16", "reference", "mosaic_gpu", "mosaic_tpu"),
        (128, 128, "float32", "reference", "reference", "mosaic_tpu"),
        (112, 128, "bfloat16", "reference", "reference", "reference"),
        (128, 32, "bfloat16", "reference", "reference", "reference"),
    ],
)
def test_what_no_kernel_takes_is_the_references(H, V, dtype, cpu, h200, v6e, keys):
    found = {d.name: choose(d, H=H, V=V, dtype=jnp.dtype(dtype)) for d in (CPU, H200, V6E)}
    assert found == {"cpu": cpu, "h200": h200, "v6e": v6e}
    for name in (name for name, impl in found.items() if impl == "reference"):
        case = Case("chosen", 1, 5, 2, 1, H, V, dtype=jnp.dtype(dtype))
        args = inputs(case, next(keys), "reference")
        got, want = (
            flash_attention(*args[:3], **options(case, args), device=DEVICES[name], impl=impl)
            for impl in (None, "reference")
        )
        np.testing.assert_array_equal(got, want)


def test_every_case_has_the_devices_kernel():
    for case in (*CASES, *MODEL_CASES):
        for device in DEVICES.values():
            assert impls(case, device)[0] == mosaic(device)
            if device.platform != "cpu" and case in MODEL_CASES:
                assert len(candidates(case, device)) > 1


@pytest.mark.parametrize("case", MODEL_CASES, ids=by_name)
def test_gpu_tiles_fit_and_tpu_pairs_are_few(case):
    """Shared memory, registers, and a table that fits in scalar memory."""
    for tiles in candidates(case, H200):
        assert mosaic_gpu.fits(tiles, case.H, case.V, H200)
    heads, queries, keys = mosaic_tpu.tiles(case.B, case.T, case.N, case.K, V6E)
    reach = (case.causal, case.window, case.attention_chunk_size)
    pairs = mosaic_tpu.pairs(case.T, case.T, queries, keys, *reach)
    assert pairs.nbytes < 64 * 1024
    visited = pairs.shape[1] * queries * keys
    assert mosaic_tpu.seen(case.T, *reach) <= visited
    assert work(case).flops > 0 and case.N % heads == 0


def test_seen_counts_what_the_mask_shows():
    for causal, *reach in (
        (True, None, None), (True, 5, None), (True, 50, None), (True, None, 8), (True, 5, 8),
        (True, 9, 30), (False, None, None),
    ):  # fmt: skip
        pos = np.arange(20)
        behind = pos[:, None] - pos
        window, size = (n or 20 for n in reach)
        mask = (behind >= 0) & (behind < window) & (pos[:, None] // size == pos // size)
        mask = mask if causal else np.ones((20, 20))
        assert mosaic_tpu.seen(20, causal, *reach) == mask.sum()


Q = jnp.zeros((2, 8, 4, 64), jnp.bfloat16)
KV = jnp.zeros((2, 8, 2, 64), jnp.bfloat16)
GPU = {"impl": "mosaic_gpu"}
BAD = {
    r"q_BTNH has shape \(2, 0": {"q_BTNH": Q[:, :0], "k_BTKH": KV[:, :0], "v_BTKV": KV[:, :0]},
    r"q_BTNH has shape \(0, 8": {"q_BTNH": Q[:0], "k_BTKH": KV[:0], "v_BTKV": KV[:0]},
    "k_BTKH has shape": {"k_BTKH": KV[:, :7]},
    "v_BTKV has shape": {"v_BTKV": KV[:, :, :1]},
    "N is 3": {"q_BTNH": Q[:, :, :3]},
    "k_BTKH is float32": {"k_BTKH": KV.astype(jnp.float32)},
    "scale is 0": {"scale": 0.0},
    "softcap is -1": {"softcap": -1.0},
    "window is 0": {"window": 0},
    "window is 5": {"window": 5, "causal": False},
    "attention_chunk_size is 0": {"attention_chunk_size": 0},
    "attention_chunk_size is 5": {"attention_chunk_size": 5, "causal": False},
    "sinks_N is bfloat16": {"sinks_N": jnp.zeros(4, jnp.bfloat16)},
    "alibi_N has shape": {"alibi_N": jnp.zeros(2)},
    "lengths_B has shape": {"lengths_B": jnp.zeros(3, jnp.int32)},
    "impl is 'mosaic_tpu'": {"impl": "mosaic_tpu"},
    "impl is 'xla'": {"impl": "xla"},
    "q_BTNH is float32":
        GPU | dict.fromkeys(("q_BTNH", "k_BTKH", "v_BTKV"), Q.astype(jnp.float32)),
    "H is 72": GPU | {"q_BTNH": jnp.zeros((2, 8, 4, 72), jnp.bfloat16),
                      "k_BTKH": jnp.zeros((2, 8, 2, 72), jnp.bfloat16)},
    "V is 16": GPU | {"v_BTKV": KV[..., :16]},
    "attention_chunk_size is given": {"impl": "cudnn", "attention_chunk_size": 4},
    "softcap is given": {"impl": "cudnn", "softcap": 1.0},
    "sinks_N is given": {"impl": "cudnn", "sinks_N": jnp.zeros(4)},
    "alibi_N is given": {"impl": "cudnn", "alibi_N": jnp.zeros(4)},
    "window is traced": {"impl": "cudnn", "window": jnp.int32(4)},
    "head_dim is": {"impl": "cudnn", "v_BTKV": jnp.zeros((2, 8, 2, 128), jnp.bfloat16)},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments_are_named(message):
    given = {"q_BTNH": Q, "k_BTKH": KV, "v_BTKV": KV, "scale": 1.0, "window": None}
    # Without the tests' own shape checks, which would come first.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(flash_attention)(**(given | BAD[message]), device=H200)

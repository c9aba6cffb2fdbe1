"""Blocks of GGUF, packed here from known numbers, come back as these; and random bytes mean what
the format's own package says."""

from functools import partial

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file

from converters.formats.gguf import BLOCKS, read_gguf, read_gguf_tensor
from converters.gguf import read_model
from tests import gguf_blocks as pack
from tests.checkpoints import GOLDENS, write
from xlinfer.forms import TABLES
from xlinfer.unpack_gguf import TYPES, unpack
from xlinfer.weights import load_model

unpacked = jax.jit(unpack, static_argnames="kind")
examples = settings(max_examples=40, deadline=None)
# Of the zero's form, in units of |scale * data| + |minimum|: three roundings to 24 bits, and the
# package's own.
TOLERANCE = 2.0**-22


def row(*blocks: bytes) -> np.ndarray:
    return np.frombuffer(b"".join(blocks), np.uint8)[None]


def numbers(low: int, high: int, count: int):
    return arrays(np.int64, count, elements=st.integers(low, high))


HALF = st.floats(-100, 100, width=16)
POSITIVE = st.floats(2**-10, 100, width=16)


E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
MEANT = {  # what a code stands for, where it is not itself
    "IQ4_NL": TABLES["iq4_nl"],
    "IQ4_XS": TABLES["iq4_nl"],
    "MXFP4": tuple(2 * v for v in E2M1) + tuple(-2 * v for v in E2M1),
}


def meaning(held, kind: str) -> np.ndarray:
    """The weights, in numpy."""
    data, scale = np.asarray(held.data), np.asarray(held.scale)[..., None]
    data = data.reshape(*held.scale.shape, -1)
    zero = np.float32(0) if held.zero is None else np.asarray(held.zero)[..., None]
    values = np.float32(np.array(MEANT[kind])[data] if kind in MEANT else data)
    with np.errstate(all="ignore"):
        return ((values - zero) * scale).reshape(held.data.shape)


def check(held, data, scale, zero=None):
    """`scale` and `zero` of each group; exactly."""
    np.testing.assert_array_equal(held.data[0], data)
    np.testing.assert_array_equal(held.scale[0], np.float32(scale))
    if zero is None:
        assert held.zero is None
    else:
        np.testing.assert_array_equal(held.zero[0], np.float32(zero))


@pytest.mark.parametrize(
    "kind, low, high", [("Q4_0", -8, 7), ("Q5_0", -16, 15), ("Q8_0", -128, 127)]
)
@given(data=st.data())
@examples
def test_symmetric_blocks(kind, low, high, data):
    q, d = data.draw(numbers(low, high, 64)), data.draw(HALF)
    blocks = row(*(getattr(pack, kind.lower())(s, x) for s, x in ((d, q[:32]), (-d, q[32:]))))
    check(unpacked(blocks, kind), q, [d, -d])


@pytest.mark.parametrize("kind, high", [("Q4_1", 15), ("Q5_1", 31)])
@given(data=st.data())
@examples
def test_blocks_with_a_minimum(kind, high, data):
    q, d, m = data.draw(numbers(0, high, 32)), data.draw(POSITIVE), data.draw(HALF)
    held = unpacked(row(getattr(pack, kind.lower())(d, m, q)), kind)
    check(held, q, [d], [np.float32(-m) / np.float32(d)])


@pytest.mark.parametrize("kind, high", [("Q4_K", 15), ("Q5_K", 31)])
@given(data=st.data())
@examples
def test_k_blocks_with_minima(kind, high, data):
    q, d, dmin = data.draw(numbers(0, high, 256)), data.draw(POSITIVE), data.draw(HALF)
    scale, minimum = data.draw(numbers(1, 63, 8)), data.draw(numbers(0, 63, 8))
    held = unpacked(row(getattr(pack, kind.lower())(d, dmin, scale, minimum, q)), kind)
    a, b = np.float32(d) * np.float32(scale), np.float32(dmin) * np.float32(minimum)
    check(held, q, a, b / a)


@given(data=st.data())
@examples
def test_q2_k(data):
    q, d, dmin = data.draw(numbers(0, 3, 256)), data.draw(POSITIVE), data.draw(HALF)
    scale, minimum = data.draw(numbers(1, 15, 16)), data.draw(numbers(0, 15, 16))
    a, b = np.float32(d) * np.float32(scale), np.float32(dmin) * np.float32(minimum)
    check(unpacked(row(pack.q2_k(d, dmin, scale, minimum, q)), "Q2_K"), q, a, b / a)


@given(data=st.data())
@examples
def test_q3_k(data):
    q, scale, d = data.draw(numbers(-4, 3, 256)), data.draw(numbers(-32, 31, 16)), data.draw(HALF)
    check(unpacked(row(pack.q3_k(d, scale, q)), "Q3_K"), q, np.float32(d) * np.float32(scale))


@given(data=st.data())
@examples
def test_q6_k(data):
    q, scale = data.draw(numbers(-32, 31, 256)), data.draw(numbers(-128, 127, 16))
    d = data.draw(HALF)
    check(unpacked(row(pack.q6_k(d, scale, q)), "Q6_K"), q, np.float32(d) * np.float32(scale))


@given(code=numbers(0, 15, 32), d=HALF)
@examples
def test_iq4_nl(code, d):
    held = unpacked(row(pack.iq4_nl(d, code)), "IQ4_NL")
    check(held, code, [d])


@given(code=numbers(0, 15, 256), scale=numbers(-32, 31, 8), d=HALF)
@examples
def test_iq4_xs(code, scale, d):
    held = unpacked(row(pack.iq4_xs(d, scale, code)), "IQ4_XS")
    check(held, code, np.float32(d) * np.float32(scale))


@given(code=numbers(0, 15, 32), e=st.integers(0, 255))
@examples
def test_mxfp4(code, e):
    held = unpacked(row(pack.mxfp4(e, code)), "MXFP4")
    check(held, code, [2.0 ** (e - 128)])


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K"])
@pytest.mark.parametrize("dmin", [1.5, -1.5, 0.0])
def test_a_group_of_scale_0_keeps_its_minimum(kind, dmin):
    """And so does a block of scale 0: every group of it is -minimum throughout."""
    q, minimum = np.arange(256) % 16, np.array([0, 1, 2, 3, 0, 63, 62, 61])
    for d, scale in ((0.0, np.full(8, 5)), (1.0, np.zeros(8, int))):
        held = unpacked(row(getattr(pack, kind.lower())(d, dmin, scale, minimum, q)), kind)
        want = np.repeat(-np.float32(dmin) * np.float32(minimum), 32)
        np.testing.assert_array_equal(meaning(held, kind)[0], want)
        assert not held.data.any() and np.isfinite(held.zero).all()


def test_types_are_those_that_files_may_hold():
    assert {name: nbytes for name, (nbytes, _) in TYPES.items()} == {
        block.name: block.nbytes for block in BLOCKS.values()
    }


@pytest.mark.parametrize("kind", TYPES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_random_bytes(kind, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    raw = np.random.default_rng(seed).integers(0, 256, (2, 3, 2 * TYPES[kind][0]), np.uint8)
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    held = unpacked(raw, kind)
    got, finite = meaning(held, kind), np.isfinite(want)
    assert held.data.shape == want.shape and held.data.dtype == jnp.int8
    if held.zero is None:
        np.testing.assert_array_equal(got[finite], want[finite])
        return
    spread = lambda x: np.repeat(x, want.shape[-1] // x.shape[-1], axis=-1)
    scale, zero = spread(held.scale), spread(held.zero)
    size = np.abs(scale * np.float32(held.data)) + np.abs(scale * zero)
    assert np.all(np.abs(got - want)[finite] <= TOLERANCE * size[finite])


@pytest.mark.parametrize("name", ["q4_0", "q4_k_m", "q8_0"])
def test_llama_cpps_tensors(name):
    """Of real scales the zero's form is within an ulp or so: 1e-6 of the row's largest weight."""
    kinds = set()
    for info in read_gguf(GOLDENS / f"gguf-{name}" / "model.gguf").tensors.values():
        if info.blocks is None:
            continue
        kinds.add(info.blocks.name)
        raw = read_gguf_tensor(info)
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[info.blocks.name])
        held = unpacked(jnp.asarray(raw), info.blocks.name)
        assert held.data.shape == info.shape
        largest = np.abs(want).max(-1, keepdims=True)
        assert np.all(np.abs(meaning(held, info.blocks.name) - want) <= 1e-6 * largest), info.name
    assert kinds == {"q4_0": {"Q4_0", "Q8_0"}, "q4_k_m": {"Q4_K", "Q6_K"}, "q8_0": {"Q8_0"}}[name]


@pytest.mark.parametrize("name", ["q4_0", "q4_k_m", "q8_0"])
def test_logits_of_llama_cpps_files(name, tmp_path):
    """Constants, names, the order of rows and every block, together: unpacked, the model computes
    what transformers does with the dequantized weights."""
    golden = load_file(GOLDENS / f"gguf-{name}" / "golden.safetensors")
    config, tensors = read_model(read_gguf(GOLDENS / f"gguf-{name}" / "model.gguf"))
    held = {}
    for info in tensors.values():
        held[info.name] = array = read_gguf_tensor(info)
        if info.blocks is not None:
            kind = info.blocks.name
            held[info.name] = meaning(unpacked(jnp.asarray(array), kind), kind)
    model = load_model(write(tmp_path / "floats", config, held), dtype="float32")
    with jax.default_matmul_precision("highest"):
        got = model(jnp.asarray(golden["input_ids"]))
    np.testing.assert_allclose(got, golden["logits"], rtol=0, atol=2e-4)


def test_leading_axes_are_free():
    raw = jnp.array(np.random.default_rng(0).integers(0, 256, (2, 3, 4, 34), np.uint8))
    held = unpacked(raw, "Q8_0")
    assert held.data.shape == (2, 3, 4, 32) and held.scale.shape == (2, 3, 4, 1)
    each = jax.vmap(jax.vmap(partial(unpack, kind="Q8_0")))(raw)
    np.testing.assert_array_equal(each.data, held.data)


def test_what_cannot_be_unpacked():
    with pytest.raises(ValueError, match="'IQ1_S'; xlinfer unpacks Q4_0, "):
        unpack(jnp.zeros((1, 50), jnp.uint8), "IQ1_S")
    with pytest.raises(ValueError, match="35 bytes are not made of Q8_0 blocks of 34"):
        unpack(jnp.zeros((1, 35), jnp.uint8), "Q8_0")

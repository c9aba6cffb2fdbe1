"""Calls as bytes."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from xlinfer.engine.worker import ON_DEVICE, Call
from xlinfer.multihost.calls import Calls, difference, file_digests
from xlinfer.multihost.wire import WireError
from xlinfer.sampling import empty_slots

FACTS = {"plan.num_pages": 100}


def shape(*sizes: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, np.dtype(dtype))


ROW = jax.tree.map(lambda x: x[0], empty_slots(1, 40).params)
INPUTS: dict[str, Any] = {
    "forward": (shape(30),), "decode": (shape(20),), "encode": (shape(7),), "sample": (shape(5),),
    "score": (shape(9),), "pool": (shape(6),),
    "admit": (shape(), jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype.name), ROW), shape(3)),
}  # fmt: skip


def calls(facts=FACTS) -> Calls:
    """Of programs that are described and not compiled."""
    program = lambda name: SimpleNamespace(args_info=((None,) * ON_DEVICE[name] + INPUTS[name], {}))
    bucketed = {"forward": (16, 64), "decode": (1, 4), "encode": ()}
    programs = {
        name: {size: program(name) for size in bucketed[name]}
        if name in bucketed
        else program(name)
        for name in ON_DEVICE
    }
    return Calls(SimpleNamespace(executables=SimpleNamespace(**programs)), facts)  # type: ignore[arg-type]


def test_a_call_is_the_same_at_the_other_end():
    rng, here, there = np.random.default_rng(0), calls(), calls()
    for name, bucket in (
        ("forward", 64),
        ("decode", 1),
        ("sample", 0),
        ("score", 0),
        ("pool", 0),
        ("admit", 0),
    ):
        inputs = jax.tree.map(
            lambda x: np.asarray(rng.integers(0, 99, x.shape)).astype(x.dtype)[()], INPUTS[name]
        )
        digest, payload = here.encode(Call(name, bucket, inputs))
        assert len(payload) == there.longest(digest)
        got = there.decode(digest, payload)
        assert (got.program, got.bucket) == (name, bucket)
        jax.tree.map(np.testing.assert_array_equal, got.inputs, inputs)


def test_buckets_and_facts_have_digests_of_their_own():
    call = lambda bucket: Call("forward", bucket, (np.zeros(30, np.int32),))
    digests = {facts.encode(call(b))[0] for facts in (calls(), calls({"a": 1})) for b in (16, 64)}
    assert len(digests) == 4


def test_what_does_not_fit_is_refused():
    here = calls()
    digest, payload = here.encode(Call("decode", 1, (np.zeros(20, np.int32),)))
    with pytest.raises(WireError, match="decode-1 takes 80 bytes, not 79"):
        here.decode(digest, payload[:-1])
    with pytest.raises(WireError, match=r"runs the program 0+, which is not here"):
        here.longest(bytes(16))
    with pytest.raises(ValueError, match=r"decode-1 takes int32\[20\], and is given int64\[20\]"):
        here.encode(Call("decode", 1, (np.zeros(20, np.int64),)))


def test_other_weights_are_a_difference(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(300_000))
    before = file_digests(tmp_path)
    assert set(before) == {"config.json", "model.safetensors"}
    assert difference(before, file_digests(tmp_path)) is None
    weights.write_bytes(bytes(299_999) + b"\1")
    said = difference(before, file_digests(tmp_path))
    assert said is not None and said.startswith("model.safetensors is ")

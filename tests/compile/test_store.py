"""Programs are found again while nothing they depend on has changed; else it is said what has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from xlinfer.compile.executable import ExecutableError, Stored, load, serialize
from xlinfer.compile.parallel import CompileError, compile_in_parallel
from xlinfer.compile.store import Store, origin_of
from xlinfer.compile.trees import decode_tree, encode_tree
from xlinfer.mesh import make_mesh
from xlinfer.sampling import Logprobs, empty_slots


def program(mesh, scale: float):
    whole, split = (NamedSharding(mesh, PartitionSpec(*names)) for names in ((), (None, "expert")))
    shape = lambda place: jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=place)
    args = ((shape(split),), shape(split), shape(whole))

    def run(params, kv, unused):
        return kv + 1, (params[0] @ kv * scale).sum(0)

    how = {"donate_argnums": (1,), "out_shardings": (split, whole), "keep_unused": True}
    return jax.jit(run, **how).lower(*args), args


@pytest.fixture(params=[1, 4])
def mesh(request):
    return make_mesh(request.param)


def call(compiled, args):
    arrays = jax.tree.map(
        lambda x: jax.device_put(np.arange(16, dtype=np.float32).reshape(4, 4), x.sharding), args
    )
    kv, total = compiled(*arrays)
    return arrays, np.asarray(kv), np.asarray(total)


def test_a_stored_program_runs_as_the_one_that_was_compiled(mesh):
    lowered, args = program(mesh, 2.0)
    compiled = lowered.compile()
    again = load(serialize(compiled, args, (1,)), mesh)
    given, kv, total = call(again, args)
    assert given[1].is_deleted() and not given[2].is_deleted()
    _, want_kv, want_total = call(compiled, args)
    np.testing.assert_array_equal(kv, want_kv)
    np.testing.assert_array_equal(total, want_total)
    with pytest.raises(TypeError, match=r"Argument 'kv' compiled with float32\[4,4\]"):
        again((given[0][0],), jnp.zeros((2, 2)), given[2])


def test_damaged_or_foreign_code_is_refused():
    mesh = make_mesh(1)
    lowered, args = program(mesh, 1.0)
    whole = serialize(lowered.compile(), args, (1,))
    with pytest.raises(ExecutableError, match="does not load on cpu"):
        load(dataclasses.replace(whole, code=whole.code[:100]), mesh)
    for name in ("arguments", "results", "name"):
        less = {k: v for k, v in whole.description.items() if k != name}
        with pytest.raises(ExecutableError, match="description is damaged"):
            load(Stored(description=less, code=whole.code), mesh)


def test_what_missed_is_said(tmp_path):
    mesh, kept = make_mesh(1), Store(tmp_path)
    lowered, args = program(mesh, 1.0)
    origin = origin_of(lowered, mesh, {})
    assert kept.get(origin) is None
    assert kept.why_missed("p", origin) == "it was never compiled here"
    kept.put("p", origin, serialize(lowered.compile(), args, (1,)))
    found = kept.get(origin)
    assert found is not None and call(load(found, mesh), args)

    other = origin_of(program(mesh, 3.0)[0], mesh, {})
    assert kept.get(other) is None and "the program is another" in kept.why_missed("p", other)
    older = dataclasses.replace(origin, versions={**origin.versions, "jaxlib": "0.0"})
    assert kept.get(older) is None
    was = origin.versions["jaxlib"]
    assert kept.why_missed("p", older) == f"jaxlib was {was}, is 0.0"
    tuned = origin_of(lowered, mesh, {"xla_backend_optimization_level": 1})
    assert "options was {}, is {'xla_backend" in kept.why_missed("p", tuned)

    code = tmp_path / "programs" / f"{origin.key}.xla"
    code.write_bytes(code.read_bytes()[:-1])
    assert kept.get(origin) is None
    assert kept.why_missed("p", origin) == "its files were missing or damaged"


def test_trees():
    slots = empty_slots(3, 40)
    tree = ((1, (2,)), slots, Logprobs(*(jnp.zeros(n) for n in range(1, 5))))
    leaves = jax.tree.leaves(tree)
    again = decode_tree(encode_tree(tree), leaves)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for wrong in (["os.system", "*"], ["Slots", "*"], {"a": "*"}, None, ["tuple", "*"]):
        with pytest.raises(ValueError, match=r"no tree of|more leaves|fewer leaves"):
            decode_tree(wrong, [])
    with pytest.raises(ValueError, match="fewer leaves"):
        decode_tree("*", [1, 2])
    with pytest.raises(TypeError, match="has a dict"):
        encode_tree(({"a": 1},))


def test_a_compiler_that_dies_is_reported(tmp_path, monkeypatch):
    from xlinfer.compile import parallel

    monkeypatch.setattr(parallel, "WORKER", "this")  # which prints, and exits
    with pytest.raises(CompileError, match="program decode-4 was not compiled"):
        compile_in_parallel(
            {}, [("decode", 4)], tmp_path, processes=1, cpu_devices=1, progress=None
        )

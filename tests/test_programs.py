"""What the compiled programs hold in memory; their results are tested through the engine."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.devices import DEVICES
from xlinfer.kvcache import CacheSpec
from xlinfer.mesh import make_mesh
from xlinfer.plan import make_plan
from xlinfer.program_inputs import PoolInput, forward_shapes, pack, score_shapes, unpack
from xlinfer.programs import Programs
from xlinfer.sampling import empty_slots


class Head(nnx.Module):
    """Just what `score` asks of a model."""

    vocab_size = 20_000
    num_layers = num_heads = num_kv_heads = head_dim = max_position_embeddings = 8

    def __init__(self):
        self.head_DV = nnx.Param(jnp.zeros((8, self.vocab_size)))

    def hidden(self, tokens_BT, pos_BT, attend, kv, *, context_len):
        raise AssertionError("scoring needs hidden states, not tokens")

    def logits(self, x_BTD):
        return x_BTD @ self.head_DV[...]


def programs_for(model, **sizes) -> tuple[Programs, tuple]:
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    plan = make_plan(
        max_model_len=64, max_num_seqs=4, page_size=4, num_pages=65, decode_window=8,
        max_logprobs=5, deterministic=False, **sizes,
    )  # fmt: skip
    mesh = make_mesh(1)
    made = Programs(
        graph=graph, tree=tree, plan=plan, mesh=mesh, device=DEVICES["cpu"],
        attention_impl="reference",
        latent=False,
    )  # fmt: skip
    return made, tuple(leaves)


def test_prompt_logprobs_never_hold_all_logits():
    """4096 positions of 20,000 tokens would be 328 MB; 64 of them at a time are 5 MB."""
    programs, params = programs_for(Head(), max_num_batched_tokens=4096)
    size = sum(x.size for x in jax.tree.leaves(score_shapes(programs.plan)))
    args = params, jnp.zeros((4096, 8)), jnp.zeros(size, jnp.int32)
    compiled = jax.jit(programs.score).lower(*args).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 4096 * 20_000 * 4 / 10


def test_a_neighbours_infinity_is_not_pooled():
    programs, _ = programs_for(Head(), max_num_batched_tokens=8)
    hidden_TD = jnp.ones((8, 4)).at[:3].set(jnp.inf)
    x = PoolInput(np.array([0, 3, 0, 0]), np.array([3, 8, 0, 0]), np.int32(2))
    sums_RD = np.asarray(programs.pool(hidden_TD, jnp.asarray(pack(x))))
    assert np.isinf(sums_RD[0]).all() and (sums_RD[1] == 5).all() and not sums_RD[2:].any()


def test_an_input_is_what_was_packed():
    programs, _ = programs_for(Head(), max_num_batched_tokens=32)
    shapes = forward_shapes(programs.plan, 32)
    numbers = iter(range(10_000))
    fill = lambda x: jnp.array([next(numbers) for _ in range(x.size)], jnp.int32).reshape(x.shape)
    given = jax.tree.map(fill, shapes)
    got = unpack(jnp.asarray(pack(given)), shapes)
    jax.tree.map(np.testing.assert_array_equal, got, given)


def test_the_cache_is_the_same_array_after_a_step():
    """Donated and aliased: a step's temporaries are a fraction of the cache it updates."""
    from tests.engine.test_own_module import Net

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        net = Net(nnx.Rngs(0))
        programs, params = programs_for(net, max_num_batched_tokens=32)
        spec = CacheSpec(
            num_layers=2, num_pages=4000, num_kv_heads=4, page_size=4, head_dim=8,
            latents=None,
            dtype=jnp.float32, impl="reference",
        )  # fmt: skip
        kv = spec.abstract(programs.mesh)
        slots = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, empty_slots(5, 50)))
        shapes = forward_shapes(programs.plan, 32)
        size = sum(x.size for x in jax.tree.leaves(shapes))
        packed = jax.ShapeDtypeStruct((size,), jnp.int32)
        run = jax.jit(partial(programs.forward, tokens=32), donate_argnums=1)
        memory = run.lower(params, kv, slots, packed).compile().memory_analysis()
    cache = 4000 * spec.page_bytes_per_device(programs.mesh)
    assert memory is not None and memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 10

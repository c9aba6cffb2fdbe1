"""Engine on a module that is not xlinfer's: another structure, its own arrays, new weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlinfer.engine.engine import Engine
from xlinfer.plan import PlanError
from xlinfer.request import Request, SamplingParams


class Net(nnx.Module):
    """A researcher's: unrolled layers, learned positions, LayerNorm, one fused qkv, no rope."""

    vocab_size, num_layers, num_heads, num_kv_heads, head_dim = 50, 2, 4, 4, 8
    max_position_embeddings = 64

    def __init__(self, rngs: nnx.Rngs):
        D = self.num_heads * self.head_dim
        self.embed = nnx.Embed(self.vocab_size, D, rngs=rngs)
        self.positions = nnx.Embed(self.max_position_embeddings, D, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(D, rngs=rngs) for _ in range(self.num_layers)])
        self.qkv = nnx.List([nnx.Linear(D, 3 * D, rngs=rngs) for _ in range(self.num_layers)])
        self.out = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(self.num_layers)])

    def hidden(self, tokens_BT, pos_BT, attend, kv, *, context_len):
        x_BTD = self.embed(tokens_BT) * 3.0 + self.positions(pos_BT)
        for i, (norm, qkv, out) in enumerate(zip(self.norms, self.qkv, self.out, strict=True)):
            heads = qkv(norm(x_BTD)).reshape(*tokens_BT.shape, 3, self.num_heads, self.head_dim)
            q, k, v = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
            o_BTNH, kv = attend(q, k, v, kv, layer=i, window=2**30, scale=0.5)
            x_BTD = x_BTD + out(o_BTNH.reshape(x_BTD.shape))
        return x_BTD, kv

    def logits(self, x_BTD):
        return self.embed.attend(x_BTD)

    def __call__(self, tokens_BT):
        """Without any of xlinfer: masked softmax attention over the whole sequence."""
        T = tokens_BT.shape[1]

        def dense(q, k, v, kv, *, layer, window, scale):
            s = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
            s = jnp.where(jnp.tri(T, dtype=bool), s, -jnp.inf)
            return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s, axis=-1), v), kv

        pos_BT = jnp.broadcast_to(jnp.arange(T)[None], tokens_BT.shape)
        return self.logits(self.hidden(tokens_BT, pos_BT, dense, None, context_len=T)[0])


@pytest.fixture(scope="module", autouse=True)
def usual_promotion():
    """flax's own layers mix ranks, as a researcher's code may."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def naive(net: Net, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(net(jnp.asarray([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def generate(engine: Engine, prompt: list[int], count: int) -> list[int]:
    greedy = SamplingParams(temperature=0, max_tokens=count)
    engine.add_request(Request(request_id="a", prompt_token_ids=tuple(prompt), sampling=greedy))
    tokens = []
    while engine.has_work:
        tokens += [token for out in engine.step() for token in out.token_ids]
    return tokens


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


@pytest.fixture(scope="module")
def engine(net):
    return Engine(net, max_num_seqs=2, max_num_batched_tokens=16, page_size=4, decode_window=4)


PROMPT = [7, 3, 9, 21, 4, 4, 30, 2, 11, 40, 13, 1, 8, 49, 5, 5, 6, 17, 0, 25]


@pytest.mark.slow
def test_it_is_served_as_it_is(net, engine):
    assert generate(engine, PROMPT, 30) == naive(net, PROMPT, 30)
    mine = jax.tree.leaves(nnx.state(net))
    theirs = engine._executor.params
    where = lambda arrays: {a.unsafe_buffer_pointer() for a in arrays}
    assert where(theirs) == where(mine), "the arrays were copied"


def test_update_weights_between_steps(net, engine):
    other = Net(nnx.Rngs(1))
    before, after = naive(net, PROMPT, 20), naive(other, PROMPT, 20)
    assert before != after
    assert generate(engine, PROMPT, 20) == before
    engine.update_weights(nnx.state(other))
    assert generate(engine, PROMPT, 20) == after, "a prefix computed by the old weights was used"

    # In the middle of an answer: what follows is the new weights' continuation.
    engine.update_weights(nnx.state(net))
    greedy = SamplingParams(temperature=0, max_tokens=20)
    engine.add_request(Request(request_id="a", prompt_token_ids=tuple(PROMPT), sampling=greedy))
    got = [token for _ in range(3) for out in engine.step() for token in out.token_ids]
    engine.update_weights(nnx.state(other))
    first = [t for out in engine._outputs.ready.values() for t in out.token_ids]
    known = len(got) + len(first)
    while engine.has_work:
        got += [token for out in engine.step() for token in out.token_ids]
        engine.check()
    assert 0 < known < 20
    assert got[:known] == before[:known]
    assert got[known:] == naive(other, PROMPT + got[:known], 20 - known)
    engine.update_weights(nnx.state(net))


def test_weights_that_do_not_fit_are_named(engine, net):
    state = nnx.state(net)
    wrong = jax.tree.map(lambda x: x, state)
    wrong["embed"]["embedding"] = nnx.Param(jnp.zeros((50, 16)))
    with pytest.raises(ValueError, match=r"embedding.*50, 16.*50, 32"):
        engine.update_weights(wrong)
    with pytest.raises(ValueError, match="structure"):
        engine.update_weights({"embed": state["embed"]})
    assert generate(engine, PROMPT, 5) == naive(net, PROMPT, 5)


def test_what_a_module_lacks_is_named():
    class Half(nnx.Module):
        vocab_size = 5

        def logits(self, x): ...

    with pytest.raises(TypeError, match=r"Half cannot be served: it has no num_layers.*hidden"):
        Engine(Half())


def test_plans_that_cannot_work_are_refused_before_compiling(net):
    with pytest.raises(PlanError, match="max_position_embeddings=64"):
        Engine(net, max_model_len=65)
    with pytest.raises(PlanError, match="hold one sequence"):
        Engine(net, num_pages=3, page_size=16)
    with pytest.raises(PlanError, match="page_size must be at least 1"):
        Engine(net, page_size=0)
    with pytest.raises(PlanError, match="max_model_len must be at least 1"):
        Engine(net, max_model_len=0)
    with pytest.raises(PlanError, match="hbm_utilization"):
        Engine(net, hbm_utilization=1.5)


def test_arrays_stay_where_they_are_sharded(net):
    """On a mesh without a tensor axis, replicated over four devices."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    graph, state = nnx.split(net)
    spread = nnx.merge(graph, jax.device_put(state, whole))
    engine = Engine(spread, max_num_seqs=2, max_num_batched_tokens=16, page_size=4)
    assert generate(engine, PROMPT, 10) == naive(net, PROMPT, 10)
    assert np.all([p.sharding == whole for p in engine._executor.params])

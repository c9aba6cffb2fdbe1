"""Counted operations and bytes against XLA's own count and against arithmetic by hand."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

from converters import parse_config
from pallas_kernels.devices import DEVICES
from tests import checkpoints
from xlinfer.cost import cost_of, multiplied
from xlinfer.deployment import Deployment, Job, Sizes, deploy, facts_of
from xlinfer.mesh import make_mesh
from xlinfer.quantize import quantize_model
from xlinfer.weights import abstract_model

XLA = 0.05  # relative: it counts elementwise operations too
OTHER_BYTES = 0.03  # relative: the sampler's state, and the step's results
LAYERS, ROWS, WIDTH = 12, 8, 64
of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
job_of = lambda run, *args, donated=(): Job(run, args, donated, None)
X, STACK, CACHE = of(ROWS, WIDTH), of(LAYERS, WIDTH, WIDTH), of(100, WIDTH)
ONE = 2 * ROWS * WIDTH * WIDTH  # operations of a layer


def scanned(x, stack):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def unrolled(x, stack):
    for i in range(LAYERS):
        x = jnp.tanh(x @ stack[i])
    return x


def xla_flops(run) -> float:
    analysis = jax.jit(run).lower(X, STACK).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def test_xla_counts_a_scans_body_once_and_cost_of_as_often_as_it_runs():
    once, all_of_them, cost = (
        xla_flops(scanned),
        xla_flops(unrolled),
        cost_of(job_of(scanned, X, STACK)),
    )
    assert once == pytest.approx(ONE, rel=XLA)
    assert cost.flops == {"float32": LAYERS * ONE} and cost.flops_once == ONE
    assert cost.flops_total == pytest.approx(all_of_them, rel=XLA)
    assert multiplied(once, cost) == pytest.approx(all_of_them, rel=XLA)
    assert cost_of(job_of(unrolled, X, STACK)).flops == cost.flops


def test_a_stack_is_read_once_whether_sliced_or_not():
    for run in (scanned, unrolled):
        assert cost_of(job_of(run, X, STACK)).bytes == 4 * (2 * X.size + STACK.size)


def of_mesh(x):
    mesh = make_mesh(4)
    split = partial(jax.shard_map, mesh=mesh, in_specs=jax.P(mesh.axis_names), out_specs=jax.P())
    return split(lambda x: lax.psum((x @ x.T).sum(), mesh.axis_names))(x)


@pytest.mark.parametrize(
    ("run", "args", "flops"),
    [
        (lambda x: x @ x.T, (X,), 2 * ROWS * ROWS * WIDTH),
        (partial(jnp.einsum, "bmk,bkn->bmn"), (of(3, 4, 5), of(3, 5, 6)), 2 * 3 * 4 * 5 * 6),
        (lambda x, w: lax.fori_loop(0, 12, lambda i, x: x @ w, x), (X, of(WIDTH, WIDTH)), 12 * ONE),
        (lambda x, w, n: lax.fori_loop(0, n, lambda i, x: x @ w, x),
         (X, of(WIDTH, WIDTH), of(dtype=jnp.int32)), ONE),
        (lambda x, w, p: lax.cond(p, lambda x: x @ w @ w, lambda x: x @ w, x),
         (X, of(WIDTH, WIDTH), of(dtype=jnp.bool)), 2 * ONE),
        (lambda x, w: jax.checkpoint(jax.jit(jnp.dot))(x, w), (X, of(WIDTH, WIDTH)), ONE),
        (lax.ragged_dot, (X, of(5, WIDTH, 7), of(5, dtype=jnp.int32)), 2 * ROWS * WIDTH * 7),
        (of_mesh, (X,), 4 * 2 * (ROWS // 4) ** 2 * WIDTH),
        (jnp.tanh, (X,), 0),
    ],
    ids=["dot", "batch", "fori", "while", "cond", "remat", "ragged", "shard_map", "elementwise"],
)  # fmt: skip
def test_operations_of(run, args, flops):
    assert cost_of(job_of(run, *args)).flops_total == flops


def test_operations_are_told_apart_by_dtype():
    both = lambda x, y: (x @ x.T, jnp.dot(y, y.T, preferred_element_type=jnp.int32))
    flops = cost_of(job_of(both, of(4, 8, dtype=jnp.bfloat16), of(2, 3, dtype=jnp.int8))).flops
    assert flops == {"bfloat16": 2 * 4 * 4 * 8, "int8": 2 * 2 * 2 * 3}


def put(cache, x, i):
    return lax.dynamic_update_slice(cache, x, (i, 0))


def put_in_loop(cache, x, i):
    return lax.fori_loop(0, 5, lambda _, cache: put(cache, x, i), cache)


INDEX, PLACES, MANY = (of(*shape, dtype=jnp.int32) for shape in ((), (3,), (500,)))


@pytest.mark.parametrize(
    ("job", "size"),
    [
        (job_of(lambda x, y: x + x * 2.0, X, CACHE), 4 * 2 * X.size),
        (job_of(lambda c, i: c[i], CACHE, PLACES), 4 * (2 * 3 * WIDTH + 3)),
        (job_of(lambda c, i: c[i].sum(), CACHE, MANY), 4 * (CACHE.size + MANY.size + 1)),
        (job_of(lambda c, i, x: c.at[i].add(x), CACHE, PLACES, of(3, WIDTH), donated=(0,)),
         4 * (3 * 3 * WIDTH + 3)),
        (job_of(put, CACHE, X, INDEX, donated=(0,)), 4 * (2 * X.size + 1)),
        (job_of(put, CACHE, X, INDEX), 4 * (2 * X.size + 1 + 2 * CACHE.size)),
        (job_of(put_in_loop, CACHE, X, INDEX, donated=(0,)), 4 * (6 * X.size + 1)),
        (job_of(lambda x: x.reshape(-1), X, donated=(0,)), 0),
        (job_of(lambda x: x.astype(jnp.float32), of(64, 2, dtype=jnp.int4)), 64 + 512),
    ],
    ids=["once", "gather", "at_most_all", "add", "donated", "copied", "loop", "same", "int4"],
)  # fmt: skip
def test_bytes_of(job, size):
    assert cost_of(job).bytes == size


def deployment(device: str, kind: str = "llama", quantization: str | None = None) -> Deployment:
    """For a device that need not even be described: tracing does not ask the mesh."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
             "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 64,
             "max_position_embeddings": 512}  # fmt: skip
    if kind == "qwen3_moe":
        sizes |= {"moe_intermediate_size": 128}
    config = parse_config(Path("config.json"), checkpoints.config(kind, **sizes))
    mesh, dtype = make_mesh(1), jnp.float32 if device == "cpu" else jnp.bfloat16
    model = abstract_model(config, dtype, mesh, DEVICES[device])
    if quantization is not None:
        quantize_model(model, quantization, DEVICES[device])
    graph, state = nnx.split(model)
    return deploy(
        graph, state, facts_of(model), mesh=mesh, device=DEVICES[device], device_bytes=2**34,
        sizes=Sizes(max_num_seqs=8, max_num_batched_tokens=64),
    )  # fmt: skip


V, D, F, L, N, K, H = 64, 256, 512, 4, 16, 2, 64
R, CONTEXT = 8, 512
ATTENTION = 4 * N * H * R * CONTEXT  # operations of a layer, with every page table full
QKVO = 2 * R * D * (2 * N + 2 * K) * H
PARAMS = L * (D * (2 * N + 2 * K) * H + 3 * D * F + 2 * D) + D + D * V  # but for the embedding


def test_bytes_of_decode_are_those_of_weights_and_cache():
    """On CPU, attention visits blocks of 128 positions in a loop that nobody knows the end of, so
    one of them counts."""
    cost = cost_of(deployment("cpu").jobs()["decode", R])
    kv = L * R * 2 * K * H * (128 + 1)  # read and written
    assert cost.bytes == pytest.approx(4 * (PARAMS + R * D + kv), rel=OTHER_BYTES)


@pytest.mark.parametrize("device", ["v6e", "h200"])
def test_decode_has_the_kernels_operations_and_all_of_the_rows_pages(device):
    """By the TPU kernel's own estimate, and by the shapes of the GPU's operands."""
    cost = cost_of(deployment(device).jobs()["decode", R])
    assert cost.flops == {"bfloat16": L * (QKVO + ATTENTION + 2 * R * 3 * D * F) + 2 * R * D * V}
    kv = L * R * 2 * K * H * (CONTEXT + 1)
    assert cost.bytes == pytest.approx(2 * (PARAMS + R * D + kv), rel=2 * OTHER_BYTES)


@pytest.mark.parametrize("device", ["v6e", "h200"])
def test_experts_operations_are_those_of_routed_rows(device):
    E, k, I = 8, 3, 128
    cost = cost_of(deployment(device, "qwen3_moe").jobs()["decode", R])
    layer = QKVO + ATTENTION + 2 * R * D * E + 2 * (R * k) * (D * 2 * I + I * D)
    assert cost.flops_total == L * layer + 2 * R * D * V


@pytest.mark.parametrize(
    ("device", "dtypes"), [("v6e", {"bfloat16"}), ("h200", {"bfloat16", "float8_e4m3fn"})]
)
def test_quantized_weights_count_their_own_bytes_and_the_dtype_they_are_multiplied_in(
    device, dtypes
):
    kernels, plain = deployment(device, quantization="fp8"), deployment(device)
    fp8, bf16 = (cost_of(d.jobs()["decode", R]) for d in (kernels, plain))
    assert fp8.flops_total == bf16.flops_total
    assert set(fp8.flops) == dtypes
    saved = L * (D * (2 * N + 2 * K) * H + 3 * D * F)
    assert bf16.bytes - fp8.bytes == pytest.approx(saved, rel=0.1)

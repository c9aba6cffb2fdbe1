"""What is compiled, and where it lies: a model's shapes, a plan and a mesh, brought together.

Everything here is abstract, so it is the same for a model that is loaded and for one of which
only config.json is there, for devices that are here and for devices that are described.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import mla_attention
from pallas_kernels.checks import check_one_of
from pallas_kernels.devices import Device, Impl, check_runs
from pallas_kernels.paged_attention import IMPLS, choose, refusal
from xlinfer.kvcache import FP8, CacheSpec, Latents, cache_dtype
from xlinfer.mesh import AnyMesh, ways
from xlinfer.models import check_model
from xlinfer.plan import Memory, Plan, PlanError, make_plan, pages_for
from xlinfer.program_inputs import (
    decode_shapes,
    encode_shapes,
    forward_shapes,
    pool_shapes,
    sample_shapes,
    score_shapes,
)
from xlinfer.programs import Programs
from xlinfer.quant import QTensor
from xlinfer.sampling import Slots, empty_slots, slot_places


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a user may say of the programs; None: by kind of device, or as large as possible."""

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    hbm_utilization: float = 0.9
    decode_window: int = 32
    deterministic: bool = False
    attention_impl: str | None = None
    kv_cache_dtype: str = "auto"
    max_logprobs: int = 20


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What is taken where the user is silent, by kind of device."""

    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    bucket_ratio: int
    fewest_tokens: int  # of a bucket
    fewest_rows: int


# On CPU a step is bound by arithmetic, so a larger one gains nothing, and two cores compile the
# programs, so there are few.
ON_CPU = Defaults(
    max_num_seqs=32, max_num_batched_tokens=512, page_size=16, bucket_ratio=4,
    fewest_tokens=32, fewest_rows=1,
)  # fmt: skip
# Elsewhere pages are of the size that kernels copy at once. A step of few tokens is bound by
# reading the weights, and as fast as one of 128; tensor cores multiply 8 rows at least.
ELSEWHERE = Defaults(
    max_num_seqs=128, max_num_batched_tokens=2048, page_size=64, bucket_ratio=2,
    fewest_tokens=128, fewest_rows=8,
)  # fmt: skip
logger = logging.getLogger("xlinfer.deployment")
CPU_CACHE_BYTES = 1 << 30  # the KV cache's budget where the memory is the host's


class Job(NamedTuple):
    """One program to compile."""

    run: Callable
    args: tuple  # abstract
    donated: tuple[int, ...]
    placed: Any  # the results' shardings, so that one program's fit the next one's arguments


class Facts(NamedTuple):
    """What programs take from a model beside its arrays: members of CausalLM, and what others it
    has."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    latents: Latents | None  # a member that a module may lack
    max_position_embeddings: int
    kv_scales: bool  # it gives `attend` scales for a cache of 8 bits; this too may be lacking
    token_width: int  # numbers that a forward holds at once for each token, over all devices
    has_encoder: bool
    has_distance_bias: bool  # which no kernel adds


@dataclass(frozen=True, kw_only=True)
class Deployment:
    programs: Programs
    params: tuple[jax.ShapeDtypeStruct, ...]  # placed on the programs' mesh
    paths: tuple[str, ...]  # of the parameters in the model
    spec: CacheSpec
    dtype: Any  # of activations
    facts: Facts
    memory: Memory
    described: bool  # the mesh is of devices that need not be here

    @property
    def plan(self) -> Plan:
        return self.programs.plan

    def jobs(self) -> dict[tuple[str, int], Job]:
        """Every program of the plan by name and bucket (0 where there is one)."""
        programs, plan, mesh = self.programs, self.plan, self.programs.mesh
        whole = NamedSharding(mesh, PartitionSpec())
        place = lambda shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
        slots = slot_shapes(mesh, plan.max_num_seqs, self.facts.vocab_size)
        slot_lies = jax.tree.map(lambda x: x.sharding, slots)
        packed = lambda shapes: place((sum(x.size for x in jax.tree.leaves(shapes)),))
        kv, params, largest = self.spec.abstract(mesh), self.params, plan.token_buckets[-1]
        hidden = jax.eval_shape(
            partial(programs.forward, tokens=largest),
            params, kv, slots, packed(forward_shapes(plan, largest)),
        )[2]  # fmt: skip
        states = lambda rows: place((rows, hidden.shape[1]), hidden.dtype)
        cache = jax.tree.map(lambda x: x.sharding, kv)

        jobs: dict[tuple[str, int], Job] = {}
        for rows in plan.decode_buckets:
            step, out = packed(decode_shapes(plan, rows)), (cache, slot_lies, whole)
            run = partial(programs.decode, rows=rows)
            jobs["decode", rows] = Job(run, (params, kv, slots, step), (1, 2), out)
        for tokens in plan.token_buckets:
            step = packed(forward_shapes(plan, tokens))
            run = partial(programs.forward, tokens=tokens)
            out = (cache, whole, whole)
            jobs["forward", tokens] = Job(run, (params, kv, slots, step), (1,), out)
        for tokens in plan.encode_buckets:
            run = partial(programs.encode, tokens=tokens)
            step = packed(encode_shapes(tokens))
            jobs["encode", tokens] = Job(run, (params, kv, step), (1,), cache)
        sample = (params, slots, states(plan.max_num_seqs), packed(sample_shapes(plan)))
        jobs["sample", 0] = Job(programs.sample, sample, (1,), (slot_lies, whole))
        score = (params, states(largest), packed(score_shapes(plan)))
        jobs["score", 0] = Job(programs.score, score, (), whole)
        pool = (states(largest), packed(pool_shapes(plan)))
        jobs["pool", 0] = Job(programs.pool, pool, (), whole)
        jobs["admit", 0] = Job(programs.admit, _admit_args(slots, place), (0,), slot_lies)
        jobs["allocate", 0] = Job(partial(self.spec.zeros, mesh), (), (), cache)
        return jobs


def _admit_args(slots: Slots, place: Callable) -> tuple:
    one = lambda x: place(x.shape[1:], x.dtype)
    row, state = jax.tree.map(one, slots.params), slots.state
    return slots, place(()), row, place(()), one(state.recent_ZC), one(state.output_count_ZV)


def slot_shapes(mesh: AnyMesh, max_num_seqs: int, vocab_size: int) -> Slots:
    """One more than rows: padding's. Placed."""
    place = lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies)
    shapes = jax.eval_shape(partial(empty_slots, max_num_seqs + 1, vocab_size))
    return jax.tree.map(place, shapes, slot_places(mesh, vocab_size))


def deploy(
    graph: nnx.GraphDef,
    state: Any,
    facts: Facts,
    *,
    mesh: Mesh,
    device: Device,
    device_bytes: int,
    sizes: Sizes,
    held_bytes: int = 0,
    described: bool = False,
) -> Deployment:
    """`state` holds placed arrays, abstract or not, as `nnx.split` gives them. `device_bytes` is
    the memory of one device, of which `held_bytes` are in use by now, the state's included.

    Raises PlanError when the sizes do not fit each other or the memory, ValueError when the device
    has no such implementation.
    """
    leaves, tree = jax.tree.flatten(state)
    params = tuple(jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding) for p in leaves)
    defaults = ON_CPU if device.platform == "cpu" else ELSEWHERE
    given = lambda name: getattr(sizes if getattr(sizes, name) is not None else defaults, name)
    max_num_seqs, page_size = given("max_num_seqs"), given("page_size")
    max_num_batched_tokens = sizes.max_num_batched_tokens
    if max_num_batched_tokens is None:
        # Deterministic serving pays for the whole bucket at every step, so it is kept small.
        most = 64 if sizes.deterministic else defaults.max_num_batched_tokens
        max_num_batched_tokens = max(max_num_seqs, most)
    max_model_len = sizes.max_model_len
    max_model_len = facts.max_position_embeddings if max_model_len is None else max_model_len
    _check_sizes(facts.max_position_embeddings, max_model_len, page_size, sizes.hbm_utilization)
    dtype = _activation_dtype(state)
    kv_dtype = cache_dtype(sizes.kv_cache_dtype, dtype, facts.kv_scales)
    if facts.has_encoder and kv_dtype == FP8:
        raise ValueError(
            "kv_cache_dtype is 'fp8': an encoder-decoder model's cache is not kept in 8 bits; ask "
            f"for auto or {jnp.dtype(dtype).name}"
        )
    spec = CacheSpec(
        num_layers=facts.num_layers,
        num_pages=sizes.num_pages or 0,
        num_kv_heads=facts.num_kv_heads,
        page_size=page_size,
        head_dim=facts.head_dim,
        latents=facts.latents,
        dtype=kv_dtype,
        impl=_attention_impl(sizes.attention_impl, device, page_size, facts, dtype, kv_dtype),
    )
    encodes = facts.has_encoder
    # An encoder reads its prompt whole.
    most_tokens = max(max_num_batched_tokens, max_model_len if encodes else 0)
    memory = Memory(
        device_bytes=device_bytes,
        hbm_utilization=sizes.hbm_utilization,
        weight_bytes=max(sum(map(bytes_on_one, params)), held_bytes),
        slot_bytes=sum(
            map(bytes_on_one, jax.tree.leaves(slot_shapes(mesh, max_num_seqs, facts.vocab_size)))
        ),
        temporary_bytes=temporary_bytes(
            facts, dtype, ways(mesh, "heads"), rows=max_num_seqs, tokens=most_tokens
        ),
        page_bytes=spec.page_bytes_per_device(mesh),
    )
    num_pages = sizes.num_pages
    if num_pages is None:
        tables = 2 if encodes else 1  # a prompt's pages beside those of the sequence
        whole = max_num_seqs * tables * pages_for(max_model_len, page_size) + 1
        # On CPU the memory is the host's, which others use too.
        room = CPU_CACHE_BYTES if device.platform == "cpu" else memory.cache_budget()
        num_pages = min(whole, room // memory.page_bytes)
    plan = make_plan(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        page_size=page_size,
        num_pages=num_pages,
        decode_window=sizes.decode_window,
        max_logprobs=min(sizes.max_logprobs, facts.vocab_size),
        deterministic=sizes.deterministic,
        encodes=encodes,
        bucket_ratio=defaults.bucket_ratio,
        fewest_tokens=defaults.fewest_tokens,
        fewest_rows=defaults.fewest_rows,
    )
    parts = ways(mesh, "tokens")
    if uneven := [tokens for tokens in plan.token_buckets if tokens % parts]:
        raise PlanError(
            f"sequence_parallel_size={parts} does not divide steps of "
            f"{', '.join(map(str, uneven))} tokens: max_num_batched_tokens, which is "
            f"{max_num_batched_tokens}, must be a multiple of {parts} by a power of two."
        )
    programs = Programs(
        graph=graph,
        tree=tree,
        plan=plan,
        mesh=mesh,
        device=device,
        attention_impl=spec.impl,
        latent=spec.latents is not None,
    )
    return Deployment(
        programs=programs, params=params, paths=paths_of(state),
        spec=spec.with_pages(num_pages), dtype=dtype, facts=facts, memory=memory,
        described=described,
    )  # fmt: skip


def temporary_bytes(facts: Facts, dtype: Any, tensor: int, *, rows: int, tokens: int) -> int:
    """Of the program that takes most: an estimate. `./run bench plan_memory` holds it to XLA's."""
    return max(activation_bytes(facts, dtype, tensor, tokens), sampler_bytes(facts, tensor, rows))


def activation_bytes(facts: Facts, dtype: Any, tensor: int, tokens: int) -> int:
    """What a forward holds at once."""
    return tokens * jnp.dtype(dtype).itemsize * -(-facts.token_width // tensor)


def sampler_bytes(facts: Facts, tensor: int, rows: int) -> int:
    """Float32 copies of its rows' logits, and a new count of every slot's output. Of logits XLA
    keeps 5 (H200) to 12 (v6e, 64 rows) at once; several devices share them."""
    return 4 * facts.vocab_size * (-(-12 * rows // tensor) + rows + 1)


def facts_of(model: Any) -> Facts:
    """Of a CausalLM. Raises TypeError naming what it lacks."""
    check_model(model)
    width = getattr(model, "token_width", None)
    if width is None:  # an own module's: its widest matrix, as gate and up, and its input
        shapes = [p.shape[-2:] for p in jax.tree.leaves(nnx.state(model)) if p.ndim >= 2]
        sides = [n for shape in shapes for n in shape if n != model.vocab_size]
        width = 4 * max(sides, default=1)
    own = {
        "token_width": width,
        "latents": getattr(model, "latents", None),
        "kv_scales": bool(getattr(model, "kv_scales", False)),
        "has_encoder": hasattr(model, "encode"),
        "has_distance_bias": bool(getattr(model, "has_distance_bias", False)),
    }
    names = [name for name in Facts._fields if name not in own]
    return Facts(**{name: getattr(model, name) for name in names}, **own)


def paths_of(state: Any) -> tuple[str, ...]:
    """A name for each leaf of a module's state: "layers.0.attn.q_D_NH"."""
    names = []
    for path, _ in jax.tree_util.tree_leaves_with_path(state):
        parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        names.append(".".join(part for part in parts if part != "value"))
    return tuple(names)


def _attention_impl(
    asked: str | None, device: Device, page_size: int, facts: Facts, dtype: Any, kv_dtype: Any
) -> Impl:
    """`dtype` is of queries: a kernel that takes a cache of it takes them."""
    common = lambda impls: next(iter(impls)) if len(impls) == 1 else "reference"
    if asked is None and facts.latents is not None:
        dims = {"page_size": page_size, **asdict(facts.latents)}
        return common({mla_attention.choose(device, **dims, dtype=d) for d in (dtype, kv_dtype)})
    cache: dict[str, Any] = {"page_size": page_size, "head_dim": facts.head_dim, "dtype": kv_dtype}
    queries = cache | {"dtype": dtype}
    wanted = {"distance_bias": facts.has_distance_bias, "apart": facts.has_encoder}
    if asked is None:
        impl = common({choose(device, **held, **wanted) for held in (cache, queries)})
        if (kernel := choose(device, **cache)) != impl:
            why = refusal(kernel, **cache, **wanted) or refusal(kernel, **queries, **wanted)
            logger.warning("attention runs by the %s, not by %s: %s", impl, kernel, why)
        return impl
    check_one_of("attention_impl", asked, IMPLS)
    check_runs("attention_impl", asked, device)
    impl: Impl = asked  # type: ignore[assignment]
    if (why := refusal(impl, **cache, **wanted)) is not None:
        raise ValueError(f"attention_impl {asked} does not take this model's cache: {why}")
    return impl


def _check_sizes(
    positions: int, max_model_len: int, page_size: int, hbm_utilization: float
) -> None:
    if page_size < 1:
        raise PlanError(f"page_size must be at least 1, got {page_size}.")
    if not 0 < hbm_utilization <= 1:
        raise PlanError(f"hbm_utilization must be in (0, 1], got {hbm_utilization}.")
    if max_model_len > positions:
        raise PlanError(
            f"max_model_len={max_model_len} is past the model's max_position_embeddings="
            f"{positions}; ask for at most that."
        )


def bytes_on_one(x: jax.ShapeDtypeStruct) -> int:
    """Of a placed array, what lies on one device. int4 counts half a byte, where nbytes has one."""
    shard = x.sharding.shard_shape(x.shape)  # type: ignore[union-attr]
    return math.prod(shard) * jax.dtypes.itemsize_bits(x.dtype) // 8


def _activation_dtype(state: Any) -> Any:
    """That of the largest parameter which is not quantized."""
    is_quantized = lambda x: isinstance(x, QTensor)
    leaves = jax.tree.leaves(state, is_leaf=is_quantized)
    return max((x for x in leaves if not is_quantized(x)), key=lambda x: x.size).dtype

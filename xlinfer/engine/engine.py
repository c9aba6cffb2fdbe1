"""The engine: token ids in, token ids out. Knows no text and no clock.

`step` is the whole system: schedule, dispatch, and hand out the results of the step before,
which the device finished meanwhile.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from pallas_kernels.checks import check_one_of
from pallas_kernels.devices import Impl, check_runs
from pallas_kernels.paged_attention import IMPLS, choose
from xlinfer.compile import compile_all
from xlinfer.engine.outputs import Outputs
from xlinfer.engine.pages import PagePool
from xlinfer.engine.runner import InFlight, Runner
from xlinfer.engine.scheduler import Scheduler
from xlinfer.engine.sequence import Sequence
from xlinfer.engine.slots import check_request, stop_ids
from xlinfer.kvcache import CacheSpec
from xlinfer.mesh import device_of, make_mesh
from xlinfer.models import check_model
from xlinfer.plan import Plan, PlanError, make_plan, pages_for
from xlinfer.programs import Programs
from xlinfer.progress import Progress
from xlinfer.quant import QTensor
from xlinfer.request import EngineStats, InvalidRequest, Request, TokenOutput

STEPS_IN_FLIGHT = 2  # one runs while the next is scheduled


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What an engine takes where its caller is silent, by kind of device."""

    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    bucket_ratio: int


# On CPU a step is bound by arithmetic, so a larger one gains nothing, and two cores compile the
# programs, so there are few. Elsewhere pages are of the size that kernels copy at once.
ON_CPU = Defaults(max_num_seqs=32, max_num_batched_tokens=512, page_size=16, bucket_ratio=4)
ELSEWHERE = Defaults(max_num_seqs=128, max_num_batched_tokens=2048, page_size=64, bucket_ratio=2)
CPU_CACHE_BYTES = 1 << 30  # the KV cache's budget where the memory is the host's


class Engine:
    """Serves any module that has the members of `xlinfer.models.CausalLM`, with the arrays it
    holds: they are not copied, cast or moved.

    Arguments beside the module:
      mesh: the devices; by default those of the module's first parameter.
      max_model_len: tokens of a sequence, prompt and answer; by default the model's positions.
      max_num_seqs, max_num_batched_tokens: rows and tokens of one step.
      page_size: tokens of a KV page.  num_pages: by default what the memory budget holds, and
        no more than all rows at full length need.
      hbm_utilization: fraction of the device's memory for weights, cache and temporaries; on
        CPU the cache's budget is 1 GiB instead.
      decode_window: most tokens that one row alone gains in one device call while nobody waits;
        rows that run together gain a quarter of it.
      deterministic: one program for every token, so a request's bits do not depend on load.
      attention_impl: of pallas_kernels.paged_attention; by default what that op chooses for the
        device.
      seed: for requests that name none.
      progress: called as progress("compile", done, total).

    Raises PlanError when the numbers do not fit each other or the memory, ValueError when the
    device has no such implementation, TypeError when the module lacks a member. Not thread-safe.
    """

    def __init__(
        self,
        model: nnx.Module,
        *,
        mesh: Mesh | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        hbm_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        decode_window: int = 32,
        deterministic: bool = False,
        attention_impl: str | None = None,
        max_logprobs: int = 20,
        seed: int = 0,
        progress: Progress | None = None,
    ):
        check_model(model)
        graph, state = nnx.split(model)
        leaves, self._tree = jax.tree.flatten(state)
        params = tuple(leaves)
        mesh = mesh or _mesh_of(params)
        self.vocab_size: int = model.vocab_size  # type: ignore[attr-defined]
        defaults = ON_CPU if mesh.devices.flat[0].platform == "cpu" else ELSEWHERE
        max_num_seqs = defaults.max_num_seqs if max_num_seqs is None else max_num_seqs
        page_size = defaults.page_size if page_size is None else page_size
        if max_num_batched_tokens is None:
            # Deterministic serving pays for the whole bucket at every step, so it is kept small.
            most = 64 if deterministic else defaults.max_num_batched_tokens
            max_num_batched_tokens = max(max_num_seqs, most)
        positions: int = model.max_position_embeddings  # type: ignore[attr-defined]
        max_model_len = positions if max_model_len is None else max_model_len
        _check_sizes(positions, max_model_len, page_size)
        device, dtype = device_of(mesh), _activation_dtype(state)
        head_dim: int = model.head_dim  # type: ignore[attr-defined]
        if attention_impl is not None:
            check_one_of("attention_impl", attention_impl, IMPLS)
            check_runs("attention_impl", attention_impl, device)
        self.attention_impl: Impl = attention_impl or choose(  # type: ignore[assignment]
            device, page_size=page_size, head_dim=head_dim, dtype=dtype
        )
        spec = CacheSpec(
            num_layers=model.num_layers,  # type: ignore[attr-defined]
            num_pages=num_pages or 0,
            num_kv_heads=model.num_kv_heads,  # type: ignore[attr-defined]
            page_size=page_size,
            head_dim=head_dim,
            dtype=dtype,
            impl=self.attention_impl,
        )
        if num_pages is None:
            whole = max_num_seqs * pages_for(max_model_len, page_size) + 1
            budget = _cache_budget(params, mesh, hbm_utilization)
            num_pages = min(whole, budget // spec.page_bytes_per_device(mesh))
            spec = spec.with_pages(num_pages)
        self.plan: Plan = make_plan(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            page_size=page_size,
            num_pages=num_pages,
            decode_window=decode_window,
            max_logprobs=min(max_logprobs, self.vocab_size),
            deterministic=deterministic,
            bucket_ratio=defaults.bucket_ratio,
        )
        programs = Programs(
            graph=graph, tree=self._tree, plan=self.plan, mesh=mesh, device=device,
            attention_impl=self.attention_impl,
        )  # fmt: skip
        executables = compile_all(programs, params, self.vocab_size, spec.abstract(mesh), progress)
        self._runner = Runner(
            params, executables, spec.allocate(mesh), self.plan, mesh,
            vocab_size=self.vocab_size, seed=seed,
        )  # fmt: skip
        self._scheduler = Scheduler(
            self.plan, PagePool(num_pages), enable_prefix_caching=enable_prefix_caching
        )
        self._sequences: dict[str, Sequence] = {}  # unfinished, by request id
        self._in_flight: deque[InFlight] = deque()
        self._outputs = Outputs()
        self._arrivals = count()

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest, and then nothing has changed."""
        check_request(request, self.vocab_size, self.plan.max_model_len, self.plan.max_logprobs)
        if request.request_id in self._sequences:
            message = f"The request id {request.request_id!r} is in use."
            raise InvalidRequest("request_id", message)
        prompt, most = request.prompt_token_ids, request.sampling.max_tokens
        longest = self.plan.max_model_len
        seq = Sequence(
            request=request,
            order=(request.priority, request.arrival_time, next(self._arrivals)),
            max_length=longest if most is None else min(len(prompt) + most, longest),
            stop_ids=frozenset(stop_ids(request)),
            tokens=list(prompt),
        )
        self._sequences[request.request_id] = seq
        self._scheduler.add(seq)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget these requests and free what they hold; unknown ids are no error, since the
        request may just have finished. They are not heard of again."""
        for request_id in request_ids:
            if (seq := self._sequences.pop(request_id, None)) is not None:
                self._scheduler.finish(seq)
                self._outputs.drop(seq)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._in_flight or self._outputs.ready)

    def step(self) -> list[TokenOutput]:
        """Schedule what can run and return what the oldest step in flight gave, waiting for it
        to be done. Empty when that gave nothing to tell."""
        while len(self._in_flight) < STEPS_IN_FLIGHT and (step := self._scheduler.schedule()):
            self._in_flight.append(self._runner.start(step))
        if self._in_flight:
            self._receive(self._in_flight.popleft())
        return self._outputs.take()

    def stats(self) -> EngineStats:
        scheduler, pool = self._scheduler, self._scheduler.pool
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            kv_cache_usage=1 - pool.num_free / pool.num_pages,
            prefix_cache_queries=scheduler.prefix_queries,
            prefix_cache_hits=scheduler.prefix_hits,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=self._outputs.prompt_tokens,
            generation_tokens=self._outputs.generation_tokens,
        )

    def update_weights(self, params: Any) -> None:
        """Swap the parameters between steps: `params` is `nnx.state` of a module of the same
        structure, shapes and dtypes. Arrays already in the old ones' shardings are not copied.

        Unfinished requests go on with the new weights: their KV is computed again. Raises
        ValueError naming the parameter that does not fit, and then nothing has changed.
        """
        leaves, tree = jax.tree.flatten(params)
        if tree != self._tree:
            raise ValueError("The new parameters have another structure than the model's.")
        paths = [
            jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        for path, new, old in zip(paths, leaves, self._runner.params, strict=True):
            if new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(
                    f"{path} is {new.dtype}{list(new.shape)}, the model's is "
                    f"{old.dtype}{list(old.shape)}."
                )
        while self._in_flight:
            self._receive(self._in_flight.popleft())
        self._scheduler.restart_all()
        self._runner.params = tuple(
            jax.device_put(new, old.sharding)
            for new, old in zip(leaves, self._runner.params, strict=True)
        )

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; running requests keep theirs."""
        self._scheduler.pool.forget_all()

    def check(self) -> None:
        """AssertionError unless every page and slot is accounted for."""
        self._scheduler.check()

    def _receive(self, done: InFlight) -> None:
        for seq in self._outputs.receive(done, self._scheduler):
            self._scheduler.finish(seq)
            del self._sequences[seq.request.request_id]


def _mesh_of(params: tuple[jax.Array, ...]) -> Mesh:
    sharding = params[0].sharding
    if isinstance(sharding, NamedSharding):
        return sharding.mesh  # type: ignore[return-value]
    return make_mesh(1, devices=sorted(sharding.device_set, key=lambda d: d.id)[:1])


def _check_sizes(positions: int, max_model_len: int, page_size: int) -> None:
    if page_size < 1:
        raise PlanError(f"page_size must be at least 1, got {page_size}.")
    if max_model_len > positions:
        raise PlanError(
            f"max_model_len={max_model_len} is past the model's max_position_embeddings="
            f"{positions}; ask for at most that."
        )


def _cache_budget(params: tuple[jax.Array, ...], mesh: Mesh, hbm_utilization: float) -> int:
    """Bytes of each device that the KV cache may take."""
    if not 0 < hbm_utilization <= 1:
        raise PlanError(f"hbm_utilization must be in (0, 1], got {hbm_utilization}.")
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return CPU_CACHE_BYTES
    facts = device.memory_stats() or {}
    in_use = max(facts["bytes_in_use"], _bytes_on(device, params))
    budget = int(facts["bytes_limit"] * hbm_utilization) - in_use
    if budget <= 0:
        raise PlanError(
            f"The weights take {in_use / 2**30:.1f} GiB of each device, and hbm_utilization="
            f"{hbm_utilization} allows {facts['bytes_limit'] * hbm_utilization / 2**30:.1f} GiB: "
            "nothing is left for the KV cache. Use more devices (tensor_parallel_size)."
        )
    return budget


def _bytes_on(device: Any, params: tuple[jax.Array, ...]) -> int:
    shards = (s.data for p in params for s in p.addressable_shards if s.device == device)
    # Not nbytes, which counts a byte for each int4.
    return sum(x.size * jax.dtypes.itemsize_bits(x.dtype) // 8 for x in shards)


def _activation_dtype(state: Any) -> Any:
    """That of the largest parameter which is not quantized."""
    is_quantized = lambda x: isinstance(x, QTensor)
    leaves = jax.tree.leaves(state, is_leaf=is_quantized)
    return max((x for x in leaves if not is_quantized(x)), key=lambda x: x.size).dtype

"""From a checkpoint folder to something that answers: the library and the server build alike."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, runtime_checkable

from xlinfer.config import GenerationConfig
from xlinfer.plan import Plan
from xlinfer.progress import Progress
from xlinfer.request import EngineStats, Request, TokenOutput
from xlinfer.serve.tokenizer import Tokenizer

logger = logging.getLogger("xlinfer.serve")
DEMO_MODEL = Path(__file__).parent.parent / "demo"
DEMO_NAME = "pystd-8m"


@runtime_checkable
class TokenEngine(Protocol):
    """What serving needs of `xlinfer.engine.engine.Engine`. One thread at a time may call it."""

    @property
    def plan(self) -> Plan: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_running(self) -> int: ...
    @property
    def has_work(self) -> bool: ...
    def add_request(self, request: Request) -> None: ...
    def abort(self, request_ids: Iterable[str]) -> None: ...
    def step(self) -> list[TokenOutput]: ...
    def stats(self) -> EngineStats: ...


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The keyword arguments of `xlinfer.LLM`, the server's flags of the same names."""

    model: str | None  # folder, GGUF, or org/name of the hub; None: the artifact's
    revision: str | None = None  # of the hub's; None: its main branch
    tokenizer: str | None = None  # folder; None: the model's
    chat_template: str | None = None  # file; None: the tokenizer's
    text_only: bool = False  # of a model that reads images too, its text model
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    hbm_utilization: float = 0.9
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel_size: int | None = None  # None: the most that divides experts and devices
    sequence_parallel_size: int = 1
    quantization: str | None = None  # int4, int8, fp8; None: weights as they are
    attention_impl: str | None = None  # None: the device's kernel
    kv_cache_dtype: str = "auto"  # auto: the activations' or the checkpoint's, fp8, or a float
    matmul_impl: str | None = None
    enable_prefix_caching: bool = True
    deterministic: bool = False
    max_logprobs: int = 20
    seed: int = 0
    compile_cache_dir: str | None = None  # None: compiled programs are not kept
    artifact: str | None = None  # what xlinfer.compile wrote
    allow_recompile: bool = False  # where the artifact does not fit


@dataclass(frozen=True, kw_only=True)
class Built:
    engine: TokenEngine
    tokenizer: Tokenizer
    generation: GenerationConfig


# Options that decide what an artifact's programs are: given, they must be what it was compiled for.
_COMPILED = (
    *("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size"),
    *("num_pages", "hbm_utilization", "tensor_parallel_size", "expert_parallel_size"),
    *("sequence_parallel_size", "quantization", "matmul_impl"),
    *("attention_impl", "kv_cache_dtype", "deterministic", "max_logprobs"),
)
# Options that are fields of xlinfer.deployment.Sizes.
_SIZES = (
    *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size", "num_pages"),
    *("hbm_utilization", "deterministic", "max_logprobs", "attention_impl", "kv_cache_dtype"),
)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is the same on every host that serves a model."""

    ready: Any  # an xlinfer.engine.ready.Ready
    others: tuple[Any, ...]  # such, of the other replicas
    source: Path  # of the weights
    tokenizer: Tokenizer
    generation: GenerationConfig


Memory = tuple[int, int]  # bytes of a device, and of those in use


def build(options: EngineOptions, progress: Progress) -> Built:
    """Load, compile, ready. Raises ValueError or OSError saying which option is wrong."""
    return start(prepare(options, progress), options, executor=None)


def start(prepared: Prepared, options: EngineOptions, executor: Any) -> Built:
    """An engine whose programs `executor` runs; None: on this host's devices. Of replicas there is
    one for each, behind one."""
    from xlinfer.engine.engine import Engine
    from xlinfer.engine.replicas import Replicas

    caching, seed = options.enable_prefix_caching, options.seed
    engine: TokenEngine = Engine.of(
        prepared.ready, executor=executor, enable_prefix_caching=caching, seed=seed
    )
    if prepared.others:
        of = partial(Engine.of, enable_prefix_caching=caching)
        others = [of(ready, seed=seed + n) for n, ready in enumerate(prepared.others, 1)]
        engine = Replicas([engine, *others], enable_prefix_caching=caching)
    return Built(engine=engine, tokenizer=prepared.tokenizer, generation=prepared.generation)


def prepare(
    options: EngineOptions,
    progress: Progress,
    agree: Callable[[Memory], Memory] = lambda own: own,
) -> Prepared:
    """Load and compile. `agree` makes of this host's memory what all hosts plan with. Raises
    ValueError or OSError saying which option is wrong."""
    if options.model is not None:
        from xlinfer.hub import fetch

        folder = os.fspath(fetch(options.model, options.revision, progress))
        options = replace(options, model=folder, revision=None)
    if options.artifact is not None:
        from xlinfer.compile.artifact import ArtifactError

        try:
            return _from_artifact(options, progress)
        except ArtifactError as error:
            if not options.allow_recompile:
                raise
            logger.warning("Compiling instead, as allow_recompile says: %s", error)
    if options.model is None:
        raise ValueError("model is not given, and the artifact cannot be used; name the checkpoint")
    # Late, so that a server answers /live while jax is still being imported.
    import converters
    from xlinfer.compile.store import Store, use_jax_cache
    from xlinfer.deployment import Sizes
    from xlinfer.engine.ready import make_ready, memory_of
    from xlinfer.mesh import default_expert_parallel_size, make_mesh, replica_meshes
    from xlinfer.weights import load_model, replica

    kept = None
    if options.compile_cache_dir is not None:
        kept = Store(options.compile_cache_dir)
        use_jax_cache(options.compile_cache_dir)
    # The small files first: a missing tokenizer should not cost a load.
    checkpoint = converters.open_checkpoint(options.model, text_only=options.text_only)
    tokenizer = Tokenizer.open(
        options.tokenizer or options.model, chat_template=options.chat_template
    )
    size, experts = options.tensor_parallel_size, options.expert_parallel_size
    if experts is None:
        experts = default_expert_parallel_size(checkpoint.config, size)
    first = make_mesh(
        size, expert_parallel_size=experts, sequence_parallel_size=options.sequence_parallel_size
    )
    mesh, *others = replica_meshes(first, options.data_parallel_size)
    if options.matmul_impl is not None and not (options.quantization or checkpoint.scheme):
        raise ValueError(
            f"matmul_impl={options.matmul_impl} chooses how quantized weights are multiplied, and "
            "there are none: name a quantization too, or leave it out"
        )
    module = load_model(
        options.model, dtype=options.dtype, mesh=mesh, quantization=options.quantization,
        matmul_impl=options.matmul_impl, text_only=options.text_only, progress=progress,
    )  # fmt: skip
    sizes = Sizes(**{name: getattr(options, name) for name in _SIZES})
    memory = agree(memory_of(mesh.local_devices[0]))
    with ExitStack() as stack:
        if kept is None and others:  # what one replica compiles is for all
            kept = Store(stack.enter_context(TemporaryDirectory(prefix="xlinfer-")))
        make = partial(make_ready, memory=memory, kept=kept, progress=progress)
        ready = make(module, sizes, mesh=mesh)
        alike = replace(sizes, num_pages=ready.plan.num_pages)
        replicas = [make(replica(module, own), alike, mesh=own) for own in others]
    return Prepared(
        ready=ready, others=tuple(replicas), source=checkpoint.path, tokenizer=tokenizer,
        generation=checkpoint.generation,
    )  # fmt: skip


def _from_artifact(options: EngineOptions, progress: Progress) -> Prepared:
    """Load, ready: nothing is traced, and nothing compiled but, for an artifact without weights,
    what places a checkpoint's. Raises ArtifactError where it does not fit, ValueError or OSError
    saying which option is wrong."""
    import jax

    import converters
    from xlinfer.compile.artifact import PARAMETERS, load_programs, moved, open_artifact
    from xlinfer.compile.parameters import read_parameters
    from xlinfer.engine.ready import Ready
    from xlinfer.mesh import replica_meshes

    assert options.artifact is not None
    opened = open_artifact(options.artifact, jax.devices())
    _check_asked(options, opened.manifest)
    source = str(opened.path) if opened.has_weights else options.model
    if source is None:
        raise ValueError(f"{opened.path} holds programs and no weights: name the checkpoint too")
    checkpoint = converters.open_checkpoint(source, text_only=options.text_only)
    tokenizer = Tokenizer.open(options.tokenizer or source, chat_template=options.chat_template)
    others = replica_meshes(opened.mesh, options.data_parallel_size)[1:]
    executables = load_programs(opened)
    if opened.has_weights:
        folder = opened.path / PARAMETERS
        params = read_parameters(folder, opened.paths, opened.params, progress)
    else:
        params = _checkpoint_parameters(checkpoint, opened, progress)
    manifest = opened.manifest
    ready = Ready(
        params=params,
        paths=opened.paths,
        executables=executables,
        plan=opened.plan,
        mesh=opened.mesh,
        vocab_size=manifest["facts"]["vocab_size"],
        attention_impl=manifest["attention_impl"],
        kv_cache_dtype=manifest["kv_cache_dtype"],
        kv_scales=manifest["facts"]["kv_scales"],
    )
    replicas = []
    for mesh in others:
        part = moved(opened, mesh)
        copied = [jax.device_put(x, p.sharding) for x, p in zip(params, part.params, strict=True)]
        own = replace(ready, params=tuple(copied), executables=load_programs(part), mesh=mesh)
        replicas.append(own)
    source = opened.path if opened.has_weights else checkpoint.path
    return Prepared(
        ready=ready,
        others=tuple(replicas),
        source=source,
        tokenizer=tokenizer,
        generation=checkpoint.generation,
    )


def _check_asked(options: EngineOptions, manifest: Mapping[str, Any]) -> None:
    """Raise ArtifactError where an option was given and is not what the programs are for."""
    from xlinfer.compile.artifact import ArtifactError, compile_again
    from xlinfer.kvcache import CACHE_DTYPES

    setup = manifest["setup"]
    has = {**setup, **setup["sizes"], "kv_cache_dtype": manifest["kv_cache_dtype"]}
    defaults = EngineOptions.__dataclass_fields__

    def differs(name: str, asked: Any) -> bool:
        if name == "kv_cache_dtype" and asked in CACHE_DTYPES:  # there are two names for one
            asked = CACHE_DTYPES[asked].name
        return asked not in (defaults[name].default, has[name])

    wrong = [
        f"{name}={asked} is asked for, and it was compiled for {has[name]}"
        for name in _COMPILED
        if differs(name, asked := getattr(options, name))
    ]
    if wrong:
        raise ArtifactError(
            f"{options.artifact}: {'; '.join(wrong)}. Leave the option out, or compile another "
            f"artifact. {compile_again(manifest)}"
        )


def _checkpoint_parameters(checkpoint: Any, opened: Any, progress: Progress) -> tuple:
    """Of a checkpoint that the artifact was compiled for, as its programs take them."""
    import jax
    from flax import nnx

    from xlinfer.compile.artifact import ArtifactError, config_digest
    from xlinfer.weights import load_model

    setup, config = opened.manifest["setup"], checkpoint.document
    if config_digest(config) != opened.manifest["config_sha256"]:
        names = sorted({*config, *setup["config"]})
        changed = [n for n in names if config.get(n) != setup["config"].get(n)]
        raise ArtifactError(
            f"{opened.path} was compiled for another model than {checkpoint.path}: its config.json "
            f"differs in {', '.join(changed[:8])}. Name the model it was compiled for, or compile "
            "it again."
        )
    module = load_model(
        checkpoint.path, dtype=setup["dtype"], mesh=opened.mesh,
        quantization=setup["quantization"], matmul_impl=setup["matmul_impl"],
        text_only=checkpoint.is_part, progress=progress,
    )  # fmt: skip
    return tuple(jax.tree.leaves(nnx.state(module)))

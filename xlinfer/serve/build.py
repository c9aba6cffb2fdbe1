"""From a checkpoint folder to something that answers: the library and the server build alike."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from xlinfer.config import GenerationConfig
from xlinfer.plan import Plan
from xlinfer.progress import Progress
from xlinfer.request import EngineStats, Request, TokenOutput
from xlinfer.serve.tokenizer import Tokenizer

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
    def has_work(self) -> bool: ...
    def add_request(self, request: Request) -> None: ...
    def abort(self, request_ids: Iterable[str]) -> None: ...
    def step(self) -> list[TokenOutput]: ...
    def stats(self) -> EngineStats: ...


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The keyword arguments of `xlinfer.LLM`, the server's flags of the same names."""

    model: str
    tokenizer: str | None = None  # folder; None: the model's
    chat_template: str | None = None  # file; None: the tokenizer's
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    hbm_utilization: float = 0.9
    tensor_parallel_size: int = 1
    quantization: str | None = None  # int4, int8, fp8; None: weights as they are
    attention_impl: str | None = None  # None: the device's kernel
    matmul_impl: str | None = None
    enable_prefix_caching: bool = True
    deterministic: bool = False
    max_logprobs: int = 20
    seed: int = 0
    compile_cache_dir: str | None = None  # None: compiled programs are not kept


@dataclass(frozen=True, kw_only=True)
class Built:
    engine: TokenEngine
    tokenizer: Tokenizer
    generation: GenerationConfig


# Options that are the engine's arguments of the same name.
_ENGINE = (
    *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size", "num_pages"),
    *("hbm_utilization", "enable_prefix_caching", "deterministic", "max_logprobs", "seed"),
    "attention_impl",
)


def build(options: EngineOptions, progress: Progress) -> Built:
    """Load, compile, ready. Raises ValueError or OSError saying which option is wrong."""
    # Late, so that a server answers /live while jax is still being imported.
    import converters
    from xlinfer.compile import use_compile_cache
    from xlinfer.engine.engine import Engine
    from xlinfer.mesh import device_of, make_mesh
    from xlinfer.quant import quantize_model
    from xlinfer.weights import load_model

    if options.compile_cache_dir is not None:
        use_compile_cache(options.compile_cache_dir)
    # The small files first: a missing tokenizer should not cost a load.
    checkpoint = converters.open_checkpoint(options.model)
    tokenizer = Tokenizer.open(
        options.tokenizer or options.model, chat_template=options.chat_template
    )
    mesh = make_mesh(options.tensor_parallel_size)
    if options.matmul_impl is not None and options.quantization is None:
        raise ValueError(
            f"matmul_impl={options.matmul_impl} chooses how quantized weights are multiplied, and "
            "there are none: name a quantization too, or leave it out"
        )
    module = load_model(options.model, dtype=options.dtype, mesh=mesh, progress=progress)
    if options.quantization is not None:
        quantize_model(module, options.quantization, device_of(mesh), options.matmul_impl)
    # What nobody asked for is left to the engine's own defaults.
    given = {name: value for name in _ENGINE if (value := getattr(options, name)) is not None}
    engine = Engine(module, mesh=mesh, progress=progress, **given)
    return Built(engine=engine, tokenizer=tokenizer, generation=checkpoint.generation)

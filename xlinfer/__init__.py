"""xlinfer: a JAX/XLA inference compiler for GPU and TPU.

`LLM` answers prompts, `Engine` serves any nnx module in token ids, `load_model` gives a
checkpoint as one. Names are imported when they are first used, so `import xlinfer` is cheap.
"""

import os
from importlib import import_module
from typing import Any

_HOMES = {
    "LLM": "xlinfer.serve.llm",
    "RequestOutput": "xlinfer.serve.text",
    "CompletionOutput": "xlinfer.serve.text",
    "Engine": "xlinfer.engine.engine",
    "Request": "xlinfer.request",
    "TokenOutput": "xlinfer.request",
    "SamplingParams": "xlinfer.request",
    "InvalidRequest": "xlinfer.request",
    "PlanError": "xlinfer.plan",
    "CheckpointError": "converters",
    "load_model": "xlinfer.weights",
    "make_mesh": "xlinfer.mesh",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"
# Where the server and xlinfer.compile both keep compiled programs.
COMPILE_CACHE_DIR = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "xlinfer", "compile")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'xlinfer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]

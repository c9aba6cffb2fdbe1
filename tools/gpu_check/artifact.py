"""Three starts of the engine on Llama-3-8B with random weights, each in a fresh process: with the
programs of an artifact that was compiled elsewhere, with programs compiled here, and with those
found in the compile cache. Each is timed from the process's start to the first token, and answers
the same prompts, greedily.

The weights are made on the device where a replica would read them, and what makes them is traced
and compiled: their time is given apart, and what jax does meanwhile does not count.
"""

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from converters.errors import read_object
from tools.gpu_check.engine import build, dtype_of, model_config
from tools.gpu_check.job import Job, device_here, progress, record
from tools.gpu_check.starts import (
    STARTS,
    compile_command,
    compile_flags,
    model_file,
    sizes,
)
from xlinfer.compile.artifact import (
    ArtifactError,
    Opened,
    load_programs,
    open_artifact,
    read_manifest,
)
from xlinfer.compile.executable import ExecutableError
from xlinfer.compile.store import Store
from xlinfer.deployment import Sizes, paths_of
from xlinfer.engine.engine import Engine
from xlinfer.engine.ready import Ready
from xlinfer.mesh import make_mesh
from xlinfer.plan import PlanError
from xlinfer.request import Request, SamplingParams
from xlinfer.setup import MESH_SIZES
from xlinfer.weights import abstract_model

PROMPTS = (5, 33, 64, 90)  # tokens of each: two steps' worth, so that one is cut
ANSWER = 32
TRACE, COMPILE = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Phases:
    """Seconds of what a process did since it was started, and what jax traced and compiled."""

    def __init__(self, started: float):
        self._at = started
        self._heard: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.heard: dict[str, Counter[str]] = {}
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        self._heard.update([event])

    def end(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._at = now - self._at, now
        self.heard[name], self._heard = self._heard, Counter()

    def count(self, event: str) -> int:
        """But while the weights were made."""
        return sum(heard[event] for name, heard in self.heard.items() if name != "weights")


def main(job: Job) -> None:
    """One of STARTS; in a dry run "compile" too, which writes the artifact."""
    (name,) = job.ops
    if name in STARTS:
        record(start=name, **start(job, name))
    else:
        write(job)


def write(job: Job) -> None:
    # Late: what a start imports is timed.
    from xlinfer.commands.compile import main as compile_command_line

    flags = compile_flags(model_file(True), "cpu", sizes(True), job.artifact)
    flags += [f"--compile_cache_dir={Path(job.scratch) / 'compiled'}", "--processes=1"]
    if code := compile_command_line(["compile", *flags]):
        raise RuntimeError(f"python -m xlinfer.compile {' '.join(flags)} ended with {code}")


def start(job: Job, name: str) -> dict[str, Any]:
    phases = Phases(job.started)
    phases.end("import")
    device_here(job.dry_run)
    mesh = make_mesh(1)
    phases.end("device")
    if name == "artifact":
        try:
            opened = opened_for(job)
            executables = load_programs(opened)
        except (ArtifactError, ExecutableError, PlanError) as error:
            progress(f"artifact: refused: {error}")
            return {"refused": str(error)}
        phases.end("load")
        params = weights(job, dict(zip(opened.paths, opened.params, strict=True)))
        phases.end("weights")
        ready = Ready(
            params=tuple(params[path] for path in opened.paths), paths=opened.paths,
            executables=executables, plan=opened.plan, mesh=opened.mesh,
            vocab_size=opened.manifest["facts"]["vocab_size"],
            attention_impl=opened.manifest["attention_impl"],
            kv_cache_dtype=opened.manifest["kv_cache_dtype"],
            kv_scales=opened.manifest["facts"]["kv_scales"],
        )  # fmt: skip
        engine = Engine.of(ready, enable_prefix_caching=False)
    else:
        model = placed_model(job, mesh)
        phases.end("weights")
        kept = Store(Path(job.scratch) / "kept") if job.scratch else None
        given = sizes(job.dry_run)
        engine = Engine(model, mesh=mesh, kept=kept, enable_prefix_caching=False, **given)
        phases.end("compile")
    answers = generate(engine, phases)
    engine.check()
    phases.end("answers")
    seconds = {phase: s for phase, s in phases.seconds.items() if phase != "answers"}
    found = {
        "seconds": sum(seconds.values()), "phases": seconds,
        "traces": phases.count(TRACE), "compiles": phases.count(COMPILE),
        "attention_impl": engine.attention_impl, "plan": asdict(engine.plan), "answers": answers,
    }  # fmt: skip
    progress(
        f"{name}: first token {found['seconds']:.1f} s after the process started, "
        f"{found['traces']} traces and {found['compiles']} compiles"
    )
    return found


def opened_for(job: Job) -> Opened:
    """The artifact, where it fits what is here and is of what the other starts run. Raises
    ArtifactError, PlanError."""
    path, manifest = read_manifest(job.artifact)
    wanted = {
        "config": read_object(model_file(job.dry_run)),
        "sizes": asdict(Sizes(**sizes(job.dry_run))),
        "dtype": str(np.dtype(dtype_of(job))), **dict.fromkeys(MESH_SIZES, 1), "quantization": None,
    }  # fmt: skip
    setup = manifest.get("setup", {})
    differ = [name for name, value in wanted.items() if setup.get(name) != value]
    if differ:
        raise ArtifactError(
            f"{path} is of another {', '.join(differ)} than what it is compared with; "
            f"{compile_command()} compiles the right one"
        )
    return open_artifact(path, jax.devices())


def placed_model(job: Job, mesh: jax.sharding.Mesh) -> nnx.Module:
    """As a checkpoint is loaded: parameters that lie on a mesh."""
    cfg, device = model_config(job.dry_run), device_here(job.dry_run)
    graph, state = nnx.split(abstract_model(cfg, dtype_of(job), mesh, device))
    paths, (targets, tree) = paths_of(state), jax.tree.flatten(state)
    params = weights(job, dict(zip(paths, targets, strict=True)))
    return nnx.merge(graph, jax.tree.unflatten(tree, [params[path] for path in paths]))


def weights(job: Job, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The engine part's, where `targets` want them."""
    state = nnx.state(build(model_config(job.dry_run), None, job))
    made = dict(zip(paths_of(state), jax.tree.leaves(state), strict=True))
    if {n: (x.shape, x.dtype) for n, x in made.items()} != {
        n: (x.shape, x.dtype) for n, x in targets.items()
    }:
        raise ValueError("the parameters are not those that the programs take")
    placed = {name: jax.device_put(made[name], x.sharding) for name, x in targets.items()}
    return jax.block_until_ready(placed)


def generate(engine: Engine, phases: Phases) -> list[dict[str, list]]:
    """Greedy answers with their log-probabilities; ends the phase at the first token."""
    rng = np.random.default_rng(20)
    sampling = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True, logprobs=2)
    for i, length in enumerate(PROMPTS):
        tokens = tuple(rng.integers(0, engine.vocab_size, length).tolist())
        engine.add_request(Request(request_id=str(i), prompt_token_ids=tokens, sampling=sampling))
    answers = [{"tokens": [], "logprobs": [], "lead": []} for _ in PROMPTS]
    while engine.has_work:
        outputs = engine.step()
        if "first token" not in phases.seconds and any(out.token_ids for out in outputs):
            phases.end("first token")
        for out in outputs:
            answer = answers[int(out.request_id)]
            answer["tokens"] += out.token_ids
            for one in out.logprobs or ():  # the token's, then those of the two best
                answer["logprobs"].append(one.logprobs[0])
                answer["lead"].append(one.logprobs[1] - one.logprobs[2])
    return answers

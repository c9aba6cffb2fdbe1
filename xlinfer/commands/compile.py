"""python -m xlinfer.compile --model=DIR --target=T --output=ARTIFACT: every program that serving
the model on T needs, compiled here, for hardware that need not be here.

Without --weights only config.json is read, and the artifact holds the programs alone.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flax import nnx

import xlinfer
from converters import CheckpointError, open_checkpoint
from xlinfer.commands.flags import define, help_text, parse, setup_of
from xlinfer.compile import Key, title
from xlinfer.compile.artifact import MANIFEST, PARAMETERS, describe, seal, write_programs
from xlinfer.compile.parallel import Compiled, CompileError, compile_in_parallel
from xlinfer.compile.parameters import write_parameters
from xlinfer.compile.store import Store, check_private
from xlinfer.converted import copy_beside
from xlinfer.deployment import Deployment, paths_of
from xlinfer.flags import UsageError, show
from xlinfer.progress import Progress, show_progress
from xlinfer.setup import Setup, cpu_mesh, deployment_for
from xlinfer.weights import load_model

FAILED, MISUSED = 1, 2  # exit codes
MEMORY_PER_PROCESS = 3 << 30  # bytes, generously: jax, a compiler and one large program


def main(argv: Sequence[str]) -> int:
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_string("output", None, "Directory to write; must not exist.", flag_values=values)
    flags.DEFINE_bool(
        "weights", False, "Write the weights too, so that the artifact is all a replica needs.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "compile_cache_dir", xlinfer.COMPILE_CACHE_DIR,
        "Where compiled programs are kept: an interrupted command goes on from there.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "processes", None, "Compilers at once; by default one for each core and 3 GiB of memory.",
        lower_bound=1, flag_values=values,
    )  # fmt: skip
    try:
        parse(values, argv, required=("model", "target", "output"))
    except UsageError as error:
        print(f"xlinfer.compile: {error}", file=sys.stderr)
        return MISUSED
    if values.help:
        show(f"{__doc__}\n{help_text(values)}")
        return 0
    try:
        setup = setup_of(values)
        output = Path(values.output).expanduser().absolute()
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"--output={output} is not empty; give a new directory")
        if values.weights and Path(values.model).expanduser().is_file():
            raise ValueError("--weights needs the folder of a checkpoint as --model")
        jax.config.update("jax_platforms", "cpu")
        if jax.config.jax_num_cpu_devices < setup.devices:  # for the weights
            jax.config.update("jax_num_cpu_devices", setup.devices)
        report = compile_artifact(
            setup,
            values.model,
            output,
            cache=Path(values.compile_cache_dir).expanduser(),
            processes=values.processes or default_processes(),
            weights=values.weights,
            text_only=values.text_only,
        )
    except (CompileError, CheckpointError, ValueError, OSError, MemoryError) as error:
        print(f"xlinfer.compile: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("xlinfer.compile: interrupted; the same command goes on from here", file=sys.stderr)
        return FAILED
    print(report)
    return 0


def compile_artifact(
    setup: Setup, model: str, output: Path, *, cache: Path, processes: int, weights: bool,
    text_only: bool,
) -> str:  # fmt: skip
    """Write the artifact at `output`, whole or not at all; a report in a few lines."""
    started, kept = time.monotonic(), Store(cache)
    output.parent.mkdir(parents=True, exist_ok=True)
    deployment = deployment_for(setup)
    jobs = list(deployment.jobs())
    with show_progress() as progress:
        done = compile_in_parallel(
            setup.as_json(), longest_first(jobs), cache, processes=processes,
            cpu_devices=setup.devices, progress=progress,
        )  # fmt: skip
        digests = {key: done[key].digest for key in jobs}
        manifest = describe(deployment, setup.as_json(), digests)
        draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            write_programs(draft, manifest, kept)
            measured = measure(deployment, manifest, kept)
            manifest["measured"] = measured
            if weights:
                write_weights(draft, setup, model, deployment, progress, text_only=text_only)
            seal(draft, manifest)
            draft.chmod(0o755)
            draft.rename(output)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    check_private(output / MANIFEST, "artifact")
    return summary(output, setup, deployment, done, measured, time.monotonic() - started)


def longest_first(keys: Sequence[Key]) -> list[Key]:
    """So that no compiler is left alone with a long one: decode with its sampler, large buckets."""
    order = ("decode", "sample", "forward")
    rank = lambda key: (order.index(key[0]) if key[0] in order else len(order), -key[1])
    return sorted(keys, key=rank)


def write_weights(
    draft: Path, setup: Setup, model: str, deployment: Deployment, progress: Progress,
    *, text_only: bool,
) -> None:  # fmt: skip
    """The parameters as the programs take them, and what stands beside them in the checkpoint."""
    mesh = cpu_mesh(setup)
    loaded = load_model(
        model, dtype=setup.dtype, mesh=mesh, quantization=setup.quantization, text_only=text_only,
        progress=progress,
    )  # fmt: skip
    state = nnx.state(loaded)
    arrays = dict(zip(paths_of(state), jax.tree.leaves(state), strict=True))
    wanted = dict(zip(deployment.paths, deployment.params, strict=True))
    if {n: (a.shape, a.dtype) for n, a in arrays.items()} != {
        n: (p.shape, p.dtype) for n, p in wanted.items()
    }:
        raise ValueError(f"--model={model}: its weights are not those of its config.json")
    write_parameters(draft / PARAMETERS, arrays)
    copy_beside(open_checkpoint(model, text_only=text_only), draft)


def measure(deployment: Deployment, manifest: dict[str, Any], kept: Store) -> dict[str, Any]:
    """What XLA says of memory, beside what was planned: bytes of one device."""
    memory, plan = deployment.memory, deployment.plan
    planned = memory.weight_bytes + memory.slot_bytes + memory.page_bytes * plan.num_pages
    found = {}
    for name, program in manifest["programs"].items():
        stored = kept.read(program["digest"])
        if stored is not None and name.startswith(("forward", "decode")):
            found[name] = stored.description["memory"]
    return {
        "arguments_planned": planned,
        "arguments": max(m["arguments"] for m in found.values()),
        "temporaries_planned": memory.temporary_bytes,
        "temporaries": max(m["temporaries"] for m in found.values()),
        "code": sum(m["code"] for m in found.values()),
    }


def summary(
    output: Path, setup: Setup, deployment: Deployment, done: dict[Key, Compiled],
    measured: dict[str, Any], seconds: float,
) -> str:  # fmt: skip
    hits = sum(compiled.hit for compiled in done.values())
    slowest = max(done, key=lambda key: done[key].seconds)
    gib = lambda n: f"{n / 2**30:.2f} GiB"
    total = measured["arguments"] + measured["temporaries"]
    planned = measured["arguments_planned"] + measured["temporaries_planned"]
    size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    return "\n".join(
        (
            f"{output}: {len(done)} programs for {setup.target}, {hits} of them compiled before,"
            f" in {seconds:.0f} s; {size / 2**20:.0f} MiB on disk",
            f"  the slowest: {title(slowest)}, {done[slowest].seconds:.0f} s",
            f"  of each device: {gib(total)}, planned {gib(planned)}"
            f" ({100 * (total / planned - 1):+.1f} %); temporaries {gib(measured['temporaries'])},"
            f" planned {gib(measured['temporaries_planned'])}",
            f"  python -m xlinfer.inspect {output} shows each program",
        )
    )


def default_processes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, memory // MEMORY_PER_PROCESS))

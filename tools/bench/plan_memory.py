"""Memory as xlinfer.plan counts it against XLA's memory_analysis, for models and targets.

The largest forward and the largest decode program of each are compiled, for devices that need not
be here. `weights_and_kv` is the plan's part of a program's arguments over all of XLA's;
`total` adds the temporaries on both sides. Writes docs/plan_memory.md.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from xlinfer.compile.parallel import compile_in_parallel
from xlinfer.compile.store import Store
from xlinfer.deployment import Sizes
from xlinfer.setup import deployment_of, find_target, setup, shapes_for

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "data" / "configs"
COMPILERS = Path(sys.prefix) / "compilers"  # where ./run puts them
TABLE = ROOT / "docs" / "plan_memory.md"
SIZES = Sizes(max_model_len=8192, max_num_seqs=64)


class Pair(NamedTuple):
    model: str
    target: str
    tensor: int
    quantization: str | None = None


PAIRS = (
    Pair("llama-3.1-8b", "h100", 1),
    Pair("llama-3.1-8b", "h200", 1),
    Pair("llama-3.1-8b", "h200", 1, "int4"),
    Pair("llama-3.1-8b", "v5e-8", 8),
    Pair("llama-3.1-8b", "v5p-4", 4),
    Pair("llama-3.1-8b", "v6e-1", 1),
    Pair("llama-3.1-8b", "v6e-1", 1, "int8"),
    Pair("llama-3.1-8b", "tpu7x-1", 2),
    Pair("llama-3.1-70b", "v5e-16", 16),
    Pair("llama-3.1-70b", "v6e-8", 8),
    Pair("qwen3-30b-a3b", "h200", 1),
    Pair("qwen3-30b-a3b", "v6e-8", 8),
    Pair("llama-256-heads", "v5e-256", 256),  # 405B's width: none that is published has as many
)


def main() -> dict[str, Any]:
    if not COMPILERS.is_dir():
        raise FileNotFoundError(f"{COMPILERS} has no compilers; ./run aot --help installs them")
    sys.path.append(str(COMPILERS))
    os.environ["PYTHONPATH"] = str(COMPILERS)
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o700)
        found = {}
        for pair in PAIRS:
            name = " ".join(str(part) for part in pair if part is not None)
            found[name] = measure(pair, Path(directory))
            print(f"  {name}: {found[name]}", flush=True)
    TABLE.write_text(table(found))
    return found


def measure(pair: Pair, directory: Path) -> dict[str, float]:
    """Bytes of one device, planned and as XLA says."""
    asked = setup(
        CONFIGS / f"{pair.model}.json", pair.target, text_only=False,
        tensor_parallel_size=pair.tensor, dtype="auto",
        quantization=pair.quantization, matmul_impl=None, sizes=SIZES,
    )  # fmt: skip
    shapes = shapes_for(asked, planned_for=find_target(pair.target))
    planned = deployment_of(shapes, asked.sizes)
    plan, memory = planned.plan, planned.memory
    keys = [("decode", plan.decode_buckets[-1]), ("forward", plan.token_buckets[-1])]
    done = compile_in_parallel(
        asked.as_json(), keys, directory, processes=2, cpu_devices=1, progress=None
    )
    kept = Store(directory)
    analyses = []
    for compiled in done.values():
        stored = kept.read(compiled.digest)
        assert stored is not None
        analyses.append(stored.description["memory"])
    arguments = max(a["arguments"] for a in analyses)
    temporaries = max(a["temporaries"] for a in analyses)
    weights_and_kv = memory.weight_bytes + memory.page_bytes * plan.num_pages
    fixed = weights_and_kv + memory.slot_bytes
    return {
        "weights_and_kv_planned": weights_and_kv,
        "arguments": arguments,
        "weights_and_kv_ratio": weights_and_kv / (arguments - memory.slot_bytes),
        "temporaries_planned": memory.temporary_bytes,
        "temporaries": temporaries,
        "total_ratio": (fixed + memory.temporary_bytes) / (arguments + temporaries),
    }


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    gib = lambda n: f"{n / 2**30:.2f}"
    off = lambda ratio: f"{round(100 * (ratio - 1), 1) + 0.0:+.1f} %"
    rows = [
        f"| {name} | {gib(m['weights_and_kv_planned'])} | {off(m['weights_and_kv_ratio'])} "
        f"| {gib(m['temporaries_planned'])} | {gib(m['temporaries'])} | {off(m['total_ratio'])} |"
        for name, m in found.items()
    ]
    return "\n".join(
        (
            "# The plan's memory against XLA's",
            "",
            "GiB of one device, max_model_len 8192 and max_num_seqs 64, hbm_utilization 0.9, as "
            "`./run bench plan_memory` compiled and wrote it. The deviations are of the plan from "
            "`memory_analysis()`.",
            "",
            "| model, target, devices | weights + KV planned | deviates | temporaries planned | "
            "temporaries | total deviates |",
            "|---|--:|--:|--:|--:|--:|",
            *rows,
            "",
        )
    )

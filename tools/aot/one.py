"""`python -m tools.aot.one OP CASE IMPL DEVICE`: one compile; its report as the last line, JSON.

A process of its own, because a compiler may abort the process it runs in.
"""

import importlib
import json
import re
import sys
import time
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.devices import DEVICES
from xlinfer.topology import described_mesh, lower


def compile_case(op: str, case_name: str, impl: str, device_name: str) -> dict[str, Any]:
    """Bytes, flops and seconds as the compilers report them; absent where they report none."""
    cases = importlib.import_module(f"pallas_kernels.{op}.cases")
    case = next(c for c in (*cases.MODEL_CASES, *cases.CASES) if c.name == case_name)
    device = DEVICES[device_name]
    mesh = described_mesh(device)
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(lambda key: cases.inputs(case, key, impl), jax.random.key(0))
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tuple(shapes)
    )
    donated = getattr(cases, "DONATED", ())
    started = time.perf_counter()
    lowered = lower(cases.call(case, impl, device), args, device, mesh, donate_argnums=donated)
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    memory, estimates = compiled.memory_analysis(), kernel_estimates(compiled.as_text() or "")
    assert memory is not None
    work = cases.work(case)
    return {
        "seconds": seconds,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        **estimates,
        "work": work._asdict(),
    }


def kernel_estimates(hlo: str) -> dict[str, int]:
    """What the TPU kernels of a compiled program say they cost, summed over its custom calls: a
    program's `cost_analysis` adds what XLA does around them."""
    found = re.findall(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', hlo)
    return {
        "flops": sum(int(flops) for flops, _ in found),
        "bytes": sum(int(bytes_) for _, bytes_ in found),
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    print(json.dumps(compile_case(*sys.argv[1:])))

"""Runs an op's kernel in interpret mode: random inputs, poisoned memory, races detected."""

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as gpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cases import widened
from pallas_kernels.devices import DEVICES, Impl

# Largest error over the largest value of the float32 reference, by the dtype of what is judged.
TOLERANCE = {
    # 8 bits of mantissa: one rounding of the output is up to 2^-9 = 2e-3 of the value, and the
    # softmax's probabilities are rounded once more before their product with v.
    jnp.dtype(jnp.bfloat16): 5e-3,
    # Kernels round q, k, v or p to the 16-bit type of their matrix unit: as bfloat16 or better.
    jnp.dtype(jnp.float16): 5e-3,
    # float32 throughout; sums run in another order.
    jnp.dtype(jnp.float32): 1e-5,
}

GPU = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
TPU = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait"
)
# For what runs once: LLVM's effort would cost more than it saves.
once = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
DEVICE_OF = {"mosaic_gpu": DEVICES["h200"], "mosaic_tpu": DEVICES["v6e"]}


def check_case(op: str, case, impl: Impl, key: jax.Array, *, device=None, view=None) -> None:
    """The kernel equals the op's reference, computed in float32, on `case`, without a race.
    `view(case, output)` is what of an output is compared; None: all of it."""
    cases = import_module(f"pallas_kernels.{op}.cases")
    device = device or DEVICE_OF[impl]
    assert impl in cases.impls(case, device), f"{op} {case.name} does not run as {impl}"
    run = jax.jit(cases.call(case, "reference", DEVICES["cpu"]))
    want = run(*widened(cases.inputs(case, key, "reference")))
    interpret = GPU if impl == "mosaic_gpu" else TPU
    try:
        run = once(cases.call(case, impl, device, interpret=interpret))
        got = jax.block_until_ready(run(*cases.inputs(case, key, impl)))
    except BaseException:
        plgpu_reset() if impl == "mosaic_gpu" else pltpu.reset_tpu_interpret_mode_state()
        raise
    assert_close(*(view(case, x) if view else x for x in (got, want)))
    found = gpu_interpreter.get_races() if impl == "mosaic_gpu" else tpu_interpreter.races
    assert found is not None and not found.races_found, f"{op} {case.name} as {impl}: a race"


def plgpu_reset() -> None:
    gpu_interpreter.reset_gpu_interpret_mode_state()


def assert_close(got, want) -> None:
    """Every output's error is within its dtype's tolerance; NaN anywhere fails."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and w.dtype in (g.dtype, jnp.float32)
        g_, w_ = (np.asarray(x, np.float32) for x in (g, w))
        assert np.isfinite(w_).all(), "the reference itself is not finite"
        assert np.isfinite(g_).all(), "something poisoned was read, or an output never written"
        error = np.abs(g_ - w_).max() / max(np.abs(w_).max(), 1e-30)
        limit = TOLERANCE[jnp.dtype(g.dtype)]
        assert error <= limit, f"relative error {error:.2e}, at most {limit:.0e}"

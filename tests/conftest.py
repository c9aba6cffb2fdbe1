"""Every test sees four CPU devices, strict promotion of dtypes and ranks, and no compile cache."""

import gc
import os

# Tests that need an accelerator say so: JAX_PLATFORMS=cuda,cpu ./run test -m accelerator
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a network

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)  # sharding is tested on every machine
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", None)  # tests count compiles

# A loaded machine is not a bug: hypothesis sets no time limit on an example.
hypothesis.settings.register_profile("xlinfer", parent=hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("xlinfer")


@pytest.fixture(autouse=True, scope="module")
def release_programs():
    """A process may have 65,530 memory maps, and each program that XLA compiled for the CPU has
    several: with the programs of all files, LLVM aborts."""
    yield
    gc.collect()
    jax.clear_caches()


@pytest.fixture
def keys():
    """An endless supply of distinct PRNG keys: `next(keys)`."""
    return (jax.random.key(i) for i in range(1 << 20))

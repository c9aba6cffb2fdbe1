import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import Pages, Ragged, reference, write_and_attend
from pallas_kernels.paged_attention.cases import CASES, make_inputs, num_decodes
from xlinfer.kvcache import FULL

# float32: sums in another order, over at most 400 terms of size 1.
# bfloat16: the output's own rounding.
ATOL = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


def run(case, inputs, **changes):
    q, k, v, kc, vc, page_T, slot_T, ragged = inputs
    options = {"window": case.window or FULL, "scale": case.H**-0.5, "impl": "reference"}
    options["decode_only"] = num_decodes(case) == len(case.queries)
    options |= changes
    return write_and_attend(
        q, k, v, Pages(kc, vc), jnp.int32(1), page_T, slot_T, Ragged(*ragged), **options
    )


@pytest.mark.parametrize("dtype", ATOL, ids=lambda d: d.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_blocks_equal_the_definition(case, dtype, keys):
    inputs = make_inputs(case, next(keys), dtype)
    got, pages = run(case, inputs)
    want = reference.definition(
        inputs[0], *pages, jnp.int32(1), *inputs[-1],
        window=case.window or FULL, scale=case.H**-0.5,
    )  # fmt: skip
    tokens = sum(case.queries)
    got, want = (np.asarray(x[:tokens], np.float32) for x in (got, want))
    np.testing.assert_allclose(got, want, atol=ATOL[dtype], rtol=0)
    assert np.abs(want).max() < 10  # nothing poisoned was read


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_decode_rows_may_go_the_prefill_way(case, keys):
    """With num_decodes = 0 every row is a prefill row: what deterministic serving relies on."""
    inputs = make_inputs(case, next(keys))
    want, _ = run(case, inputs)
    ragged = (*inputs[-1][:3], jnp.int32(0), inputs[-1][4])
    got, _ = run(case, (*inputs[:-1], ragged), decode_only=False)
    tokens = sum(case.queries)
    np.testing.assert_allclose(got[:tokens], want[:tokens], atol=ATOL[jnp.float32], rtol=0)


def test_a_row_does_not_see_its_neighbours(keys):
    """Bit for bit: other rows' lengths, queries and pages change nothing."""
    case = next(c for c in CASES if c.name == "decode_many")
    inputs = make_inputs(case, next(keys))
    q, k, v, kc, vc, page_T, slot_T, ragged = inputs
    want, _ = run(case, inputs)
    others = np.r_[0:3, 4 : len(case.queries)]
    lengths = np.asarray(ragged[1]).copy()
    lengths[others] = np.maximum(lengths[others] // 3, 1)
    q = q.at[others].set(-q[others])
    got, _ = run(
        case, (q, k, v, kc, vc, page_T, slot_T, (ragged[0], jnp.asarray(lengths), *ragged[2:]))
    )
    np.testing.assert_array_equal(got[3], want[3])
    assert not np.array_equal(got[4], want[4])


def test_the_cache_is_updated_in_place(keys):
    """Compiled for a cache far larger than the step: nothing of its size is copied."""
    case = next(c for c in CASES if c.name == "mixed")
    q, k, v, kc, _, page_T, slot_T, ragged = make_inputs(case, next(keys))
    big = jax.ShapeDtypeStruct((16, 4096, *kc.shape[2:]), kc.dtype)
    step = lambda kc, vc: run(case, (q, k, v, kc, vc, page_T, slot_T, ragged))
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(big, big).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == 2 * big.size * 4
    assert memory.temp_size_in_bytes < 0.01 * big.size * 4

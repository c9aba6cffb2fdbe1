import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.reach import into_chunk, most, oldest


@pytest.mark.parametrize("size", [None, 1, 7, 8, 50])
@pytest.mark.parametrize("window", [None, 1, 5, 50])
def test_the_oldest_key_is_the_first_that_the_mask_shows(window, size):
    pos = np.arange(30)
    seen = pos[:, None] >= pos
    if window is not None:
        seen &= pos[:, None] - pos < window
    if size is not None:
        seen &= pos[:, None] // size == pos // size
        np.testing.assert_array_equal(into_chunk(jnp.asarray(pos), size), pos % size)
    np.testing.assert_array_equal(oldest(jnp.asarray(pos), window, size), seen.argmax(1))
    bound = most(window, size)
    assert bound is None or seen.sum(1).max() <= bound


def test_no_token_sees_nothing():
    """The position of the last token of an empty row."""
    assert [int(oldest(jnp.int32(-1), *reach)) for reach in ((3, None), (None, 8), (3, 7))] == [
        0
    ] * 3

"""ALiBi's slopes, against the published lists (arXiv 2108.12409, and the code beside it)."""

import numpy as np
import pytest

from xlinfer.models.parts import alibi_slopes


@pytest.mark.parametrize(
    "heads, want",
    [
        (1, [2**-8]),
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (8, [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8]),
        (12, [*(2.0**-i for i in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
    ],
)
def test_slopes(heads, want):
    np.testing.assert_allclose(alibi_slopes(heads), want, rtol=1e-6)

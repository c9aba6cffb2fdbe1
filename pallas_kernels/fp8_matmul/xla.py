"""Per-tensor and per-channel FP8 products, left to XLA: it has them fused.

On Hopper weights [N, K] are what `__cublas$lt$matmul$f8` takes as they lie. Both scales follow
the product in one pass, on its float32 result: cuBLASLt itself takes one scale a matrix.
Where a chip has no fp8 matrix unit, XLA widens tiles of the weights inside the product.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.fp8_matmul.reference import quantize


def matmul(x_MK, w_NK, w_scale, x_scale):
    q_MK, scale_MG = quantize(x_MK, w_scale, x_scale)
    y_MN = lax.dot_general(
        q_MK, w_NK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )  # fmt: skip
    return (y_MN * scale_MG * w_scale.reshape(1, -1)).astype(x_MK.dtype)

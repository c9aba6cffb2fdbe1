"""Per-tensor and per-channel FP8 products, left to XLA: it has them fused.

On Hopper weights [N, K] are what `__cublas$lt$matmul$f8` takes as they lie. Both scales follow
the product in one pass, on its float32 result: cuBLASLt itself takes one scale a matrix.
Where a chip has no fp8 matrix unit, XLA widens tiles of the weights inside the product.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.fp8_matmul.reference import dequantize, quantize


def matmul(x_MK, w_NK, w_scale, x_scale):
    q_MK, scale_MG = quantize(x_MK, w_scale, x_scale)
    return (_dot(q_MK, w_NK) * scale_MG * w_scale.reshape(1, -1)).astype(x_MK.dtype)


def float_activations(x_MK, w_NK, w_scale):
    """x's dtype holds every e4m3 number, so that its product needs no scaled weights."""
    if w_scale.ndim == 2:
        return _dot(x_MK, dequantize(w_NK, w_scale).astype(x_MK.dtype)).astype(x_MK.dtype)
    return (_dot(x_MK, w_NK.astype(x_MK.dtype)) * w_scale.reshape(1, -1)).astype(x_MK.dtype)


def _dot(a_MK, b_NK):
    contract_last = (((1,), (1,)), ((), ()))
    return lax.dot_general(a_MK, b_NK, contract_last, preferred_element_type=jnp.float32)

"""The blocks that families are built from.

B rows  T tokens per row  D hidden  F ffw hidden  N query heads  K kv heads  H head_dim
D_NH: an axis of D, and one of N x H
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from xlinfer.config import ModelConfig
from xlinfer.kvcache import KV, Attend
from xlinfer.models.rope import Angles, rotate
from xlinfer.quant import product

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def weight(
    rngs: nnx.Rngs, dtype, axes: tuple[str | None, ...], *shape: int, **metadata
) -> nnx.Param:
    """A weight whose logical `axes` (see mesh.py) decide its sharding; None is never split."""
    init = nnx.initializers.normal(0.02)
    return nnx.Param(init(rngs.params(), shape, dtype), logical_axes=axes, **metadata)


def matrix(rngs: nnx.Rngs, dtype, axes: tuple[str, str], inputs: int, outputs: int) -> nnx.Param:
    """What `quant.product` multiplies by, and so may be quantized. Heads and head_dim are one
    axis: XLA:TPU would lay out three anew at every call (docs/LOG.md)."""
    return weight(rngs, dtype, axes, inputs, outputs, is_matrix=True)


def bias(dtype, axes: tuple[str, ...], *shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype), logical_axes=axes)


class RMSNorm(nnx.Module):
    def __init__(self, size: int, axis: str, eps: float, *, dtype):
        self.scale_D = nnx.Param(jnp.ones((size,), dtype), logical_axes=(axis,))
        self.eps = eps

    def __call__(self, x):
        """Normalizes the last axis; float32 inside, since bf16 squares lose the norm."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        scale = self.scale_D[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return y.astype(x.dtype) * scale


class Attention(nnx.Module):
    def __init__(self, cfg: ModelConfig, *, dtype, rngs: nnx.Rngs):
        D, N, K, H = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.q_D_NH = matrix(rngs, dtype, ("hidden", "heads"), D, N * H)
        self.k_D_KH = matrix(rngs, dtype, ("hidden", "kv_heads"), D, K * H)
        self.v_D_KH = matrix(rngs, dtype, ("hidden", "kv_heads"), D, K * H)
        self.o_NH_D = matrix(rngs, dtype, ("heads", "hidden"), N * H, D)
        if cfg.qkv_bias:
            self.q_bias_NH = bias(dtype, ("heads", "head_dim"), N, H)
            self.k_bias_KH = bias(dtype, ("kv_heads", "head_dim"), K, H)
            self.v_bias_KH = bias(dtype, ("kv_heads", "head_dim"), K, H)
        if cfg.attention_output_bias:
            self.o_bias_D = bias(dtype, ("hidden",), D)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(H, "head_dim", cfg.norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(H, "head_dim", cfg.norm_eps, dtype=dtype)
        self.cfg = cfg

    def __call__(self, x_BTD, angles: Angles, attend: Attend, kv: KV, *, layer, window):
        # Without the barrier XLA:TPU carries the layout that heads ask for back to the weights,
        # and copies all layers' at every call (docs/LOG.md).
        by_head = lambda x: jax.lax.optimization_barrier(x).reshape(
            *x.shape[:2], -1, self.cfg.head_dim
        )
        q_BTNH = by_head(product(x_BTD, self.q_D_NH))
        k_BTKH = by_head(product(x_BTD, self.k_D_KH))
        v_BTKH = by_head(product(x_BTD, self.v_D_KH))
        if self.cfg.qkv_bias:
            q_BTNH += self.q_bias_NH[...][None, None]
            k_BTKH += self.k_bias_KH[...][None, None]
            v_BTKH += self.v_bias_KH[...][None, None]
        if self.cfg.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH, k_BTKH = rotate(q_BTNH, angles), rotate(k_BTKH, angles)
        scale = self.cfg.head_dim**-0.5
        o_BTNH, kv = attend(q_BTNH, k_BTKH, v_BTKH, kv, layer=layer, window=window, scale=scale)
        y_BTD = product(o_BTNH.reshape(*x_BTD.shape[:2], -1), self.o_NH_D)
        if self.cfg.attention_output_bias:
            y_BTD += self.o_bias_D[...][None, None]
        return y_BTD, kv


class MLP(nnx.Module):
    def __init__(self, cfg: ModelConfig, F: int, *, dtype, rngs: nnx.Rngs):
        D = cfg.hidden_size
        self.gate_DF = matrix(rngs, dtype, ("hidden", "ffw"), D, F)
        self.up_DF = matrix(rngs, dtype, ("hidden", "ffw"), D, F)
        self.down_FD = matrix(rngs, dtype, ("ffw", "hidden"), F, D)
        if cfg.mlp_bias:
            self.gate_bias_F = bias(dtype, ("ffw",), F)
            self.up_bias_F = bias(dtype, ("ffw",), F)
            self.down_bias_D = bias(dtype, ("hidden",), D)
        self.cfg = cfg

    def __call__(self, x_BTD):
        gate_BTF, up_BTF = product(x_BTD, self.gate_DF), product(x_BTD, self.up_DF)
        if self.cfg.mlp_bias:
            gate_BTF += self.gate_bias_F[...][None, None]
            up_BTF += self.up_bias_F[...][None, None]
        y_BTD = product(ACTIVATIONS[self.cfg.hidden_act](gate_BTF) * up_BTF, self.down_FD)
        return y_BTD + self.down_bias_D[...][None, None] if self.cfg.mlp_bias else y_BTD

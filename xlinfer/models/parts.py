"""The blocks that families are built from.

B rows  T tokens per row  D hidden  F ffw hidden  N query heads  K kv heads  H head_dim
D_NH: an axis of D, and one of N x H
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from xlinfer.config import Activation, ClampedSwiGLU, ModelConfig
from xlinfer.kvcache import KV, Attend, Scales
from xlinfer.models.rope import Positions, rotate
from xlinfer.quant import QTensor, product

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def activate(act: Activation, gate: Array | None, up: Array) -> Array:
    """What goes into an MLP's last product, of any shape; without a gate, `up` is activated."""
    if isinstance(act, ClampedSwiGLU):
        assert gate is not None
        gate, up = jnp.minimum(gate, act.limit), jnp.clip(up, -act.limit, act.limit)
        return gate * jax.nn.sigmoid(act.alpha * gate) * (up + 1)
    return ACTIVATIONS[act](up) if gate is None else ACTIVATIONS[act](gate) * up


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


def kv_scale(num_kv_heads: int) -> nnx.Param:
    """Float32 whatever the weights are: what is rounded by it is compared to the last bit."""
    return nnx.Param(jnp.ones(num_kv_heads, jnp.float32), logical_axes=("kv_heads",))


def unit_rms(x: Array, eps: float) -> Array:
    """x over the root of its mean square along the last axis, float32: bf16 squares lose it."""
    y = x.astype(jnp.float32)
    return y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """With `offset` the weight is 1 + scale, in float32: bf16 has few numbers near 1."""

    def __init__(self, size: int, axis: str, eps: float, *, offset: bool, dtype):
        init = jnp.zeros if offset else jnp.ones
        self.scale_D = nnx.Param(init((size,), dtype), logical_axes=(axis,))
        self.eps, self.offset = eps, offset

    def __call__(self, x):
        """Normalizes the last axis."""
        y = unit_rms(x, self.eps)
        scale = along_last(self.scale_D, x)
        if self.offset:
            return (y * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        return y.astype(x.dtype) * scale


class LayerNorm(nnx.Module):
    def __init__(self, size: int, axis: str, eps: float, *, dtype):
        self.scale_D = nnx.Param(jnp.ones((size,), dtype), logical_axes=(axis,))
        self.bias_D = bias(dtype, (axis,), size)
        self.eps = eps

    def __call__(self, x):
        """Normalizes the last axis, in float32."""
        y = x.astype(jnp.float32)
        y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        scale, shift = (along_last(p, x).astype(jnp.float32) for p in (self.scale_D, self.bias_D))
        return (y * scale + shift).astype(x.dtype)


def along_last(param: nnx.Param, x: Array) -> Array:
    """A vector with as many axes as x, to be multiplied with or added to it."""
    return param[...].reshape((1,) * (x.ndim - 1) + (-1,))


def hidden_norm(cfg: ModelConfig, dtype) -> RMSNorm | LayerNorm:
    """The kind of norm that the family has, over D."""
    if cfg.norm == "layer":
        return LayerNorm(cfg.hidden_size, "hidden", cfg.norm_eps, dtype=dtype)
    return rms_norm(cfg, cfg.hidden_size, "hidden", dtype)


def rms_norm(cfg: ModelConfig, size: int, axis: str, dtype) -> RMSNorm:
    return RMSNorm(size, axis, cfg.norm_eps, offset=cfg.norm == "rms_offset", dtype=dtype)


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
        if cfg.qk_norm == "head":
            self.q_norm = rms_norm(cfg, H, "head_dim", dtype)
            self.k_norm = rms_norm(cfg, H, "head_dim", dtype)
        if cfg.qk_norm == "all":
            self.q_norm = rms_norm(cfg, N * H, "heads", dtype)
            self.k_norm = rms_norm(cfg, K * H, "kv_heads", dtype)
        if cfg.sinks:
            self.sinks_N = bias(dtype, ("heads",), N)
        if cfg.kv_scales:
            self.k_scale_K = kv_scale(K)
            self.v_scale_K = kv_scale(K)
        self.cfg = cfg

    def __call__(
        self, x_BTD, positions: Positions, attend: Attend, kv: KV, *, layer, window,
        attention_chunk_size: int | None = None,
    ):  # fmt: skip
        cfg = self.cfg
        q_BTNH, (k_BTKH, v_BTKH) = self.queries(x_BTD), self.keys_values(x_BTD)
        if cfg.qk_norm == "head":
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if cfg.qk_norm == "all":
            together = lambda norm, x: norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
            q_BTNH, k_BTKH = together(self.q_norm, q_BTNH), together(self.k_norm, k_BTKH)
        if positions.angles is not None:
            turn = partial(rotate, angles=positions.angles, interleaved=cfg.rope_interleaved)
            q_BTNH, k_BTKH = turn(q_BTNH), turn(k_BTKH)
            if cfg.qk_norm == "after_rope":
                unit = lambda x: unit_rms(x, cfg.norm_eps).astype(x.dtype)
                q_BTNH, k_BTKH = unit(q_BTNH), unit(k_BTKH)
        if (temperature_BT := positions.temperature_BT) is not None:
            scaled_BTNH = q_BTNH.astype(jnp.float32) * temperature_BT[..., None, None]
            q_BTNH = scaled_BTNH.astype(q_BTNH.dtype)
        o_BTNH, kv = attend(
            q_BTNH, k_BTKH, v_BTKH, kv, layer=layer, window=window,
            attention_chunk_size=attention_chunk_size, scale=cfg.attention_scale,
            softcap=cfg.attention_softcap,
            sinks_N=self.sinks_N[...].astype(jnp.float32) if cfg.sinks else None,
            alibi_N=self._slopes(),
            kv_scales=Scales(self.k_scale_K[...], self.v_scale_K[...]) if cfg.kv_scales else None,
        )  # fmt: skip
        return self.output(o_BTNH), kv

    def queries(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        q_BTNH = self._by_head(product(x_BTD, self.q_D_NH))
        return q_BTNH + self.q_bias_NH[...][None, None] if self.cfg.qkv_bias else q_BTNH

    def keys_values(
        self, x_BTD: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        k_BTKH = self._by_head(product(x_BTD, self.k_D_KH))
        v_BTKH = self._by_head(product(x_BTD, self.v_D_KH))
        if self.cfg.qkv_bias:
            k_BTKH += self.k_bias_KH[...][None, None]
            v_BTKH += self.v_bias_KH[...][None, None]
        return k_BTKH, v_BTKH

    def output(self, o_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        y_BTD = product(o_BTNH.reshape(*o_BTNH.shape[:2], -1), self.o_NH_D)
        return y_BTD + self.o_bias_D[...][None, None] if self.cfg.attention_output_bias else y_BTD

    def _by_head(self, x):
        # Without the barrier XLA:TPU carries the layout that heads ask for back to the weights,
        # and copies all layers' at every call (docs/LOG.md).
        return jax.lax.optimization_barrier(x).reshape(*x.shape[:2], -1, self.cfg.head_dim)

    def _slopes(self) -> Float[Array, " N"] | None:
        if (scale := self.cfg.alibi_scale) is None:
            return None
        return alibi_slopes(self.cfg.num_heads) * scale


def alibi_slopes(num_heads: int) -> Float[Array, " N"]:
    """Powers of 2^(-8/n) for n heads; where n is no power of two, those of the one below it and
    then every other one of the next (arXiv 2108.12409, and the code published with it)."""
    below = 2 ** (num_heads.bit_length() - 1)
    exponents = [8 * i / below for i in range(1, below + 1)]
    exponents += [4 * i / below for i in range(1, 2 * (num_heads - below), 2)]
    return jnp.asarray([2.0**-e for e in exponents], jnp.float32)


class MLP(nnx.Module):
    def __init__(self, cfg: ModelConfig, F: int, *, dtype, rngs: nnx.Rngs):
        D = cfg.hidden_size
        if cfg.gated_mlp:
            self.gate_DF = matrix(rngs, dtype, ("hidden", "ffw"), D, F)
        self.up_DF = matrix(rngs, dtype, ("hidden", "ffw"), D, F)
        self.down_FD = matrix(rngs, dtype, ("ffw", "hidden"), F, D)
        if cfg.mlp_bias:
            if cfg.gated_mlp:
                self.gate_bias_F = bias(dtype, ("ffw",), F)
            self.up_bias_F = bias(dtype, ("ffw",), F)
            self.down_bias_D = bias(dtype, ("hidden",), D)
        self.cfg = cfg

    def __call__(self, x_BTD):
        biased, gate_BTF = self.cfg.mlp_bias, None
        if self.cfg.gated_mlp:
            gate_BTF = product(x_BTD, self.gate_DF)
            if biased:
                gate_BTF += self.gate_bias_F[...][None, None]
        up_BTF = product(x_BTD, self.up_DF)
        if biased:
            up_BTF += self.up_bias_F[...][None, None]
        y_BTD = product(activate(self.cfg.hidden_act, gate_BTF, up_BTF), self.down_FD)
        return y_BTD + self.down_bias_D[...][None, None] if biased else y_BTD


def token_logits(model: Any, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Float32 scores by the head of `model`, which is its embedding where `cfg` ties them."""
    cfg: ModelConfig = model.cfg
    tied = cfg.tie_word_embeddings
    head, equation = (model.embed_VD, "BTD,VD->BTV") if tied else (model.head_DV, "BTD,DV->BTV")
    if isinstance(head.get_value(), QTensor):
        y_BTV = product(x_BTD, head).astype(jnp.float32)
    else:
        y_BTV = jnp.einsum(equation, x_BTD, head[...], preferred_element_type=jnp.float32)
    if cfg.head_bias:
        y_BTV += model.head_bias_V[...].astype(jnp.float32)[None, None]
    if cfg.logits_divisor != 1.0:
        y_BTV /= cfg.logits_divisor
    if (softcap := cfg.logit_softcap) is not None:
        y_BTV = softcap * jnp.tanh(y_BTV / softcap)
    return y_BTV

"""Attention to latents, DeepSeek's MLA.

B rows  T tokens  D hidden  N heads  H head_dim  Q query rank  C latent_dim  J rotary_dim
U nope_dim  W value_dim  L = C + J
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from xlinfer.config import ModelConfig
from xlinfer.kvcache import FULL, KV, LatentAttend
from xlinfer.models.parts import RMSNorm, matrix, weight
from xlinfer.models.rope import Positions, rotate
from xlinfer.quant import product


class LatentAttention(nnx.Module):
    """The latent and the rotated key are the same for all heads, so each device computes them
    whole; a head's own matrices, k_b and v_b, go to `attend`, which decides when they act."""

    def __init__(self, cfg: ModelConfig, *, dtype, rngs: nnx.Rngs):
        assert cfg.mla is not None
        D, N, H, J = cfg.hidden_size, cfg.num_heads, cfg.head_dim, cfg.rotary_dim
        Q, C, U, W = (
            cfg.mla.query_rank, cfg.mla.latent_dim, cfg.mla.nope_dim, cfg.mla.value_dim,
        )  # fmt: skip
        eps = cfg.mla.norm_eps
        norm = lambda size: RMSNorm(size, "rank", eps, offset=False, dtype=dtype)
        if Q is None:
            self.q_D_NH = matrix(rngs, dtype, ("hidden", "heads"), D, N * H)
        else:
            self.q_a_DQ = matrix(rngs, dtype, ("hidden", "rank"), D, Q)
            self.q_a_norm = norm(Q)
            self.q_b_Q_NH = matrix(rngs, dtype, ("rank", "heads"), Q, N * H)
        self.kv_a_DL = matrix(rngs, dtype, ("hidden", "rank"), D, C + J)
        self.kv_a_norm = norm(C)
        self.k_b_NUC = weight(rngs, dtype, ("heads", "head_dim", "rank"), N, U, C)
        self.v_b_NCW = weight(rngs, dtype, ("heads", "rank", "head_dim"), N, C, W)
        self.o_NW_D = matrix(rngs, dtype, ("heads", "hidden"), N * W, D)
        self.cfg, self.mla = cfg, cfg.mla

    def __call__(
        self, x_BTD, positions: Positions, attend: LatentAttend, kv: KV, *, layer, window,
        attention_chunk_size,
    ):  # fmt: skip
        cfg, mla, angles = self.cfg, self.mla, positions.angles
        assert window == FULL and attention_chunk_size is None, "no family has latents and these"
        if mla.query_rank is None:
            q_BTX = product(x_BTD, self.q_D_NH)
        else:
            q_BTX = product(self.q_a_norm(product(x_BTD, self.q_a_DQ)), self.q_b_Q_NH)
        # The barrier: see parts.Attention.
        q_BTNH = jax.lax.optimization_barrier(q_BTX).reshape(*x_BTD.shape[:2], -1, cfg.head_dim)
        q_BTNU, q_BTNJ = jnp.split(q_BTNH, [mla.nope_dim], axis=-1)
        kv_BTL = product(x_BTD, self.kv_a_DL)
        latent_BTC, rope_BTJ = jnp.split(kv_BTL, [mla.latent_dim], axis=-1)
        if angles is not None:
            turn = partial(rotate, angles=angles, interleaved=cfg.rope_interleaved)
            q_BTNJ, rope_BTJ = turn(q_BTNJ), turn(rope_BTJ[:, :, None])[:, :, 0]
        o_BTNW, kv = attend(
            q_BTNU, q_BTNJ, self.kv_a_norm(latent_BTC), rope_BTJ, self.k_b_NUC[...],
            self.v_b_NCW[...], kv, layer=layer, scale=cfg.attention_scale,
        )  # fmt: skip
        return product(o_BTNW.reshape(*x_BTD.shape[:2], -1), self.o_NW_D), kv

"""One layer."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.devices import Device
from xlinfer.config import LayerKind, ModelConfig
from xlinfer.kvcache import FULL, KV, Attend, LatentAttend
from xlinfer.mesh import AnyMesh
from xlinfer.models.mla import LatentAttention
from xlinfer.models.moe import MoE
from xlinfer.models.parts import MLP, Attention, hidden_norm
from xlinfer.models.rope import Positions


class Block(nnx.Module):
    """One layer: attention, then an MLP or a mixture of experts, or both at once; `cfg` says where
    norms are."""

    def __init__(
        self,
        cfg: ModelConfig,
        kind: LayerKind,
        *,
        dtype,
        device: Device,
        mesh: AnyMesh | None,
        rngs: nnx.Rngs,
    ):
        if cfg.pre_norm:
            self.attn_norm = hidden_norm(cfg, dtype)
            if not cfg.shared_norm:
                self.mlp_norm = hidden_norm(cfg, dtype)
        if cfg.post_norm:
            self.attn_post_norm = hidden_norm(cfg, dtype)
            self.mlp_post_norm = hidden_norm(cfg, dtype)
        attention = Attention if cfg.mla is None else LatentAttention
        self.attn: Any = attention(cfg, dtype=dtype, rngs=rngs)
        if kind.experts:
            self.moe = MoE(cfg, dtype=dtype, device=device, mesh=mesh, rngs=rngs)
        else:
            self.mlp = MLP(cfg, cfg.intermediate_size, dtype=dtype, rngs=rngs)
        self.cfg, self.kind = cfg, kind

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions: Positions,
        attend: Attend | LatentAttend,
        kv: KV,
        *,
        layer,
    ) -> tuple[Float[Array, "B T D"], KV]:
        cfg, input_BTD = self.cfg, x_BTD
        y_BTD = self.attn_norm(x_BTD) if cfg.pre_norm else x_BTD
        o_BTD, kv = self.attn(
            y_BTD, positions, attend, kv, layer=layer, window=self.kind.window or FULL,
            attention_chunk_size=self.kind.attention_chunk_size,
        )  # fmt: skip
        x_BTD = self._plus(x_BTD, self.attn_post_norm(o_BTD) if cfg.post_norm else o_BTD)
        if not cfg.shared_norm:
            z_BTD = input_BTD if cfg.parallel else x_BTD
            y_BTD = self.mlp_norm(z_BTD) if cfg.pre_norm else z_BTD
        o_BTD = self.moe(y_BTD) if self.kind.experts else self.mlp(y_BTD)
        return self._plus(x_BTD, self.mlp_post_norm(o_BTD) if cfg.post_norm else o_BTD), kv

    def _plus(self, x_BTD, y_BTD):
        if (multiplier := self.cfg.residual_multiplier) != 1.0:
            # In float32: bf16 has no 0.22.
            y_BTD = (y_BTD.astype(jnp.float32) * multiplier).astype(y_BTD.dtype)
        return x_BTD + y_BTD

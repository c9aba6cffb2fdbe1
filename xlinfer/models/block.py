"""One layer."""

from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.devices import Device
from xlinfer.config import ModelConfig
from xlinfer.kvcache import KV, AnyMesh, Attend
from xlinfer.models.moe import MoE
from xlinfer.models.parts import MLP, Attention, RMSNorm
from xlinfer.models.rope import Angles


class Block(nnx.Module):
    """One layer: pre-norm attention, pre-norm gated MLP or mixture of experts."""

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        dtype,
        device: Device,
        mesh: AnyMesh | None,
        rngs: nnx.Rngs,
    ):
        self.attn_norm = RMSNorm(cfg.hidden_size, "hidden", cfg.norm_eps, dtype=dtype)
        self.attn = Attention(cfg, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(cfg.hidden_size, "hidden", cfg.norm_eps, dtype=dtype)
        if cfg.moe is None:
            self.mlp = MLP(cfg, cfg.intermediate_size, dtype=dtype, rngs=rngs)
        else:
            self.mlp = MoE(cfg, dtype=dtype, device=device, mesh=mesh, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        angles: Angles,
        attend: Attend,
        kv: KV,
        *,
        layer,
        window,
    ) -> tuple[Float[Array, "B T D"], KV]:
        y_BTD, kv = self.attn(self.attn_norm(x_BTD), angles, attend, kv, layer=layer, window=window)
        x_BTD += y_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), kv

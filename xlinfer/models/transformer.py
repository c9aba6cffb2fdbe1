"""The decoder-only transformer: embedding, scanned layers, norm, head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.devices import DEVICES, Device
from xlinfer.config import ModelConfig
from xlinfer.kvcache import FULL, KV, AnyMesh, Attend
from xlinfer.models.block import Block
from xlinfer.models.causal_lm import causal_attend
from xlinfer.models.parts import RMSNorm, weight
from xlinfer.models.rope import rope_angles, rope_frequencies
from xlinfer.quant import apart, together


class Transformer(nnx.Module):
    """`model(tokens[B, T]) -> logits[B, T, V]`, causal and pure: jit, vmap and grad apply, and
    forward-mode jvp where attention is no kernel.

    Every array of `layers` has the layer as its first axis and the forward scans over it, so
    neither compile time nor the number of arguments grows with depth. On CUDA the scan is written
    out: XLA:GPU copies each layer's weights out of the stack before a product inside a loop, and
    reads them in place outside of one (docs/LOG.md).

    `device` is what the forward's kernels are chosen for, where the weights are to lie; what the
    CPU runs runs anywhere. `mesh` is needed where several devices share the heads or experts.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        dtype=jnp.float32,
        device: Device = DEVICES["cpu"],
        mesh: AnyMesh | None = None,
        rngs: nnx.Rngs,
    ):
        self.embed_VD = weight(rngs, dtype, ("vocab", "hidden"), cfg.vocab_size, cfg.hidden_size)

        @nnx.split_rngs(splits=cfg.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(cfg, dtype=dtype, device=device, mesh=mesh, rngs=rngs)

        self.layers = stacked(rngs)
        self.norm = RMSNorm(cfg.hidden_size, "hidden", cfg.norm_eps, dtype=dtype)
        if not cfg.tie_word_embeddings:
            self.head_DV = weight(rngs, dtype, ("hidden", "vocab"), cfg.hidden_size, cfg.vocab_size)
        self.cfg, self.device, self.mesh = cfg, device, mesh
        self.vocab_size, self.num_layers = cfg.vocab_size, cfg.num_layers
        self.num_heads, self.num_kv_heads = cfg.num_heads, cfg.num_kv_heads
        self.head_dim = cfg.head_dim
        self.max_position_embeddings = cfg.max_position_embeddings
        # Numbers alive at once for each token of a forward, as XLA schedules it: gate and up, or
        # those of all experts of a token with their input, and the residual.
        if cfg.moe is None:
            self.token_width = 2 * cfg.intermediate_size + 2 * cfg.hidden_size
        else:
            expert = 3 * cfg.moe.intermediate_size + cfg.hidden_size
            self.token_width = cfg.moe.num_experts_per_tok * expert + 2 * cfg.hidden_size

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        attend = causal_attend(self.device, self.mesh)
        x_BTD, _ = self.hidden(tokens_BT, pos_BT, attend, None, context_len=tokens_BT.shape[1])
        return self.logits(x_BTD)

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        pos_BT: Int[Array, "B T"],
        attend: Attend,
        kv: KV,
        *,
        context_len: int,
    ) -> tuple[Float[Array, "B T D"], KV]:
        """See CausalLM.hidden."""
        freq_h, scale = rope_frequencies(self.cfg.rope, self.cfg.head_dim, context_len)
        angles = rope_angles(freq_h, scale, pos_BT)
        graph, state = nnx.split(self.layers)
        stacked, whole = apart(state)
        windows = [window or FULL for window in self.cfg.windows]
        same = len(set(windows)) == 1  # then a constant, for which kernels visit fewer keys

        def layer(carry, xs):
            (x_BTD, kv), (weights, index, window) = carry, xs
            block = nnx.merge(graph, together(weights, whole, index))
            window = windows[0] if same else window
            return block(x_BTD, angles, attend, kv, layer=index, window=window), None

        index_L = jnp.arange(self.cfg.num_layers)
        x_BTD = self.embed_VD[...][tokens_BT]
        xs = (stacked, index_L, None if same else jnp.array(windows))
        unroll = self.device.platform == "cuda"
        (x_BTD, kv), _ = jax.lax.scan(layer, (x_BTD, kv), xs, unroll=unroll)
        return self.norm(x_BTD), kv

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 scores of the next token."""
        if self.cfg.tie_word_embeddings:
            equation, head = "BTD,VD->BTV", self.embed_VD[...]
        else:
            equation, head = "BTD,DV->BTV", self.head_DV[...]
        return jnp.einsum(equation, x_BTD, head, preferred_element_type=jnp.float32)

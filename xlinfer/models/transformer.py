"""The decoder-only transformer: embedding, scanned layers, norm, head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.devices import DEVICES, Device
from xlinfer.config import ModelConfig, Rope
from xlinfer.kvcache import FULL, KV, AnyMesh, Attend
from xlinfer.models.block import Block
from xlinfer.models.causal_lm import causal_attend
from xlinfer.models.parts import bias, hidden_norm, weight
from xlinfer.models.rope import Angles, rope_angles, rope_frequencies
from xlinfer.models.scan import scan_layers
from xlinfer.quant import QTensor, apart, lookup, product, together


class Transformer(nnx.Module):
    """`model(tokens[B, T]) -> logits[B, T, V]`, causal and pure: jit, vmap and grad apply, and
    forward-mode jvp where attention is no kernel.

    Every array of `layers` has the layer as its first axis and the forward scans over it, so
    neither compile time nor the number of arguments grows with depth.

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
        V, D, M = cfg.vocab_size, cfg.hidden_size, cfg.max_position_embeddings
        self.embed_VD = weight(rngs, dtype, ("vocab", "hidden"), V, D, is_table=True)
        if cfg.embedding_norm:
            self.embed_norm = hidden_norm(cfg, dtype)
        if cfg.learned_positions:
            self.positions_MD = weight(rngs, dtype, ("positions", "hidden"), M, D)

        @nnx.split_rngs(splits=cfg.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(cfg, dtype=dtype, device=device, mesh=mesh, rngs=rngs)

        self.layers = stacked(rngs)
        self.norm = hidden_norm(cfg, dtype)
        if not cfg.tie_word_embeddings:
            self.head_DV = weight(rngs, dtype, ("hidden", "vocab"), D, V)
        if cfg.head_bias:
            self.head_bias_V = bias(dtype, ("vocab",), V)
        self.cfg, self.device, self.mesh = cfg, device, mesh
        self.vocab_size, self.num_layers = cfg.vocab_size, cfg.num_layers
        self.num_heads, self.num_kv_heads = cfg.num_heads, cfg.num_kv_heads
        self.head_dim = cfg.head_dim
        self.max_position_embeddings = cfg.max_position_embeddings
        # Numbers alive at once for each token of a forward, as XLA schedules it: gate and up, or
        # those of all experts of a token with their input, and the residual; where attention and
        # MLP are parallel, the sum of both too.
        if cfg.moe is None:
            self.token_width = (2 if cfg.gated_mlp else 1) * cfg.intermediate_size
        else:
            self.token_width = cfg.moe.num_experts_per_tok * (3 * cfg.moe.intermediate_size + D)
        self.token_width += (3 if cfg.parallel else 2) * D

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
        kinds = list(dict.fromkeys(self.cfg.ropes))
        all_angles = self._angles(kinds, pos_BT, context_len)
        graph, state = nnx.split(self.layers)
        stacked, whole = apart(state)
        windows = [window or FULL for window in self.cfg.windows]
        same = len(set(windows)) == 1  # then a constant, for which kernels visit fewer keys
        kind_L = None if len(kinds) == 1 else jnp.array([kinds.index(r) for r in self.cfg.ropes])

        def layer(carry, xs):
            (x_BTD, kv), (weights, index, window, kind) = carry, xs
            block = nnx.merge(graph, together(weights, whole, index))
            window = windows[0] if same else window
            angles = all_angles if kind is None else jax.tree.map(lambda a: a[kind], all_angles)
            return block(x_BTD, angles, attend, kv, layer=index, window=window)

        index_L = jnp.arange(self.cfg.num_layers)
        x_BTD = lookup(self.embed_VD, tokens_BT).astype(self.norm.scale_D[...].dtype)
        if self.cfg.embedding_norm:
            x_BTD = self.embed_norm(x_BTD)
        if self.cfg.embedding_multiplier != 1.0:
            x_BTD *= self.cfg.embedding_multiplier
        if self.cfg.learned_positions:
            x_BTD += self.positions_MD[...][pos_BT]
        xs = (stacked, index_L, None if same else jnp.array(windows), kind_L)
        x_BTD, kv = scan_layers(layer, (x_BTD, kv), xs)
        return self.norm(x_BTD), kv

    def _angles(
        self, kinds: list[Rope | None], pos_BT: Int[Array, "B T"], context_len: int
    ) -> Angles | None:
        """Once for all layers; of several kinds of rope one after the other, [X, B, T, h] each.
        None: no layer rotates."""
        if kinds == [None]:
            return None
        frequencies = [rope_frequencies(r, self.cfg.rotary_dim, context_len) for r in kinds]
        each = [rope_angles(freq_h, scale, pos_BT) for freq_h, scale in frequencies]
        return each[0] if len(each) == 1 else jax.tree.map(lambda *a: jnp.stack(a), *each)

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 scores of the next token."""
        tied = self.cfg.tie_word_embeddings
        head, equation = (self.embed_VD, "BTD,VD->BTV") if tied else (self.head_DV, "BTD,DV->BTV")
        if isinstance(head.get_value(), QTensor):
            y_BTV = product(x_BTD, head).astype(jnp.float32)
        else:
            y_BTV = jnp.einsum(equation, x_BTD, head[...], preferred_element_type=jnp.float32)
        if self.cfg.head_bias:
            y_BTV += self.head_bias_V[...].astype(jnp.float32)[None, None]
        if self.cfg.logits_divisor != 1.0:
            y_BTV /= self.cfg.logits_divisor
        if (softcap := self.cfg.logit_softcap) is not None:
            y_BTV = softcap * jnp.tanh(y_BTV / softcap)
        return y_BTV

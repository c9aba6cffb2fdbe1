"""The encoder-decoder transformer: an encoder that sees its whole input, and a decoder that attends
to what it makes of it."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.devices import DEVICES, Device
from xlinfer.config import ModelConfig, RelativePositions
from xlinfer.kvcache import FULL, KV, Attend, CrossAttend, Keep
from xlinfer.mesh import AnyMesh
from xlinfer.models.causal_lm import (
    causal_attend,
    dense_cross_attend,
    dense_keep,
    encoder_attend,
)
from xlinfer.models.parts import MLP, Attention, bias, hidden_norm, token_logits, weight
from xlinfer.models.rope import Positions
from xlinfer.models.scan import scan_layers
from xlinfer.quant import apart, lookup, together


class EncoderDecoder(nnx.Module):
    """`model(inputs[B, S], tokens[B, T]) -> logits[B, T, V]`: the decoder's scores of the token
    after each of `tokens`, given what the encoder reads. Pure: jit, vmap and grad apply.

    As in Transformer, layers are stacked and scanned, `device` is what kernels are chosen for, and
    `mesh` is needed where several devices share the heads. Raises ValueError for a dtype that the
    model's numbers do not fit.
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
        assert cfg.encoder is not None
        if not cfg.encoder.fits_float16 and dtype == jnp.float16:
            raise ValueError(
                f"dtype is float16, which {cfg.model_type} overflows: use bfloat16 or float32"
            )
        V, D = cfg.vocab_size, cfg.hidden_size
        self.embed_VD = weight(rngs, dtype, ("vocab", "hidden"), V, D, is_table=True)
        self.encoder = Stack(cfg, cfg.encoder.num_layers, crosses=False, dtype=dtype, rngs=rngs)
        self.decoder = Stack(cfg, cfg.num_layers, crosses=True, dtype=dtype, rngs=rngs)
        if not cfg.tie_word_embeddings:
            self.head_DV = weight(rngs, dtype, ("hidden", "vocab"), D, V)
        if cfg.head_bias:
            self.head_bias_V = bias(dtype, ("vocab",), V)
        self.cfg, self.device, self.mesh = cfg, device, mesh
        self.vocab_size, self.num_layers = cfg.vocab_size, cfg.num_layers
        self.num_heads, self.num_kv_heads = cfg.num_heads, cfg.num_kv_heads
        self.head_dim = cfg.head_dim
        self.max_position_embeddings = cfg.max_position_embeddings
        self.has_distance_bias = cfg.encoder.relative_positions is not None
        # Numbers alive at once for each token of a forward, as in Transformer.
        self.token_width = (2 if cfg.gated_mlp else 1) * cfg.intermediate_size + 2 * D

    def __call__(
        self,
        inputs_BS: Int[Array, "B S"],
        tokens_BT: Int[Array, "B T"],
        lengths_B: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Row b of `inputs` has lengths_B[b] tokens, or all."""
        (B, S), T, cfg = inputs_BS.shape, tokens_BT.shape[1], self.cfg
        shape = (cfg.num_layers, B, S, cfg.num_kv_heads, cfg.head_dim)
        empty = jnp.zeros(shape, self.dtype)
        kv = self.encode(inputs_BS, lengths_B, dense_keep, (empty, empty))
        pos_BT = jnp.broadcast_to(jnp.arange(T)[None], tokens_BT.shape)
        x_BTD, _ = self.hidden(
            tokens_BT, pos_BT, causal_attend(self.device, self.mesh), kv, context_len=T,
            cross=dense_cross_attend(lengths_B),
        )  # fmt: skip
        return self.logits(x_BTD)

    def encode(
        self,
        tokens_BT: Int[Array, "B T"],
        lengths_B: Int[Array, " B"] | None,
        keep: Keep,
        kv: KV,
    ) -> KV:
        """See EncoderDecoderLM.encode."""
        pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        attend = encoder_attend(self.device, self.mesh, lengths_B)
        x_BTD, _ = self.encoder(self._embed(tokens_BT), pos_BT, attend, None, None)
        return self.decoder.keep(x_BTD, keep, kv)

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        pos_BT: Int[Array, "B T"],
        attend: Attend,
        kv: KV,
        *,
        context_len: int,
        cross: CrossAttend | None = None,
    ) -> tuple[Float[Array, "B T D"], KV]:
        """See EncoderDecoderLM.hidden."""
        del context_len
        return self.decoder(self._embed(tokens_BT), pos_BT, attend, cross, kv)

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 scores of the next token."""
        return token_logits(self, x_BTD)

    @property
    def dtype(self) -> Any:
        """Of activations; matrices may be quantized, norms are not."""
        return self.decoder.layers.attn_norm.scale_D[...].dtype

    def _embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x_BTD = lookup(self.embed_VD, tokens_BT).astype(self.dtype)
        multiplier = self.cfg.embedding_multiplier
        return x_BTD if multiplier == 1.0 else x_BTD * multiplier


class Stack(nnx.Module):
    """The layers of the encoder, or of the decoder, which crosses over to it; with what stands
    before and behind them."""

    def __init__(self, cfg: ModelConfig, num_layers: int, *, crosses: bool, dtype, rngs: nnx.Rngs):
        assert cfg.encoder is not None
        if cfg.learned_positions:
            M, D = cfg.max_position_embeddings, cfg.hidden_size
            self.positions_MD = weight(rngs, dtype, ("positions", "hidden"), M, D)
        if (relative := cfg.encoder.relative_positions) is not None:
            axes, B = ("buckets", "heads"), relative.num_buckets
            self.distance_BN = weight(rngs, dtype, axes, B, cfg.num_heads)
        if cfg.embedding_norm:
            self.embed_norm = hidden_norm(cfg, dtype)

        @nnx.split_rngs(splits=num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(cfg, crosses=crosses, dtype=dtype, rngs=rngs)

        self.layers = stacked(rngs)
        if cfg.pre_norm:
            self.norm = hidden_norm(cfg, dtype)
        self.cfg, self.num_layers, self.crosses = cfg, num_layers, crosses

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        pos_BT: Int[Array, "B T"],
        attend: Attend,
        cross: CrossAttend | None,
        kv: KV,
    ) -> tuple[Float[Array, "B T D"], KV]:
        if self.cfg.learned_positions:
            x_BTD += self.positions_MD[...][pos_BT]
        if self.cfg.embedding_norm:
            x_BTD = self.embed_norm(x_BTD)
        assert self.cfg.encoder is not None
        if (relative := self.cfg.encoder.relative_positions) is not None:
            bucket_X = distance_buckets(relative, both_ways=not self.crosses)
            bias_NX = self.distance_BN[...].astype(jnp.float32)[bucket_X].T
            attend = partial(attend, distance_bias_NX=bias_NX)

        def layer(block: Layer, carry, index):
            x_BTD, kv = carry
            return block(x_BTD, attend, cross, kv, layer=index)

        x_BTD, kv = self._over_layers(layer, (x_BTD, kv))
        return self.norm(x_BTD) if self.cfg.pre_norm else x_BTD, kv

    def keep(self, x_BTD: Float[Array, "B T D"], keep: Keep, kv: KV) -> KV:
        """The cache with the keys and values that each layer makes of the encoder's output."""

        def each(block: Layer, kv: KV, index):
            k_BTKH, v_BTKH = block.cross.keys_values(x_BTD)
            return keep(k_BTKH, v_BTKH, kv, layer=index)

        return self._over_layers(each, kv)

    def _over_layers(self, run, carry):
        """The last carry of `carry = run(block, carry, index)`."""
        graph, state = nnx.split(self.layers)
        stacked, whole = apart(state)

        def layer(carry, xs):
            weights, index = xs
            return run(nnx.merge(graph, together(weights, whole, index)), carry, index)

        return scan_layers(layer, carry, (stacked, jnp.arange(self.num_layers)))


class Layer(nnx.Module):
    """Attention, in the decoder attention to the encoder's output too, and an MLP."""

    def __init__(self, cfg: ModelConfig, *, crosses: bool, dtype, rngs: nnx.Rngs):
        self.attn_norm = hidden_norm(cfg, dtype)
        self.attn = Attention(cfg, dtype=dtype, rngs=rngs)
        if crosses:
            self.cross_norm = hidden_norm(cfg, dtype)
            self.cross = Attention(cfg, dtype=dtype, rngs=rngs)
        self.mlp_norm = hidden_norm(cfg, dtype)
        self.mlp = MLP(cfg, cfg.intermediate_size, dtype=dtype, rngs=rngs)
        self.pre_norm, self.scale, self.crosses = cfg.pre_norm, cfg.attention_scale, crosses

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        attend: Attend,
        cross: CrossAttend | None,
        kv: KV,
        *,
        layer,
    ) -> tuple[Float[Array, "B T D"], KV]:
        before = lambda norm, x_BTD: norm(x_BTD) if self.pre_norm else x_BTD
        after = lambda norm, x_BTD: x_BTD if self.pre_norm else norm(x_BTD)
        y_BTD = before(self.attn_norm, x_BTD)
        no_rope = Positions(None, None)
        y_BTD, kv = self.attn(y_BTD, no_rope, attend, kv, layer=layer, window=FULL)
        x_BTD = after(self.attn_norm, x_BTD + y_BTD)
        if self.crosses:
            assert cross is not None, "a decoder needs what attends to its encoder's output"
            q_BTNH = self.cross.queries(before(self.cross_norm, x_BTD))
            o_BTNH = cross(q_BTNH, kv, layer=layer, scale=self.scale)
            x_BTD = after(self.cross_norm, x_BTD + self.cross.output(o_BTNH))
        y_BTD = self.mlp(before(self.mlp_norm, x_BTD))
        return after(self.mlp_norm, x_BTD + y_BTD), kv


def distance_buckets(relative: RelativePositions, *, both_ways: bool) -> np.ndarray:
    """The bucket of each distance from -M to M, a key's position less the query's, M being
    `max_distance`: [2 M + 1]. Where a query sees only what is before it (not `both_ways`), all keys
    after it are as near as itself."""
    farthest, buckets = relative.max_distance, relative.num_buckets
    ahead_X = np.arange(-farthest, farthest + 1)
    first_X = np.zeros_like(ahead_X)
    if both_ways:
        buckets //= 2
        first_X = np.where(ahead_X > 0, buckets, 0)
        far_X = np.abs(ahead_X)
    else:
        far_X = np.maximum(-ahead_X, 0)
    exact = buckets // 2
    # In float32 and in this order, as transformers has it: some quotients are whole numbers.
    grown_X = np.log(np.maximum(far_X, 1).astype(np.float32) / np.float32(exact))
    grown_X = grown_X / np.float32(np.log(farthest / exact)) * np.float32(buckets - exact)
    large_X = np.minimum(exact + grown_X.astype(np.int64), buckets - 1)
    return first_X + np.where(far_X < exact, far_X, large_X)

"""What a module needs to be served, and its forward without a cache."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.devices import Device
from pallas_kernels.flash_attention import flash_attention
from xlinfer.kvcache import FULL, KV, Attend, CrossAttend, Keep, LatentAttend
from xlinfer.mesh import AnyMesh, by_head


@runtime_checkable
class CausalLM(Protocol):
    """What the engine asks of a module. `xlinfer.models.Transformer` is one; so is any
    nnx.Module with these members, its weights and its structure being its own. One that has
    `latents: Latents` besides is given a LatentAttend for its `attend`."""

    vocab_size: int
    num_layers: int  # calls of `attend` in one `hidden`, each with its own `layer` < num_layers
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        pos_BT: Int[Array, "B T"],
        attend: Any,
        kv: KV,
        *,
        context_len: int,
    ) -> tuple[Float[Array, "B T D"], KV]:
        """The last layer's normalized output. Token (b, t) stands at position pos_BT[b, t];
        `context_len` bounds the positions."""
        ...

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 scores of the next token."""
        ...


@runtime_checkable
class EncoderDecoderLM(CausalLM, Protocol):
    """What the engine asks of a module whose prompts an encoder reads, once; the sequences are the
    decoder's. The sizes are the decoder's too, and the encoder's input has at most
    max_position_embeddings tokens as well."""

    def encode(
        self,
        tokens_BT: Int[Array, "B T"],
        lengths_B: Int[Array, " B"] | None,
        keep: Keep,
        kv: KV,
    ) -> KV:
        """The cache with what `keep` made of the encoder's output, for each of the decoder's
        layers. Row b has lengths_B[b] tokens (None: T), and what follows is padding."""
        ...

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
        """As CausalLM's; `cross`, which is always given, attends to what `encode` kept."""
        ...


def causal_attend(device: Device, mesh: AnyMesh | None) -> Attend:
    """The `attend` over whole sequences, without a cache, by what flash_attention chooses for
    `device`; each device attends with its own heads."""
    return _whole_rows(device, mesh, None, causal=True)


def encoder_attend(
    device: Device, mesh: AnyMesh | None, lengths_B: Int[Array, " B"] | None
) -> Attend:
    """As causal_attend, but every token sees all of its row, of lengths_B[b] tokens."""
    return _whole_rows(device, mesh, lengths_B, causal=False)


def _whole_rows(device: Device, mesh: AnyMesh | None, lengths_B, *, causal: bool) -> Attend:
    def attend(
        q_BTNH, k_BTKH, v_BTKH, kv: KV, *,
        layer, window, scale, attention_chunk_size=None, softcap=None, sinks_N=None, alibi_N=None,
        distance_bias_NX=None, kv_scales=None,
    ):  # fmt: skip
        del kv_scales  # of a cache
        constant = isinstance(window, int)
        if constant and window >= q_BTNH.shape[1]:
            window = None
        if attention_chunk_size is not None and attention_chunk_size >= q_BTNH.shape[1]:
            attention_chunk_size = None

        def local(q_BTNH, k_BTKH, v_BTKH, sinks_N, alibi_N, distance_bias_NX, traced):
            return flash_attention(
                q_BTNH, k_BTKH, v_BTKH, window=window if constant else traced,
                attention_chunk_size=attention_chunk_size, scale=scale,
                causal=causal, softcap=softcap, sinks_N=sinks_N, alibi_N=alibi_N,
                distance_bias_NX=distance_bias_NX, lengths_B=lengths_B, device=device,
            )  # fmt: skip

        if mesh is not None and mesh.size > 1:  # XLA cannot split a kernel among devices
            heads, one = by_head(mesh, before=2), by_head(mesh, before=0)
            local = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(heads, heads, heads, one, one, one, PartitionSpec()),
                out_specs=heads,
                check_vma=False,
            )
        traced = None if constant else window
        return local(q_BTNH, k_BTKH, v_BTKH, sinks_N, alibi_N, distance_bias_NX, traced), kv

    return attend


def dense_keep(k_BTKH: Array, v_BTKH: Array, kv: KV, *, layer) -> KV:
    """The `Keep` of a cache of two arrays [L, B, T, K, H]."""
    return tuple(all_L.at[layer].set(one) for all_L, one in zip(kv, (k_BTKH, v_BTKH), strict=True))


def dense_cross_attend(lengths_B: Int[Array, " B"] | None) -> CrossAttend:
    """The `CrossAttend` over what dense_keep kept, with every logit at once."""

    def cross(q_BTNH, kv: KV, *, layer, scale):
        k_BSKH, v_BSKH = (all_L[layer].astype(jnp.float32) for all_L in kv)
        (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
        q_BTKGH = q_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, H)
        s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * scale
        if lengths_B is not None:
            seen_BS = jnp.arange(S)[None] < lengths_B[:, None]
            s_BKGTS = jnp.where(seen_BS[:, None, None, None], s_BKGTS, -jnp.inf)
        o_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(s_BKGTS, axis=-1), v_BSKH)
        return o_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)

    return cross


def causal_latent_attend(device: Device, mesh: AnyMesh | None) -> LatentAttend:
    """`causal_attend` to latents: keys and values of all tokens are made of them first."""
    by_heads = causal_attend(device, mesh)

    def attend(q_BTNU, q_BTNJ, latent_BTC, rope_BTJ, k_b_NUC, v_b_NCW, kv: KV, *, layer, scale):
        k_BTNU = jnp.einsum("BTC,NUC->BTNU", latent_BTC, k_b_NUC)
        v_BTNW = jnp.einsum("BTC,NCW->BTNW", latent_BTC, v_b_NCW)
        k_BTNJ = jnp.broadcast_to(rope_BTJ[:, :, None], q_BTNJ.shape)
        q_BTNH = jnp.concatenate([q_BTNU, q_BTNJ], axis=-1)
        k_BTNH = jnp.concatenate([k_BTNU, k_BTNJ], axis=-1)
        return by_heads(q_BTNH, k_BTNH, v_BTNW, kv, layer=layer, window=FULL, scale=scale)

    return attend


def check_model(model: nnx.Module) -> None:
    """Raise TypeError naming what `model` lacks of CausalLM."""
    members = [*CausalLM.__annotations__, "hidden", "logits"]
    missing = [name for name in members if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"{type(model).__name__} cannot be served: it has no {', '.join(missing)}. "
            "xlinfer.models.CausalLM describes each."
        )

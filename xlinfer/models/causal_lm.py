"""What a module needs to be served, and its forward without a cache."""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from xlinfer.kvcache import KV, Attend


@runtime_checkable
class CausalLM(Protocol):
    """What the engine asks of a module. `xlinfer.models.Transformer` is one; so is any
    nnx.Module with these members, its weights and its structure being its own."""

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
        attend: Attend,
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


def causal_attend(q_BTNH, k_BTKH, v_BTKH, kv: KV, *, layer, window, scale):
    """Dense attention over whole sequences, without a cache: the definition."""
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32)
    behind_TS = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    seen_TS = (behind_TS >= 0) & (behind_TS < window)
    p_BKGTS = jax.nn.softmax(jnp.where(seen_TS, s_BKGTS * scale, -jnp.inf), axis=-1)
    o_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS.astype(v_BTKH.dtype), v_BTKH)
    return o_BTKGH.reshape(B, T, N, H), kv


def check_model(model: nnx.Module) -> None:
    """Raise TypeError naming what `model` lacks of CausalLM."""
    members = [*CausalLM.__annotations__, "hidden", "logits"]
    missing = [name for name in members if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"{type(model).__name__} cannot be served: it has no {', '.join(missing)}. "
            "xlinfer.models.CausalLM describes each."
        )

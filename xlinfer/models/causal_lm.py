"""What a module needs to be served, and its forward without a cache."""

from typing import Protocol, runtime_checkable

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.devices import Device
from pallas_kernels.flash_attention import flash_attention
from xlinfer.kvcache import KV, AnyMesh, Attend, by_head


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


def causal_attend(device: Device, mesh: AnyMesh | None) -> Attend:
    """The `attend` over whole sequences, without a cache, by what flash_attention chooses for
    `device`; each device of the mesh's tensor axis attends with its own heads."""

    def attend(
        q_BTNH, k_BTKH, v_BTKH, kv: KV, *,
        layer, window, scale, softcap=None, sinks_N=None, alibi_N=None,
    ):  # fmt: skip
        constant = isinstance(window, int)
        if constant and window >= q_BTNH.shape[1]:
            window = None

        def local(q_BTNH, k_BTKH, v_BTKH, sinks_N, alibi_N, traced):
            return flash_attention(
                q_BTNH, k_BTKH, v_BTKH, window=window if constant else traced, scale=scale,
                softcap=softcap, sinks_N=sinks_N, alibi_N=alibi_N, device=device,
            )  # fmt: skip

        if mesh is not None and mesh.size > 1:  # XLA cannot split a kernel among devices
            heads, one = by_head(mesh, before=2), by_head(mesh, before=0)
            local = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(heads, heads, heads, one, one, PartitionSpec()),
                out_specs=heads,
                check_vma=False,
            )
        traced = None if constant else window
        return local(q_BTNH, k_BTKH, v_BTKH, sinks_N, alibi_N, traced), kv

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

"""A mixture of experts in place of an MLP.

T tokens  D hidden  R = E experts  k of them for each token  I ffw hidden of an expert
M = T k rows: a token for each of its experts
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.devices import Device
from xlinfer.config import Activation, ExpertGroups, ModelConfig
from xlinfer.mesh import AnyMesh, split, ways
from xlinfer.models.parts import MLP, activate, bias, weight
from xlinfer.quant import Experts, grouped_product, specs_of

Choice = tuple[Float[Array, "T k"], Int[Array, "T k"]]  # weights, and experts by number


class MoE(nnx.Module):
    """Each expert is a gated MLP. They are spread over the mesh's expert axis, some to a device,
    and each of them over its tensor axis; a device sees all tokens of its part of the step and
    multiplies its own experts' rows. One sum over both axes makes the output."""

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        dtype,
        device: Device,
        mesh: AnyMesh | None,
        rngs: nnx.Rngs,
    ):
        assert cfg.moe is not None
        D, E, I = cfg.hidden_size, cfg.moe.num_experts, cfg.moe.intermediate_size
        self.router_DR = weight(rngs, dtype, ("hidden", "routes"), D, E)
        # [E, N, K] as grouped_matmul wants it. The first I of gate_up's rows are the gate's, and
        # where devices share an expert, the first half of each one's: see placing.Halves.
        self.gate_up_EID = weight(
            rngs, dtype, ("experts", "expert_ffw", "hidden"), E, 2 * I, D, is_experts=True
        )
        self.down_EDI = weight(
            rngs, dtype, ("experts", "hidden", "expert_ffw"), E, D, I, is_experts=True
        )
        if cfg.moe.bias:
            self.router_bias_R = bias(dtype, ("routes",), E)
            self.gate_up_bias_EI = bias(dtype, ("experts", "expert_ffw"), E, 2 * I)
            self.down_bias_ED = bias(dtype, ("experts", "hidden"), E, D)
        if cfg.moe.selection_bias:
            self.selection_bias_R = bias(jnp.float32, ("routes",), E)
        if (shared := cfg.moe.shared_intermediate_size) is not None:
            self.shared = MLP(cfg, shared, dtype=dtype, rngs=rngs)
            if cfg.moe.shared_gate:
                self.shared_gate_D1 = weight(rngs, dtype, ("hidden", None), D, 1)
        self.moe = cfg.moe
        self.activation: Activation = cfg.hidden_act
        self.device, self.mesh = device, mesh

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        y_TD = self.experts(x_TD, self._routed(x_TD))
        y_BTD = y_TD.reshape(x_BTD.shape)
        if self.moe.shared_intermediate_size is None:
            return y_BTD
        shared_BTD = self.shared(x_BTD)
        if self.moe.shared_gate:
            shared_BTD *= jax.nn.sigmoid(x_BTD @ self.shared_gate_D1[...])
        return y_BTD + shared_BTD

    def _routed(self, x_TD: Float[Array, "T D"]) -> Choice:
        """`route`, of each device's own tokens: XLA does not split every top_k."""
        if self.mesh is None or (tokens := split(self.mesh, "tokens", x_TD.shape[0])) is None:
            return self.route(x_TD)
        own = PartitionSpec(tokens)
        return jax.shard_map(
            self.route, mesh=self.mesh, in_specs=own, out_specs=own, check_vma=False
        )(x_TD)

    def route(self, x_TD: Float[Array, "T D"]) -> Choice:
        """In float32: where two experts score nearly alike, bf16 would choose by rounding."""
        logits_TR = jnp.einsum(
            "TD,DR->TR", x_TD, self.router_DR[...],
            precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
        )  # fmt: skip
        if self.moe.bias:
            logits_TR += self.router_bias_R[...].astype(jnp.float32)[None]
        is_softmax = self.moe.scores == "softmax"
        score_TR = jax.nn.softmax(logits_TR) if is_softmax else jax.nn.sigmoid(logits_TR)
        # Sigmoids of large logits are all 1; where nothing is added to them, logits order as well.
        chosen_by_TR = score_TR if is_softmax or self.moe.groups is not None else logits_TR
        if self.moe.selection_bias:
            chosen_by_TR = score_TR + self.selection_bias_R[...][None]
        if (groups := self.moe.groups) is not None:
            chosen_by_TR = _of_the_best(chosen_by_TR, groups)
        weight_Tk, expert_Tk = lax.top_k(chosen_by_TR, self.moe.num_experts_per_tok)
        if chosen_by_TR is not score_TR:
            weight_Tk = jnp.take_along_axis(score_TR, expert_Tk, axis=-1)
        if self.moe.norm_topk_prob:  # sigmoids may all be 0
            weight_Tk /= jnp.maximum(weight_Tk.sum(-1, keepdims=True), 1e-20)
        if self.moe.weight_multiplier != 1.0:
            weight_Tk *= self.moe.weight_multiplier
        return weight_Tk, expert_Tk

    def experts(self, x_TD: Float[Array, "T D"], choice: Choice) -> Float[Array, "T D"]:
        """The sum of the chosen experts' outputs by their weights, or of what they make of the
        token by its weights."""
        matrices = self.gate_up_EID.get_value(), self.down_EDI.get_value()
        biases = (self.gate_up_bias_EI[...], self.down_bias_ED[...]) if self.moe.bias else None
        mesh, E = self.mesh, self.moe.num_experts
        if mesh is None or mesh.size == 1:  # XLA cannot split a kernel among devices
            return self._own(x_TD, choice, matrices, biases, E)
        expert, inside = split(mesh, "experts"), split(mesh, "expert_ffw")
        summed = [axis for axis in (expert, inside) if axis is not None]

        def local(x_TD, choice, matrices, biases):
            (weight_Tk, expert_Tk), own = choice, E // ways(mesh, "experts")
            if expert is not None:
                expert_Tk -= own * lax.axis_index(expert)
                # Another device's is number `own`: it comes after all of this one's.
                expert_Tk = jnp.where((expert_Tk >= 0) & (expert_Tk < own), expert_Tk, own)
            if inside is not None and biases is not None:  # of a sum, added once
                is_first = lax.axis_index(inside) == 0
                biases = biases[0], jnp.where(is_first, biases[1], 0)
            y_TD = self._own(x_TD, (weight_Tk, expert_Tk), matrices, biases, own)
            return lax.psum(y_TD, summed) if summed else y_TD

        by_token = PartitionSpec(split(mesh, "tokens", x_TD.shape[0]))
        gate_up, down = matrices
        run = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(
                by_token,
                (by_token, by_token),
                (specs_of(gate_up, None, inside, expert), specs_of(down, inside, None, expert)),
                None if biases is None else (PartitionSpec(expert, inside), PartitionSpec(expert)),
            ),
            out_specs=by_token,
            check_vma=False,
        )
        return run(x_TD, choice, matrices, biases)

    def _own(self, x_TD, choice: Choice, matrices: tuple[Experts, Experts], biases, E: int):
        """What `E` experts, numbered from 0, add; those numbered E add nothing.

        Rows come back by a gather: a scatter would add in the order of its atomics.
        """
        (weight_Tk, expert_Tk), (gate_up, down) = choice, matrices
        expert_M = expert_Tk.reshape(-1)
        order_M = jnp.argsort(expert_M, stable=True)
        row_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(order_M.size, dtype=jnp.int32))
        size_E = (expert_M[None] == jnp.arange(E)[:, None]).sum(1, dtype=jnp.int32)
        sorted_M = expert_M[order_M]

        def product(x_MK, w, which: int):
            y_MN = grouped_product(x_MK, w, size_E, self.device)
            if biases is None:
                return y_MN
            return y_MN + biases[which].at[sorted_M].get(mode="fill", fill_value=0)  # number E: 0

        x_MD = x_TD[order_M // self.moe.num_experts_per_tok]
        if self.moe.scaled_inputs:
            weight_M1 = weight_Tk.reshape(-1)[order_M, None]
            x_MD = (x_MD.astype(jnp.float32) * weight_M1).astype(x_MD.dtype)
            weight_Tk = jnp.ones_like(weight_Tk)
        gate_MI, up_MI = jnp.split(product(x_MD, gate_up, 0), 2, axis=-1)
        y_MD = product(activate(self.activation, gate_MI, up_MI), down, 1)
        y_TkD = y_MD[row_M].reshape(*expert_Tk.shape, -1).astype(jnp.float32)
        return (y_TkD * weight_Tk[..., None]).sum(1).astype(x_TD.dtype)


def _of_the_best(score_TR: Float[Array, "T R"], groups: ExpertGroups) -> Float[Array, "T R"]:
    """The scores of those in the groups that score best; of the others -inf."""
    score_TGg = score_TR.reshape(score_TR.shape[0], groups.count, -1)
    score_TG = lax.top_k(score_TGg, groups.best)[0].sum(-1)
    _, chosen_Tc = lax.top_k(score_TG, groups.chosen)
    is_chosen_TG = (chosen_Tc[..., None] == jnp.arange(groups.count)[None, None]).any(1)
    return jnp.where(is_chosen_TG[..., None], score_TGg, -jnp.inf).reshape(score_TR.shape)

"""The pure functions that get compiled; nothing else is.

`forward` runs the model over a step's tokens (one program a token bucket), `sample` turns the
last hidden states into tokens, `decode` does both for several tokens on the device (one a row
bucket), `score` gives log-probabilities of known tokens, `pool` sums hidden states, `admit` sets a
request's slot, `encode` reads its prompt where the model has an encoder (one a token bucket). Every
step's small inputs travel as one int32 vector (`pack`).

T tokens of the step   R rows   Z slots   M pages per row   V vocabulary   W decode window
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.devices import Device, Impl
from pallas_kernels.paged_attention import Ragged
from xlinfer.kvcache import (
    PADDING_PAGE,
    Cache,
    paged_attend,
    paged_cross_attend,
    paged_keep,
    paged_latent_attend,
)
from xlinfer.mesh import RULES, split
from xlinfer.plan import Plan
from xlinfer.program_inputs import (
    FROM_DEVICE,
    Encoded,
    decode_shapes,
    encode_shapes,
    forward_shapes,
    pool_shapes,
    sample_shapes,
    score_shapes,
    unpack,
)
from xlinfer.sampling import (
    Logprobs,
    SlotParams,
    Slots,
    Wanted,
    advance,
    choose,
    logprobs_of,
    no_logprobs,
    slot_places,
    take,
)

SCORE_ROWS = 64  # positions whose logits exist at once in `score`


class Sampled(NamedTuple):
    """Leading axis: the window's tokens, 1 for `sample`."""

    token_WR: Int[Array, "W R"]
    count_R: Int[Array, " R"]  # how many of the window's tokens are the row's
    logprobs: Logprobs | None  # zeros unless wanted


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The functions for one module's structure, plan and mesh. `params` are the flat leaves of
    `nnx.split(model)`: a tuple of arrays costs nothing to pass, a State a callback each."""

    graph: nnx.GraphDef
    tree: Any  # the State's PyTreeDef
    plan: Plan
    mesh: Any  # a Mesh; an AbstractMesh where nothing is compiled
    device: Device
    attention_impl: Impl
    latent: bool  # the cache holds latents

    def forward(
        self,
        params: Sequence[Array],
        kv: Cache,
        slots: Slots,
        packed: Int[Array, " n"],
        *,
        tokens: int,
    ) -> tuple[Cache, Float[Array, "most D"], Float[Array, "R D"]]:
        """The cache with this step's KV, every token's hidden state (padded to the largest
        bucket, so that one `score` serves all), each row's last."""
        x = self._whole(unpack(packed, forward_shapes(self.plan, tokens)))
        token_T = jnp.where(x.token_T == FROM_DEVICE, slots.state.token_Z[x.slot_T], x.token_T)
        ragged = Ragged(x.pages_RM, x.kv_len_R, x.start_R, x.num_decodes, x.num_rows)
        attend = self._attend(x.page_T, x.offset_T, ragged, decode_only=False)
        row_T = jnp.searchsorted(x.start_R[1:], jnp.arange(tokens), side="right")
        row_T = jnp.minimum(row_T, self.plan.max_num_seqs - 1)
        x_TD, kv = self._hidden(
            self._model(params), token_T, x.pos_T, attend, kv,
            self._cross(x.encoded, row_T, x.start_R[-1]),
        )  # fmt: skip
        last_R = jnp.maximum(x.start_R[1:] - 1, 0)
        unused = self.plan.max_num_batched_tokens - tokens
        return kv, jnp.pad(x_TD, ((0, unused), (0, 0))), x_TD[last_R]

    def sample(
        self,
        params: Sequence[Array],
        slots: Slots,
        hidden_RD: Float[Array, "R D"],
        packed: Int[Array, " n"],
    ) -> tuple[Slots, Sampled]:
        """One token for each row; padding rows' slot is the last, which nobody holds. Reading
        the head's weights costs the same for few rows as for many, so there is one size."""
        x = unpack(packed, sample_shapes(self.plan))
        chosen = take(slots.params, x.slot_R)
        live_R = ~slots.state.done_Z[x.slot_R]
        state, token_R, logprobs = self._in_each_part(self._choose)(
            hidden_RD[x.row_R], params, chosen, slots.state, x.slot_R, x.length_R, live_R, x.wanted
        )
        count_R = live_R.astype(jnp.int32)
        sampled = Sampled(token_R[None], count_R, jax.tree.map(lambda a: a[None], logprobs))
        return Slots(slots.params, state), sampled

    def decode(
        self,
        params: Sequence[Array],
        kv: Cache,
        slots: Slots,
        packed: Int[Array, " n"],
        *,
        rows: int,
    ) -> tuple[Cache, Slots, Sampled]:
        """Up to `num_steps` tokens a row, until every row has stopped."""
        x = self._whole(unpack(packed, decode_shapes(self.plan, rows)))
        model, W = self._model(params), self.plan.decode_window
        chosen = take(slots.params, x.slot_R)
        start_R = jnp.arange(rows + 1)
        none = no_logprobs(rows, self.plan.max_logprobs, model.vocab_size)
        out = Sampled(
            jnp.zeros((W, rows), jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jax.tree.map(lambda a: jnp.zeros((W, *a.shape), a.dtype), none),
        )

        cross = self._cross(x.encoded, jnp.arange(rows), x.num_rows)
        several, places = self.mesh.size > 1, slot_places(self.mesh, model.vocab_size).state

        def token(carry):
            i, kv, state, out = carry
            live_R = ~state.done_Z[x.slot_R]
            length_R = x.length_R + i
            pos_R = jnp.where(live_R, length_R - 1, 0)
            page_R = jnp.take_along_axis(x.pages_RM, pos_R[:, None] // self.plan.page_size, 1)
            page_R = jnp.where(live_R, page_R[:, 0], PADDING_PAGE)
            kv_len_R = jnp.where(live_R, length_R, 0)
            ragged = Ragged(x.pages_RM, kv_len_R, start_R, x.num_rows, x.num_rows)
            offset_R = pos_R % self.plan.page_size
            attend = self._attend(page_R, offset_R, ragged, decode_only=True)
            token_R = state.token_Z[x.slot_R]
            x_RD, kv = self._hidden(model, token_R, pos_R, attend, kv, cross)
            state, token_R, logprobs = self._in_each_part(self._choose)(
                x_RD, params, chosen, state, x.slot_R, length_R, live_R, x.wanted
            )
            put = lambda all_W, one: all_W.at[i].set(one)
            out = Sampled(
                put(out.token_WR, token_R),
                out.count_R + live_R.astype(jnp.int32),
                jax.tree.map(put, out.logprobs, logprobs),
            )
            state = lax.with_sharding_constraint(state, places) if several else state
            return i + 1, kv, state, self._whole(out)

        def unfinished(carry):
            i, _, state, _ = carry
            return (i < x.num_steps) & ~state.done_Z[x.slot_R].all()

        carry = (jnp.int32(0), kv, slots.state, out)
        _, kv, state, out = lax.while_loop(unfinished, token, carry)
        return kv, Slots(slots.params, state), out

    def score(
        self,
        params: Sequence[Array],
        hidden_TD: Float[Array, "T D"],
        packed: Int[Array, " n"],
    ) -> Logprobs:
        """Log-probabilities of token_T[i] after hidden state row_T[i] for i < num_rows, and if
        `tops` the most likely tokens; the logits of at most SCORE_ROWS positions exist at a
        time."""
        x = unpack(packed, score_shapes(self.plan))
        model, T, most = self._model(params), len(x.token_T), self.plan.max_logprobs
        size = min(SCORE_ROWS, T)

        def some(i, scores):
            first = jnp.minimum(i * size, T - size)  # the last may overlap the one before
            cut = lambda x: lax.dynamic_slice_in_dim(x, first, size)
            logits_rV = model.logits(hidden_TD[cut(x.row_T)][None])[0]
            put = lambda all_T, new: lax.dynamic_update_slice_in_dim(all_T, new, first, 0)
            new = logprobs_of(logits_rV, cut(x.token_T), most, tops=x.tops > 0)
            return jax.tree.map(put, scores, new)

        nothing = no_logprobs(T, most, model.vocab_size)
        return lax.fori_loop(0, (x.num_rows + size - 1) // size, some, nothing)

    def pool(self, hidden_TD: Float[Array, "T D"], packed: Int[Array, " n"]) -> Float[Array, "R D"]:
        """Float32 sums of each row's hidden states. Row by row, and not by a product with ones
        and zeros, in which a neighbour's infinity would be everybody's NaN."""
        x = unpack(packed, pool_shapes(self.plan))
        (T, D), R = hidden_TD.shape, len(x.start_R)
        t_T1 = jnp.arange(T)[:, None]

        def row(r, sum_RD):
            own_T1 = (x.start_R[r] <= t_T1) & (t_T1 < x.end_R[r])
            own_TD = jnp.where(own_T1, hidden_TD.astype(jnp.float32), 0.0)
            return sum_RD.at[r].set(own_TD.sum(0))

        return lax.fori_loop(0, x.num_rows, row, jnp.zeros((R, D)))

    def admit(
        self,
        slots: Slots,
        slot: Int[Array, ""],
        row: SlotParams,
        token: Int[Array, ""],
        recent_C: Int[Array, " C"],
        output_count_V: Int[Array, " V"],
    ) -> Slots:
        """Slot `slot` is this request's from here on."""
        put = lambda all_Z, one: all_Z.at[slot].set(one)
        state = slots.state
        return Slots(
            jax.tree.map(put, slots.params, row),
            state._replace(
                token_Z=put(state.token_Z, token),
                done_Z=put(state.done_Z, False),
                recent_ZC=put(state.recent_ZC, recent_C),
                output_count_ZV=put(state.output_count_ZV, output_count_V),
            ),
        )

    def encode(
        self, params: Sequence[Array], kv: Cache, packed: Int[Array, " n"], *, tokens: int
    ) -> Cache:
        """The cache with what the decoder is to see of one prompt."""
        x = unpack(packed, encode_shapes(tokens))
        keep = paged_keep(
            x.page_T, x.offset_T, self.mesh, device=self.device, impl=self.attention_impl
        )
        return self._model(params).encode(x.token_T[None], x.num_tokens[None], keep, kv)

    def _model(self, params: Sequence[Array]) -> Any:  # a CausalLM, or an EncoderDecoderLM
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, params))

    def _cross(self, encoded: Encoded | None, row_T: Int[Array, " T"], num_tokens) -> dict:
        """What `hidden` is given beside, where the model has an encoder: for each token its row's,
        and from `num_tokens` on nothing."""
        if encoded is None:
            return {}
        len_T = jnp.where(jnp.arange(len(row_T)) < num_tokens, encoded.len_R[row_T], 0)
        cross = paged_cross_attend(
            encoded.pages_RM[row_T], len_T, num_tokens, self.mesh,
            device=self.device, impl=self.attention_impl,
        )  # fmt: skip
        return {"cross": cross}

    def _hidden(self, model: Any, token_T, pos_T, attend, kv: Cache, cross: dict):
        """The hidden states of a step's tokens, whole on every device, and the cache. Between, each
        device has its own part of the tokens, where the mesh splits them."""
        tokens = split(self.mesh, "tokens", len(token_T))
        lies = NamedSharding(self.mesh, PartitionSpec(tokens))
        if tokens is not None:
            token_T, pos_T = (
                lax.with_sharding_constraint(x, lies) for x in self._whole((token_T, pos_T))
            )
        x_1TD, kv = model.hidden(
            token_T[None], pos_T[None], attend, kv, context_len=self.plan.max_model_len, **cross
        )
        return self._whole(x_1TD[0]), kv

    def _whole[Tree](self, tree: Tree) -> Tree:
        """Whole on every device, which XLA else decides by what reads it."""
        if self.mesh.size == 1:
            return tree
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda x: lax.with_sharding_constraint(x, whole), tree)

    def _attend(self, page_T, offset_T, ragged: Ragged, *, decode_only: bool):
        attend = paged_latent_attend if self.latent else paged_attend
        return attend(
            page_T, offset_T, ragged, self.mesh,
            decode_only=decode_only, device=self.device, impl=self.attention_impl,
        )  # fmt: skip

    def _in_each_part(self, run: Callable) -> Callable:
        """`run`, of arrays that every part of the mesh that has its own tokens holds, done by each:
        XLA would have them share it, and exchange its pieces for every token."""
        if split(self.mesh, "tokens") is None:
            return run
        whole = PartitionSpec()
        return jax.shard_map(
            run, mesh=self.mesh, in_specs=whole, out_specs=whole,
            axis_names=set(RULES["tokens"]), check_vma=False,
        )  # fmt: skip

    def _choose(self, x_RD, params, chosen, state, slot_R, length_R, live_R, wanted: Wanted):
        logits_RV = self._model(params).logits(x_RD[None])[0]
        token_R = choose(logits_RV, chosen, state, slot_R, length_R, wanted)
        most = self.plan.max_logprobs
        logprobs = lax.cond(
            wanted.logprobs > 0,
            lambda x: logprobs_of(x, token_R, most),
            lambda x: no_logprobs(x.shape[0], most, x.shape[1]),
            logits_RV,
        )
        state = advance(state, chosen, slot_R, token_R, length_R, live_R)
        return state, token_R, logprobs

"""Choosing tokens on device, every row by its own parameters, at fixed shapes.

Each parameter's work sits behind a `lax.cond` on whether any row wants it, and is an exact
no-op on rows that do not, so a row's result is the same whoever shares the batch. Thresholds
are found by bisecting the bits of floats: exact, and without sorting the vocabulary.

R rows  V vocabulary  Z slots  E stop ids  A logit-bias entries  B bad words  C their length
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from xlinfer.mesh import AnyMesh, split
from xlinfer.request import MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS

STOP_IDS = MAX_STOP_TOKEN_IDS + 16  # the request's and the model's own
BAD_WORDS = 2 * MAX_BAD_WORDS  # each word with and without a leading space
BAD_WORD_LENGTH = 16  # tokens
NO_TOKEN = -1  # fills token tables; no token has this id
BANNED = -1e30  # finite, so that a row with everything banned still gives a token


Leaf = Any  # a jax array, or what stands for one: numpy, a shape, a sharding


class SlotParams(NamedTuple):
    """What a request asks of the sampler, one entry a slot. Set when it is admitted."""

    temperature_Z: Leaf  # float32; 0: greedy
    top_k_Z: Leaf  # int32; V: off
    top_p_Z: Leaf  # float32; 1: off
    min_p_Z: Leaf  # float32; 0: off
    presence_Z: Leaf  # float32
    frequency_Z: Leaf  # float32
    repetition_Z: Leaf  # float32
    seed_Z2: Leaf  # uint32; threefry key
    min_length_Z: Leaf  # int32; tokens, prompt included, before which no stop id is chosen
    max_length_Z: Leaf  # int32; tokens, prompt included, at which the answer ends
    stop_ZE: Leaf  # int32
    bias_token_ZA: Leaf  # int32
    bias_ZA: Leaf  # float32
    bad_words_ZBC: Leaf  # int32; each word's tokens at its end, NO_TOKEN before them
    allowed_Zv: Leaf  # uint32; one bit a token; v = ceil(V/32)
    prompt_Zv: Leaf  # uint32; tokens of the prompt, for the repetition penalty


class SlotState(NamedTuple):
    """What the device itself keeps of a request between steps."""

    token_Z: Leaf  # int32; the latest token, whose KV is not in the cache yet
    done_Z: Leaf  # bool; ended by a stop id or by its length
    recent_ZC: Leaf  # int32; the latest tokens, for bad words
    output_count_ZV: Leaf  # int32; how often each token was generated


class Slots(NamedTuple):
    params: SlotParams
    state: SlotState


class Wanted(NamedTuple):
    """Which parts of the sampler any row of this batch needs. int32 0 or 1."""

    random: Leaf
    filters: Leaf  # top_k, top_p, min_p
    penalties: Leaf
    constraints: Leaf  # logit_bias, allowed ids, bad words, min_tokens
    logprobs: Leaf


class Logprobs(NamedTuple):
    """Of the raw logits: the chosen token's, and the most likely tokens' best first."""

    chosen_R: Float[Array, " R"]
    rank_R: Int[Array, " R"]  # from 1
    top_token_RQ: Int[Array, "R Q"]
    top_RQ: Float[Array, "R Q"]


def empty_slots(num_slots: int, vocab_size: int) -> Slots:
    """numpy arrays: all slots done; each is set by `admit` before it is used."""
    Z, v = num_slots, -(-vocab_size // 32)
    real = lambda fill, *shape: np.full((Z, *shape), fill, np.float32)
    whole = lambda fill, *shape: np.full((Z, *shape), fill, np.int32)
    bits = lambda fill, *shape: np.full((Z, *shape), fill, np.uint32)
    return Slots(
        SlotParams(
            temperature_Z=real(0), top_k_Z=whole(vocab_size), top_p_Z=real(1), min_p_Z=real(0),
            presence_Z=real(0), frequency_Z=real(0), repetition_Z=real(1), seed_Z2=bits(0, 2),
            min_length_Z=whole(0), max_length_Z=whole(0), stop_ZE=whole(NO_TOKEN, STOP_IDS),
            bias_token_ZA=whole(0, MAX_LOGIT_BIAS), bias_ZA=real(0, MAX_LOGIT_BIAS),
            bad_words_ZBC=whole(NO_TOKEN, BAD_WORDS, BAD_WORD_LENGTH),
            allowed_Zv=bits(2**32 - 1, v), prompt_Zv=bits(0, v),
        ),
        SlotState(
            token_Z=whole(0), done_Z=np.ones(Z, bool),
            recent_ZC=whole(NO_TOKEN, BAD_WORD_LENGTH), output_count_ZV=whole(0, vocab_size),
        ),
    )  # fmt: skip


def slot_places(mesh: AnyMesh, vocab_size: int) -> Slots:
    """How slots lie on `mesh`: whole on every device, but the counts of outputs, which are met by
    logits and lie as they do."""
    whole = NamedSharding(mesh, PartitionSpec())
    state = SlotState(*[whole] * len(SlotState._fields))
    counts = NamedSharding(mesh, PartitionSpec(None, split(mesh, "vocab", vocab_size)))
    return Slots(
        SlotParams(*[whole] * len(SlotParams._fields)), state._replace(output_count_ZV=counts)
    )


def choose(
    logits_RV: Float[Array, "R V"],
    params: SlotParams,
    state: SlotState,
    slot_R: Int[Array, " R"],
    length_R: Int[Array, " R"],
    wanted: Wanted,
) -> Int[Array, " R"]:
    """The next token of each row, which stands at position `length_R`; `params` are the rows'
    own (see `take`), `state` is all slots'."""

    def adjust(x_RV):
        x_RV = _constrain(x_RV, params, state, slot_R, length_R)
        return _penalize(x_RV, params, state, slot_R)

    adjusts = wanted.constraints + wanted.penalties > 0
    x_RV = lax.cond(adjusts, adjust, lambda x: x, logits_RV)
    return lax.cond(
        wanted.random > 0, lambda x: _draw(x, params, length_R, wanted.filters), argmax, x_RV
    )


def take(params: SlotParams, slot_R: Int[Array, " R"]) -> SlotParams:
    """The rows' parameters. A dynamic index, so once a step and not once a token."""
    return jax.tree.map(lambda x: x[slot_R], params)


def argmax(x_RV: Float[Array, "R V"]) -> Int[Array, " R"]:
    """The first of the largest. In two plain reductions: XLA:CPU runs a paired one far slower."""
    V = x_RV.shape[1]
    peak_R1 = x_RV.max(-1, keepdims=True)
    return jnp.where(x_RV == peak_R1, jnp.arange(V)[None], V - 1).min(-1).astype(jnp.int32)


def advance(
    state: SlotState,
    params: SlotParams,
    slot_R: Int[Array, " R"],
    token_R: Int[Array, " R"],
    length_R: Int[Array, " R"],
    live_R: Bool[Array, " R"],
) -> SlotState:
    """Record each live row's new token, which stands at position `length_R`."""
    stopped_R = (token_R[:, None] == params.stop_ZE).any(-1)
    done_R = ~live_R | stopped_R | (length_R + 1 >= params.max_length_Z)
    keep = lambda new, old: jnp.where(live_R, new, old[slot_R])
    # Not behind a `cond`, which would copy the counts of all slots to leave them as they are.
    old_RC = state.recent_ZC[slot_R]
    new_RC = jnp.concatenate([old_RC[:, 1:], token_R[:, None]], axis=1)
    recent_RC = jnp.where(live_R[:, None], new_RC, old_RC)
    return SlotState(
        token_Z=state.token_Z.at[slot_R].set(keep(token_R, state.token_Z)),
        done_Z=state.done_Z.at[slot_R].set(done_R),
        recent_ZC=state.recent_ZC.at[slot_R].set(recent_RC),
        output_count_ZV=state.output_count_ZV.at[slot_R, token_R].add(live_R.astype(jnp.int32)),
    )


def logprobs_of(
    logits_RV: Float[Array, "R V"],
    token_R: Int[Array, " R"],
    most: int,
    *,
    tops: Bool[Array, ""] | None = None,
) -> Logprobs:
    """Log-probabilities of `token_R` and of the `most` most likely tokens, which are zeros where
    `tops` is given and false."""
    lse_R = jax.nn.logsumexp(logits_RV, axis=-1)
    chosen_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=1)[:, 0]
    R, Q = len(token_R), min(most, logits_RV.shape[1])

    def best(logits_RV):
        top_RQ, top_token_RQ = lax.top_k(logits_RV, Q)
        return top_RQ - lse_R[:, None], top_token_RQ

    if tops is None:
        top_RQ, top_token_RQ = best(logits_RV)
    else:
        none = lambda _: (jnp.zeros((R, Q)), jnp.zeros((R, Q), jnp.int32))
        top_RQ, top_token_RQ = lax.cond(tops, best, none, logits_RV)
    return Logprobs(
        chosen_R=chosen_R - lse_R,
        rank_R=(logits_RV > chosen_R[:, None]).sum(-1).astype(jnp.int32) + 1,
        top_token_RQ=top_token_RQ,
        top_RQ=top_RQ,
    )


def no_logprobs(rows: int, most: int, vocab_size: int) -> Logprobs:
    Q = min(most, vocab_size)
    return Logprobs(
        jnp.zeros(rows), jnp.zeros(rows, jnp.int32), jnp.zeros((rows, Q), jnp.int32),
        jnp.zeros((rows, Q)),
    )  # fmt: skip


def _constrain(x_RV, params: SlotParams, state: SlotState, slot_R, length_R):
    R, V = x_RV.shape
    row_R1, token_V = jnp.arange(R)[:, None], jnp.arange(V)
    x_RV = jnp.where(_bit(params.allowed_Zv, token_V), x_RV, BANNED)
    # A word is banned by its last token, when the tokens before it are the latest ones.
    tail_RB, head_RBc = params.bad_words_ZBC[..., -1], params.bad_words_ZBC[..., :-1]
    latest_R1c = state.recent_ZC[slot_R][:, None, 1:]
    match_RB = ((head_RBc == NO_TOKEN) | (head_RBc == latest_R1c)).all(-1)
    early_RE = jnp.broadcast_to((length_R < params.min_length_Z)[:, None], params.stop_ZE.shape)
    token = jnp.concatenate([params.bias_token_ZA, tail_RB, params.stop_ZE], axis=1)
    banned = jnp.concatenate([jnp.zeros(params.bias_ZA.shape, bool), match_RB, early_RE], axis=1)
    bias = jnp.pad(params.bias_ZA, ((0, 0), (0, BAD_WORDS + STOP_IDS)))
    token = jnp.where(token == NO_TOKEN, V, token)  # V: dropped
    return x_RV.at[row_R1, token].add(jnp.where(banned, BANNED, bias), mode="drop")


def _penalize(x_RV, params: SlotParams, state: SlotState, slot_R):
    count_RV = state.output_count_ZV[slot_R]
    said_RV = count_RV > 0
    known_RV = said_RV | _bit(params.prompt_Zv, jnp.arange(x_RV.shape[1]))
    repetition_RV = jnp.where(known_RV, params.repetition_Z[:, None], 1.0)
    x_RV = jnp.where(x_RV > 0, x_RV / repetition_RV, x_RV * repetition_RV)
    x_RV = x_RV - params.frequency_Z[:, None] * count_RV.astype(jnp.float32)
    return x_RV - params.presence_Z[:, None] * said_RV.astype(jnp.float32)


def _draw(x_RV, params: SlotParams, length_R, filters):
    """Gumbel-max: argmax of logits/temperature + noise keyed by (seed, position)."""
    greedy_R1 = params.temperature_Z[:, None] == 0
    y_RV = x_RV / jnp.where(greedy_R1, 1.0, params.temperature_Z[:, None])
    y_RV = lax.cond(filters > 0, lambda y: _filter(y, params), lambda y: y, y_RV)
    keys_R = jax.random.wrap_key_data(params.seed_Z2, impl="threefry2x32")
    keys_R = jax.vmap(jax.random.fold_in)(keys_R, length_R)
    noise_RV = jax.vmap(lambda key: jax.random.gumbel(key, (x_RV.shape[1],)))(keys_R)
    return argmax(jnp.where(greedy_R1, x_RV, y_RV + noise_RV))


def _filter(y_RV, params: SlotParams):
    """Ban what min_p, top_k and top_p leave out; equals of the last one kept are kept too."""
    floor_R1 = y_RV.max(-1, keepdims=True) + jnp.log(params.min_p_Z)[:, None]  # -inf when off
    y_RV = jnp.where(y_RV >= floor_R1, y_RV, BANNED)

    ordered_RV = _ordered(y_RV)
    enough = lambda t_R: (ordered_RV >= t_R[:, None]).sum(-1) >= params.top_k_Z
    y_RV = jnp.where(ordered_RV >= _largest(enough, y_RV.shape[0])[:, None], y_RV, BANNED)

    p_RV = jax.nn.softmax(y_RV, axis=-1)
    bits_RV = lax.bitcast_convert_type(p_RV, jnp.uint32)  # ordered, since p >= 0
    mass = lambda t_R: jnp.where(bits_RV >= t_R[:, None], p_RV, 0.0).sum(-1)
    least_R = jnp.maximum(params.top_p_Z, 1e-30)  # not even 0 leaves out the likeliest
    kept_R = _largest(lambda t_R: mass(t_R) >= least_R, y_RV.shape[0])
    kept_R = jnp.where(params.top_p_Z >= 1.0, jnp.uint32(0), kept_R)
    return jnp.where(bits_RV >= kept_R[:, None], y_RV, BANNED)


def _ordered(x):
    """uint32 in the order of the float32 values."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 0, bits | jnp.uint32(1 << 31), ~bits)


def _largest(holds, rows: int) -> UInt32[Array, " R"]:
    """The largest uint32 a row's monotone condition holds for; it holds for 0."""

    def step(i, t_R):
        raised_R = t_R | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(raised_R), raised_R, t_R)

    return lax.fori_loop(0, 32, step, jnp.zeros(rows, jnp.uint32))


def _bit(mask_Rv, token_V) -> Bool[Array, "R V"]:
    shift_V = (token_V % 32).astype(jnp.uint32)
    return ((mask_Rv[:, token_V // 32] >> shift_V[None]) & 1) == 1

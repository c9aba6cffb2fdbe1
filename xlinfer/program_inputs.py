"""What programs take from the host, and how it travels: all of a step's integers as one int32
vector.

T tokens of the step   R rows   M pages per row
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from xlinfer.plan import Plan
from xlinfer.sampling import Wanted

Ints = Any  # int32: numpy where the host fills them in, jax arrays inside the program
FROM_DEVICE = -1  # a token the host does not know yet: the slot's latest


class Encoded(NamedTuple):
    """Where each row has what the encoder made of its prompt, and of how many tokens."""

    pages_RM: Ints
    len_R: Ints


class ForwardInput(NamedTuple):
    token_T: Ints  # FROM_DEVICE or an id
    pos_T: Ints
    page_T: Ints  # where the token's KV goes
    offset_T: Ints  # within the page
    slot_T: Ints
    pages_RM: Ints
    kv_len_R: Ints
    start_R: Ints  # R+1
    num_decodes: Ints
    num_rows: Ints
    encoded: Encoded | None  # None: the model has no encoder


class SampleInput(NamedTuple):
    slot_R: Ints
    row_R: Ints  # of the forward's rows
    length_R: Ints  # tokens before the new one
    wanted: Wanted


class ScoreInput(NamedTuple):
    row_T: Ints  # of the forward's hidden states
    token_T: Ints  # that follows it
    num_rows: Ints
    tops: Ints  # 0 or 1: whether the most likely tokens are wanted


class PoolInput(NamedTuple):
    start_R: Ints  # of the forward's hidden states, where a row's begin
    end_R: Ints
    num_rows: Ints


class DecodeInput(NamedTuple):
    slot_R: Ints
    length_R: Ints
    pages_RM: Ints
    num_rows: Ints
    num_steps: Ints
    wanted: Wanted
    encoded: Encoded | None


class EncodeInput(NamedTuple):
    token_T: Ints
    page_T: Ints  # where the token's keys and values go
    offset_T: Ints  # within the page
    num_tokens: Ints


def pack(values: tuple) -> np.ndarray:
    """All of an input's integers as one int32 vector: one transfer a step."""
    leaves = jax.tree.leaves(values)
    return np.concatenate([np.asarray(x, np.int32).ravel() for x in leaves])


def unpack[Input](packed: Int[Array, " n"], shapes: Input) -> Input:
    """The arrays that `pack` was given; `shapes` is a tree of their ShapeDtypeStructs."""
    leaves, tree = jax.tree.flatten(shapes)
    ends = np.cumsum([0] + [x.size for x in leaves])
    parts = [
        packed[start : start + x.size].reshape(x.shape)
        for start, x in zip(ends[:-1], leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, parts)


def _whole(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


WANTED = Wanted(*(_whole() for _ in Wanted._fields))


def forward_shapes(plan: Plan, tokens: int) -> ForwardInput:
    R, M, one_T = plan.max_num_seqs, plan.pages_per_seq, _whole(tokens)
    return ForwardInput(
        one_T, one_T, one_T, one_T, one_T, _whole(R, M), _whole(R), _whole(R + 1),
        _whole(), _whole(), encoded_shapes(plan, R),
    )  # fmt: skip


def encoded_shapes(plan: Plan, rows: int) -> Encoded | None:
    return Encoded(_whole(rows, plan.pages_per_seq), _whole(rows)) if plan.encode_buckets else None


def encode_shapes(tokens: int) -> EncodeInput:
    one_T = _whole(tokens)
    return EncodeInput(one_T, one_T, one_T, _whole())


def sample_shapes(plan: Plan) -> SampleInput:
    one_R = _whole(plan.max_num_seqs)
    return SampleInput(one_R, one_R, one_R, WANTED)


def score_shapes(plan: Plan) -> ScoreInput:
    one_T = _whole(plan.max_num_batched_tokens)
    return ScoreInput(one_T, one_T, _whole(), _whole())


def pool_shapes(plan: Plan) -> PoolInput:
    one_R = _whole(plan.max_num_seqs)
    return PoolInput(one_R, one_R, _whole())


def decode_shapes(plan: Plan, rows: int) -> DecodeInput:
    pages_RM = _whole(rows, plan.pages_per_seq)
    return DecodeInput(
        _whole(rows), _whole(rows), pages_RM, _whole(), _whole(), WANTED,
        encoded_shapes(plan, rows),
    )  # fmt: skip

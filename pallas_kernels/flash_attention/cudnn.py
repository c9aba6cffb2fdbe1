"""cuDNN's attention through jax.nn, as the rival to measure against: only when asked for by name.

Its causal mask is aligned to the top left, which is right for whole rows alone. cuDNN has no
softcap or slopes, and a window is a constant of the program.
"""

import jax
import jax.numpy as jnp

HEAD_DIM_MULTIPLE = 8


def refusal(
    *, H, V, window, attention_chunk_size, softcap, sinks_N, alibi_N
) -> str | None:  # fmt: skip
    """Why cuDNN does not take the arguments: a sentence that begins with the one at fault."""
    widest = max(H, V)
    if widest > 256 or H % HEAD_DIM_MULTIPLE or V % HEAD_DIM_MULTIPLE:
        return f"head_dim is {H} and {V}; cudnn takes multiples of 8 up to 256"
    if V > H:
        return f"head_dim is {H} and {V}; cudnn takes a v no wider than q and k"
    if window is not None and not isinstance(window, int):
        return "window is traced; cudnn takes an int"
    for name, x in (
        ("attention_chunk_size", attention_chunk_size), ("softcap", softcap), ("sinks_N", sinks_N),
        ("alibi_N", alibi_N),
    ):  # fmt: skip
        if x is not None:
            return f"{name} is given; cudnn takes None"
    return None


def attend(q_BTNH, k_BTKH, v_BTKV, *, scale, causal, window, lengths_B):
    with jax.numpy_dtype_promotion("standard"):  # jax.nn's own code mixes dtypes
        o_BTNV = jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKV, scale=scale, is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            query_seq_lengths=lengths_B, key_value_seq_lengths=lengths_B,
            implementation="cudnn",
        )  # fmt: skip
    if lengths_B is None:
        return o_BTNV
    valid_BT = jnp.arange(q_BTNH.shape[1])[None] < lengths_B[:, None]
    return jnp.where(valid_BT[..., None, None], o_BTNV, jnp.zeros((), o_BTNV.dtype))

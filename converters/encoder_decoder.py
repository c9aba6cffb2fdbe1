"""The table that encoder-decoder families share: Llama's parts, for the encoder and the decoder."""

from collections.abc import Mapping
from dataclasses import replace

from converters.config import Constants
from converters.errors import CheckpointError
from converters.llama import Linear, llama_rows
from converters.rules import Row
from xlinfer.config import ModelConfig

Names = Mapping[str, str | Linear]  # as llama.NAMES has them
WHOLE = ("embed_VD", "head_DV")  # that belong to neither


def encoder_decoder_rows(
    config: ModelConfig, *, encoder: Names, decoder: Names, cross: Names
) -> tuple[Row, ...]:
    """`encoder` and `decoder` name the parts of each; `cross` those of the decoder's attention to
    the encoder's output, as q, k, v, o and attn_norm."""
    # Where a norm stands does not change what it is called.
    parts = replace(config, pre_norm=True, head_bias=False)
    rows = {
        "encoder": llama_rows(parts, encoder),
        "decoder": llama_rows(parts, decoder),
        "cross": [
            replace(row, target=row.target.replace("layers.attn", "layers.cross"))
            for row in llama_rows(parts, {**decoder, **cross})
            if row.target.startswith("layers.attn")
        ],
    }
    is_there = lambda row: config.pre_norm or not row.target.startswith("norm.")
    return (
        *(row for row in rows["decoder"] if row.target in WHOLE),
        *(
            replace(row, target=f"{'encoder' if of == 'encoder' else 'decoder'}.{row.target}")
            for of in rows
            for row in rows[of]
            if row.target not in WHOLE and is_there(row)
        ),
    )


def decoder_start(constants: Constants, absent: int | None) -> int:
    """`decoder_start_token_id`, or `absent` where the file says null."""
    given = constants.get("decoder_start_token_id")
    start = absent if given is None else given
    if type(start) is not int or start < 0:
        raise CheckpointError(
            f"{constants.where}: 'decoder_start_token_id' is {start!r}; it must be a token id: the "
            "one that the decoder's sequences begin with"
        )
    return start

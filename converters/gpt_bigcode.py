"""GPTBigCode (SantaCoder, StarCoder): GPT-2 with linear layers that have their outputs first, and
with one kv head or one for each query head; q, k and v in one tensor by turns of groups."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from converters.config import DECODER_ONLY, Constants, known_keys
from converters.family import Family
from converters.gpt2 import ALIASES, SUMMARY
from converters.llama import SIZES, Linear, llama_config, llama_rows
from xlinfer.config import ModelConfig

# What GPTBigCodeConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-5,
    "intermediate_size": None,
    "multi_query": True,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
    "num_key_value_heads": None,
    "head_dim": None,
}
FIXED: Mapping[str, tuple[Any, ...]] = {**DECODER_ONLY, "head_dim": (None,)}
# Dropout, the order of operations in half precision, what text-generation-inference once read.
HARMLESS = frozenset(
    """
    attn_pdrop attention_softmax_in_fp32 scale_attention_softmax_in_fp32 n_ctx
    inference_runner max_batch_size max_sequence_length pad_key_length pre_allocate_kv_cache
    validate_runner_input
    """.split()
)
LAYER = "transformer.h.{layer}."
QKV = f"{LAYER}attn.c_attn"
NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "attn_norm": f"{LAYER}ln_1",
    "mlp_norm": f"{LAYER}ln_2",
    "q": Linear(QKV, "(X G|1|1 H)", 0),
    "k": Linear(QKV, "(K G|1|1 H)", 1),
    "v": Linear(QKV, "(K G|1|1 H)", 2),
    "o": f"{LAYER}attn.c_proj",
    "up": f"{LAYER}mlp.c_fc",
    "down": f"{LAYER}mlp.c_proj",
}


def read_gpt_bigcode(constants: Constants) -> ModelConfig:
    constants = replace(constants, aliases=ALIASES)
    constants = constants.check(known_keys(SIZES, HARMLESS, SUMMARY), FIXED, ABSENT)
    heads = 1 if constants.flag("multi_query") else constants.integer("num_attention_heads")
    # transformers writes it and reads multi_query alone.
    constants = constants.check(constants.values, {"num_key_value_heads": (None, heads)}, {})
    if constants.get("intermediate_size") is None:
        constants = constants.having(intermediate_size=4 * constants.integer("hidden_size"))
    config = llama_config(
        constants.having(num_key_value_heads=heads),
        model_type="gpt_bigcode",
        absent_rope_theta=None,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    )
    config = replace(config, norm="layer", gated_mlp=False, learned_positions=True)
    return config if constants.flag("scale_attn_weights") else replace(config, attention_scale=1.0)


GPT_BIGCODE = Family(
    model_type="gpt_bigcode",
    read=read_gpt_bigcode,
    rows=partial(llama_rows, names=NAMES),
    prefix="transformer.",
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias", r"transformer\.bias"),  # causal masks
    copies={"lm_head.weight": "transformer.wte.weight"},
)

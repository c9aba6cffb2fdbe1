"""DeepSeek V3 and R1 (deepseek_v3), V2 and V2-Lite (deepseek_v2): latent attention, experts of
which some are for every token, and an MLP in the first layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters import moe
from converters.config import DECODER_ONLY, Constants, known_keys
from converters.errors import CheckpointError
from converters.family import Family
from converters.llama import COPIES, IGNORED, LAYER, SIZES, llama_config, llama_rows
from converters.rope import KEYS as ROPE_KEYS
from converters.rope import latent_scale
from converters.rules import Row
from xlinfer.config import MLA, ExpertGroups, ModelConfig

ALIASES = {"num_experts": "n_routed_experts"}
OWN_SIZES = frozenset(
    """
    kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim moe_intermediate_size
    num_experts n_shared_experts num_experts_per_tok first_k_dense_replace
    """.split()
)
# What both families' configs of transformers put where the file is silent.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "q_lora_rank": 1536,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
V3_ABSENT: Mapping[str, Any] = {
    **ABSENT,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_interleave": True,
}
V2_ABSENT: Mapping[str, Any] = {
    **ABSENT,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
}
ABSENT_ROPE_THETA = 10_000.0
FIXED: Mapping[str, tuple[Any, ...]] = {
    **DECODER_ONLY,
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
}
V3_FIXED: Mapping[str, tuple[Any, ...]] = {
    **FIXED,
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "num_nextn_predict_layers": (1, 0),
}
# Of V2 the published code and transformers differ in what true means; no published model has it.
V2_FIXED: Mapping[str, tuple[Any, ...]] = {
    **FIXED,
    "scoring_func": ("softmax",),
    "norm_topk_prob": (False,),
}
# How training balanced experts and spread them, and what follows from other keys.
HARMLESS = frozenset({"aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp"}) | {
    "head_dim",
    "qk_head_dim",
}
LATENT_NORM_EPS = 1e-6  # whatever rms_norm_eps says
GROUP_CHOICES = {"greedy": False, "group_limited_greedy": True}

QUERY = (
    Row("layers.attn.q_D_NH", f"{LAYER}self_attn.q_proj.weight", "(N H) D -> D (N H)", inputs="D"),
)
LOW_RANK_QUERY = (
    Row("layers.attn.q_a_DQ", f"{LAYER}self_attn.q_a_proj.weight", "Q D -> D Q", inputs="D"),
    Row("layers.attn.q_a_norm.scale_D", f"{LAYER}self_attn.q_a_layernorm.weight", "Q -> Q"),
    Row(
        "layers.attn.q_b_Q_NH",
        f"{LAYER}self_attn.q_b_proj.weight",
        "(N H) Q -> Q (N H)",
        inputs="Q",
    ),
)
KV_B = f"{LAYER}self_attn.kv_b_proj.weight"
ABSORBED = "its halves multiply queries and outputs of a head each, which no packed product does"
LATENT = (
    Row(
        "layers.attn.kv_a_DL",
        f"{LAYER}self_attn.kv_a_proj_with_mqa.weight",
        "L D -> D L",
        inputs="D",
    ),
    Row("layers.attn.kv_a_norm.scale_D", f"{LAYER}self_attn.kv_a_layernorm.weight", "C -> C"),
    Row("layers.attn.k_b_NUC", KV_B, "(N U|W) C -> N U C", inputs="C", floats=ABSORBED),
    Row("layers.attn.v_b_NCW", KV_B, "(N U|W) C -> N C W", piece=1, inputs="C", floats=ABSORBED),
    Row(
        "layers.attn.o_NW_D",
        f"{LAYER}self_attn.o_proj.weight",
        "D (N W) -> (N W) D",
        inputs="(N W)",
    ),
)
SELECTION_BIAS = (
    Row("layers.moe.selection_bias_R", f"{LAYER}mlp.gate.e_score_correction_bias", "R -> R"),
)


def deepseek_rows(config: ModelConfig) -> tuple[Row, ...]:
    assert config.mla is not None and config.moe is not None
    return (
        *llama_rows(config),
        *(QUERY if config.mla.query_rank is None else LOW_RANK_QUERY),
        *LATENT,
        *moe.QWEN_EXPERTS,
        *moe.shared_rows("mlp.shared_experts"),
        *(SELECTION_BIAS if config.moe.selection_bias else ()),
    )


def read_deepseek_v3(constants: Constants) -> ModelConfig:
    known = known_keys(SIZES, OWN_SIZES, ROPE_KEYS, moe.HARMLESS, HARMLESS)
    constants = replace(constants, aliases=ALIASES).check(known, V3_FIXED, V3_ABSENT)
    config = _config(constants, "deepseek_v3")
    assert config.moe is not None
    experts = replace(
        config.moe,
        scores="sigmoid",
        selection_bias=True,
        groups=_groups(constants, best=2),
        norm_topk_prob=constants.flag("norm_topk_prob"),
    )
    return replace(config, moe=experts, rope_interleaved=constants.flag("rope_interleave"))


def read_deepseek_v2(constants: Constants) -> ModelConfig:
    known = known_keys(SIZES, OWN_SIZES, ROPE_KEYS, moe.HARMLESS, HARMLESS)
    constants = replace(constants, aliases=ALIASES).check(known, V2_FIXED, V2_ABSENT)
    config, in_groups = (
        _config(constants, "deepseek_v2"),
        constants.choice("topk_method", GROUP_CHOICES),
    )
    assert config.moe is not None
    experts = replace(config.moe, groups=_groups(constants, best=1) if in_groups else None)
    return replace(config, moe=experts, rope_interleaved=True)


def _config(constants: Constants, model_type: str) -> ModelConfig:
    """What both read alike. Only the last part of a head has a rope, so that part is what Llama's
    reader is told of."""
    heads = constants.integer("num_attention_heads")
    kv_heads = constants.optional_integer("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise CheckpointError(
            f"{constants.where}: num_key_value_heads is {kv_heads} and num_attention_heads "
            f"{heads}; a latent serves all heads, so they must agree"
        )
    nope, rope = constants.integer("qk_nope_head_dim"), constants.integer("qk_rope_head_dim")
    per_expert, layers = (
        constants.integer("moe_intermediate_size"),
        constants.integer("num_hidden_layers"),
    )
    first = constants.integer("first_k_dense_replace", least=0)
    experts = moe.read_moe(
        constants,
        size="moe_intermediate_size",
        norm_topk_prob=False,
        shared=constants.integer("n_shared_experts") * per_expert,
        bias=False,
        layers=tuple(range(min(first, layers), layers)),
    )
    config = llama_config(
        constants.having(head_dim=rope),
        model_type=model_type,
        absent_rope_theta=ABSENT_ROPE_THETA,
        moe=replace(
            experts,
            weight_multiplier=constants.number("routed_scaling_factor"),
            shared_gate=False,
        ),
    )
    return replace(
        config,
        head_dim=nope + rope,
        mla=MLA(
            query_rank=constants.optional_integer("q_lora_rank"),
            latent_dim=constants.integer("kv_lora_rank"),
            nope_dim=nope,
            value_dim=constants.integer("v_head_dim"),
            norm_eps=LATENT_NORM_EPS,
        ),
        attention_scale=(nope + rope) ** -0.5 * latent_scale(constants, ABSENT_ROPE_THETA),
    )


def _groups(constants: Constants, best: int) -> ExpertGroups:
    count, chosen = constants.integer("n_group"), constants.integer("topk_group")
    experts, each = constants.integer("num_experts"), constants.integer("num_experts_per_tok")
    if experts % count or chosen > count or chosen * experts // count < each:
        raise CheckpointError(
            f"{constants.where}: {experts} experts in {count} groups (n_group), of which {chosen} "
            f"(topk_group) offer {each} (num_experts_per_tok): groups must be of one size, and "
            "those chosen hold as many experts as a token needs"
        )
    if experts // count < best:
        raise CheckpointError(
            f"{constants.where}: groups of {experts // count} experts (n_group {count}); the best "
            f"{best} of each are added"
        )
    return ExpertGroups(count=count, chosen=chosen, best=best)


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    read=read_deepseek_v3,
    rows=deepseek_rows,
    ignored=IGNORED,
    has_mtp_layers=True,
    copies=COPIES,
)
DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    read=read_deepseek_v2,
    rows=deepseek_rows,
    ignored=IGNORED,
    copies=COPIES,
)

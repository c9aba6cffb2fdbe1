"""config.json of each family: what is read, what stands for what is absent, what is refused."""

import math
from dataclasses import replace
from typing import Any

import pytest

from converters import CheckpointError
from tests.checkpoints import config, opened
from xlinfer.config import ClampedSwiGLU, DefaultRope, LinearRope, MoE, YarnRope

GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def phi3(**changes):
    return config("phi3", **changes)


def longrope(**changes):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2, 3, 4, 5.5]}
    return {**rope, "original_max_position_embeddings": 16, **changes}


def gpt2(**changes):
    names = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64}
    return {"model_type": "gpt2", **{k: v for k, v in {**names, **changes}.items() if v is not ...}}


def bigcode(**changes):
    return gpt2(model_type="gpt_bigcode", **changes)


GROUPED: dict[str, Any] = {"new_decoder_architecture": True, "num_kv_heads": 2}
LAYER_NORM: dict[str, Any] = {"rms_norm_eps": ..., "layer_norm_eps": 1e-5, "head_dim": ...}
PARTIAL: dict[str, Any] = {"head_dim": 8, "rope_parameters": {"partial_rotary_factor": 0.75}}


def neox(**changes):
    no = dict.fromkeys(("rms_norm_eps", "num_key_value_heads", "head_dim", "rope_parameters"), ...)
    return config("gpt_neox", **{**no, **changes})


def opt(**changes):
    no = dict.fromkeys(
        ("intermediate_size", "rms_norm_eps", "num_key_value_heads", "head_dim"), ...
    )
    no |= dict.fromkeys(("hidden_act", "rope_parameters"), ...)
    return config("opt", **{**no, "ffn_dim": 24, **changes})


def bloom(**changes):
    names = {"hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    return {"model_type": "bloom", **names, **changes}


def falcon(**changes):
    names = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {"model_type": "falcon", **names, "vocab_size": 64, **changes}


def test_constants_of_each_family(tmp_path):
    llama = opened(tmp_path, config()).config
    assert (llama.hidden_size, llama.num_layers, llama.num_heads) == (16, 2, 4)
    assert (llama.num_kv_heads, llama.head_dim, llama.norm_eps) == (2, 8, 1e-5)
    assert llama.ropes == (DefaultRope(theta=1000.0),) * 2 and llama.windows == (None, None)
    qwen2 = opened(tmp_path, config("qwen2")).config
    assert qwen2.qkv_bias and not qwen2.attention_output_bias and qwen2.qk_norm is None
    qwen3 = opened(tmp_path, config("qwen3")).config
    assert qwen3.qk_norm == "head" and not qwen3.qkv_bias
    biased = opened(tmp_path, config("qwen3", attention_bias=True)).config
    assert biased.qkv_bias and biased.attention_output_bias


@pytest.mark.parametrize(
    "cfg, field, want",
    [
        # What each class of transformers puts for a key that is absent.
        (config(rope_parameters=...), "ropes", (DefaultRope(theta=10_000.0),) * 2),
        (config(rms_norm_eps=...), "norm_eps", 1e-6),
        (config(num_key_value_heads=...), "num_kv_heads", 4),
        (config(num_key_value_heads=None), "num_kv_heads", 4),
        (config(head_dim=...), "head_dim", 4),
        (config(head_dim=None), "head_dim", 4),
        (config(tie_word_embeddings=...), "tie_word_embeddings", False),
        (config("qwen2", tie_word_embeddings=...), "tie_word_embeddings", False),
        (config("qwen3", head_dim=...), "head_dim", 128),
        (config("mistral"), "windows", (4096, 4096)),
        (config("mixtral"), "windows", (None, None)),
        (config("mixtral", rope_parameters=...), "ropes", (DefaultRope(theta=1_000_000.0),) * 2),
        (config("mixtral", router_jitter_noise=0.1), "num_kv_heads", 2),
        (config("qwen3_moe", head_dim=None), "head_dim", 4),
        (config("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=1), "num_kv_heads", 2),
        (config("qwen2_moe"), "qkv_bias", True),
        (config("qwen2_moe", qkv_bias=False), "qkv_bias", False),
        (config("mistral", sliding_window=None), "windows", (None, None)),
        (config("mistral", sliding_window=7), "windows", (7, 7)),
        (config("qwen2", sliding_window=7), "windows", (None, None)),
        (
            config("qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=1),
            "windows",
            (None, 7),
        ),
        (
            config(
                "qwen3",
                sliding_window=7,
                use_sliding_window=True,
                layer_types=["sliding_attention", "full_attention"],
            ),
            "windows",
            (7, None),
        ),
        (phi3(partial_rotary_factor=0.5), "rotary_dim", 4),
        (config("granite", logits_scaling=8.0), "logits_divisor", 8.0),
        (config("granite", attention_multiplier=0.015625), "attention_scale", 0.015625),
        (
            config("smollm3", no_rope_layer_interval=2),
            "ropes",
            (DefaultRope(theta=1000.0), None),
        ),
        (
            config("smollm3", no_rope_layers=[0, 1], use_sliding_window=True, sliding_window=7),
            "windows",
            (7, None),
        ),
        (config("stablelm", **LAYER_NORM, partial_rotary_factor=0.5), "rotary_dim", 2),
        (config("stablelm", **LAYER_NORM, partial_rotary_factor=1), "shared_norm", False),
        (config("phi", **{**LAYER_NORM, **PARTIAL}), "rotary_dim", 6),
        (neox(rotary_pct=1.0), "rotary_dim", 4),
        (neox(rotary_pct=0.5, use_parallel_residual=False), "parallel", False),
        (neox(rotary_pct=0.5, rotary_emb_base=500), "ropes", (DefaultRope(theta=500.0),) * 2),
        (opt(word_embed_proj_dim=16), "hidden_act", "relu"),
        (phi3(rope_parameters={"partial_rotary_factor": 0.75}), "rotary_dim", 6),
        (bloom(), "max_position_embeddings", 2048),
        (bloom(seq_length=512), "max_position_embeddings", 512),
        (bloom(), "intermediate_size", 64),
        (falcon(), "num_kv_heads", 1),
        (falcon(), "max_position_embeddings", 2048),
        (falcon(ffn_hidden_size=20, bias=True), "mlp_bias", True),
        (falcon(num_kv_heads=71), "num_kv_heads", 1),
        (falcon(), "shared_norm", True),
        (falcon(parallel_attn=False), "shared_norm", False),
        (falcon(multi_query=False), "num_kv_heads", 4),
        (falcon(alibi=True), "ropes", (None, None)),
        (falcon(alibi=True), "alibi_scale", 0.5),
        (falcon(**GROUPED), "num_kv_heads", 2),
        (falcon(**GROUPED), "shared_norm", False),
        (falcon(**GROUPED, multi_query=False, num_ln_in_parallel_attn=2), "shared_norm", False),
        (falcon(**GROUPED, num_ln_in_parallel_attn=1, ff_factor=4), "shared_norm", True),
        (falcon(new_decoder_architecture=True), "num_kv_heads", 4),
        (gpt2(), "intermediate_size", 64),
        (gpt2(n_inner=20), "intermediate_size", 20),
        (gpt2(), "ropes", (None, None)),
        (bigcode(), "num_kv_heads", 1),
        (bigcode(num_key_value_heads=1), "hidden_act", "gelu_tanh"),
        (bigcode(multi_query=False), "num_kv_heads", 4),
        (bigcode(), "attention_scale", 0.5),
        (bigcode(scale_attn_weights=False), "attention_scale", 1.0),
        (config("starcoder2", rms_norm_eps=..., use_bias=False), "mlp_bias", False),
        (
            config("gpt_oss", **GPT_OSS, rope_parameters=...),
            "ropes",
            (
                YarnRope(
                    theta=150_000.0,
                    factor=32.0,
                    original_max_position_embeddings=4096,
                    beta_fast=32.0,
                    beta_slow=1.0,
                    attention_factor=0.1 * math.log(32) + 1,
                    truncate=False,
                ),
            )
            * 2,
        ),
        (config("gpt_oss", **GPT_OSS), "hidden_act", ClampedSwiGLU(alpha=1.702, limit=7.0)),
        (config("gpt_oss", **GPT_OSS), "windows", (128, None)),
        (config("gemma", hidden_act="gelu"), "hidden_act", "gelu_tanh"),
        (config("gemma", hidden_act=...), "hidden_act", "gelu_tanh"),
        (config("gemma2", hidden_act=..., sliding_window=7), "windows", (7, None)),
        (config("gemma2", hidden_act=...), "attention_softcap", 50.0),
        (config("gemma2", hidden_act=..., final_logit_softcapping=None), "logit_softcap", None),
        (
            config("gemma3_text", hidden_act=..., rope_parameters=..., sliding_window_pattern=2),
            "ropes",
            (DefaultRope(theta=10_000.0), DefaultRope(theta=1_000_000.0)),
        ),
        (config(hidden_act="gelu_pytorch_tanh"), "hidden_act", "gelu_tanh"),
        (
            config(
                rope_parameters=..., rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2}
            ),
            "ropes",
            (LinearRope(theta=5e5, factor=2.0),) * 2,
        ),
        # Kept from fine-tuning and export tools, without a meaning for inference.
        (
            config(auto_map={"AutoModel": "x--y.Z"}, unsloth_version="1", use_cache=True),
            "ropes",
            ...,
        ),
    ],
)
def test_absent_and_optional_keys(cfg, field, want, tmp_path):
    got = getattr(opened(tmp_path, cfg).config, field)
    assert want is ... or got == want


@pytest.mark.parametrize(
    "cfg, message",
    [
        (bloom(apply_residual_connection_post_layernorm=True), "xlinfer computes only False"),
        (falcon(**GROUPED, parallel_attn=False), "'parallel_attn' is False; .* only True"),
        (falcon(**GROUPED, num_ln_in_parallel_attn=3), "'num_ln_in_parallel_attn' is 3"),
        (falcon(num_ln_in_parallel_attn=2), "'num_ln_in_parallel_attn' is 2; .* None or 1"),
        (falcon(multi_query=False, num_kv_heads=2), "'num_kv_heads' is 2; .* only None or 4"),
        (falcon(new_decoder_architecture=True, num_kv_heads=3), "4 is not a multiple"),
        (falcon(num_key_value_heads=2), "'num_key_value_heads' is 2"),
        (config(foo=1), "unknown model constant 'foo'"),
        (config(foo=1, bar=2), "'bar', 'foo'"),
        (config(logits_scaling=8.0), "'logits_scaling'"),
        (config(sliding_window=4), "'sliding_window'"),  # a key of other families
        (config(vocab_size=...), "'vocab_size' is missing"),
        (config(vocab_size="64"), "'vocab_size' is '64'"),
        (config(vocab_size=True), "'vocab_size' is True"),
        (config(num_hidden_layers=0), "'num_hidden_layers' is 0; it must be an integer >= 1"),
        (config(hidden_size=16.5), "'hidden_size' is 16.5"),
        (config(hidden_size=None), "'hidden_size' is None"),
        (config(rms_norm_eps=-1e-6), "'rms_norm_eps'"),
        (config(rms_norm_eps=float("nan")), "'rms_norm_eps'"),
        (config(tie_word_embeddings="false"), "'tie_word_embeddings' is 'false'"),
        (config(attention_bias=1), "'attention_bias' is 1"),
        (config(num_attention_heads=3, num_key_value_heads=2), "3 is not a multiple"),
        (config(num_attention_heads=3, num_key_value_heads=3, head_dim=None), "no head_dim"),
        (config(head_dim=7), "odd"),
        (config(hidden_act="relu2"), "'relu2'.* silu"),
        (config(rope_interleaved=True), "'rope_interleaved' is True"),
        (config(is_encoder_decoder=True), "'is_encoder_decoder' is True"),
        (config(partial_rotary_factor=0.5), "'partial_rotary_factor' is 0.5"),
        (config("mistral", attention_bias=True), "'attention_bias' is True"),
        (config("qwen2", use_mrope=True), "'use_mrope' is True"),
        (config("qwen2", layer_types=["full_attention"]), "must hold 2"),
        (config("qwen2", layer_types=["full_attention", "linear_attention"]), "linear_attention"),
        (config("qwen2", layer_types=["sliding_attention"] * 2), "use_sliding_window is false"),
        (config("qwen2", layer_types="full_attention"), "'layer_types'"),
        (config("qwen2", layer_types=[1, 2]), "'layer_types'"),
        (config("lama"), "does not know model_type 'lama'. The nearest: llama"),
        (
            config("qwen2_vl"),
            "The nearest: qwen2.* It knows .*llama, llama4_text, mistral, .*qwen2, qwen2_",
        ),
        (config("qwen3_moe", num_experts=...), "'num_experts' is missing"),
        (config("qwen3_moe", num_local_experts=4), "num_experts is 8 and num_local_experts 4"),
        (config("qwen3_moe", num_experts_per_tok=9), "'num_experts_per_tok' is 9, .* 8 experts"),
        (config("qwen3_moe", moe_intermediate_size=...), "'moe_intermediate_size' is missing"),
        (config("qwen3_moe", mlp_only_layers=["1"]), "'mlp_only_layers' is"),
        (config("qwen2_moe", use_sliding_window=True), "'use_sliding_window' is True"),
        (config("qwen3_moe", shared_expert_intermediate_size=8), "unknown model constant"),
        (config("qwen2_moe", shared_expert_intermediate_size=...), "'shared_expert_int.* missing"),
        (config("mixtral", norm_topk_prob=False), "unknown model constant 'norm_topk_prob'"),
        (config("mixtral", attention_bias=True), "'attention_bias' is True"),
        (config("zzz"), "'zzz'. It knows bart"),
        (config("granite", residual_multiplier=0), "'residual_multiplier' is 0; it must be"),
        (config("olmo2", clip_qkv=8.0), "unknown model constant 'clip_qkv'"),
        (config("smollm3", no_rope_layers=[1]), "'no_rope_layers' must be null or 2 of 0 and 1"),
        (config("smollm3", layer_types=["sliding_attention"] * 2), "use_sliding_window is false"),
        (config("stablelm", **LAYER_NORM, qk_layernorm=True), "'qk_layernorm' is True"),
        (config("stablelm", **LAYER_NORM, rotary_pct=0.5), "unknown model constant 'rotary_pct'"),
        (config("phi", **LAYER_NORM, qk_layernorm=True), "'qk_layernorm' is True"),
        (config("phi", **LAYER_NORM, tie_word_embeddings=True), "'tie_word_embeddings' is True"),
        (
            config("phi", **{**LAYER_NORM, **PARTIAL}, partial_rotary_factor=0.5),
            "partial_rotary_factor has two values",
        ),
        (neox(rotary_pct=2.0), "'rotary_pct' is 2"),
        (neox(rms_norm_eps=1e-5), "unknown model constant 'rms_norm_eps'"),
        (opt(do_layer_norm_before=False), "'do_layer_norm_before' is False"),
        (opt(word_embed_proj_dim=8), "'word_embed_proj_dim' is not hidden_size, 16"),
        (opt(ffn_dim=...), "'ffn_dim' is missing"),
        (
            phi3(rope_parameters=longrope(short_factor=[1.0])),
            "'short_factor' must be a list of 4 nu",
        ),
        (phi3(rope_parameters=longrope(long_factor=[1, 2, 3, 0])), "'long_factor' must be a list"),
        (
            phi3(rope_parameters=longrope(), original_max_position_embeddings=8),
            "is 8 outside and 16",
        ),
        (phi3(partial_rotary_factor=1.5), "'partial_rotary_factor' is 1.5"),
        (phi3(partial_rotary_factor=0.4), "0.4 of a head_dim of 8 is no even number"),
        (phi3(attention_bias=True), "'attention_bias' is True"),
        (config("gpt_oss", num_experts_per_tok=9, num_local_experts=8), "there are 8 experts"),
        (
            config("gpt_oss", **GPT_OSS, swiglu_limit=0),
            "'swiglu_limit' is 0; it must be a number > 0",
        ),
        (config("gpt_oss", hidden_act="gelu"), "'hidden_act' is 'gelu'"),
        (gpt2(n_embd=...), "'n_embd' is missing"),
        (gpt2(n_head=0), "'n_head' is 0; it must be an integer >= 1"),
        (gpt2(activation_function="tanh"), "'activation_function' is 'tanh'"),
        (gpt2(scale_attn_by_inverse_layer_idx=True), "'scale_attn_by_inverse_layer_idx' is True"),
        (
            bigcode(num_key_value_heads=4),
            "'num_key_value_heads' is 4; xlinfer computes only None or",
        ),
        (bigcode(multi_query="yes"), "'multi_query' is 'yes'; it must be true or false"),
        (bigcode(add_cross_attention=True), "'add_cross_attention' is True"),
        (gpt2(hidden_size=32), "unknown model constant 'hidden_size'"),
        (config("starcoder2", rms_norm_eps=..., norm_type="rms_norm"), "'norm_type' is 'rms_norm'"),
        (config("gemma3"), "'gemma3' reads images beside text.* --text_only .*text_only=True"),
        (
            config("gemma2", hidden_act=..., hidden_activation="relu"),
            "'hidden_activation' is 'relu'",
        ),
        (
            config("gemma2", hidden_act=..., use_bidirectional_attention=True),
            "'use_bidirectional_attention'",
        ),
        (
            config("gemma2", hidden_act=..., attn_logit_softcapping=-1.0),
            "'attn_logit_softcapping' is -1.0",
        ),
        (
            config("gemma3_text", hidden_act=..., rope_parameters={"full_attention": {}}),
            "and sliding_attention",
        ),
        (config(model_type=...), "'model_type' must name"),
        (config(eos_token_id="x"), "'eos_token_id' is 'x'"),
        ([], "must be an object"),
    ],
)
def test_configs_that_are_refused(cfg, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path, cfg)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_the_constants_of_experts(tmp_path):
    """By either name for their number; Qwen's weights add up to 1 only where the file says so."""
    shared = MoE(
        layers=(0, 1),
        num_experts=4,
        num_experts_per_tok=2,
        intermediate_size=12,
        scores="softmax",
        selection_bias=False,
        groups=None,
        norm_topk_prob=False,
        weight_multiplier=1.0,
        shared_intermediate_size=20,
        shared_gate=True,
        bias=False,
        scaled_inputs=False,
    )
    assert opened(tmp_path, config("qwen2_moe")).config.moe == shared
    renamed = config("qwen2_moe", num_experts=..., num_local_experts=4, norm_topk_prob=True)
    assert opened(tmp_path, renamed).config.moe == replace(shared, norm_topk_prob=True)
    sparse = config("qwen2_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[1])
    assert opened(tmp_path, sparse).config.moe == replace(shared, layers=(3, 5))
    mixtral = replace(
        shared,
        intermediate_size=24,
        norm_topk_prob=True,
        shared_intermediate_size=None,
        shared_gate=False,
    )
    assert opened(tmp_path, config("mixtral")).config.moe == mixtral
    assert opened(tmp_path, config("qwen3")).config.moe is None

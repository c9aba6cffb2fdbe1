"""config.json of DeepSeek V2 and V3: what is read, what stands for what is absent, and what is
refused."""

import json
import math
from dataclasses import replace

import pytest

from converters import CheckpointError
from tests.checkpoints import GOLDENS, opened
from xlinfer.config import ExpertGroups, MoE


def deepseek(version="v3", **changes):
    golden = GOLDENS / f"deepseek-{version}" / "config.json"
    values = {**json.loads(golden.read_text()), **changes}
    return {key: value for key, value in values.items() if value is not ...}


@pytest.mark.parametrize(
    "cfg, field, want",
    [
        (deepseek(rope_interleave=False), "rope_interleaved", False),
        (deepseek(rope_interleave=...), "rope_interleaved", True),
        (
            deepseek(
                "v2", rope_parameters={"rope_type": "yarn", "factor": 40, "mscale_all_dim": 1}
            ),
            "attention_scale",
            24**-0.5 * (0.1 * math.log(40) + 1) ** 2,
        ),
        (
            deepseek("v2", rope_parameters={"rope_type": "yarn", "factor": 40}),
            "attention_scale",
            24**-0.5,
        ),
    ],
)
def test_constants(cfg, field, want, tmp_path):
    assert getattr(opened(tmp_path, cfg).config, field) == pytest.approx(want)


@pytest.mark.parametrize(
    "cfg, message",
    [
        (deepseek(n_group=3), "8 experts in 3 groups"),
        (deepseek(topk_group=5), "4 groups .n_group., of which 5"),
        (deepseek(topk_group=1, num_experts_per_tok=3), "of which 1 .topk_group. offer 3"),
        (deepseek(n_group=8), "groups of 1 experts"),
        (deepseek(num_key_value_heads=2), "num_key_value_heads is 2 and num_attention_heads 4"),
        (deepseek(scoring_func="softmax"), "'scoring_func' is 'softmax'"),
        (deepseek(moe_layer_freq=2), "'moe_layer_freq' is 2"),
        (deepseek(kv_lora_rank=...), "'kv_lora_rank' is missing"),
        (deepseek("v2", norm_topk_prob=True), "'norm_topk_prob' is True"),
        (deepseek("v2", topk_method="noaux_tc"), "'topk_method' is 'noaux_tc', which"),
        (deepseek("v2", n_group=None), "'n_group' is None"),
    ],
)
def test_configs_that_are_refused(cfg, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, cfg)


def test_the_experts_of_deepseek(tmp_path):
    """Scored by sigmoids in V3, by softmax in V2; with fewer layers than MLPs there are none."""
    v3 = opened(tmp_path, deepseek()).config.moe
    assert v3 is not None
    assert v3 == MoE(
        layers=(1, 2),
        num_experts=8,
        num_experts_per_tok=2,
        intermediate_size=16,
        scores="sigmoid",
        selection_bias=True,
        groups=ExpertGroups(count=4, chosen=2, best=2),
        norm_topk_prob=True,
        weight_multiplier=2.5,
        shared_intermediate_size=16,
        shared_gate=False,
        bias=False,
        scaled_inputs=False,
    )
    v2 = replace(
        v3, scores="softmax", selection_bias=False, groups=ExpertGroups(count=4, chosen=2, best=1),
        norm_topk_prob=False, num_experts_per_tok=3, weight_multiplier=1.7,
        shared_intermediate_size=32,
    )  # fmt: skip
    assert opened(tmp_path, deepseek("v2")).config.moe == v2
    greedy = opened(tmp_path, deepseek("v2", topk_method="greedy")).config.moe
    assert greedy == replace(v2, groups=None)
    assert opened(tmp_path, deepseek(first_k_dense_replace=9)).config.moe == replace(v3, layers=())

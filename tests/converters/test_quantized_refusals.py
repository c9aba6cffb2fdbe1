"""What is refused of quantized checkpoints, with the sentence that its owner reads.

FOLDER stands for the checkpoint's, CONFIG for where it says how it is quantized, UP for its file
and the one module that is changed, READ for the methods that are read.
"""

from functools import partial

import numpy as np
import pytest

from converters.quantization import REFUSED
from tests.converters import packers
from tests.converters.packers import Packer
from tests.converters.quantized import (
    NAN,
    STATE,
    UP,
    Change,
    extra,
    first,
    group,
    make,
    one_float,
    only,
    prove,
    said_of,
    sentence,
    state,
    tensor,
    without,
)
from xlinfer.commands.plan import main
from xlinfer.weights import load_model

GPTQ = partial(packers.gptq, bits=4, group=32)
SYM = partial(packers.gptq, bits=4, group=32, symmetric=True)
ORDERED = partial(packers.gptq, bits=4, group=32, reordered=True)
AWQ = partial(packers.awq, version="gemm", group=32)
INTS = partial(packers.packed_ints, bits=4, group=32)
BY_CHANNEL = partial(packers.plain, kind="int", strategy="channel")
BLOCKS = packers.fp8_blocks
MX, NV = packers.mxfp4, partial(packers.nvfp4, by="modelopt")
NF4 = partial(packers.bnb4, grid="nf4", nested=True)
EXPERTS = "experts"  # of a Qwen3-MoE
CASES: dict[str, tuple[Packer | tuple[str, Packer], Change, str]] = {
    "an unknown method": (
        GPTQ, said_of(quant_method="gptq2"),
        "CONFIG: quant_method 'gptq2' is not read. xlinfer reads READ",
    ),
    "no method": (GPTQ, only(bits=4), "CONFIG names no quant_method; xlinfer reads READ"),
    "an unknown key": (
        GPTQ, said_of(rotation="hadamard"),
        "CONFIG: xlinfer does not know rotation of GPTQ",
    ),
    "bits that there are not": (GPTQ, said_of(bits=5), "CONFIG: 'bits' is 5; GPTQ has 2, 3, 4, 8"),
    "a group of no inputs": (
        GPTQ, said_of(group_size=0),
        "CONFIG: 'group_size' is 0; it must be above 0, or -1",
    ),
    "groups that do not divide": (
        GPTQ, said_of(group_size=48),
        "CONFIG: model.layers.0.self_attn.q_proj is [64, 64], which does not divide into "
        "groups of 48 and words of 32 bits for 4 bits",
    ),
    "sym that is no flag": (
        GPTQ, said_of(sym="yes"),
        "CONFIG: 'sym' is 'yes'; it must be true or false",
    ),
    "a checkpoint_format": (
        GPTQ, said_of(checkpoint_format="marlin"),
        "CONFIG: checkpoint_format 'marlin' is not read; xlinfer reads gptq, gptq_v2",
    ),
    "words of 64 bits": (
        GPTQ, said_of(pack_dtype="int64"),
        "CONFIG: pack_dtype 'int64'; it must be 'int32'",
    ),
    "dynamic that is no object": (
        GPTQ, said_of(dynamic=["-:.*up.*"]),
        "CONFIG: 'dynamic' is ['-:.*up.*']; it must be an object",
    ),
    "dynamic with a wrong expression": (
        GPTQ, said_of(dynamic={"-:*": {}}),
        "CONFIG: 'dynamic' holds '-:*', no regular expression: nothing to repeat at position 0",
    ),
    "dynamic with an unknown key": (
        GPTQ, said_of(dynamic={".*up_proj": {"rank": 8}}),
        "CONFIG: 'dynamic' of '.*up_proj' is {'rank': 8}; xlinfer knows bits, desc_act, "
        "group_size, sym",
    ),
    "blocks that are no names": (
        GPTQ, said_of(modules_in_block_to_quantize=[[3]]),
        "CONFIG: 'modules_in_block_to_quantize' holds 3; it must be a list of module names",
    ),
    "other bits than the words have": (
        GPTQ, said_of(dynamic={".*up_proj": {"bits": 8}}),
        "FOLDER: tensors do not fit config.json, whose format is gptq: "
        "model.layers.0.mlp.up_proj.qweight has shape [8, 96] where the config asks for [16, "
        "96], model.layers.0.mlp.up_proj.qzeros has shape [2, 12] where the config asks for "
        "[2, 24]",
    ),
    "an index below 0": (
        ORDERED, tensor(".g_idx", first(-1)),
        "UP: its g_idx goes from -1 to 1, and there are 2 groups, numbered from 0",
    ),
    "an index above the groups": (
        ORDERED, tensor(".g_idx", first(2)),
        "UP: its g_idx goes from 0 to 2, and there are 2 groups, numbered from 0",
    ),
    "groups of unequal size": (
        ORDERED, tensor(".g_idx", lambda g: np.r_[1 - g[:1], g[1:]]),
        "UP: by its g_idx the groups have 31 to 33 inputs; each must have 32",
    ),
    "an order that the config denies": (
        GPTQ, tensor(".g_idx", lambda g: g[::-1].copy()),
        "UP: its g_idx reorders the inputs, and desc_act is false; one of them is wrong",
    ),
    "a scale that is no number": (
        GPTQ, tensor(".scales", first(NAN)),
        "UP: 1 of 192 numbers of scales are not finite",
    ),
    "zero points that are not the middle": (
        SYM, tensor(".qzeros", first(0x12345678)),
        "UP: sym is true, but its zero points are not all 8 (v2) or 7 (v1); the first word is "
        "0x12345678",
    ),
    "floats where integers are to be": (
        GPTQ, tensor(".qweight", lambda q: q.astype(np.float32)),
        "FOLDER/model.safetensors: tensor 'model.layers.0.mlp.up_proj.qweight' is float32; in "
        "this format it must be int32",
    ),
    "a part missing": (
        GPTQ, without(".qzeros"),
        "FOLDER: tensors do not fit config.json, whose format is gptq: missing: "
        "model.layers.0.mlp.up_proj.qzeros",
    ),
    "a tensor left over": (
        GPTQ, extra(f"{UP}.qscales", np.ones(4, np.float32)),
        "FOLDER: tensors do not fit config.json, whose format is gptq: left over, without a "
        "place in this family: model.layers.0.mlp.up_proj.qscales",
    ),
    "a bias that is not zero": (
        GPTQ, extra(f"{UP}.bias", np.full(96, 0.5, np.float16)),
        "FOLDER: tensors do not fit config.json, whose format is gptq: left over, without a "
        "place in this family: model.layers.0.mlp.up_proj.bias",
    ),
    "an expert with one float matrix": (
        (EXPERTS, GPTQ), one_float,
        "FOLDER: model.layers.0.mlp.experts.1.up_proj.weight is float and "
        "model.layers.0.mlp.experts.0.gate_proj.weight uint4 by groups of 32, zero points; "
        "they are parts of one parameter, so they must be alike",
    ),
    "awq's bits": (AWQ, said_of(bits=8), "CONFIG: 'bits' is 8; AWQ has 4"),
    "awq for another kernel": (
        AWQ, said_of(version="gemv_fast"),
        "CONFIG: AWQ's version 'gemv_fast' is not read; xlinfer reads gemm and gemv",
    ),
    "awq for marlin": (
        AWQ, said_of(version="marlin"),
        "CONFIG: AWQ's version 'marlin' is not read; xlinfer reads gemm and gemv",
    ),
    "awq without zero points": (
        AWQ, said_of(zero_point=False),
        "CONFIG: 'zero_point' is not true; AWQ's layouts have zero points",
    ),
    "awq groups that do not divide": (
        AWQ, said_of(group_size=48),
        "CONFIG: model.layers.0.self_attn.q_proj is [64, 64], which does not divide into "
        "groups of 48 and words of 8 numbers",
    ),
    "a module that there is not": (
        AWQ, said_of(modules_to_not_convert=["vision_tower"]),
        "FOLDER: what its awq config leaves out names what the checkpoint does not have: "
        "vision_tower. Its modules have names like lm_head, model.embed_tokens",
    ),
    "modules that are no list": (
        AWQ, said_of(modules_to_not_convert="lm_head"),
        "CONFIG: 'modules_to_not_convert' is 'lm_head'; it must be a list of module names",
    ),
    "a module that is no name": (
        AWQ, said_of(modules_to_not_convert=[7]),
        "CONFIG: 'modules_to_not_convert' holds 7; it must be a list of module names",
    ),
    "a wrong regular expression": (
        INTS, said_of(ignore=["lm_head", "re:(up"]),
        "CONFIG: 'ignore' holds 're:(up', no regular expression: missing ), unterminated "
        "subpattern at position 0",
    ),
    "no group": (
        INTS, said_of(config_groups={}),
        "CONFIG: 'config_groups' must name at least one group",
    ),
    "not compressed": (
        INTS, said_of(quantization_status="calibration"),
        "CONFIG: quantization_status is 'calibration'; weights that are read are 'compressed'",
    ),
    "2:4 sparsity": (
        INTS, said_of(sparsity_config={"format": "sparse-24-bitmask"}),
        "CONFIG: 'sparsity_config' asks for what xlinfer does not compute: {'format': "
        "'sparse-24-bitmask'}",
    ),
    "a transform": (
        INTS, said_of(transform_config={"config_groups": {"R1": {}}}),
        "CONFIG: 'transform_config' asks for what xlinfer does not compute: {'config_groups': "
        "{'R1': {}}}",
    ),
    "a transform that is no object": (
        INTS, said_of(transform_config="hadamard"),
        "CONFIG: 'transform_config' is 'hadamard'; it must be an object",
    ),
    "a format for one kernel": (
        INTS, said_of(format="marlin-24"),
        "CONFIG: group_0: format 'marlin-24' is not read; xlinfer reads pack-quantized, "
        "int-quantized, float-quantized, naive-quantized, nvfp4-pack-quantized, "
        "mxfp4-pack-quantized",
    ),
    "a group without weights": (
        INTS, group(weights=None),
        "CONFIG: group_0 must have 'weights', an object",
    ),
    "an unknown strategy": (
        BY_CHANNEL, group(weights={"strategy": "attn_head"}),
        "CONFIG: group_0: strategy 'attn_head' is not read; xlinfer reads tensor, channel, "
        "group, block",
    ),
    "an unknown order": (
        INTS, group(weights={"actorder": "random"}),
        "CONFIG: group_0: 'actorder' is 'random'; it must be null, 'group' or 'weight'",
    ),
    "bits of another format": (
        BY_CHANNEL, group(weights={"num_bits": 4}),
        "CONFIG: group_0: format int-quantized has int of 8 bits; it says int of 4",
    ),
    "activations with zero points": (
        BY_CHANNEL, group(input_activations={"num_bits": 8, "type": "int", "symmetric": False}),
        "CONFIG: group_0: input_activations of int with 8 bits and zero points are not "
        "computed; xlinfer has int and float of 8 bits, symmetric",
    ),
    "activations of 4 bits": (
        BY_CHANNEL, group(input_activations={"num_bits": 4, "type": "int"}),
        "CONFIG: group_0: input_activations of int with 4 bits are not computed; xlinfer has "
        "int and float of 8 bits, symmetric",
    ),
    "activations that are no object": (
        BY_CHANNEL, group(input_activations=8),
        "CONFIG: group_0: 'input_activations' is 8; it must be an object",
    ),
    "quantized outputs": (
        BY_CHANNEL, group(output_activations={"num_bits": 8}),
        "CONFIG: group_0: output_activations are quantized, which is not computed",
    ),
    "int8 with zero points": (
        BY_CHANNEL, group(weights={"symmetric": False}),
        "CONFIG: group_0: int-quantized with zero points is not read",
    ),
    "blocks of another size": (
        partial(packers.plain, kind="float", strategy="block"),
        group(weights={"block_structure": [64, 64]}),
        "CONFIG: group_0: blocks must be of e4m3 and 128 x 128; they are [64, 64] of "
        "float-quantized",
    ),
    "another shape than its own": (
        INTS, tensor(".weight_shape", first(7)),
        "UP: its weight_shape is [7, 64] where the config asks for [96, 64]",
    ),
    "zeros in another layout": (
        partial(packers.packed_ints, bits=3, group=32, symmetric=False),
        tensor(".weight_zero_point", lambda z: np.zeros((10, 2), np.int32)),
        "UP: its weight_zero_point has 10 words for each group; in the layout of its "
        "weight_packed they are 9",
    ),
    "a power that is no number": (
        MX, tensor(".weight_scale", first(255)),
        "UP: 1 of 192 numbers of weight_scale are not finite",
    ),
    "a scale over all of 0": (
        partial(packers.nvfp4, by="compressed-tensors"), tensor(".weight_global_scale", first(0)),
        "UP: its global_scale must be above 0",
    ),
    "blocks of fp8": (
        BLOCKS, said_of(weight_block_size=[64, 64]),
        "CONFIG: 'weight_block_size' is [64, 64]; xlinfer reads [128, 128] and null",
    ),
    "fp8 of another kind": (
        BLOCKS, said_of(fmt="e5m2"),
        "CONFIG: 'fmt' is 'e5m2'; xlinfer reads e4m3",
    ),
    "static blocks": (
        BLOCKS, said_of(activation_scheme="static"),
        "CONFIG: 'activation_scheme' is 'static'; it must be 'dynamic', or without blocks "
        "'static'",
    ),
    "a block's scale that is infinite": (
        BLOCKS, tensor(".weight_scale_inv", first(np.inf)),
        "UP: 1 of 1 numbers of scale are not finite",
    ),
    "an E8M0 scale that is no number": (
        partial(packers.fp8_blocks, scales="e8m0"),
        tensor(".weight_scale_inv", lambda s: np.full(s.shape, NAN).astype(s.dtype)),
        "UP: 1 of 1 numbers of scale are not finite",
    ),
    "an algorithm of ModelOpt": (
        NV, said_of(quant_algo="W4A8_AWQ"),
        "CONFIG: 'quant_algo' is 'W4A8_AWQ'; xlinfer reads FP8, NVFP4",
    ),
    "4 and 8 bits": (
        NF4, said_of(load_in_8bit=True),
        "CONFIG: one of 'load_in_4bit' and 'load_in_8bit' must be true; they are True and True",
    ),
    "a type of 4 bits": (
        NF4, said_of(bnb_4bit_quant_type="int4"),
        "CONFIG: bnb_4bit_quant_type 'int4'; it must be nf4 or fp4",
    ),
    "a storage": (
        NF4, said_of(bnb_4bit_quant_storage="int64"),
        "CONFIG: bnb_4bit_quant_storage 'int64' is not one of uint8, bfloat16, float16, float32",
    ),
    "a storage that is no name": (
        NF4, said_of(bnb_4bit_quant_storage=8),
        "CONFIG: 'bnb_4bit_quant_storage' is 8; it must be a text",
    ),
    "another blocksize": (
        NF4, state(blocksize=128),
        "UP: its quant_state says {'blocksize': 128} where {'quant_type': 'nf4', 'blocksize': "
        "64, 'shape': [96, 64]} is read",
    ),
    "an offset that is no number": (
        NF4, state(nested_offset=None),
        "UP: nested_offset is None, not a number",
    ),
    "a state that is no JSON": (
        NF4, tensor(STATE, lambda s: s[:-3].copy()),
        "UP: its quant_state is not JSON",
    ),
    "a state without end": (
        NF4, tensor(STATE, lambda s: np.full(200_000, ord("["), np.uint8)),
        "UP: its quant_state is not JSON",
    ),
    "another map": (
        NF4, tensor(".weight.quant_map", lambda m: m[::-1].copy()),
        "UP: its quant_map is not that of nf4",
    ),
    "an absmax that is no number": (
        partial(packers.bnb4, grid="nf4"), tensor(".weight.absmax", first(NAN)),
        "UP: 1 of 96 numbers of absmax are not finite",
    ),
    "columns": (
        packers.bnb8, tensor(".weight_format", first(1)),
        "UP: weight_format is 1; xlinfer reads 0, by rows",
    ),
    "blocks of GGUF elsewhere": (
        GPTQ, only(quant_method="gguf", types={"a": ["Q4_K"]}),
        "CONFIG: 'types' must name the block of each tensor, one of Q4_0, Q4_1, Q5_0, Q5_1, "
        "Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_sentence(name, tmp_path):
    packer, change, expected = CASES[name]
    make(tmp_path, packer, change)
    assert sentence(tmp_path) == expected


@pytest.mark.parametrize("method", REFUSED)
def test_a_method_that_is_not_read(method, tmp_path):
    make(tmp_path, GPTQ, only(quant_method=method))
    assert sentence(tmp_path) == (
        f"CONFIG: quant_method {method!r} is not read: {REFUSED[method]}. xlinfer reads READ"
    )


def test_a_method_that_is_not_read_is_one_line_of_the_command(tmp_path, capsys):
    make(tmp_path, GPTQ, only(quant_method="hqq"))
    assert main(["xlinfer.plan", f"--model={tmp_path}", "--target=v5e-1"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"xlinfer.plan: {tmp_path}: quantization_config: quant_method 'hqq' is")


def test_what_is_quantized_is_not_quantized_again(tmp_path):
    make(tmp_path, GPTQ, only(**GPTQ(np.random.default_rng(0), 32, 32).config))
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path, quantization="int8")
    assert str(caught.value) == (
        f"quantization=int8: {tmp_path} is quantized already (gptq); leave it out"
    )


def test_biases_of_zeros_are_left_out(tmp_path):
    """AutoGPTQ wrote them for models that have none."""
    make(tmp_path, GPTQ, extra(f"{UP}.bias", np.zeros(96, np.float16)))
    prove(tmp_path)
    make(tmp_path, GPTQ, extra("model.norm.bias", np.zeros(64, np.float16)))
    assert sentence(tmp_path) == (
        "FOLDER: tensors do not fit config.json, whose format is gptq: left over, without a place "
        "in this family: model.norm.bias"
    )

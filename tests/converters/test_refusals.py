"""What is refused, with the sentence that its owner reads. FOLDER stands for the
checkpoint's, FAMILIES for all that are known."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import CheckpointError, open_checkpoint
from converters.families import FAMILIES
from tests.checkpoints import config, tensors, write

MALFORMED = Path(__file__).parents[1] / "data" / "malformed"
KNOWN = ", ".join(FAMILIES)
Make = Callable[[Path], Any]


def with_config(**changes: Any) -> Make:
    return lambda folder: write(folder, config(**changes), tensors(config()))


def with_text(text: str) -> Make:
    return lambda folder: (folder / "config.json").write_text(text)


def with_tensors(**changes: np.ndarray | None) -> Make:
    """Dots in names are double underscores; None takes the tensor away."""
    named = {name.replace("__", "."): array for name, array in changes.items()}
    held = {name: a for name, a in {**tensors(config()), **named}.items() if a is not None}
    return lambda folder: write(folder, config(), held)


def with_files(*names: str) -> Make:
    def make(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config()))
        for name in names:
            (folder / name).write_bytes(b"")

    return make


def with_index(**changes: Any) -> Make:
    """Two shards, and an index that says something else of them."""

    def make(folder: Path) -> None:
        write(folder, config(), tensors(config()), shards=2)
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"] |= {name.replace("__", "."): where for name, where in changes.items()}
        file.write_text(json.dumps(index))

    return make


def with_header(header: bytes, length: int | None = None) -> Make:
    def make(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config()))
        size = len(header) if length is None else length
        (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header)

    return make


def copied(name: str) -> Make:
    return lambda folder: shutil.copytree(MALFORMED / name, folder, dirs_exist_ok=True)


CASES: dict[str, tuple[Make, str]] = {
    "pickles alone": (
        with_files("pytorch_model.bin", "training_args.bin"),
        "FOLDER has its weights only as pickles (pytorch_model.bin, training_args.bin). A "
        "pickle runs code when it is opened, so xlinfer never opens one. Convert it where you"
        " trust it: transformers' "
        "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) writes "
        "safetensors.",
    ),
    "no weights": (
        with_files("tokenizer.json"),
        "FOLDER holds no weights: neither model.safetensors nor model.safetensors.index.json "
        "is there.",
    ),
    "other names": (
        with_files("adapter_model.safetensors"),
        "FOLDER has neither model.safetensors nor model.safetensors.index.json, but "
        "adapter_model.safetensors. xlinfer reads the layout that transformers' "
        "save_pretrained writes, and a GGUF that is named itself.",
    ),
    "two layouts": (
        with_files("model.safetensors", "model.safetensors.index.json"),
        "FOLDER holds both model.safetensors and model.safetensors.index.json, and which one "
        "is meant cannot be told. Remove the one that is stale.",
    ),
    "code of its own": (
        with_config(model_type="my_llama", auto_map={"AutoModelForCausalLM": "modeling.My"}),
        "FOLDER/config.json: model_type 'my_llama' is computed by code of its own "
        "('auto_map'), which xlinfer never runs. It knows FAMILIES.",
    ),
    "an unknown family": (
        with_config(model_type="lama"),
        "FOLDER/config.json: xlinfer does not know model_type 'lama'. The nearest: llama, "
        "llama4_text. It knows FAMILIES.",
    ),
    "no family": (
        with_config(model_type=...),
        "FOLDER/config.json: 'model_type' must name the family: FAMILIES",
    ),
    "images beside text": (
        with_config(model_type="gemma3"),
        "FOLDER/config.json: model_type 'gemma3' reads images beside text, which xlinfer does"
        " not. --text_only (in Python text_only=True) takes its text model alone and leaves "
        "out the rest.",
    ),
    "no JSON": (
        with_text('{"model_type": '),
        "FOLDER/config.json: its JSON cannot be read: Expecting value: line 1 column 16 (char 15)",
    ),
    "no object": (
        with_text("[]"),
        "FOLDER/config.json: its JSON must be an object",
    ),
    "a key twice": (
        with_text('{"model_type": "llama", "model_type": "qwen2"}'),
        "FOLDER/config.json: its JSON names model_type twice",
    ),
    "an unknown constant": (
        with_config(attention_multiplier=0.5),
        "FOLDER/config.json: unknown model constant 'attention_multiplier'. xlinfer does not "
        "know whether it changes what the model computes, so it does not guess; remove it if "
        "it has no meaning for this model.",
    ),
    "a missing constant": (
        with_config(hidden_size=...),
        "FOLDER/config.json: 'hidden_size' is missing; it must be an integer >= 1",
    ),
    "a text for a number": (
        with_config(num_hidden_layers="2"),
        "FOLDER/config.json: 'num_hidden_layers' is '2'; it must be an integer >= 1",
    ),
    "a constant that changes the mathematics": (
        with_config(rope_interleaved=True),
        "FOLDER/config.json: 'rope_interleaved' is True; xlinfer computes only False",
    ),
    "an odd head": (
        with_config(head_dim=7),
        "FOLDER/config.json: a head_dim of 7 is odd; rotary embeddings turn pairs",
    ),
    "heads that do not divide": (
        with_config(num_attention_heads=4, num_key_value_heads=3),
        "FOLDER/config.json: num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    "a hidden size that does not divide": (
        with_config(hidden_size=18, head_dim=None),
        "FOLDER/config.json: hidden_size 18 is not a multiple of num_attention_heads 4, and "
        "no head_dim is given",
    ),
    "an unknown activation": (
        with_config(hidden_act="relu2"),
        "FOLDER/config.json: 'hidden_act' is 'relu2', which xlinfer does not compute; it "
        "computes silu, swish, gelu, gelu_pytorch_tanh, gelu_new, gelu_fast, relu",
    ),
    "an unknown rope": (
        with_config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        "FOLDER/config.json: rope_parameters: 'rope_type' is 'spiral', which xlinfer does not"
        " compute; it computes default, linear, dynamic, llama3, yarn, longrope, su",
    ),
    "two ropes": (
        with_config(rope_scaling={"type": "linear", "factor": 2.0}),
        "FOLDER/config.json: it has both 'rope_parameters' and 'rope_scaling'; keep the one "
        "that is meant",
    ),
    "a missing tensor": (
        with_tensors(model__norm__weight=None),
        "FOLDER: tensors do not fit config.json: missing: model.norm.weight",
    ),
    "a tensor left over": (
        with_tensors(model__layers__0__mlp__gate_proj__bias=np.zeros(24, np.float32)),
        "FOLDER: tensors do not fit config.json: left over, without a place in this family: "
        "model.layers.0.mlp.gate_proj.bias",
    ),
    "a tensor of another shape": (
        with_tensors(model__norm__weight=np.zeros(15, np.float32)),
        "FOLDER: tensors do not fit config.json: model.norm.weight has shape [15] where the "
        "config asks for [16]",
    ),
    "integers": (
        with_tensors(model__norm__weight=np.zeros(16, np.int32)),
        "FOLDER/model.safetensors: tensor 'model.norm.weight' is int32; without a "
        "quantization_config a weight must be F64, F32, F16 or BF16",
    ),
    "a layer too many": (
        with_config(num_hidden_layers=1),
        "FOLDER: tensors do not fit config.json: left over, without a place in this family: "
        "model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "
        "model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight, "
        "model.layers.1.post_attention_layernorm.weight, "
        "model.layers.1.self_attn.k_proj.weight, model.layers.1.self_attn.o_proj.weight, "
        "model.layers.1.self_attn.q_proj.weight, model.layers.1.self_attn.v_proj.weight",
    ),
    "a file cut short": (
        copied("truncated"),
        "FOLDER/model.safetensors is truncated: tensor "
        "'model.layers.0.self_attn.v_proj.weight' ends at byte 181944, the file at 181200",
    ),
    "a tensor forgotten": (
        copied("missing"),
        "FOLDER: tensors do not fit config.json: missing: model.layers.0.mlp.up_proj.weight",
    ),
    "a tensor turned": (
        copied("shape"),
        "FOLDER: tensors do not fit config.json: model.layers.0.self_attn.k_proj.weight has "
        "shape [64, 32] where the config asks for [32, 64]",
    ),
    "an enormous header": (
        with_header(b"{}", 2**62),
        "FOLDER/model.safetensors is not a whole safetensors file: its header is said to be "
        "4611686018427387904 bytes, the file has 10 and a header at most 100000000",
    ),
    "a header that is no JSON": (
        with_header(b"{1}"),
        "FOLDER/model.safetensors: its JSON cannot be read: Expecting property name enclosed "
        "in double quotes: line 1 column 2 (char 1)",
    ),
    "a tensor twice": (
        with_header(b'{"a": {}, "a": {}}'),
        "FOLDER/model.safetensors: its JSON names a twice",
    ),
    "an unknown dtype": (
        with_header(b'{"a": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}}'),
        "FOLDER/model.safetensors: tensor 'a' has dtype 'F4'; xlinfer reads F64, F32, F16, "
        "BF16, F8_E4M3, F8_E5M2, F8_E8M0, I64, I32, I16, I8, U64, U32, U16, U8, BOOL",
    ),
    "a shard elsewhere": (
        with_index(model__norm__weight="../other/model.safetensors"),
        "FOLDER/model.safetensors.index.json: tensor 'model.norm.weight' is said to be in "
        "'../other/model.safetensors', which is not a plain *.safetensors file name. Every "
        "shard must lie beside its index.",
    ),
    "a shard that holds more": (
        with_index(model__norm__weight="model-00001-of-00002.safetensors"),
        "FOLDER/model-00002-of-00002.safetensors holds tensors that "
        "model.safetensors.index.json does not place there: model.norm.weight",
    ),
    "a shard that is not there": (
        with_index(model__extra__weight="model-3.safetensors"),
        "FOLDER/model-3.safetensors is missing: model.safetensors.index.json names it",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_sentence(name, tmp_path):
    make, sentence = CASES[name]
    make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path).schedule()
    said = str(caught.value).replace(str(tmp_path), "FOLDER").replace(KNOWN, "FAMILIES")
    assert said == sentence

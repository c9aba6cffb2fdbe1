"""Small checkpoints of which every matrix of the layers is packed, and what may be wrong of one."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import CheckpointError, PackedStep, open_checkpoint, read_tensor, weight_forms
from converters.quantization import METHODS
from tests.checkpoints import config, tensors, write
from tests.converters.packers import Packer, Rng

Held = dict[str, np.ndarray]
Change = Callable[[dict[str, Any], Held], Any]  # of a quantization_config and the tensors
UP = "model.layers.0.mlp.up_proj"
STATE = ".weight.quant_state.bitsandbytes__nf4"
NAN = np.float32("nan")


def small(model_type: str = "llama", **changes) -> dict:
    return config(
        model_type, hidden_size=64, intermediate_size=96, head_dim=16, num_attention_heads=4,
        num_key_value_heads=2, **changes,
    )  # fmt: skip


def held_by(cfg: dict) -> dict[str, np.ndarray]:
    held = tensors(cfg)
    return {name: x * (1.0 if "norm" in name else 0.3) for name, x in held.items()}


def matrices(held: dict[str, np.ndarray]) -> list[str]:
    """The modules of the layers that are Linears, without routers."""
    names = (name.removesuffix(".weight") for name in held if "layers" in name)
    return [name for name in names if name.endswith("_proj")]


def of_all(
    packer: Packer, rng: Rng, held: dict[str, np.ndarray], modules: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a float checkpoint with `modules` packed, the same with their floats, and the
    quantization_config."""
    packed, floats, config = dict(held), dict(held), {}
    for module in modules:
        name = f"{module}.weight"
        one = packer(rng, *packed.pop(name).shape)
        packed |= {module + suffix: tensor for suffix, tensor in one.tensors.items()}
        floats[name], config = np.ascontiguousarray(one.weight), one.config
    return packed, floats, config


def make(folder: Path, packer: Packer | tuple[str, Packer], change: Change) -> None:
    kind = "llama"
    if isinstance(packer, tuple):
        kind, packer = "qwen3_moe", packer[1]
    cfg = small(kind, num_hidden_layers=1)
    if kind != "llama":
        cfg["moe_intermediate_size"] = 32
    floats = held_by(cfg)
    held, _, said = of_all(packer, np.random.default_rng(0), floats, matrices(floats))
    change(said, held)
    write(folder, {**cfg, "quantization_config": said}, held)


def prove(folder: Path) -> None:
    """All that load_model asks of a checkpoint, without what it then does with it."""
    checkpoint = open_checkpoint(folder)
    weight_forms(checkpoint.config, checkpoint.scheme, str(folder))
    for step in checkpoint.schedule():
        if isinstance(step, PackedStep):
            step.settle({role: read_tensor(info) for role, info in step.tensors.items()})


def shortened(said: str, folder: Path) -> str:
    for long, short in {
        f"{folder}/config.json: quantization_config": "CONFIG",
        f"{folder}/model.safetensors: {UP}": "UP",
        str(folder): "FOLDER",
        ", ".join(METHODS): "READ",
    }.items():
        said = said.replace(long, short)
    return said


def sentence(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        prove(folder)
    return shortened(str(caught.value), folder)


def said_of(**changes: Any) -> Change:
    """The quantization_config with other values; `...` removes the key."""

    def change(config: dict[str, Any], held: Held) -> None:
        config |= changes
        for name in [name for name, value in changes.items() if value is ...]:
            del config[name]

    return change


def only(**values: Any) -> Change:
    return lambda config, held: (config.clear(), config.update(values))


def tensor(suffix: str, make: Callable[[np.ndarray], Any], module: str = UP) -> Change:
    """Another tensor in place of one of the module's."""

    def change(config: dict[str, Any], held: Held) -> None:
        held[module + suffix] = np.asarray(make(held[module + suffix]))

    return change


def first(value: Any) -> Callable[[np.ndarray], np.ndarray]:
    """The same numbers but the first."""

    def make(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed.flat[0] = value
        return changed

    return make


def group(**changes: Any) -> Change:
    """compressed-tensors' one group with other values; `weights` and the like are merged."""

    def change(config: dict[str, Any], held: Held) -> None:
        of = config["config_groups"]["group_0"]
        for name, value in changes.items():
            old = of.get(name)
            of[name] = {**old, **value} if old and value else value

    return change


def state(**changes: Any) -> Change:
    """bitsandbytes' quant_state of one matrix with other values."""

    def make(raw: np.ndarray) -> np.ndarray:
        return np.frombuffer(json.dumps({**json.loads(raw.tobytes()), **changes}).encode(), "u1")

    return tensor(STATE, make)


def one_float(config: dict[str, Any], held: Held) -> None:
    """One part of an expert is not quantized, and the config says so."""
    name = "model.layers.0.mlp.experts.1.up_proj"
    for suffix in (".qweight", ".qzeros", ".scales", ".g_idx"):
        del held[name + suffix]
    held[f"{name}.weight"] = np.ones((32, 64), np.float32)
    config["dynamic"] = {rf"-:{name}": {}}


def without(suffix: str) -> Change:
    return lambda config, held: held.pop(UP + suffix)


def extra(name: str, array: np.ndarray) -> Change:
    return lambda config, held: held.update({name: array})

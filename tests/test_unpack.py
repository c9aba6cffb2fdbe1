"""Matrices packed by tests/converters/packers.py come back as what they stand for: one alone, and
all of a model's, whose logits are then those of the float weights."""

from functools import partial
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from converters import CheckpointError, read_scheme
from converters.formats.packing import Code, Matrix, Packing, Parts
from tests.checkpoints import write
from tests.converters import packers
from tests.converters.packers import Packed, Packer
from tests.converters.quantized import held_by, matrices, of_all, small
from xlinfer.placing import floats
from xlinfer.quant import QTensor, dequantize
from xlinfer.unpack import unpack
from xlinfer.weights import load_model

few = settings(max_examples=3, deadline=None, derandomize=True, database=None)
TOKENS = jnp.asarray([[5, 17, 3, 60, 41, 2, 9, 33]])

gptq, ints, plain = packers.gptq, packers.packed_ints, packers.plain
DYNAMIC = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {**DYNAMIC, "strategy": "tensor", "dynamic": False}
# Name -> a packer and the shapes that it is asked for.
CASES: dict[str, tuple[Packer, list[tuple[int, int]]]] = {
    f"gptq {bits} bits {version} {'sym' if symmetric else 'asym'}{' g_idx' * reordered}": (
        partial(
            gptq, bits=bits, group=32, symmetric=symmetric, version=version, reordered=reordered
        ),
        [(32, 96), (64, 32)],
    )
    for bits in (2, 3, 4, 8)
    for version in ("v1", "v2")
    for symmetric in (True, False)
    for reordered in (True, False)
}
CASES |= {
    f"gptq {bits} bits v1 of AutoGPTQ": (
        partial(gptq, bits=bits, group=32, version="v1", by="autogptq"), [(32, 64)],
    )
    for bits in (2, 3, 4, 8)
}  # fmt: skip
CASES |= {
    f"awq {version} g{group}": (
        partial(packers.awq, version=version, group=group), [(16, 256), (8, 4224)],
    )
    for version in ("gemm", "gemv")
    for group in (32, 64, 128)
}  # fmt: skip
CASES |= {
    f"pack-quantized {pack.__name__} {bits} bits {'sym' if symmetric else 'asym'}": (
        partial(ints, bits=bits, group=32, symmetric=symmetric, pack=pack),
        [(20, 96), (7, 160)],
    )
    for bits in range(2, 9)
    for symmetric in (True, False)
    for pack in (packers.stream, packers.loose)
    if pack is packers.stream or 32 % bits
}
CASES |= {
    "pack-quantized actorder": (
        partial(ints, bits=4, group=32, reordered=True, symmetric=False), [(24, 128)],
    ),
    "pack-quantized by channel": (partial(ints, bits=4, group=None), [(24, 40)]),
    "int-quantized by tensor": (partial(plain, kind="int", strategy="tensor"), [(24, 40)]),
    "int-quantized by channel": (
        partial(plain, kind="int", strategy="channel", inputs={"type": "int", **DYNAMIC}),
        [(24, 40)],
    ),
    "int-quantized by group": (partial(plain, kind="int", strategy="group", group=32), [(8, 96)]),
    "int-quantized static": (
        partial(plain, kind="int", strategy="channel", inputs={"type": "int", **STATIC}), [(9, 40)],
    ),
    "float-quantized by tensor, static": (
        partial(plain, kind="float", strategy="tensor", inputs={"type": "float", **STATIC}),
        [(24, 40)],
    ),
    "float-quantized by channel": (
        partial(plain, kind="float", strategy="channel", inputs={"type": "float", **DYNAMIC}),
        [(24, 40)],
    ),
    "float-quantized by block": (
        partial(plain, kind="float", strategy="block"), [(256, 128), (130, 72), (40, 200)],
    ),
    "nvfp4-pack": (partial(packers.nvfp4, by="compressed-tensors"), [(12, 64)]),
    "mxfp4-pack": (packers.mxfp4, [(12, 96)]),
    "fp8 by block": (packers.fp8_blocks, [(256, 128), (130, 72), (40, 200)]),
    "fp8 by block, bfloat16": (partial(packers.fp8_blocks, scales=ml_dtypes.bfloat16), [(130, 72)]),
    "fp8 by block, E8M0": (partial(packers.fp8_blocks, scales="e8m0"), [(300, 130)]),
    "fp8 by block, E8M0 as bytes": (partial(packers.fp8_blocks, scales="uint8"), [(300, 130)]),
    "fp8 static": (partial(packers.fp8_scaled, by="transformers"), [(24, 40)]),
    "fbgemm": (partial(packers.fp8_scaled, by="fbgemm"), [(24, 40)]),
    "modelopt fp8": (partial(packers.fp8_scaled, by="modelopt"), [(24, 40)]),
    "modelopt nvfp4": (partial(packers.nvfp4, by="modelopt"), [(12, 64)]),
    "bnb int8": (packers.bnb8, [(24, 40)]),
    "mxfp4 experts": (packers.mxfp4_experts, [(12, 64)]),
}  # fmt: skip
CASES |= {
    f"bnb {grid}{' nested' * nested}{' in bfloat16' * (storage == 'bfloat16')}": (
        partial(packers.bnb4, grid=grid, nested=nested, storage=storage),
        [(24, 128), (520, 64), (10, 48)],
    )
    for grid in ("nf4", "fp4")
    for nested in (True, False)
    for storage in ("uint8", "bfloat16")
}


def test_three_bits_are_one_stream():
    """As compressed-tensors' files of today have them, which two packers agree on."""
    q_RC = np.random.default_rng(0).integers(0, 8, (4, 64))
    np.testing.assert_array_equal(packers.threes(q_RC), packers.stream(q_RC, 3))


def read(packed: Packed) -> tuple[Packing, Parts, Code]:
    """How the scheme of its config has the matrix, and what it takes of the tensors."""
    scheme = read_scheme("config.json", {"quantization_config": packed.config})
    experts = packed.weight.ndim == 3
    name = "model.layers.0.mlp." + ("experts.gate_up_proj" if experts else "up_proj.weight")
    shape = packed.weight.shape
    assert scheme is not None
    packing = scheme.packing(
        Matrix(tensor=name, shape=shape, stored=shape, axes=tuple(range(len(shape))))
    )
    assert packing is not None
    parts = {}
    for role, part in packing.parts.items():
        tensor = packed.tensors.get(suffix := part.suffix or ".weight")
        assert tensor is not None or part.optional, f"{suffix} is asked for"
        if tensor is not None:
            assert not part.shapes or tensor.shape in part.shapes
            assert tensor.dtype.name in part.dtypes
            parts[role] = tensor
    assert len(parts) == len(packed.tensors), "all have a place"
    code, parts = scheme.settle(packing.code, parts, "here")
    return packing, parts, code


@pytest.mark.parametrize("name", CASES)
def test_a_matrix_comes_back(name):
    packer, shapes = CASES[name]

    @few
    @given(st.sampled_from(shapes), st.integers(0, 2**32 - 1))
    def check(shape, seed):
        packed = packer(np.random.default_rng(seed), *shape)
        packing, parts, code = read(packed)
        found = unpack(code, {role: jnp.asarray(part) for role, part in parts.items()})
        np.testing.assert_allclose(floats(found), packed.weight, rtol=packed.rtol, atol=0)
        form = packing.form
        if form is None:
            assert packed.weight.shape[-1] % 64, "blocks end within a row"
            return
        numbers = np.asarray(found.numbers)
        np.testing.assert_array_equal(numbers, numbers.astype(form.dtype), "its form holds them")
        held = {
            "zero_GN": found.zero_NG,
            "order_K": found.order_K,
            "input_scale": found.input_scale,
        }
        has = {"data_NK", "scale", *(name for name, x in held.items() if x is not None)}
        assert has == form.shapes(*packed.weight.shape[-2:]).keys()

    check()


def fused(held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Llama's as Phi-3's: q, k and v in one tensor, gate and up in another."""
    done = dict(held)
    for layer in (0, 1):
        for block, parts, whole in (
            ("self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
            ("mlp", ("gate_proj", "up_proj"), "gate_up_proj"),
        ):
            at = f"model.layers.{layer}.{block}"
            pieces = [done.pop(f"{at}.{part}.weight") for part in parts]
            done[f"{at}.{whole}.weight"] = np.concatenate(pieces)
    return done


def write_both(folder: Path, cfg: dict, packer: Packer, held: dict) -> tuple[Path, Path]:
    """The checkpoint with its matrices packed, and one of the floats that they stand for."""
    rng = np.random.default_rng(1)
    packed, plain, quantization = of_all(packer, rng, held, matrices(held))
    return (
        write(folder / "packed", {**cfg, "quantization_config": quantization}, packed),
        write(folder / "float", cfg, plain),
    )


def check_logits(folder: Path, cfg: dict, packer: Packer, held: dict | None = None):
    both = write_both(folder, cfg, packer, held or held_by(cfg))
    logits, want = (np.asarray(load_model(path)(TOKENS)) for path in both)
    assert want.std() > 0.1
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "packer",
    [
        partial(gptq, bits=4, group=32, version="v1", reordered=True),
        partial(gptq, bits=3, group=32, version="v1", symmetric=True),
        partial(gptq, bits=8, group=32, scales=ml_dtypes.bfloat16),
        partial(gptq, bits=4, group=8),  # no kernel has such groups
        partial(ints, bits=6, group=16, symmetric=False, pack=packers.loose),
        partial(packers.awq, group=32, version="gemv"),
        partial(packers.nvfp4, by="modelopt"),
        partial(packers.bnb4, grid="nf4", nested=True, storage="bfloat16"),
    ],
    ids=["gptq-v1", "gptq-3", "gptq-8", "gptq-g8", "ct-6-loose", "awq-gemv", "nvfp4", "nf4"],
)
def test_logits_are_those_of_the_floats(packer, tmp_path):
    check_logits(tmp_path, small(), packer)


def test_fused_matrices(tmp_path):
    cfg = small("phi3")
    packer = partial(gptq, bits=4, group=32, version="v1", reordered=True)
    check_logits(tmp_path, cfg, packer, fused(held_by(small())))


def test_matrices_of_experts(tmp_path):
    packer = partial(gptq, bits=4, group=32, version="v1", reordered=True)
    check_logits(tmp_path, small("qwen3_moe", moe_intermediate_size=32), packer)


@pytest.mark.parametrize(
    "hidden, size, forms",
    [
        (64, 128, {"float8_e4m3fn by 128x128 blocks"}),
        (128, 32, {"float8_e4m3fn by groups of 128", "float8_e4m3fn by 128x128 blocks"}),
        (64, 32, {"float8_e4m3fn by 128x128 blocks"}),  # gate and up become floats
    ],
)
def test_blocks_of_experts(hidden, size, forms, tmp_path):
    """Their products round the inputs too, so here the weights are compared."""
    cfg = small("qwen3_moe", moe_intermediate_size=size) | {"hidden_size": hidden}
    packed, plain = write_both(tmp_path, cfg, packers.fp8_blocks, held_by(cfg))
    want = dict(nnx.to_flat_state(nnx.state(load_model(plain))))
    seen = set()
    for path, param in nnx.to_flat_state(nnx.state(load_model(packed))):
        if "gate_up_EID" in path or "down_EDI" in path:
            held, floats_LENK = param.get_value(), want[path].get_value()
            if isinstance(held, QTensor):
                seen.add(held.form.describe().removesuffix(", fp8 activations"))
                held = dequantize(held)
            np.testing.assert_array_equal(held, floats_LENK)
    assert seen == forms


def test_gate_and_up_of_an_expert_with_two_orders(tmp_path):
    cfg = small("qwen3_moe", moe_intermediate_size=32)
    packer = partial(gptq, bits=4, group=32, reordered=True)
    folder, _ = write_both(tmp_path, cfg, packer, held_by(cfg))
    held = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.3.up_proj"
    held[f"{name}.g_idx"] = held[f"{name}.g_idx"][::-1].copy()
    save_file(held, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert str(caught.value) == (
        f"{name} and {name.replace('up', 'gate')} are one parameter, and their g_idx differ; they "
        "have the same inputs, so they must be reordered alike"
    )

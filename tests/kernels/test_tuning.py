import json
import re
from collections import namedtuple
from importlib import import_module

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.cases import OPS
from pallas_kernels.devices import DEVICES
from pallas_kernels.int4_matmul import mosaic_tpu as int4_tpu
from pallas_kernels.int4_matmul import tiles as int4_tiles

BF16 = jnp.dtype(jnp.bfloat16)
H200, V6E = DEVICES["h200"], DEVICES["v6e"]
INT4_TPU = int4_tpu.Tiles(16, 256, 512, scale_after=True)
# (op, case, device, tiles); None: the second of the case's candidates. Where an op has two kinds of
# tiles, or two programs, both.
CHOICES = (
    ("int4_matmul", "llama_8b_down_of_32", H200, None),
    ("int4_matmul", "llama_8b_qkv_decode", V6E, INT4_TPU),
    ("int8_matmul", "llama_8b_down_of_32", H200, None),
    ("fp8_matmul", "qwen3_30b_a3b_q_16_of_48", H200, None),
    ("fp8_matmul", "qwen3_30b_a3b_kv_2048", H200, None),
    ("fp8_matmul", "qwen3_30b_a3b_q_16_of_48", V6E, None),
    ("grouped_matmul", "qwen3_up_int4_of_4_512", H200, None),
    ("grouped_matmul", "qwen3_down_512", V6E, None),
    ("flash_attention", "gpt_oss_120b_2k", H200, None),
    ("flash_attention", "gemma3_27b_traced", V6E, None),
    ("paged_attention", "llama3_8b_decode", H200, None),
    ("paged_attention", "llama3_8b_fp8_mixed", H200, None),
    ("paged_attention", "gpt_oss_120b_decode", V6E, None),
    ("paged_attention", "llama3_8b_mixed", V6E, None),
    ("mla_attention", "deepseek_v3_tp8_decode_64x4k", H200, None),
    ("mla_attention", "deepseek_v3_tp8_both", V6E, None),
)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Writes a table in place of the package's."""
    monkeypatch.setattr(tuning, "files", lambda package: tmp_path)

    def write(op: str, device, entries: dict) -> None:
        path = tmp_path / op / "tuned" / f"{device.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiles = {key: {"tiles": tuning.fields(t)} for key, t in entries.items()}
        path.write_text(json.dumps({"tiles": tiles}))
        tuning._measured.cache_clear()

    tuning._measured.cache_clear()
    yield write
    tuning._measured.cache_clear()


def named(op: str, name: str):
    cases = import_module(f"pallas_kernels.{op}.cases")
    return cases, next(c for c in cases.MODEL_CASES if c.name == name)


def program(op: str, case, device, tiles=None) -> str:
    """What the op traces to."""
    cases = import_module(f"pallas_kernels.{op}.cases")
    impl = cases.impls(case, device)[0]
    make = lambda key: cases.inputs(case, key, impl)
    args = jax.eval_shape(make, jax.random.key(0))
    run = cases.call(case, impl, device, tiles=tiles)
    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(run)(*args)))


@pytest.mark.parametrize(
    "op,name,device,tiles", CHOICES, ids=[f"{op}-{name}-{d.name}" for op, name, d, _ in CHOICES]
)
def test_an_op_takes_the_measured_tiles(op, name, device, tiles, measured):
    cases, case = named(op, name)
    tiles = tiles or cases.candidates(case, device)[1]
    wanted, own = program(op, case, device, tiles), program(op, case, device)
    measured(op, device, {cases.tuning_key(case, device): tiles})
    assert program(op, case, device) == wanted != own


@pytest.mark.parametrize("device", [H200, V6E], ids=lambda d: d.name)
def test_what_was_measured_for_16_tokens_serves_9_to_16(device, measured):
    _, case = named("int4_matmul", "llama_8b_down_gptq")
    tiling = int4_tiles if device is H200 else int4_tpu
    problem = int4_tiles.Problem(16, case.N, case.K, 112, 4, BF16, BF16, True, "int")
    own = tiling.best_tiles(problem, device)
    other = own._replace(tokens=48)
    measured("int4_matmul", device, {int4_tiles.tuning_key(problem): other})
    for M in (8, 9, 16, 17):
        found = tiling.best_tiles(problem._replace(M=M), device)
        assert (found == other) == (8 < M <= 16)
    assert int4_tiles.op_of(problem._replace(bits=8)) == "int8_matmul"
    assert tiling.best_tiles(problem._replace(bits=8), device) != other


def test_a_power_of_two_is_not_rounded():
    assert [tuning.up_to(n) for n in (1, 2, 3, 8, 9, 16, 2080)] == [1, 2, 4, 8, 16, 16, 4096]


@pytest.mark.parametrize("kind", ["Tiles", "Older"])
def test_an_entry_of_an_older_kernel_is_an_error(kind, measured):
    cases, case = named("int4_matmul", "llama_8b_down_of_32")
    stale = namedtuple(kind, ("tokens", "waves"))(16, 2)
    measured("int4_matmul", H200, {cases.tuning_key(case, H200): stale})
    with pytest.raises(
        ValueError, match=r"int4_matmul/tuned/h200\.json has .*waves.* for 'M=16,N="
    ):
        program("int4_matmul", case, H200)


@pytest.mark.parametrize("op", OPS)
def test_every_case_has_a_key(op):
    cases = import_module(f"pallas_kernels.{op}.cases")
    for device in (H200, V6E):
        assert all("=" in cases.tuning_key(case, device) for case in cases.MODEL_CASES)

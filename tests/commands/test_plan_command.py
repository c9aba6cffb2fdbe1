"""python -m xlinfer.plan, against arithmetic from the published configs alone."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from xlinfer.commands.plan import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "data" / "configs"
GiB = 2**30
BF16 = 2
# As published with the models.
PARAMETERS = {
    "deepseek-v3": 671_026_419_200,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-30b-a3b": 30_532_122_624,
}


def config(model: str) -> dict:
    return json.loads((CONFIGS / f"{model}.json").read_text())


def plan(capsys, model: str, target: str, *flags: str, code: int = 0) -> dict:
    argv = ["xlinfer.plan", f"--model={CONFIGS / model}.json", f"--target={target}"]
    assert main([*argv, "--json", *flags]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def error(capsys, *argv: str, code: int = 1) -> str:
    assert main(["xlinfer.plan", *argv]) == code
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.startswith("xlinfer.plan: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("model", PARAMETERS)
def test_parameters_are_those_published(capsys, model):
    target = "v5p-32" if model.startswith("deepseek") else "v5e-16"
    assert plan(capsys, model, target)["model"]["parameters"] == PARAMETERS[model]


@pytest.mark.parametrize(
    "model, target, size",
    [("llama-3.1-70b", "v5e-16", 16), ("llama-3.1-70b", "v6e-8", 8), ("qwen3-30b-a3b", "v6e-8", 4)],
)
def test_weights_and_pages_are_those_of_one_devices_share(capsys, model, target, size):
    made, c = plan(capsys, model, target), config(model)
    assert made["fits"] and made["mesh"] == {
        "tensor_parallel_size": size, "replicas": made["target"]["devices"] // size, "chosen": True,
        "expert_parallel_size": size if model.startswith("qwen") else 1,
        "sequence_parallel_size": 1,
    }  # fmt: skip
    D, L, K = c["hidden_size"], c["num_hidden_layers"], c["num_key_value_heads"]
    H = c.get("head_dim", D // c["num_attention_heads"])
    norms = (2 * L + 1) * D + (2 * L * H if model.startswith("qwen") else 0)
    routers = L * D * c.get("num_experts", 0)
    repeated = max(1, size // K)  # kv heads, where there are fewer than devices
    kv = 2 * L * D * K * H
    whole = norms + routers
    divided = PARAMETERS[model] - whole - kv + kv * repeated
    assert made["memory"]["weight_bytes"] == BF16 * (whole + divided // size)
    assert sum(weight["bytes"] for weight in made["weights"]) == made["memory"]["weight_bytes"]
    token = 2 * L * max(K, size) * H * BF16
    assert made["kv_cache"]["token_bytes_of_all_devices"] == token
    assert made["kv_cache"]["page_bytes"] == token * 64 // size


def test_what_is_left_of_the_memory_is_pages(capsys):
    made = plan(capsys, "llama-3.1-8b", "v6e-1", "--max_model_len=8192")
    memory, cache = made["memory"], made["kv_cache"]
    usable = int(0.9 * memory["device_bytes"])
    fixed = sum(memory[f"{n}_bytes"] for n in ("weight", "temporary", "sampling_state"))
    page = 64 * 2 * 32 * 8 * 128 * BF16
    assert cache["pages"] == (usable - fixed) // page
    assert memory["total_bytes"] == fixed + cache["pages"] * page <= usable
    assert cache["sequences_of_max_model_len"] == (cache["pages"] - 1) // (8192 // 64)
    assert cache["longest_context_tokens"] == (cache["pages"] - 1) * 64
    assert memory["temporary_bytes"] == max(
        2048 * BF16 * (2 * 14336 + 2 * 4096), 4 * 128256 * (12 * 128 + 129)
    )


def test_decode_takes_as_long_as_its_bytes(capsys):
    made = plan(capsys, "llama-3.1-8b", "v6e-1", "--max_model_len=8192")
    read = BF16 * (PARAMETERS["llama-3.1-8b"] - 128256 * 4096)  # of the embedding only rows
    for rate in made["decode"]:
        batch = rate["batch"]
        kv = batch * 2049 * 2 * 32 * 8 * 128 * BF16
        moved = read + batch * 4096 * BF16 + kv + 2 * batch * 128256 * 4
        assert rate["memory_s"] == pytest.approx(moved / 1.64e12, rel=1e-9)
        # Products with every weight, and q·k and p·v with 2048 keys.
        flop = batch * (read + 32 * 2048 * 4 * 4096)
        assert rate["flop"] == pytest.approx(flop, rel=1e-3)  # norms multiply nothing
        assert rate["compute_s"] == pytest.approx(flop / 918e12, rel=1e-3)
        assert rate["limit"] == "memory" and rate["link_bytes"] == 0
        assert rate["tokens_per_s"] == pytest.approx(batch / rate["memory_s"])
    concurrent = made["kv_cache"]["sequences_of_context"]
    for rate in made["decode"]:
        lacks = rate["more_rows_needed"] or rate["more_pages_needed"]
        assert bool(lacks) == (rate["batch"] > concurrent)


def test_devices_of_a_replica_exchange_what_they_computed(capsys):
    made = plan(capsys, "llama-3.1-70b", "v6e-8")
    for rate in made["decode"]:
        reduced = (2 * 80 + 1) * rate["batch"] * 8192 * BF16 * 2 * 7 / 8
        assert rate["link_bytes"] == pytest.approx(reduced)


def test_a_batch_reads_the_experts_that_it_chooses(capsys):
    made = plan(capsys, "qwen3-30b-a3b", "v6e-8")
    expert = 48 * 3 * 2048 * 768 * BF16
    for rate in made["decode"]:
        chosen = 128 * (1 - (1 - 8 / 128) ** rate["batch"])
        others = BF16 * (PARAMETERS["qwen3-30b-a3b"] - 151936 * 2048) - 128 * expert
        read = (others + chosen * expert) / 4
        assert rate["weight_bytes"] == pytest.approx(read, rel=0.02)  # routers stand whole
    one, many = made["decode"][0], made["decode"][-1]
    assert many["weight_bytes"] > 5 * one["weight_bytes"]


def test_prefill_is_bound_by_arithmetic_and_slower_for_longer_prompts(capsys):
    made = plan(capsys, "llama-3.1-8b", "v6e-1", "--max_model_len=65536")
    assert [p["prompt_tokens"] for p in made["prefill"]] == [2048, 8192, 65535]
    assert [p["steps"] for p in made["prefill"]] == [1, 4, 32]
    assert {p["limit"] for p in made["prefill"]} == {"compute"}
    speeds = [p["tokens_per_s"] for p in made["prefill"]]
    assert speeds == sorted(speeds, reverse=True)


def test_the_mesh_is_the_one_that_decodes_most(capsys):
    flags = ("--max_model_len=8192", "--context=2048")
    best = plan(capsys, "llama-3.1-8b", "h200-8", *flags)
    assert best["mesh"]["chosen"]
    assert best["mesh"]["tensor_parallel_size"] == 1  # it fits one, and nothing is exchanged

    def most(made: dict) -> float:
        batch = made["kv_cache"]["sequences_of_context"]
        nearest = max(r["batch"] for r in made["decode"] if r["batch"] <= batch)
        return next(r["tokens_per_s"] for r in made["decode"] if r["batch"] == nearest)

    for size in (2, 4, 8):
        other = plan(capsys, "llama-3.1-8b", "h200-8", *flags, f"--tensor_parallel_size={size}")
        assert not other["mesh"]["chosen"] and other["mesh"]["replicas"] == 8 // size
        assert most(other) < most(best)


@pytest.mark.parametrize(
    "model, target, flags",
    [
        ("llama-3.1-8b", "v6e-1", ()),
        ("llama-3.1-8b", "v5e-1", ("--max_model_len=4096",)),
        ("llama-3.1-70b", "v5e-1", ()),
        ("llama-3.1-70b", "h200", ()),
        ("llama-3.1-70b", "v6e-8", ("--tensor_parallel_size=4",)),
        ("qwen3-30b-a3b", "h100", ("--num_pages=100", "--max_model_len=32768")),
        ("llama-3.1-8b", "cpu", ()),
    ],
)
def test_what_does_not_fit_is_told_by_how_much_and_three_changes_that_do(
    capsys, model, target, flags
):
    made = plan(capsys, model, target, *flags, code=1)
    memory = made["memory"]
    assert not made["fits"] and made["decode"] == [] == made["prefill"]
    assert made["short_bytes"] == memory["total_bytes"] - memory["allowed_bytes"] > 0
    assert len(made["changes"]) == 3
    assert len({change["flags"] for change in made["changes"]}) == 3
    for change in made["changes"]:
        assert plan(capsys, model, target, *flags, *change["flags"].split())["fits"]


def test_the_longest_that_fits_is_named(capsys):
    made = plan(capsys, "llama-3.1-8b", "v6e-1", code=1)
    flag, length = made["changes"][0]["flags"].split("=")
    assert flag == "--max_model_len" and int(length) % 256 == 0
    plan(capsys, "llama-3.1-8b", "v6e-1", f"{flag}={length}")
    plan(capsys, "llama-3.1-8b", "v6e-1", f"{flag}={int(length) + 256}", code=1)


def test_more_pages_than_the_memory_holds_do_not_fit(capsys):
    flags = ("--max_model_len=1024", "--num_pages=1000000")
    made = plan(capsys, "llama-3.1-8b", "v6e-1", *flags, code=1)
    assert made["short_bytes"] > 7 * 1024 * GiB
    assert made["changes"][0]["flags"].startswith("--num_pages=")


def test_a_chip_without_kernels_is_planned_and_says_so(capsys):
    made = plan(capsys, "llama-3.1-70b", "b200-8")
    assert made["fits"] and not made["target"]["compiles"]
    assert "Nothing is compiled for b200" in made["notes"][0]
    assert "h200" in made["notes"][0]


def test_fewer_bits_are_fewer_bytes_to_read(capsys):
    speeds = {}
    for method in ("none", "int8", "int4", "fp8"):
        flags = () if method == "none" else (f"--quantization={method}",)
        made = plan(capsys, "llama-3.1-8b", "h200", "--max_model_len=8192", *flags)
        speeds[method] = made["decode"][0]["tokens_per_s"]
        assert made["model"]["parameters"] == PARAMETERS["llama-3.1-8b"]
    assert speeds["none"] < speeds["int8"] < speeds["int4"]
    assert speeds["fp8"] == pytest.approx(speeds["int8"], rel=0.01)


def test_a_quantized_checkpoint_is_planned_as_it_is(capsys, tmp_path):
    config = json.loads((CONFIGS / "llama-3.1-8b.json").read_text())
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": gptq}))
    argv = ["xlinfer.plan", f"--model={tmp_path}", "--target=h200", "--max_model_len=8192"]
    assert main([*argv, "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    rounded = plan(capsys, "llama-3.1-8b", "h200", "--max_model_len=8192", "--quantization=int4")
    assert own["model"]["quantization"] == "gptq"
    assert own["model"]["parameters"] == PARAMETERS["llama-3.1-8b"]
    assert own["memory"] == rounded["memory"]
    assert main([*argv, "--quantization=int8"]) == 1
    assert (
        "quantization=int8: the checkpoint is quantized already (gptq)" in capsys.readouterr().err
    )


def test_local_is_what_is_here(capsys):
    argv = ["xlinfer.plan", f"--model={ROOT / 'xlinfer' / 'demo'}", "--target=local", "--json"]
    assert main(argv) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["target"]["platform"] == "cpu" and made["target"]["devices"] == 4
    assert any("nominal" in note for note in made["notes"])


def test_a_folder_is_a_model_too(capsys, tmp_path):
    (tmp_path / "config.json").write_text((CONFIGS / "llama-3.1-8b.json").read_text())
    argv = ["xlinfer.plan", str(tmp_path), "--target=v6e-8", "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == tmp_path.name


LLAMA = f"--model={CONFIGS / 'llama-3.1-8b.json'}"


@pytest.mark.parametrize(
    "argv, said",
    [
        ((), "--model is required"),
        ((LLAMA,), "--target is required"),
        ((LLAMA, "--target=v6e-1", "--max_model_len=0"), "max_model_len"),
        ((LLAMA, "--target=v6e-1", "--quantization=int3"), "int3"),
        ((LLAMA, "--target=v6e-1", "more"), "unexpected argument 'more'"),
        ((LLAMA, "--target=v6e-1", "--nosuch=1"), "nosuch"),
        ((LLAMA, "--target=v6e-1", "--plot=/no/such/folder/a.png"), "--plot"),
        ((LLAMA, "--target=v6e-1", "--plot=a.pdf"), "must be a .png"),
    ],
)
def test_a_wrong_command_line_exits_2(capsys, argv, said):
    assert said in error(capsys, *argv, code=2)


@pytest.mark.parametrize(
    "argv, said",
    [
        (("--model=/no/such", "--target=v6e-1"), "there is no folder with a config.json"),
        ((LLAMA, "--target=v7e-1"), "Did you mean v"),
        ((LLAMA, "--target=v6e-3"), "v6e comes as v6e-1, v6e-4"),
        ((LLAMA, "--target=v6e-8", "--tensor_parallel_size=3"), "does not divide the 8 devices"),
        ((LLAMA, "--target=v6e-1", "--max_model_len=200000"), "max_position_embeddings=131072"),
        ((LLAMA, "--target=v6e-1", "--attention_impl=mosaic_gpu"), "runs on cuda"),
        ((LLAMA, "--target=v6e-1", "--matmul_impl=xla"), "name a quantization"),
        ((LLAMA, "--target=v6e-8", "--kv_cache_dtype=float16"), "or load the weights as float16"),
        (
            (LLAMA, "--target=v6e-8", "--max_num_seqs=64", "--max_num_batched_tokens=32"),
            "must be at least max_num_seqs=64",
        ),
    ],
)
def test_what_cannot_be_exits_1(capsys, argv, said):
    assert said in error(capsys, *argv)


def test_a_config_that_is_not_understood_exits_1(capsys, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama-3.1-8b") | {"model_type": "lama"}))
    assert "'lama'. The nearest: llama" in error(capsys, f"--model={file}", "--target=v6e-1")
    file.write_text("{")
    error(capsys, f"--model={file}", "--target=v6e-1")
    file.write_text(json.dumps(config("llama-3.1-8b") | {"torch_dtype": "float8_e5m2"}))
    assert "name a --dtype" in error(capsys, f"--model={file}", "--target=v6e-1")


def test_help_names_every_flag(capsys):
    assert main(["xlinfer.plan", "--help"]) == 0
    out = capsys.readouterr().out
    for name in ("model", "target", "tensor_parallel_size", "json", "plot", "context"):
        assert f"--{name}" in out or f"--[no]{name}" in out
    assert max(map(len, out.splitlines())) <= 100


KEYS = """
changes collectives.devices collectives.kind collectives.largest_step_bytes collectives.layers
collectives.of collectives.token_bytes decode.batch decode.compute_s decode.context_tokens
decode.flop decode.kv_bytes decode.limit decode.link_bytes decode.link_s decode.logit_bytes
decode.memory_s decode.more_pages_needed decode.more_rows_needed decode.seconds decode.tokens_per_s
decode.tokens_per_s_of_a_sequence decode.weight_bytes
fits
kv_cache.context_tokens kv_cache.dtype kv_cache.longest_context_tokens kv_cache.max_model_len
kv_cache.page_bytes kv_cache.page_tokens kv_cache.pages kv_cache.sequences_of_context
kv_cache.sequences_of_max_model_len kv_cache.token_bytes kv_cache.token_bytes_of_all_devices
load.bytes_to_devices_of_a_host load.checkpoint_bytes load.disk_bytes_per_s load.from_disk_s
load.from_host_memory_s load.host_link_bytes_per_s
memory.allowed_bytes memory.device_bytes memory.hbm_utilization memory.kv_cache_bytes
memory.sampling_state_bytes memory.temporary_activation_bytes memory.temporary_bytes
memory.temporary_sampler_bytes memory.total_bytes memory.usable_bytes memory.weight_bytes
mesh.chosen mesh.expert_parallel_size mesh.replicas mesh.sequence_parallel_size
mesh.tensor_parallel_size model.dtype model.max_position_embeddings model.model_type model.name
model.parameters model.quantization notes
prefill.compute_s prefill.flop prefill.kv_bytes prefill.limit prefill.link_bytes prefill.link_s
prefill.logit_bytes prefill.memory_s prefill.prompt_tokens prefill.seconds prefill.steps
prefill.tokens_per_s prefill.weight_bytes
programs.attention_impl programs.count programs.decode_buckets programs.decode_window
programs.encode_buckets programs.max_logprobs programs.max_num_batched_tokens programs.max_num_seqs
programs.token_buckets
short_bytes
target.attention_flop_per_s target.bytes_per_s target.chip target.compiles
target.device_memory_bytes target.devices target.hosts target.link_bytes_per_s target.name
target.platform target.product_flop_per_s
version
weights.bytes weights.dtype weights.name weights.shape weights.split weights.ways
""".split()


def keys(value: object, path: str = "") -> set[str]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return keys(value[0], path)
    if not isinstance(value, dict):
        return {path}
    return {k for name, v in value.items() for k in keys(v, f"{path}.{name}".lstrip("."))}


def test_the_object_of_version_1_has_these_names(capsys):
    made = plan(capsys, "llama-3.1-8b", "v6e-8")
    assert made["version"] == 1
    assert sorted(keys(made)) == sorted(KEYS)
    unfit = plan(capsys, "llama-3.1-8b", "v6e-1", code=1)
    assert made.keys() == unfit.keys()
    assert set(unfit["changes"][0]) == {
        "flags", "target", "tensor_parallel_size", "replicas", "max_model_len",
        "sequences_of_max_model_len", "expert_parallel_size", "sequence_parallel_size",
    }  # fmt: skip


@pytest.mark.parametrize("target", ["v6e-8", "v6e-1"])  # the second does not fit
def test_a_picture_is_drawn(capsys, tmp_path, target):
    file = tmp_path / "plan.png"
    main(["xlinfer.plan", LLAMA, f"--target={target}", f"--plot={file}"])
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_without_matplotlib_the_extra_is_named(capsys, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "xlinfer.commands.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = (LLAMA, "--target=v6e-8", f"--plot={tmp_path / 'a.png'}")
    assert "xlinfer[plot]" in error(capsys, *argv, code=2)


def test_neither_accelerator_nor_its_compiler_need_be_here():
    """In a process of its own, where neither can be imported and jax is told of no platform."""
    code = (
        "import sys; sys.modules |= {'libtpu': None, 'jax_cuda13_plugin': None}; "
        "from xlinfer.commands.plan import main; "
        f"code = main(['plan', {LLAMA!r}, '--target=v6e-8', '--json']); "
        "print('matplotlib' in sys.modules, code, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={"PATH": ""}
    )
    assert done.stderr == "False 0\n"
    assert math.isfinite(json.loads(done.stdout)["decode"][0]["tokens_per_s"])

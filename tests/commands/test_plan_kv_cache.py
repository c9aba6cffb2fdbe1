"""python -m xlinfer.plan with a KV cache of 8 bits."""

import json

from tests.commands.test_plan_command import PARAMETERS, config, plan
from xlinfer.commands.plan import main


def test_an_8_bit_cache_has_pages_of_half_the_bytes(capsys):
    wide = plan(capsys, "llama-3.1-8b", "v6e-1", "--max_model_len=8192")
    flags = ("--max_model_len=8192", "--kv_cache_dtype=fp8")
    half = plan(capsys, "llama-3.1-8b", "v6e-1", *flags)
    assert (wide["kv_cache"]["dtype"], half["kv_cache"]["dtype"]) == ("bfloat16", "float8_e4m3fn")
    assert 2 * half["kv_cache"]["page_bytes"] == wide["kv_cache"]["page_bytes"]
    assert half["kv_cache"]["pages"] >= 2 * wide["kv_cache"]["pages"]
    # Activations are bfloat16 still.
    for name in ("temporary_activation_bytes", "weight_bytes"):
        assert half["memory"][name] == wide["memory"][name]
    assert half["target"] == wide["target"]


def test_a_checkpoint_that_speaks_of_one_gets_one(capsys, tmp_path):
    file, target = tmp_path / "config.json", "--target=v6e-1"
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    given = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    file.write_text(json.dumps(config("llama-3.1-8b") | {"quantization_config": given}))
    found = {}
    for flags in ((), ("--kv_cache_dtype=bfloat16",)):
        command = ["xlinfer.plan", f"--model={file}", target, "--json", "--max_model_len=8192"]
        assert main([*command, *flags]) == 0
        made = json.loads(capsys.readouterr().out)
        found[made["kv_cache"]["dtype"]] = made["kv_cache"]["page_bytes"]
        assert made["model"]["parameters"] == PARAMETERS["llama-3.1-8b"]
    assert found["bfloat16"] == 2 * found["float8_e4m3fn"]

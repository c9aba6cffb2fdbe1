"""python -m xlinfer.plan for a model whose cache holds latents, against arithmetic."""

import pytest

from tests.commands.test_plan_command import BF16, plan


def test_latents_stand_whole_on_every_device(capsys):
    """And all heads attend to the same ones, in the space where they lie."""
    context, L, N, n = 2048, 61, 128, 32
    made = plan(capsys, "deepseek-v3", "v5p-32", f"--tensor_parallel_size={n}")
    token = L * 640 * BF16  # 512 and 64 numbers, which a TPU fills up to a multiple of 128
    assert made["kv_cache"]["page_bytes"] == 64 * token
    assert made["kv_cache"]["token_bytes_of_all_devices"] == n * token
    one, *_ = made["decode"]
    assert one["kv_bytes"] == (context + 1) * token
    # Of a token: what stands whole on every device, what is divided, and 8 of 256 experts.
    whole = L * 7168 * (1536 + 576) + 58 * 7168 * 256
    heads = L * N * (1536 * 192 + 512 * 256 + 128 * 7168)
    mlps = 3 * 7168 * (3 * 18432 + 58 * (1 + 8) * 2048)
    products = 2 * (whole + (heads + mlps + 7168 * 129280) / n)
    attention = L * context * N // n * 2 * (512 + 64 + 512)
    assert one["batch"] == 1
    assert one["flop"] == pytest.approx(products + attention, rel=1e-3)

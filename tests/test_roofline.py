"""The arithmetic of a step, against sums written out."""

from dataclasses import replace

import pytest

from xlinfer.plan.collectives import Layers, collectives
from xlinfer.plan.roofline import (
    Rates,
    Work,
    decode_step,
    distinct_experts,
    limit_of,
    pairs,
    prefill_steps,
    total_seconds,
)

RATES = Rates(memory=1e9, products=1e12, attention=5e11, link=1e8)
DENSE = Work(
    devices=1, parts=1, layer_bytes=1000, head_bytes=100, layer_flops=2000, head_flops=200,
    num_experts=0, expert_devices=1, experts_per_token=0, expert_bytes=0, expert_flops=0,
    windows=(None, 4), attention_chunk_sizes=(None, None), kv_bytes=8.0, pair_flops=16,
    hidden_bytes=10, collectives=(), vocab_size=50,
)  # fmt: skip
MOE = replace(
    DENSE,
    devices=2,
    num_experts=8,
    expert_devices=2,
    experts_per_token=2,
    expert_bytes=64,
    expert_flops=128,
)


@pytest.mark.parametrize("size", [None, 1, 4, 6, 100])
@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
@pytest.mark.parametrize("start, end", [(0, 1), (0, 7), (2, 3), (2, 9), (5, 6), (7, 20)])
def test_pairs_are_counted_one_by_one(start, end, window, size):
    counted = sum(min(t % (size or 100) + 1, window or t + 1) for t in range(start, end))
    assert pairs(start, end, window, size) == counted


def test_a_chunk_ends_what_is_read():
    work = replace(DENSE, windows=(None, None), attention_chunk_sizes=(None, 4))
    steps = [decode_step(work, RATES, batch=1, context=n) for n in (4, 5, 8)]
    assert [step.kv_bytes for step in steps] == [8 * n for n in (4 + 4 + 2, 5 + 1 + 2, 8 + 4 + 2)]
    steps = prefill_steps(work, RATES, prompt=10, chunk=3)
    read = [0, 3 + 3, 6 + 2, 9 + 1]
    assert [step.kv_bytes for step in steps] == [
        8 * (before + 2 * 2 * tokens) for before, tokens in zip(read, (3, 3, 3, 1), strict=True)
    ]


def test_a_decode_step_reads_the_weights_once_and_each_sequences_window():
    step = decode_step(DENSE, RATES, batch=3, context=10)
    assert step.weight_bytes == 1000 + 100 + 3 * 10
    assert step.kv_bytes == 3 * ((10 + 4) + 2) * 8  # both layers' keys and values, and its own
    assert step.logit_bytes == 2 * 3 * 50 * 4
    assert step.link_bytes == 0
    assert step.flops == 3 * (2000 + 200 + 14 * 16)
    assert step.memory_s == (step.weight_bytes + step.kv_bytes + step.logit_bytes) / 1e9
    assert step.compute_s == pytest.approx(3 * 2200 / 1e12 + 3 * 14 * 16 / 5e11)
    assert step.seconds == step.memory_s and step.limit == "memory"


LAYERS = Layers(
    attention=2, cross_attention=0, mlp=2, experts=0, gated_experts=0, norms_of_heads=0,
    hidden_bytes=10, kept_bytes=(6, 6),
)  # fmt: skip


def test_devices_exchange_sums():
    exchanged = collectives(LAYERS, devices=4, parts=1, embedding_is_split=True)
    step = decode_step(replace(DENSE, devices=4, collectives=exchanged), RATES, batch=3, context=10)
    assert step.link_bytes == pytest.approx(5 * 3 * 10 * 2 * 3 / 4)
    assert step.seconds == step.memory_s + step.link_bytes / 1e8


def test_parts_of_a_step_exchange_keys_and_values():
    exchanged = collectives(LAYERS, devices=4, parts=2, embedding_is_split=False)
    kinds = [(one.kind, one.of, one.times, one.devices) for one in exchanged]
    assert kinds == [
        ("all-reduce", "attention", 2, 4), ("all-reduce", "MLP", 2, 4),
        *[("all-gather", "keys and values", 2, 2)] * 2, ("all-gather", "hidden states", 1, 2),
    ]  # fmt: skip
    work = replace(DENSE, devices=4, parts=2, collectives=exchanged)
    step, whole = (prefill_steps(w, RATES, prompt=8, chunk=8)[0] for w in (work, DENSE))
    assert step.link_bytes == pytest.approx(4 * 4 * 10 * 2 * 3 / 4 + (4 * 8 * 6 + 8 * 10) / 2)
    assert step.flops - 200 == (whole.flops - 200) / 2 and step.kv_bytes == whole.kv_bytes
    assert collectives(LAYERS, devices=1, parts=1, embedding_is_split=False) == ()


def test_experts_are_read_as_far_as_they_are_expected_to_be_chosen():
    assert distinct_experts(DENSE, 5) == 0
    assert distinct_experts(MOE, 1) == pytest.approx(1)  # 2 of 8, of which half are here
    assert distinct_experts(MOE, 10_000) == pytest.approx(4)
    two = 4 * (1 - 0.75**2)
    step = decode_step(MOE, RATES, batch=2, context=1)
    assert step.weight_bytes == pytest.approx(1000 + 100 + 2 * 10 + 64 * two)
    assert step.flops == 2 * (2000 + 200 + 128 + 2 * 16)


def test_every_expert_is_read_where_a_token_takes_all():
    assert distinct_experts(replace(MOE, experts_per_token=8), 1) == 4


def test_a_prompt_goes_in_chunks_of_which_the_last_is_sampled_from():
    steps = prefill_steps(DENSE, RATES, prompt=10, chunk=4)
    assert [step.weight_bytes for step in steps] == [1040, 1040, 1120]
    read = [0, 4 + 4, 8 + 4]
    assert [step.kv_bytes for step in steps] == [
        8 * (before + 2 * 2 * tokens) for before, tokens in zip(read, (4, 4, 2), strict=True)
    ]
    attention = 16 * sum(t + 1 for t in range(10)) + 16 * sum(min(t + 1, 4) for t in range(10))
    assert sum(step.flops for step in steps) == 10 * 2000 + 200 + attention
    assert total_seconds(steps) == sum(step.seconds for step in steps)


def test_the_limit_is_what_takes_longest():
    slow = {"memory": 1.0, "products": 1.0, "link": 1.0}
    for name, limit in (("memory", "memory"), ("products", "compute"), ("link", "link")):
        rates = replace(RATES, **{other: 1e15 for other in slow if other != name}, **{name: 1.0})
        exchanged = collectives(LAYERS, devices=2, parts=1, embedding_is_split=True)
        work = replace(DENSE, devices=2, collectives=exchanged)
        assert decode_step(work, rates, batch=1, context=1).limit == limit
        assert limit_of(prefill_steps(work, rates, prompt=9, chunk=4)) == limit

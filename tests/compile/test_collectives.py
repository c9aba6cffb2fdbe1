"""What XLA has the devices exchange is what is planned: each sum and gather, by bytes and devices.

`./run aot --op=collectives` holds it to the programs of TPU slices.
"""

from collections import Counter

import pytest

from tools.aot.collectives import Case, Exchange, compiled, deployed, exchanges, planned

CASES = {
    "dense": Case("llama", "cpu-4", 4),
    "int4": Case("llama", "cpu-4", 4, quantization="int4"),
    "experts": Case("mixtral", "cpu-4", 4, expert=4),
    "experts-shared": Case("mixtral", "cpu-4", 4, expert=2),
    "experts-int4": Case("mixtral", "cpu-4", 4, expert=2, quantization="int4"),
    "parts": Case("llama", "cpu-4", 2, sequence=2),
    "parts-experts": Case("mixtral", "cpu-4", 2, expert=2, sequence=2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_of_prompts(case):
    deployment, setup = deployed(case)
    tokens = deployment.plan.token_buckets[-1]
    want = planned(deployment, setup, tokens, 1)
    assert {one.kind for one in want} == {"all-reduce", *["all-gather"] * (case.sequence > 1)}
    assert exchanges(compiled(deployment, "forward", tokens)) == want


def test_latents():
    """The CPU's compiler adds neither experts' sum to the other's, as that of TPUs does."""
    deployment, setup = deployed(Case("deepseek", "cpu-4", 2, expert=2, sequence=2))
    tokens = deployment.plan.token_buckets[-1]
    want = planned(deployment, setup, tokens, 1)
    shared = Exchange("all-reduce", tokens // 2 * setup.config["hidden_size"] * 4, 2, 1)
    assert exchanges(compiled(deployment, "forward", tokens)) == want + Counter([shared])


@pytest.mark.parametrize("name", ["dense", "parts"])
def test_a_token_for_each_row(name):
    """In the loop over layers, inside that over tokens; around it nothing else but what says which
    tokens and pages there are. No device gets the logits of another's vocabulary, nor counts."""
    deployment, setup = deployed(CASES[name])
    rows = deployment.plan.max_num_seqs
    want = planned(deployment, setup, rows, 2)
    found = exchanges(compiled(deployment, "decode", rows))
    small = 4 * rows * deployment.plan.pages_per_seq
    assert Counter(one for one in found.elements() if one.bytes > small) == want
    assert all(one.loops < 2 for one in found - want)

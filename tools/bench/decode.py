"""Decode speed of the engine on the demo model, as a share of what memory bandwidth allows.

The ceiling of one stream is the machine's copy bandwidth (bytes read and written) over the
weights' bytes: every token reads every weight once. Streams beyond one share that reading, so
they are compared with one.
"""

import time
from statistics import median

import jax
import numpy as np
from flax import nnx

from tools.bench.bandwidth import numpy_copy
from tools.bench.report import cores
from xlinfer.engine.engine import Engine
from xlinfer.request import Request, SamplingParams
from xlinfer.serve.build import DEMO_MODEL
from xlinfer.weights import load_model

PROMPT, ANSWER = 16, 128  # tokens
STREAMS = (1, 8, 32)
REPEATS = 9


def main() -> dict:
    model = load_model(DEMO_MODEL)
    weight_bytes = sum(p.nbytes for p in jax.tree.leaves(nnx.state(model)))
    engine = Engine(model)
    # A shared machine's bandwidth drifts, so every round has its own ceiling and its own ratio.
    rounds = []
    for _ in range(REPEATS + 1):
        copy = max(numpy_copy(threads=n) for n in range(1, cores() + 1))
        rates = {n: tokens_per_second(engine, n, temperature=0.0) for n in STREAMS}
        rounds.append((copy, copy * 1e9 / weight_bytes, rates))
    rounds = rounds[1:]  # the first touches memory for the first time
    middle = lambda pick: median(pick(*one) for one in rounds)
    seeded = tokens_per_second(engine, 32, temperature=1.0, seed=1)
    filtered = tokens_per_second(engine, 32, temperature=0.8, top_p=0.9, top_k=50, seed=1)
    return {
        "weight_MB": weight_bytes / 1e6,
        "copy_GB_per_s": middle(lambda copy, ceiling, rates: copy),
        "one_stream_ceiling_tokens_per_s": middle(lambda copy, ceiling, rates: ceiling),
        **{
            f"{n}_streams_tokens_per_s": middle(lambda copy, ceiling, rates, n=n: rates[n])
            for n in STREAMS
        },
        "32_streams_seeded_tokens_per_s": seeded,
        "32_streams_top_p_top_k_tokens_per_s": filtered,
        "one_stream_over_ceiling": middle(lambda copy, ceiling, rates: rates[1] / ceiling),
        "32_streams_over_one": middle(lambda copy, ceiling, rates: rates[32] / rates[1]),
    }


def tokens_per_second(engine: Engine, streams: int, **sampling) -> float:
    """Of `streams` requests that arrive at once, prefill included."""
    rng = np.random.default_rng()
    for i in range(streams):
        prompt = tuple(rng.integers(4, engine.vocab_size, PROMPT).tolist())
        params = SamplingParams(max_tokens=ANSWER, ignore_eos=True, **sampling)
        engine.add_request(Request(request_id=str(i), prompt_token_ids=prompt, sampling=params))
    started, tokens = time.perf_counter(), 0
    while engine.has_work:
        tokens += sum(len(out.token_ids) for out in engine.step())
    assert tokens == streams * ANSWER
    return tokens / (time.perf_counter() - started)

"""Host time of a decode step with 64 running sequences.

The device is idle when a step begins and its work is waited for off the clock, so what is left
is Python and the dispatch. 10 or 10,000 requests wait behind the running ones.
"""

import time

import jax

from tools.bench.report import spread
from xlinfer.engine.engine import Engine
from xlinfer.engine.scheduler import Decode
from xlinfer.request import Request, SamplingParams
from xlinfer.serve.build import DEMO_MODEL
from xlinfer.weights import load_model

RUNNING = 64
STEPS = 200


def main() -> dict:
    engine = Engine(
        load_model(DEMO_MODEL), max_num_seqs=RUNNING, max_num_batched_tokens=128, decode_window=1
    )
    few, many = step_ms(engine, waiting=10), step_ms(engine, waiting=10_000)
    ratio = many["schedule_batch_dispatch"]["p50"] / few["schedule_batch_dispatch"]["p50"]
    return {"ms_10_waiting": few, "ms_10000_waiting": many, "ratio_10000_to_10_waiting": ratio}


def step_ms(engine: Engine, *, waiting: int) -> dict[str, dict[str, float]]:
    params = SamplingParams(temperature=0.0, max_tokens=STEPS + 50, ignore_eos=True)
    ids = [str(i) for i in range(RUNNING + waiting)]
    for name in ids:
        engine.add_request(Request(request_id=name, prompt_token_ids=(5, 6, 7), sampling=params))
    while engine.stats().generation_tokens == 0 or engine.stats().num_running < RUNNING:
        engine.step()
    scheduler, runner = engine._scheduler, engine._runner
    while engine._in_flight:
        engine._receive(engine._in_flight.popleft())
    before, after = [], []
    for _ in range(STEPS):
        started = time.perf_counter()
        step = scheduler.schedule()
        assert isinstance(step, Decode) and len(step.seqs) == RUNNING
        flying = runner.start(step)
        dispatched = time.perf_counter()
        jax.block_until_ready(flying.sampled)
        done = time.perf_counter()
        engine._receive(flying)
        engine._outputs.take()
        before.append(1e3 * (dispatched - started))
        after.append(1e3 * (time.perf_counter() - done))
    engine.abort(ids)
    while engine.has_work:
        engine.step()
    return {"schedule_batch_dispatch": spread(before), "hand_out": spread(after)}

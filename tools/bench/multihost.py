"""What sending each step's plan to another process costs, as a share of a decode step.

Two processes share the demo model, a device each, over gloo. Rank 0 decodes 32 sequences, a token a
step; the time that it spends writing, signing and sending calls is held against its whole steps.
"""

import json
import os
import subprocess
import sys
import time

from tools.bench.report import spread
from xlinfer.deployment import Sizes
from xlinfer.engine.engine import Engine
from xlinfer.engine.ready import make_ready
from xlinfer.engine.worker import Call, Worker
from xlinfer.mesh import make_mesh
from xlinfer.multihost.calls import Calls, facts_of
from xlinfer.multihost.cluster import Cluster, free_port, join
from xlinfer.multihost.follower import Follower
from xlinfer.multihost.leader import Leader
from xlinfer.multihost.member import leave_process
from xlinfer.multihost.wire import Kind
from xlinfer.request import Request, SamplingParams
from xlinfer.serve.build import DEMO_MODEL
from xlinfer.weights import load_model

RUNNING, STEPS = 32, 200
ALONE = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


def main() -> dict:
    command = [sys.executable, "-m", "tools.bench.multihost", str(free_port())]
    env = {**os.environ, **ALONE}
    with subprocess.Popen([*command, "1"], env=env, stderr=subprocess.DEVNULL) as follower:
        try:
            leader = subprocess.run([*command, "0"], env=env, capture_output=True, check=True)
        finally:
            follower.kill()
    return json.loads(leader.stdout.splitlines()[-1])


class Timed:
    """An Executor that leads, and notes how long the telling took."""

    def __init__(self, leader: Leader, worker: Worker, calls: Calls):
        self._leader, self._worker, self._calls = leader, worker, calls
        self.params, self.replace_params = worker.params, worker.replace_params
        self.seconds, self.bytes = 0.0, 0

    def run(self, call: Call):
        started = time.perf_counter()
        digest, payload = self._calls.encode(call)
        self._leader.send(Kind.CALL, payload, digest)
        self.seconds += time.perf_counter() - started
        self.bytes = len(payload)
        return self._worker.run(call)


def one_rank(port: int, rank: int) -> None:
    cluster = Cluster(
        host="127.0.0.1", port=port, bind="127.0.0.1", num_processes=2, process_id=rank,
        key=b"k" * 32, heartbeat_timeout_s=60,
    )  # fmt: skip
    group = Leader(cluster) if rank == 0 else Follower(cluster)
    if isinstance(group, Leader):
        group.gather()
        join(cluster, group.coordinator)
    else:
        group.connect()
        join(cluster, group.open_coordinator())
    mesh = make_mesh(2)
    sizes = Sizes(max_num_seqs=RUNNING, max_num_batched_tokens=128, decode_window=1)
    ready = make_ready(load_model(DEMO_MODEL, mesh=mesh), sizes, mesh=mesh)
    facts = facts_of(ready, DEMO_MODEL)
    calls, worker = Calls(ready, facts), Worker(ready)
    if isinstance(group, Follower):
        group.follow(worker, calls, facts)
        leave_process(group.code)
    group.lead(worker, calls, facts)
    timed = Timed(group, worker, calls)
    print(json.dumps(decode(Engine.of(ready, executor=timed), timed)), flush=True)
    leave_process(group.end(0, ""))


def decode(engine: Engine, timed: Timed) -> dict:
    params = SamplingParams(temperature=0.0, max_tokens=STEPS + 50, ignore_eos=True)
    for i in range(RUNNING):
        request = Request(request_id=str(i), prompt_token_ids=(5, 6, 7), sampling=params)
        engine.add_request(request)
    while engine.stats().generation_tokens < 5 * RUNNING:
        engine.step()
    steps, sending = [], []
    for _ in range(STEPS):
        before, started = timed.seconds, time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - started)
        sending.append(timed.seconds - before)
    return {
        "step_ms": spread([1e3 * s for s in steps]),
        "send_us": spread([1e6 * s for s in sending]),
        "plan_bytes": timed.bytes,
        "send_over_step": sum(sending) / sum(steps),
    }


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), int(sys.argv[2]))

"""`python -m xlinfer.commands.worker STORE CPUS`: compiles programs of one setup, as they are asked
for; CPUS is how many CPU devices jax shall have.

The setup comes as the first line of stdin, then a line for each program; a line of JSON goes out
for each. XLA ends the process where it meets what it cannot do: so this one, and not the command.
"""

import json
import sys
import time
from typing import Any

import jax

from xlinfer.compile import Key, label, lower_job, options_for
from xlinfer.compile.executable import serialize
from xlinfer.compile.store import Store, origin_of
from xlinfer.cost import cost_of
from xlinfer.deployment import Deployment, Job
from xlinfer.setup import Setup, deployment_for


def compile_one(key: Key, job: Job, deployment: Deployment, kept: Store) -> dict[str, Any]:
    """Compile the program unless `kept` has it; what came of it."""
    started = time.perf_counter()
    options = options_for(deployment.programs.device)
    lowered = lower_job(job, deployment)
    origin = origin_of(lowered, deployment.programs.mesh, options)
    found, hit = kept.get(origin), True
    if found is None:
        hit, compiled = False, lowered.compile(options)
        found = serialize(compiled, job.args, job.donated)
        memory, cost = compiled.memory_analysis(), cost_of(job)
        assert memory is not None
        found.description["memory"] = {
            "arguments": memory.argument_size_in_bytes,
            "results": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        }
        found.description["cost"] = {"flops": dict(cost.flops), "bytes": cost.bytes}
        kept.put(label(key, deployment), origin, found)
    return {
        "program": list(key),
        "digest": origin.key,
        "hit": hit,
        "seconds": round(time.perf_counter() - started, 3),
    }


def main(directory: str) -> None:
    kept, setup = Store(directory), Setup.from_json(json.loads(sys.stdin.readline()))
    deployment = deployment_for(setup)
    jobs = deployment.jobs()
    for line in sys.stdin:
        name, bucket = json.loads(line)
        print(
            json.dumps(compile_one((name, bucket), jobs[name, bucket], deployment, kept)),
            flush=True,
        )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
    main(sys.argv[1])

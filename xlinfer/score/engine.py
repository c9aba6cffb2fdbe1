"""The engine of a worker, and how fast it could be."""

import logging
import os
from collections.abc import Callable

from xlinfer.progress import show_progress
from xlinfer.score.rows import Scorer
from xlinfer.score.shard import Worker
from xlinfer.serve.build import Built, EngineOptions, build

logger = logging.getLogger("xlinfer.score")


def build_worker[T](
    make_scorer: Callable[[Built, T], Scorer], options: EngineOptions, task: T
) -> Worker:
    """Load and compile, on this machine's devices. Raises ValueError or OSError saying which
    option is wrong."""
    with show_progress() as progress:
        built = build(options, progress)
    import jax  # by now here

    device = jax.devices()[0]
    return Worker(
        scorer=make_scorer(built, task),
        device=device.device_kind,
        # A CPU has no peak rates that a data sheet would tell.
        roofline_tokens_per_s=None if device.platform == "cpu" else _roofline(options, built),
    )


def _roofline(options: EngineOptions, built: Built) -> float | None:
    """Tokens that this process's devices compute per second at their data sheets' rates, in full
    steps of prefill. None for a chip that is not in the table, or an artifact alone."""
    from xlinfer.commands.sizing import Wish, plan_for
    from xlinfer.deployment import Sizes
    from xlinfer.hub import fetch
    from xlinfer.plan.roofline import prefill_steps, total_seconds
    from xlinfer.target import TargetError

    if options.model is None:
        return None
    chunk = built.engine.plan.max_num_batched_tokens
    sizes = Sizes.__dataclass_fields__.keys() & EngineOptions.__dataclass_fields__.keys()
    try:
        planned = plan_for(
            Wish(
                model=os.fspath(fetch(options.model, options.revision, lambda *_: None)),
                target="local",
                text_only=options.text_only,
                tensor_parallel_size=options.tensor_parallel_size,
                expert_parallel_size=options.expert_parallel_size,
                sequence_parallel_size=options.sequence_parallel_size,
                dtype=options.dtype,
                quantization=options.quantization,
                matmul_impl=options.matmul_impl,
                sizes=Sizes(**{name: getattr(options, name) for name in sizes}),
            )
        )
    except (TargetError, ValueError) as error:
        logger.warning("No roofline: %s", error)
        return None
    steps = prefill_steps(planned.work, planned.rates, prompt=chunk, chunk=chunk)
    return options.data_parallel_size * chunk / total_seconds(steps)

"""A plan as one object of plain data: what `python -m xlinfer.plan --json` prints.

Every number has its unit in its name. Where nothing is said of it, a number is of one device, a
rate of the whole target, and a batch of one replica.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from converters import read_scheme
from converters.quantization import KEYS
from xlinfer.commands.changes import Change
from xlinfer.commands.sizing import Planned, Wish
from xlinfer.compile import SINGLE
from xlinfer.deployment import activation_bytes, bytes_on_one, sampler_bytes
from xlinfer.plan.collectives import Collective
from xlinfer.plan.roofline import (
    Step,
    decode_step,
    limit_of,
    prefill_steps,
    total_seconds,
)
from xlinfer.setup import MESH_SIZES, Setup, shapes_for
from xlinfer.weights import DTYPES

VERSION = 1  # of the object; larger where a name or unit changed
BATCHES = (1, 8, 64, 256)
PROMPT = 8192  # tokens, beside one step and the longest
DISK = 2e9  # bytes per second that a checkpoint is read with: assumed


def report(
    planned: Planned, changes: Sequence[Change], wish: Wish, *, context: int
) -> dict[str, Any]:
    """`changes` are what would make it fit, where it does not."""
    context = min(context, planned.deployment.plan.max_model_len)
    fits = planned.fit.fits
    return {
        "version": VERSION,
        "fits": fits,
        "short_bytes": planned.fit.short,
        "changes": [_change(change) for change in changes],
        "model": _model(planned, wish),
        "target": _target(planned),
        "mesh": {
            **{name: getattr(planned.setup, name) for name in MESH_SIZES},
            "replicas": planned.replicas,
            "chosen": wish.tensor_parallel_size is None,
        },
        "memory": _memory(planned),
        "kv_cache": _kv_cache(planned, context),
        "programs": _programs(planned),
        "collectives": [_collective(one, planned) for one in planned.work.collectives],
        "weights": _weights(planned),
        "decode": [_decode(planned, batch, context) for batch in BATCHES] if fits else [],
        # What an encoder does with a prompt is not counted.
        "prefill": [_prefill(planned, prompt) for prompt in _prompts(planned)]
        if fits and not planned.deployment.facts.has_encoder
        else [],
        "load": _load(planned),
        "notes": _notes(planned),
    }


def decode_rates(planned: Planned, batch: int, context: int) -> Step:
    return decode_step(planned.work, planned.rates, batch=batch, context=context)


def _model(planned: Planned, wish: Wish) -> dict[str, Any]:
    path = Path(wish.model).expanduser().resolve()
    name = path.parent.name if path.name == "config.json" else path.name.removesuffix(".json")
    return {
        "name": name,
        "model_type": planned.setup.config["model_type"],
        "parameters": parameters(planned),
        "dtype": planned.setup.dtype,
        "quantization": planned.setup.quantization or _format(planned.setup),
        "max_position_embeddings": planned.deployment.facts.max_position_embeddings,
    }


def _format(setup: Setup) -> str | None:
    """The checkpoint's own, where it is quantized."""
    scheme = read_scheme("config.json", setup.config)
    return None if scheme is None else scheme.name


def parameters(planned: Planned) -> int:
    """The checkpoint's own: no kv head is counted twice."""
    config = {name: x for name, x in planned.setup.config.items() if name not in KEYS}
    plain = replace(
        planned.setup, config=config, quantization=None, matmul_impl=None,
        **dict.fromkeys(MESH_SIZES, 1),
    )  # fmt: skip
    state = shapes_for(plain, planned_for=planned.target).state
    return sum(math.prod(x.shape) for x in jax.tree.leaves(state))


def _target(planned: Planned) -> dict[str, Any]:
    target, chip = planned.target, planned.target.chip
    return {
        "name": target.name,
        "chip": chip.name,
        "platform": chip.platform,
        "devices": target.devices,
        "hosts": target.hosts,
        "device_memory_bytes": chip.memory_bytes,
        "bytes_per_s": chip.bandwidth,
        "product_flop_per_s": planned.rates.products,
        "attention_flop_per_s": planned.rates.attention,
        "link_bytes_per_s": chip.link,
        "compiles": not chip.refused,
    }


def _memory(planned: Planned) -> dict[str, Any]:
    memory, deployment = planned.memory, planned.deployment
    plan, facts = deployment.plan, deployment.facts
    tensor = planned.setup.tensor_parallel_size
    pages = plan.num_pages * memory.page_bytes
    return {
        "device_bytes": memory.device_bytes,
        "hbm_utilization": memory.hbm_utilization,
        "usable_bytes": memory.usable_bytes,
        "weight_bytes": memory.weight_bytes,
        "sampling_state_bytes": memory.slot_bytes,
        "temporary_bytes": memory.temporary_bytes,
        "temporary_activation_bytes": activation_bytes(
            facts, deployment.dtype, tensor, plan.max_num_batched_tokens
        ),
        "temporary_sampler_bytes": sampler_bytes(facts, tensor, plan.max_num_seqs),
        "kv_cache_bytes": pages,
        "total_bytes": memory.fixed_bytes + pages,
        "allowed_bytes": planned.fit.allowed,
    }


def _kv_cache(planned: Planned, context: int) -> dict[str, Any]:
    memory, plan = planned.memory, planned.deployment.plan
    token = memory.page_bytes / plan.page_size
    return {
        "dtype": jnp.dtype(planned.deployment.spec.dtype).name,
        "token_bytes": token,
        "token_bytes_of_all_devices": token * planned.setup.devices,
        "page_bytes": memory.page_bytes,
        "page_tokens": plan.page_size,
        "pages": plan.num_pages,
        "max_model_len": plan.max_model_len,
        "longest_context_tokens": planned.longest(),
        "sequences_of_max_model_len": planned.concurrency(plan.max_model_len),
        "context_tokens": context,
        "sequences_of_context": planned.concurrency(context),
    }


def _programs(planned: Planned) -> dict[str, Any]:
    plan = asdict(planned.deployment.plan)
    names = ("token_buckets", "decode_buckets", "encode_buckets", "decode_window")
    others = ("max_num_seqs", "max_num_batched_tokens", "max_logprobs")
    buckets = sum(len(plan[name]) for name in names if name.endswith("buckets"))
    return {
        **{name: plan[name] for name in (*names, *others)},
        "count": buckets + len(SINGLE),
        "attention_impl": planned.deployment.spec.impl,
    }


def _collective(one: Collective, planned: Planned) -> dict[str, Any]:
    """Bytes are of one of them: the result's, on each device."""
    return {
        "kind": one.kind,
        "of": one.of,
        "devices": one.devices,
        "layers": one.layers,
        "token_bytes": one.token_bytes / one.parts,
        "largest_step_bytes": one.result_bytes(planned.deployment.plan.max_num_batched_tokens),
    }


def _weights(planned: Planned) -> list[dict[str, Any]]:
    deployment = planned.deployment
    made = []
    for path, x in zip(deployment.paths, deployment.params, strict=True):
        spec = tuple(x.sharding.spec)  # type: ignore[union-attr]
        names = [spec[axis] if axis < len(spec) else None for axis in range(x.ndim)]
        over = [(name,) if isinstance(name, str) else name or () for name in names]
        made.append(
            {
                "name": path,
                "shape": list(x.shape),
                "dtype": x.dtype.name,
                "split": [" x ".join(names) or None for names in over],
                "ways": [math.prod(planned.setup.axes[n] for n in names) for names in over],
                "bytes": bytes_on_one(x),
            }
        )
    return made


def _times(steps: Sequence[Step]) -> dict[str, Any]:
    return {
        "seconds": total_seconds(steps),
        "limit": limit_of(list(steps)),
        "memory_s": sum(s.memory_s for s in steps),
        "compute_s": sum(s.compute_s for s in steps),
        "link_s": sum(s.link_s for s in steps),
        "weight_bytes": sum(s.weight_bytes for s in steps),
        "kv_bytes": sum(s.kv_bytes for s in steps),
        "logit_bytes": sum(s.logit_bytes for s in steps),
        "link_bytes": sum(s.link_bytes for s in steps),
        "flop": sum(s.flops for s in steps),
    }


def _decode(planned: Planned, batch: int, context: int) -> dict[str, Any]:
    step, plan = decode_rates(planned, batch, context), planned.deployment.plan
    pages = batch * plan.pages_at(context) + 1
    return {
        "batch": batch,
        "context_tokens": context,
        "tokens_per_s": planned.replicas * batch / step.seconds,
        "tokens_per_s_of_a_sequence": 1 / step.seconds,
        # What it takes beyond what is planned; the rates hold once that is given.
        "more_rows_needed": max(0, batch - plan.max_num_seqs),
        "more_pages_needed": max(0, pages - plan.num_pages),
        **_times([step]),
    }


def _prompts(planned: Planned) -> list[int]:
    plan = planned.deployment.plan
    wanted = (plan.max_num_batched_tokens, PROMPT, plan.max_model_len - 1)
    return sorted({max(1, min(n, plan.max_model_len - 1)) for n in wanted})


def _prefill(planned: Planned, prompt: int) -> dict[str, Any]:
    chunk = planned.deployment.plan.max_num_batched_tokens
    steps = prefill_steps(planned.work, planned.rates, prompt=prompt, chunk=chunk)
    return {
        "prompt_tokens": prompt,
        "steps": len(steps),
        "tokens_per_s": planned.replicas * prompt / total_seconds(steps),
        **_times(steps),
    }


def _load(planned: Planned) -> dict[str, Any]:
    """A host reads the checkpoint once, whatever its devices take of it."""
    target, config = planned.target, planned.setup.config
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    itemsize = DTYPES[stored].itemsize if stored in DTYPES else jnp.dtype("float32").itemsize
    read = parameters(planned) * itemsize
    sent = planned.memory.weight_bytes * target.devices // target.hosts
    return {
        "checkpoint_bytes": read,
        "disk_bytes_per_s": DISK,
        "from_disk_s": read / DISK,
        "bytes_to_devices_of_a_host": sent,
        "host_link_bytes_per_s": target.chip.host_link,
        "from_host_memory_s": sent / target.chip.host_link,
    }


def _change(change: Change) -> dict[str, Any]:
    planned = change.planned
    return {
        "flags": change.flags,
        "target": planned.target.name,
        **{name: getattr(planned.setup, name) for name in MESH_SIZES},
        "replicas": planned.replicas,
        "max_model_len": planned.deployment.plan.max_model_len,
        "sequences_of_max_model_len": planned.concurrency(planned.deployment.plan.max_model_len),
    }


def _notes(planned: Planned) -> list[str]:
    target, chip = planned.target, planned.target.chip
    notes = []
    if chip.refused:
        notes.append(
            f"Nothing is compiled for {chip.name}: {chip.refused}. It is planned with the layouts "
            f"of {chip.planned_as}'s kernels."
        )
    if chip.platform == "cpu":
        notes.append(
            f"Rates of a CPU are nominal ({chip.bandwidth / 1e9:.0f} GB/s), not this machine's; "
            "./run bench bandwidth measures them. Unless --num_pages says otherwise, 1 GiB is "
            "taken for the KV cache."
        )
    if target.hosts > 1:
        notes.append(
            f"{target.name} has {target.hosts} hosts, and one replica spans "
            f"{-(-planned.setup.devices * target.hosts // target.devices)} of them."
        )
    if planned.fit.fits:
        notes.append(
            "Rates are bounds, not forecasts: data-sheet peaks; memory and arithmetic overlap each "
            "other; what goes between devices overlaps neither; starting programs and transfers "
            "takes no time"
            + ("; experts are chosen with equal chances." if planned.work.num_experts else ".")
        )
    if planned.deployment.facts.has_encoder:
        notes.append(
            "An encoder reads the prompt, and a sequence holds pages for it beside its own. "
            "Sequences are counted with prompts as long as they are, and rates are the decoder's, "
            "with what it reads of such a prompt."
        )
    estimates = "Temporaries and load times are" if planned.fit.fits else "Temporaries are"
    notes.append(f"{estimates} estimates.")
    return notes

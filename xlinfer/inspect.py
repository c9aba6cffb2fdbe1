"""python -m xlinfer.inspect ARTIFACT: what a compiled artifact holds, is tied to, and what each of
its programs costs. Nothing of it is run, and no device is needed.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from xlinfer.compile.artifact import PROGRAMS, ArtifactError, read_manifest
from xlinfer.flags import UsageError, help_text, read, show
from xlinfer.plan import PlanError
from xlinfer.target import Target, parse_target

FAILED, MISUSED = 1, 2  # exit codes


class Row(NamedTuple):
    """One program on one device. A decode program is one token of each row: its loop's body."""

    program: str
    flops: int
    bytes: int
    temporary_bytes: int
    code_bytes: int
    seconds: float  # the larger of what its flops and its bytes take at the chip's peaks
    limit: str  # which of the two


def main(argv: Sequence[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_bool("json", False, "Print JSON.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show these flags.", short_name="h", flag_values=values)
    try:
        rest = read(values, argv)
    except UsageError as error:
        print(f"xlinfer.inspect: {error}", file=sys.stderr)
        return MISUSED
    if values.help:
        show(f"{__doc__}\n{help_text(values, {'h'})}")
        return 0
    if len(rest) != 1:
        print("xlinfer.inspect: name one artifact", file=sys.stderr)
        return MISUSED
    try:
        path, manifest = read_manifest(rest[0])
        rows = [
            row(name, json.loads((path / PROGRAMS / f"{name}.json").read_bytes()), manifest)
            for name in manifest["programs"]
        ]
    except (ArtifactError, PlanError, OSError) as error:
        print(f"xlinfer.inspect: {error}", file=sys.stderr)
        return FAILED
    except (KeyError, TypeError, ValueError) as error:
        print(f"xlinfer.inspect: {rest[0]} is damaged: {error!r}", file=sys.stderr)
        return FAILED
    if values.json:
        shown = {k: v for k, v in manifest.items() if k != "parameters"}
        show(json.dumps(shown | {"programs": [r._asdict() for r in rows]}, indent=1))
    else:
        show(table(str(path), manifest, rows))
    return 0


def row(name: str, description: Mapping[str, Any], manifest: Mapping[str, Any]) -> Row:
    chip = parse_target(manifest["setup"]["target"]).chip
    devices = math.prod(manifest["mesh"].values())  # which share the work alike
    memory = description["memory"]
    flops = {dtype: n // devices for dtype, n in description["cost"]["flops"].items()}
    moved = description["cost"]["bytes"] // devices
    # What a chip has no units for it does at the rate of its 16-bit ones.
    slowest = min(chip.flops.values())
    compute = sum(n / chip.flops.get(dtype, slowest) for dtype, n in flops.items())
    traffic = moved / chip.bandwidth
    return Row(
        program=name,
        flops=sum(flops.values()),
        bytes=moved,
        temporary_bytes=memory["temporaries"],
        code_bytes=memory["code"],
        seconds=max(compute, traffic),
        limit="compute" if compute > traffic else "memory",
    )


def table(path: str, manifest: Mapping[str, Any], rows: Sequence[Row]) -> str:
    setup, plan, memory = manifest["setup"], manifest["plan"], manifest["memory"]
    target: Target = parse_target(setup["target"])
    gib = lambda n: f"{n / 2**30:.2f} GiB"
    config = setup["config"]
    each = setup["tensor_parallel_size"] * setup["sequence_parallel_size"]
    replicas = target.devices // each
    measured = manifest["measured"]
    stored = sum(file["bytes"] for file in manifest["files"].values())
    weights = "with weights" if manifest["has_weights"] else "programs alone"
    lines = [
        f"{path}: {len(rows)} programs for {target.name}, {weights}, {gib(stored)} on disk",
        f"  model       {config['model_type']}, {config.get('num_hidden_layers')} layers, "
        f"{setup['dtype']}"
        + (f", {setup['quantization']}" if setup["quantization"] else "")
        + f"; config.json {manifest['config_sha256'][:12]}",
        f"  devices     {manifest['device']}, {each} for each replica, "
        f"{replicas} replica{'s' * (replicas > 1)}",
        "  tied to     "
        + ", ".join(f"{name} {v}" for name, v in manifest["versions"].items())
        + f", xlinfer {manifest['xlinfer']}",
        f"  serves      max_model_len {plan['max_model_len']:,}, max_num_seqs "
        f"{plan['max_num_seqs']}, {plan['num_pages']:,} pages of {plan['page_size']} tokens, "
        f"attention {manifest['attention_impl']}, KV cache {manifest['kv_cache_dtype']}",
        f"  memory      {gib(measured['arguments'] + measured['temporaries'])} of each device "
        f"(weights {gib(memory['weight_bytes'])}, pages "
        f"{gib(memory['page_bytes'] * plan['num_pages'])}, temporaries "
        f"{gib(measured['temporaries'])}), of {gib(memory['device_bytes'])}",
        "",
        f"{'program':14}{'GFLOP':>12}{'GB moved':>11}{'temp MiB':>10}{'code MiB':>10}"
        f"{'at least':>12}  limit",
    ]
    for r in rows:
        lines.append(
            f"{r.program:14}{r.flops / 1e9:>12,.2f}{r.bytes / 1e9:>11,.3f}"
            f"{r.temporary_bytes / 2**20:>10,.1f}{r.code_bytes / 2**20:>10,.1f}"
            f"{r.seconds * 1e3:>9,.3f} ms  {r.limit}"
        )
    lines += [
        "",
        "A row is one device's share. GFLOP are those of products; GB are what must move if all "
        "else",
        "is fused; decode is one token of every row; 'at least' is at the chip's peak rates.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv))

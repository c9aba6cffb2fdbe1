"""A plan's object (plan_report.py) as a page of plain text, at most 100 columns wide."""

import textwrap
from collections.abc import Sequence
from typing import Any

WIDTH = 100


def as_text(made: dict[str, Any]) -> str:
    parts = [_head(made), _memory(made)]
    if made["fits"]:
        parts += [_kv_cache(made), _programs(made), _weights(made)]
        parts += [*([_collectives(made)] if made["collectives"] else []), _decode(made)]
        parts += [*([_prefill(made)] if made["prefill"] else []), _load(made)]
    else:
        parts += [_changes(made)]
    notes = [textwrap.fill(note, WIDTH) for note in made["notes"]]
    return "\n\n".join([*parts, "\n".join(notes)])


def _head(made: dict[str, Any]) -> str:
    model, target, mesh = made["model"], made["target"], made["mesh"]
    kept = model["dtype"] + (
        f", layers in {model['quantization']}" if model["quantization"] else ""
    )
    verdict = "fits" if made["fits"] else f"does not fit: {_size(made['short_bytes'])} short"
    if not made["fits"]:
        verdict += " on each device" if target["devices"] > 1 else ""
    devices, hosts = target["devices"], target["hosts"]
    lines = [
        f"{model['name']} on {target['name']}: {verdict}",
        f"{model['model_type']}, {_count(model['parameters'])} parameters, {kept}",
    ]
    if devices > 1:
        chosen = " (chosen; --tensor_parallel_size says otherwise)" if mesh["chosen"] else ""
        lines.append(f"{devices} devices on {hosts} {_s('host', hosts)}: {_shared(mesh)}{chosen}")
    return "\n".join(lines)


def _memory(made: dict[str, Any]) -> str:
    memory, programs, cache = made["memory"], made["programs"], made["kv_cache"]
    held = (
        f"activations of {programs['max_num_batched_tokens']} tokens "
        f"{_gib(memory['temporary_activation_bytes'])}, sampler of {programs['max_num_seqs']} rows "
        f"{_gib(memory['temporary_sampler_bytes'])}: the larger"
    )
    pages = f"{cache['pages']} pages of {cache['page_tokens']} tokens"
    if not made["fits"]:
        pages = f"the fewest that do: {pages}"
    rows = [
        ("weights", memory["weight_bytes"], ""),
        ("temporaries", memory["temporary_bytes"], held),
        ("sampling state", memory["sampling_state_bytes"], f"{programs['max_num_seqs']} rows"),
        ("KV cache", memory["kv_cache_bytes"], pages),
        ("in all", memory["total_bytes"], _allowed(memory)),
    ]
    lines = [
        textwrap.fill(f"  {name:<16}{_gib(size):>9}  {about}", WIDTH, subsequent_indent=" " * 29)
        for name, size, about in rows
    ]
    return "\n".join(["Memory of a device, GiB", *lines])


def _allowed(memory: dict[str, Any]) -> str:
    usable = (
        f"{_gib(memory['usable_bytes'])}: --hbm_utilization={memory['hbm_utilization']:g} "
        f"of {_gib(memory['device_bytes'])}"
    )
    if memory["allowed_bytes"] < memory["usable_bytes"]:
        return f"of {_gib(memory['allowed_bytes'])}, as far as pages go, and of {usable}"
    return f"of {usable}"


def _kv_cache(made: dict[str, Any]) -> str:
    cache, replicas, model = made["kv_cache"], made["mesh"]["replicas"], made["model"]
    longest, positions = cache["longest_context_tokens"], model["max_position_embeddings"]
    reach = "all that the model was made for" if longest >= positions else "what memory holds"

    def at_once(sequences: int, tokens: int) -> str:
        most = ", all rows" if sequences == made["programs"]["max_num_seqs"] else ""
        total = f", {sequences * replicas:,} in all replicas" if replicas > 1 else ""
        return f"{sequences:,} of {tokens:,} tokens at once{most}{total}"

    rows = [
        (
            "a token",
            f"{cache['dtype']}, {_size(cache['token_bytes'])} on a device, "
            f"{_size(cache['token_bytes_of_all_devices'])} in a replica",
        ),
        ("a page", f"{cache['page_tokens']} tokens, {_size(cache['page_bytes'])} on a device"),
        ("longest", f"{longest:,} tokens: {reach}"),
        ("sequences", at_once(cache["sequences_of_max_model_len"], cache["max_model_len"])),
    ]
    if cache["context_tokens"] != cache["max_model_len"]:
        rows.append(("", at_once(cache["sequences_of_context"], cache["context_tokens"])))
    return _block("KV cache", rows)


def _programs(made: dict[str, Any]) -> str:
    programs = made["programs"]
    listed = lambda name: " ".join(map(str, programs[name])) or "none: decode goes by forward"
    rows = [
        ("forward, tokens", listed("token_buckets")),
        ("decode, rows", listed("decode_buckets")),
        *([("encode, tokens", listed("encode_buckets"))] if programs["encode_buckets"] else []),
        ("others", f"sample score pool admit allocate; attention by {programs['attention_impl']}"),
    ]
    return _block(f"Programs, {programs['count']} to compile", rows)


def _weights(made: dict[str, Any]) -> str:
    size, rows = made["target"]["devices"] // made["mesh"]["replicas"], []
    for weight in made["weights"]:
        sides = [
            f"{n}/{ways}" if ways > 1 else str(n)
            for n, ways in zip(weight["shape"], weight["ways"], strict=True)
        ]
        rows.append((weight["name"], " x ".join(sides), weight["dtype"], _mib(weight["bytes"])))
    title = "Weights"
    if size > 1:
        title += f"; n/m: that axis is divided among m of the {size} devices"
    return f"{title}\n" + _table(("", "shape", "dtype", "MiB a device"), rows, left=3)


def _collectives(made: dict[str, Any]) -> str:
    tokens = made["programs"]["max_num_batched_tokens"]
    rows = [
        (
            f"{one['kind']} of {one['of']}",
            "once a step" if one["layers"] is None else f"once in {one['layers']} layers",
            str(one["devices"]), f"{one['token_bytes']:,.4g}", _mib(one["largest_step_bytes"]),
        )
        for one in made["collectives"]
    ]  # fmt: skip
    columns = ("", "", "devices", "bytes a token", f"MiB of {tokens:,} tokens")
    return "What devices exchange\n" + _table(columns, rows, left=2)


def _decode(made: dict[str, Any]) -> str:
    replicas, rates = made["mesh"]["replicas"], made["decode"]
    columns = (
        *("batch", "tokens/s", "each", "limit", "step ms", "memory", "compute", "link"),
        *("weights GB", "KV GB", "link MB"),
    )
    rows = [
        (
            str(r["batch"]), _rate(r['tokens_per_s']), _rate(r['tokens_per_s_of_a_sequence']),
            r["limit"], _ms(r["seconds"]), _ms(r["memory_s"]), _ms(r["compute_s"]),
            _ms(r["link_s"]), _gb(r['weight_bytes']), _gb(r['kv_bytes']),
            f"{r['link_bytes'] / 1e6:,.1f}",
        )
        for r in rates
    ]  # fmt: skip
    context = made["kv_cache"]["context_tokens"]
    title = f"Decode at {context:,} tokens of context; batch: sequences of a replica"
    if replicas > 1:
        title += f"; tokens/s: of {replicas} replicas"
    lacking = [f"  a batch of {r['batch']} needs {_lacking(r)}" for r in rates if _lacking(r)]
    return "\n".join([title, _table(columns, rows, left=0), *lacking])


def _lacking(rate: dict[str, Any]) -> str:
    """Beyond the plan, so that such a batch runs at once."""
    needs = [f"--max_num_seqs={rate['batch']}"] if rate["more_rows_needed"] else []
    if rate["more_pages_needed"]:
        needs.append(f"{rate['more_pages_needed']:,} pages more than there are")
    return " and ".join(needs)


def _prefill(made: dict[str, Any]) -> str:
    columns = (
        "prompt",
        "tokens/s",
        "steps",
        "first token ms",
        "limit",
        "memory",
        "compute",
        "link",
    )
    rows = [
        (
            f"{r['prompt_tokens']:,}", _rate(r['tokens_per_s']), str(r["steps"]),
            _ms(r["seconds"]), r["limit"], _ms(r["memory_s"]), _ms(r["compute_s"]),
            _ms(r["link_s"]),
        )
        for r in made["prefill"]
    ]  # fmt: skip
    chunk = made["programs"]["max_num_batched_tokens"]
    return f"Prefill, {chunk:,} tokens a step\n" + _table(columns, rows, left=0)


def _load(made: dict[str, Any]) -> str:
    load = made["load"]
    rows = [
        (
            "from a disk",
            f"{load['from_disk_s']:.3g} s for {_gb(load['checkpoint_bytes'])} GB at "
            f"{load['disk_bytes_per_s'] / 1e9:g} GB/s",
        ),
        (
            "from memory",
            f"{load['from_host_memory_s']:.3g} s for "
            f"{_gb(load['bytes_to_devices_of_a_host'])} GB to a host's devices at "
            f"{load['host_link_bytes_per_s'] / 1e9:g} GB/s",
        ),
    ]
    return _block("Load", rows)


def _changes(made: dict[str, Any]) -> str:
    if not made["changes"]:
        return "No single change of the flags makes it fit."
    rows = []
    for change in made["changes"]:
        sequences, replicas = change["sequences_of_max_model_len"], change["replicas"]
        alone = replicas == change["tensor_parallel_size"] == change["sequence_parallel_size"] == 1
        shared = "" if alone else f"{_shared(change)}, "
        rows.append(
            (
                change["flags"],
                f"{shared}{sequences} {_s('sequence', sequences)} of {change['max_model_len']:,} "
                f"tokens{' in each' if replicas > 1 else ''}",
            )
        )
    return _block("Any of these makes it fit", rows)


def _block(title: str, rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows) + 2
    lines = []
    for name, text in rows:
        indent = " " * (width + 2)
        lines.append(
            textwrap.fill(
                text, WIDTH, initial_indent=f"  {name:<{width}}", subsequent_indent=indent
            )
        )
    return "\n".join([title, *lines])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """The first `left` columns stand to the left, the others, numbers, to the right."""
    lines = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [f"{cell:<{w}}" if i < left else f"{cell:>{w}}" for i, (cell, w) in enumerate(pairs)]
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join(("  " + "  ".join(cells)).rstrip() for cells in aligned)


def _shared(mesh: dict[str, Any]) -> str:
    replicas, tensor = mesh["replicas"], mesh["tensor_parallel_size"]
    experts, sequence = mesh["expert_parallel_size"], mesh["sequence_parallel_size"]
    size = tensor * sequence
    shared = f"{replicas} {_s('replica', replicas)} of {size} {_s('device', size)}"
    if sequence > 1:
        shared += f", {sequence} parts of a step by {tensor} for each layer"
    if 1 < experts < tensor:
        shared += f", experts {experts} x {tensor // experts}"
    return shared


def _s(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}" if size >= 2**26 else f"{size / 2**30:.4f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.2f}" if size < 2**30 else f"{size / 2**20:,.0f}"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e8 else f"{n / 1e6:.2f} M"


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second < 1e7 else f"{per_second / 1e6:,.0f} M"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size >= 1e8 else f"{size / 1e9:.4f}"


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.1f}" if ms >= 100 else f"{ms:.2f}"


def _size(size: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size:.4g} B"

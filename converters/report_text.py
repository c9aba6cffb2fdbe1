"""A checkpoint's report (report.py) as text."""

from collections.abc import Iterable, Mapping
from typing import Any

from converters.errors import listing

# What the text says in words of its own, or does not say again.
SAID = frozenset(
    """
    vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim ropes
    windows attention_chunk_sizes moe tie_word_embeddings max_position_embeddings
    """.split()
)
SHOWN_ITEMS = 4  # of a list of numbers


def as_text(report: Mapping[str, Any]) -> str:
    size = f"{report['bytes']:,} bytes in {_count(len(report['files']), 'file')}"
    count = report["parameters"]
    parameters = "" if count is None else f"{count:,} parameters, "
    family = report["model_type"] or "of no known family"
    lines = [f"{report['path']}: {family}, {parameters}{size}"]
    facts = {**(_of_config(report["config"]) if report["config"] else {}), **_others(report)}
    lines += [f"  {name:12}{value}" for name, value in facts.items()]
    for group in report["groups"]:
        lines += ["", *_of_group(group, shared=len(report["files"]) > 1)]
    if report["ignored"]:
        lines += ["", "not read"]
        rows = [
            (f"  {r['name']}{_times(r)}", f"{r['bytes']:,}", r["why"]) for r in report["ignored"]
        ]
        lines += _columns(rows, right={1})
    lines += ["", "in all"]
    rows = [
        (f"  {dtype}", _count(total["tensors"], "tensor"), f"{total['numbers']:,} numbers",
         f"{total['bytes']:,} bytes")
        for dtype, total in sorted(report["totals"].items())
    ]  # fmt: skip
    return "\n".join([*lines, *_columns(rows, right={1, 2, 3})])


def _of_config(config: Mapping[str, Any]) -> dict[str, str]:
    heads = f"{config['num_heads']} of {config['head_dim']}, {config['num_kv_heads']} for k and v"
    facts = {
        "layers": f"{config['num_layers']} of {config['hidden_size']}, ffw "
        f"{config['intermediate_size']}",
        "heads": heads,
        "vocabulary": f"{config['vocab_size']:,}; {config['max_position_embeddings']:,} positions",
        "rope": _by_layers(config["ropes"]),
        "window": _by_layers(config["windows"]),
    }
    chunks = config["attention_chunk_sizes"]
    if any(part["value"] for part in chunks):
        facts["chunks"] = _by_layers(chunks)
    if (moe := config["moe"]) is not None:
        facts["experts"] = _values(moe)
    rest = {k: v for k, v in config.items() if k not in SAID and v not in (None, False)}
    return {**facts, "constants": _values(rest)}


def _others(report: Mapping[str, Any]) -> dict[str, str]:
    generation = report["generation"]
    scales = ", ".join(f"{name} ({n})" for name, n in report["kv_scales"].items())
    return {
        "weights": report["scheme"] or "floats",
        **({"head": report["head"]} if report["head"] else {}),
        **({"kv scales": scales} if scales else {}),
        **({} if generation is None else {"generation": _values(generation)}),
    }


def _by_layers(parts: Iterable[Mapping[str, Any]]) -> str:
    parts = list(parts)
    said = lambda v: "none" if v is None else _values(v) if isinstance(v, dict) else str(v)
    if len(parts) == 1:
        return said(parts[0]["value"])
    return "; ".join(f"{_layers(part['layers'])}: {said(part['value'])}" for part in parts)


def _layers(numbers: str) -> str:
    return f"layer{'s' * any(c in numbers for c in '-,')} {numbers}"


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        more = f", ... ({len(value)})" if len(value) > SHOWN_ITEMS else ""
        return f"[{', '.join(map(str, value[:SHOWN_ITEMS]))}{more}]"
    return f"({_values(value)})" if isinstance(value, dict) else str(value)


def _of_group(group: Mapping[str, Any], *, shared: bool) -> list[str]:
    of = "outside of the layers"
    if group["layers"] is not None:
        layers = _layers(group["layers"])
        of = f"{group['prefix']}*: {layers}{', each' * layers.startswith('layers')}"
    where = f", in {listing(group['files'], 4)}" if shared else ""
    rows = [
        (f"  {row['name']}{_times(row)}", ", ".join(row["roles"]) or "-",
         row["dtype"], str(row["shape"]), f"{row['bytes']:,}", row["form"] or "")
        for row in group["tensors"]
    ]  # fmt: skip
    return [f"{of} ({group['bytes']:,} bytes{' in all' * (group['layers'] is not None)}{where})",
            *_columns(rows, right={4})]  # fmt: skip


def _times(row: Mapping[str, Any]) -> str:
    return f" × {row['count']}" if row["count"] > 1 else ""


def _columns(rows: list[tuple[str, ...]], right: Iterable[int]) -> list[str]:
    """The rows with equal widths; columns in `right` end at one place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    put = lambda i, cell: cell.rjust(widths[i]) if i in right else cell.ljust(widths[i])
    return ["  ".join(put(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows]


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"

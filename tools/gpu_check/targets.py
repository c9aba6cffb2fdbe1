"""What the kernels must reach, each as a ratio to what the same run measured."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

MB = 1e6


class Target(NamedTuple):
    name: str
    op: str
    least: float
    counts: Callable[[Any, Any], bool]  # of a case and its Work
    value: Callable[[Mapping[str, Any], Mapping[str, float]], float | None]  # of a timing record


def _of_copy(report: Mapping[str, Any], ceilings: Mapping[str, float]) -> float | None:
    ms, copy = report["ours"].get("ms"), ceilings.get("copy_GB_per_s")
    return report["bytes"] / ms / 1e6 / copy if ms and copy else None


def _faster_than(word: str) -> Callable[[Mapping[str, Any], Mapping[str, float]], float | None]:
    """The time of the fastest other whose name has `word`, over ours."""

    def value(report: Mapping[str, Any], ceilings: Mapping[str, float]) -> float | None:
        ours = report["ours"].get("ms")
        fit = lambda r: word in r["name"] and "ms" in r and (r["yardstick"] or r.get("ok"))
        times = [r["ms"] for r in report["others"] if fit(r)]
        return min(times) / ours if times and ours else None

    return value


def _decode(case: Any, work: Any) -> bool:
    return set(case.queries) == {1} and work.bytes >= 256 * MB


def _prefill(case: Any, work: Any) -> bool:
    plain = case.causal and case.window is None and not (case.sinks or case.alibi or case.softcap)
    return plain and case.T == 16384 and case.H == case.V == 128


def _wide(case: Any, work: Any) -> bool:
    return case.M <= 16 and {case.N, case.K} == {8192, 28672}


TARGETS = (
    Target("decode attention, of copy bandwidth", "paged_attention", 0.85, _decode, _of_copy),
    Target("causal prefill D=128 16k, over cuDNN", "flash_attention", 1.0, _prefill,
           _faster_than("cudnn")),
    Target("W4A16 8192x28672 M<=16, over bf16", "int4_matmul", 3.3, _wide, _faster_than("bf16")),
    Target("W4A16 at any M, over bf16", "int4_matmul", 1.0, lambda case, work: True,
           _faster_than("bf16")),
    Target("block FP8 8192^3, over bf16", "fp8_matmul", 1.5,
           lambda case, work: work.flops == 2 * 8192**3, _faster_than("bf16")),
    Target("grouped bf16, of one dense product", "grouped_matmul", 0.9,
           lambda case, work: case.weights == "float" and work.flops > 206 * work.bytes,
           _faster_than("one dense")),
)  # fmt: skip


def first_of(op: str, cases: Iterable[Any], work: Callable[[Any], Any]) -> list[Any]:
    """The cases that a target counts, then the others."""
    rows = [t for t in TARGETS if t.op == op]
    specific = lambda c: min((i for i, t in enumerate(rows) if t.counts(c, work(c))), default=9)
    return sorted(cases, key=specific)


def values(
    op: str, case: Any, work: Any, report: Mapping[str, Any], ceilings: Mapping[str, float]
) -> dict[str, float | None]:
    """By target, what this case gives."""
    rows = [t for t in TARGETS if t.op == op and t.counts(case, work)]
    return {t.name: t.value(report, ceilings) for t in rows}


def verdicts(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each target with its worst case: a target is met where every case that counts meets it."""
    found = []
    for target in TARGETS:
        all_values = {
            r["case"]: r["targets"][target.name]
            for r in records
            if target.name in r.get("targets", {})
        }
        measured = {case: v for case, v in all_values.items() if v is not None}
        case = min(measured, key=lambda c: measured[c], default=None)
        value = None if case is None else measured[case]
        missing = len(all_values) - len(measured)
        met = value is not None and value >= target.least and not missing
        found.append({
            "target": target.name, "least": target.least, "worst": value, "case": case,
            "cases": len(measured), "not_measured": missing,
            "verdict": "not measured" if value is None else "met" if met else "missed",
        })  # fmt: skip
    return found

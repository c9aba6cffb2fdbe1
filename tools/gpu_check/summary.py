"""The short table at the end of a run, and how many things went wrong."""

from collections.abc import Iterator, Mapping
from typing import Any

from tools.gpu_check import starts

Document = Mapping[str, Any]


def text(document: Document) -> str:
    lines = [
        *_machine(document), *_correctness(document), *_timing(document), *_engine(document),
        *_artifact(document), *_tuning(document), *_targets(document), *_workers(document),
    ]  # fmt: skip
    return "\n".join(lines)


def faults(document: Document) -> int:
    """Workers that did not end well, results that are not the reference's, starts that differ."""
    workers = sum(w["status"] != "ok" for w in document["workers"])
    wrong = sum(r.get("ok") is False for r in _of(document, "correctness"))
    timed = [r["ours"] for r in _of(document, "timing") if "ours" in r]
    started = starts.faults(_of(document, "artifact"), document.get("dry_run", False))
    return workers + wrong + started + sum(not r.get("ok", False) for r in timed)


def _of(document: Document, part: str) -> list[Mapping[str, Any]]:
    return [r for r in document["records"] if r["part"] == part]


def _machine(document: Document) -> Iterator[str]:
    if document.get("dry_run"):
        yield "\nA dry run on CPU: it proves the paths; its times and ratios mean nothing."
    for r in _of(document, "ceilings"):
        if "machine" in r:
            versions = ", ".join(f"{k} {v}" for k, v in r["machine"]["packages"].items() if v)
            yield f"\n{r['machine']['kind']} ({r['device']}); {versions}"
    found = [r["ceilings"] for r in _of(document, "ceilings") if "ceilings" in r]
    if found:
        yield "  ".join(f"{name} {value:.1f}" for name, value in found[-1].items())


def _correctness(document: Document) -> Iterator[str]:
    rows = _of(document, "correctness")
    if rows:
        yield f"\n{'correct':18}{'cases':>7}{'right':>7}{'worst of tolerance':>20}  wrong"
    for op in dict.fromkeys(r["op"] for r in rows):
        mine = [r for r in rows if r["op"] == op and "case" in r]
        wrong = [r["case"] for r in mine if not r["ok"]]
        worst = [r["of_tolerance"] for r in mine if isinstance(r.get("of_tolerance"), float)]
        left = [c for r in rows if r["op"] == op for c in r.get("skipped", ())]
        note = " ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        note += f" ({len(left)} left out)" if left else ""
        at = f"{max(worst):.2f}" if worst else "-"
        yield f"{op:18}{len(mine):>7}{len(mine) - len(wrong):>7}{at:>20}  {note}"


def _timing(document: Document) -> Iterator[str]:
    rows = [r for r in _of(document, "timing") if "ours" in r]
    torch = {
        (r["op"], r["case"]): r["others"] for r in _of(document, "torch_timing") if "others" in r
    }
    if rows:
        yield (
            f"\n{'time':17}{'case':30}{'ms':>9}{'of':>8}{'ceiling':>8}  "
            f"{'best alternative':30}{'ms':>9}{'ratio':>7}"
        )
    for r in rows:
        ours = r["ours"]
        others = [*r["others"], *torch.get((r["op"], r["case"]), ())]
        right = [o for o in others if "ms" in o and o.get("ok")]
        best = min(right, key=lambda o: o["ms"], default=None)
        share = f"{r['of_ceiling']:.0%}" if "of_ceiling" in r else "-"
        head = f"{r['op']:17.16}{r['case']:30.29}"
        if "ms" not in ours:
            yield f"{head} FAILED {ours['why'][:60]}"
            continue
        mark = "" if ours.get("ok") else " WRONG" if "ok" in ours else " unchecked"
        # Much of the time went between kernels: by CUPTI they took less.
        mark += " gaps" if (ours.get("kernel_ms") or ours["ms"]) < 0.8 * ours["ms"] else ""
        line = f"{head}{ours['ms']:>9.4f}{r['bound'] or '-':>8}{share:>8}{mark}  "
        if best is not None:
            line += f"{best['name']:30.29}{best['ms']:>9.4f}{best['ms'] / ours['ms']:>7.2f}"
        yield line
    failed = [o for r in rows for o in r["others"] if "ms" not in o]
    failed += [o for others in torch.values() for o in others if "ms" not in o]
    for name in dict.fromkeys(o["name"] for o in failed):
        mine = [o["why"] for o in failed if o["name"] == name]
        yield f"  {name} failed {len(mine)} times: {mine[0][:90]}"
    for part in ("timing", "torch_timing"):
        for r in _of(document, part):
            if "skipped" in r:
                left = r["skipped"]
                yield f"  {part} {r['op']}: {len(left)} cases left out ({left[0]}, ...): {r['why']}"


def _engine(document: Document) -> Iterator[str]:
    latest = {r["quantization"]: r for r in _of(document, "engine")}
    for name, r in latest.items():
        rates = [
            f"{k.removesuffix('_tokens_per_s')} {v:,.0f}"
            for k, v in r.items()
            if k.endswith("_tokens_per_s")
        ]
        parts = [f"{k} {v:.0%}" for k, v in r.items() if "_of_" in k and isinstance(v, float)]
        yield f"\nengine {name} ({r['model']}, {r.get('attention_impl')}), tokens/s: " + ", ".join(
            rates
        )
        yield f"  {', '.join(parts)}; compiled in {r.get('compile_s', 0):.0f} s"


def _artifact(document: Document) -> Iterator[str]:
    if "no_artifact" in document:
        yield f"\nno --artifact to start from; this writes one: {document['no_artifact']}"
    rows = _of(document, "artifact")
    if any("start" in r for r in rows):
        yield (
            f"\n{'start':10}{'first token, s':>15}{'but weights':>13}{'traces':>8}{'compiles':>10}"
            "  of these"
        )
    for r in rows:
        if "refused" in r:
            yield f"{r['start']:10} REFUSED: {r['refused']}"
        elif "start" in r:
            phases, total = r["phases"], r["seconds"]
            of = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())
            counts = f"{r['traces']:>8}{r['compiles']:>10}"
            yield f"{r['start']:10}{total:>15.1f}{total - phases['weights']:>13.1f}{counts}  {of}"
        elif "status" in r:
            yield f"{r['ops'][0]:10} left out: {r['status']}"
    for r in rows:
        if "compared" in r:
            one, other = r["compared"]
            yield f"  {one} and {other}: {_alike(r)}"


def _alike(r: Mapping[str, Any]) -> str:
    apart = r["largest_logprob_difference"]
    apart = "" if apart is None else f", log-probabilities within {apart:.2g}"
    if r["equal"]:
        return f"the same {r['tokens']} tokens{apart}"
    first = r["first_differences"][0]
    return (
        f"DIFFERENT tokens in {len(r['first_differences'])} prompts, first in prompt "
        f"{first['prompt']} at {first['at']} ({first['tokens'][0]} for {first['tokens'][1]}, which "
        f"led by {first['lead']:.2g}); {r['tokens_agreed']} of {r['tokens']} before{apart}"
    )


def _tuning(document: Document) -> Iterator[str]:
    rows = [r for r in _of(document, "tuning") if "sweep" in r]
    if rows:
        yield f"\n{'tuned':18}{'cases':>6}{'changed':>9}{'most gained':>13}"
    for op in dict.fromkeys(r["op"] for r in rows):
        mine = [r for r in rows if r["op"] == op]
        better = [r for r in mine if r["tiles"] and r["default_ms"]]
        gain = max((r["default_ms"] / r["ms"] for r in better), default=1.0)
        yield f"{op:18}{len(mine):>6}{len(better):>9}{gain:>12.2f}x"
    for r in _of(document, "tuning"):
        if "untunable" in r:
            yield f"  {r['op']} was not tuned: {r['untunable']}"


def _targets(document: Document) -> Iterator[str]:
    if not _of(document, "timing"):
        return
    yield f"\n{'target':42}{'least':>6}{'worst':>7}{'cases':>6}  verdict"
    for t in document.get("targets", ()):
        worst = "-" if t["worst"] is None else f"{t['worst']:.2f}"
        at = f" ({t['case']})" if t["case"] else ""
        yield f"{t['target']:42}{t['least']:>6.2f}{worst:>7}{t['cases']:>6}  {t['verdict']}{at}"


def _workers(document: Document) -> Iterator[str]:
    bad = [w for w in document["workers"] if w["status"] != "ok"]
    for w in bad:
        last = w["log"][-1][:120] if w.get("log") else ""
        yield f"FAILED {w['part']} {' '.join(w['ops'])}: {w['status']} {last}"
    total = document.get("seconds", 0.0)
    yield f"\n{len(document['workers'])} workers, {len(bad)} failed, {total:.0f} s"

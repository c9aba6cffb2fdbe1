"""A plan as a picture: what fills a device's memory, and how fast decode is, against batch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from xlinfer.commands.sizing import Planned
from xlinfer.plan.roofline import Step, decode_step

GiB = 2**30
LARGEST = 512  # sequences
# Okabe and Ito's colours, which the colour-blind tell apart.
WEIGHTS, TEMPORARIES, STATE, CACHE = "#0072B2", "#56B4E9", "#999999", "#E69F00"
COMPUTE, LINK, ALL = "#009E73", "#CC79A7", "#222222"
GREY = "#666666"


def draw(planned: Planned, made: dict[str, Any], file: Path) -> None:
    """`made` is plan_report.report's. Raises OSError where `file` cannot be written."""
    figure = Figure(figsize=(12, 5.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    model, mesh, target = made["model"], made["mesh"], made["target"]
    size, replicas = planned.setup.devices, mesh["replicas"]
    shared = f", {replicas} x {size} devices" if target["devices"] > 1 else ""
    kept = model["dtype"] + (f", {model['quantization']}" if model["quantization"] else "")
    figure.suptitle(f"{model['name']} ({kept}) on {target['name']}{shared}", fontsize=13)
    largest = max(LARGEST, planned.deployment.plan.max_num_seqs)
    batches = sorted({round(2 ** (i / 8)) for i in range(8 * (largest.bit_length() - 1) + 1)})
    context = made["kv_cache"]["context_tokens"]
    _memory(left, planned, made, batches, context)
    _speed(right, planned, batches, context)
    for axes in (left, right):
        _shade(axes, planned, context, batches[-1])
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False, fontsize=9
        )
        axes.set_xscale("log", base=2)
        axes.set_xlim(1, batches[-1])
        ticks = [2**i for i in range(batches[-1].bit_length())]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"sequences of {context:,} tokens in a replica")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def _memory(
    axes: Axes, planned: Planned, made: dict[str, Any], batches: Sequence[int], context: int
) -> None:
    memory, cache = made["memory"], made["kv_cache"]
    pages = -(-context // cache["page_tokens"])
    top = 1.1 * max(memory["device_bytes"], memory["total_bytes"]) / GiB
    base = 0.0
    for name, colour, size in (
        ("weights", WEIGHTS, memory["weight_bytes"] / GiB),
        ("temporaries", TEMPORARIES, memory["temporary_bytes"] / GiB),
        ("sampling state", STATE, memory["sampling_state_bytes"] / GiB),
    ):
        label = f"{name} {size:.2f}"
        axes.fill_between(batches, base, base + size, color=colour, linewidth=0, label=label)
        base += size
    used = [base + batch * pages * cache["page_bytes"] / GiB for batch in batches]
    axes.fill_between(batches, base, used, color=CACHE, linewidth=0, label="KV cache in use")
    usable = f"--hbm_utilization={memory['hbm_utilization']:g}: "
    for size, name in ((memory["device_bytes"], "all "), (memory["usable_bytes"], usable)):
        axes.axhline(size / GiB, color=GREY, linewidth=1, linestyle="--")
        axes.annotate(
            f"{name}{size / GiB:.2f}", (1, size / GiB), (4, 3), textcoords="offset points",
            color=GREY, fontsize=9,
        )  # fmt: skip
    axes.set_ylim(0, top)
    axes.set_ylabel("memory of a device (GiB)")
    axes.set_title("What fills the memory", fontsize=11)


def _speed(axes: Axes, planned: Planned, batches: Sequence[int], context: int) -> None:
    """What each resource alone would allow, and all of them."""
    steps = [
        decode_step(planned.work, planned.rates, batch=batch, context=context) for batch in batches
    ]
    rates, n = planned.rates, planned.replicas

    def line(seconds: Callable[[Step], float], name: str, **how: Any) -> list[float]:
        speed = [n * b / seconds(step) for b, step in zip(batches, steps, strict=True)]
        axes.plot(batches, speed, label=name, **how)
        return speed

    whole = line(lambda s: s.seconds, "all together", color=ALL, linewidth=3)
    line(lambda s: s.weight_bytes / rates.memory, "reading weights", color=WEIGHTS)
    line(lambda s: s.kv_bytes / rates.memory, "reading KV", color=CACHE)
    line(lambda s: s.compute_s, "computing", color=COMPUTE)
    if planned.work.devices > 1:
        line(lambda s: s.link_s, "between devices", color=LINK)
    axes.set_yscale("log")
    ceiling = max(max(line.get_ydata()[0] for line in axes.lines), max(whole))  # type: ignore[index]
    axes.set_ylim(whole[0] / 2, 2 * ceiling)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_ylabel("decoded tokens per second" + (f", {n} replicas" if n > 1 else ""))
    axes.set_title("What decode is limited by", fontsize=11)


def _shade(axes: Axes, planned: Planned, context: int, last: int) -> None:
    """The batches that are not run at once."""
    most, plan = planned.concurrency(context), planned.deployment.plan
    if not planned.fit.fits or most >= last:
        return
    axes.axvspan(most, last, color="white", alpha=0.6, linewidth=0, zorder=2.5)
    axes.axvline(most, color=GREY, linewidth=1, zorder=2.6)
    why = "--max_num_seqs" if most == plan.max_num_seqs else "KV cache full"
    axes.annotate(
        f"{why}: {most}", (most, 0.02), (-4, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", color=ALL, fontsize=9, rotation=90, ha="right", va="bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.7},
    )  # fmt: skip

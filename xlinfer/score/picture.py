"""A job's report as a picture: how fast it was, where the time went, and what failed."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from xlinfer.score.shard import Commit

# Okabe and Ito's colours, which the colour-blind tell apart.
RATE, CEILING, FAILED = "#0072B2", "#222222", "#D55E00"
PARTS = {"scoring": "#009E73", "reading": "#E69F00", "writing": "#CC79A7"}
LABELS = {"scoring": "scoring", "reading": "waiting for rows", "writing": "writing"}
MOST_FAILURES = 8
BINS = 80  # of the time
ROOM = 4  # of failures, as tall as so many at least


def draw(made: dict[str, Any], commits: Sequence[Commit]) -> bytes:
    """PNG of `report`'s. `commits` are those that it is of."""
    figure = Figure(figsize=(12, 6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    rate, split, failed = figure.subplot_mosaic(
        [["rate", "split"], ["rate", "failed"]], width_ratios=[3, 2], height_ratios=[1, 2]
    ).values()
    rows = made["rows"]
    figure.suptitle(
        f"{rows['answered']:,} of {rows['all']:,} rows answered, {rows['failed']:,} failed; "
        f"{', '.join(made['devices'])}",
        fontsize=13,
    )
    _rate(rate, made, commits)
    _split(split, made["worker_seconds"])
    _failed(failed, made["failures"])
    for axes in (rate, split, failed):
        axes.spines[["top", "right"]].set_visible(False)
    target = io.BytesIO()
    figure.savefig(target, dpi=150, format="png")
    return target.getvalue()


def _rate(axes: Axes, made: dict[str, Any], commits: Sequence[Commit]) -> None:
    """Of all workers together, each shard's tokens spread evenly over its time."""
    begin, end = min(c.started for c in commits), max(c.ended for c in commits)
    edges = np.linspace(begin, max(end, begin + 1e-3), BINS + 1)
    tokens = np.zeros(BINS)
    for commit in commits:
        shared = np.minimum(edges[1:], commit.ended) - np.maximum(edges[:-1], commit.started)
        seconds = max(commit.ended - commit.started, 1e-9)
        tokens += np.maximum(shared, 0) * commit.scored_tokens / seconds
    axes.stairs(tokens / np.diff(edges), edges - begin, fill=True, color=RATE, alpha=0.25)
    axes.stairs(tokens / np.diff(edges), edges - begin, color=RATE, linewidth=1.5, label="tokens/s")
    mean = made["tokens_per_s"] or 0.0
    axes.axhline(
        mean, color=CEILING, linestyle="--", linewidth=1,
        label=f"mean {mean:,.0f} tokens/s, {made['rows_per_s'] or 0:,.0f} rows/s",
    )  # fmt: skip
    roofline = made["roofline"]
    if roofline["fraction"] is None:
        axes.set_title(f"Throughput (no roofline: {roofline['why']})", fontsize=11)
    else:
        share = 100 * roofline["fraction"]
        axes.set_title(f"Throughput: {share:.1f} % of the roofline of prefill", fontsize=11)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), frameon=False, fontsize=9, ncols=2)
    axes.set_xlabel("seconds since the first row")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.margins(x=0)


def _split(axes: Axes, seconds: dict[str, float]) -> None:
    left = 0.0
    for name, colour in PARTS.items():
        share = 100 * seconds[name] / (seconds["all"] or 1.0)
        label = f"{LABELS[name]} {share:.1f} %"
        axes.barh([0], [share], left=left, color=colour, label=label)
        left += share
    axes.set_xlim(0, 100)
    axes.set_yticks([])
    axes.set_title(f"Where {seconds['all']:,.0f} worker-seconds went", fontsize=11)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, frameon=False, fontsize=9)
    axes.spines["left"].set_visible(False)


def _failed(axes: Axes, failures: dict[str, int]) -> None:
    axes.set_title("Rows that failed, by message", fontsize=11)
    shown = list(failures.items())[:MOST_FAILURES][::-1]
    if not shown:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
        return
    places = range(len(shown))
    axes.barh(places, [count for _, count in shown], color=FAILED, height=0.35, align="edge")
    for place, (message, count) in zip(places, shown, strict=True):
        text = f"{count:,}  {textwrap.shorten(message, 60, placeholder=' …')}"
        axes.annotate(text, (0, place), (2, -3), textcoords="offset points", va="top", fontsize=9)
    axes.set_ylim(min(0, len(shown) - ROOM) - 0.6, len(shown))
    axes.set_yticks([])
    axes.set_xlabel("rows")

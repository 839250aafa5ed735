#!/usr/bin/env python3
"""Draws a benchmark run as one picture.

    python benchmarks/plot.py step.json step.png       from a file that bench_step.py --json wrote

Marks differ in shape or hatch as well as in shade and are labelled where they stand: it reads in black and white.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import plot_precision
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator
from plot_style import GRID, HALO, INK, QUIET, machine, plain_axes, times
from report import HostCost, Report, WorkloadReport, load
from tables import counted, ratio_text

LARGE = 20_000_000
"""Elements of a large model."""
PIPELINES = {
    "clip": "Clipping and one step of SGD with momentum",
    "amp_clip": "Unscaling, clipping and one step of SGD with momentum",
    "ema": "One step of SGD with momentum and an average of the weights",
}


class Look(NamedTuple):
    """How a contender is drawn everywhere."""

    color: str
    marker: str
    hatch: str


LOOKS: dict[str, Look] = {
    "ours": Look("#0b4f8a", "o", ""),
    "fused": Look("#e8963a", "s", "////"),
    "default": Look("#8c8c8c", "^", ""),
    "foreach": Look("#4d4d4d", "v", ""),
    "compiled": Look("#3f8f5b", "D", ""),
}
LABELS = {
    "ours": "FusedMomentum",
    "fused": "torch fused",
    "default": "torch default",
    "foreach": "torch foreach",
    "compiled": "torch compiled",
}


def workload_labels(axes: Axes, entries: Sequence[WorkloadReport]) -> None:
    """The workloads down the side, the first on top."""
    axes.set_yticks(range(len(entries)), [f"{entry.workload}\n" for entry in entries])
    for label in axes.get_yticklabels():
        label.set(color=INK, fontsize=10, fontweight="bold")
    for y, entry in enumerate(entries):
        axes.annotate(
            detail(entry), (0, y), xytext=(-3.5, -6), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="center", color=QUIET, fontsize=8,
        )  # fmt: skip
    axes.set_ylim(len(entries) - 0.45, -0.55)


def detail(entry: WorkloadReport) -> str:
    """What a workload consists of, short enough for a label: "148 tensors, 124M"; in groups where each has its own."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if entry.elements >= size:
            total = f"{entry.elements / size:.3g}{unit}"
            break
    else:
        total = str(entry.elements)
    noun = "tensor" if entry.groups == 1 else "group"
    return f"{counted(entry.tensors, noun)}, {total}" + (f", {entry.dtype}" if entry.dtype != "float32" else "")


def draw_ratios(axes: Axes, entries: Sequence[WorkloadReport]) -> None:
    """Bars of how many times faster ours is than torch's default and fused."""
    height = 0.36
    smallest = largest = 1.0
    for y, entry in enumerate(entries):
        for offset, key in ((-height / 2, "default"), (height / 2, "fused")):
            row = entry.row(key)
            if row is None or row.ours_times_faster is None:
                continue
            value = row.ours_times_faster
            smallest, largest = min(smallest, value), max(largest, value)
            look = LOOKS[key]
            axes.barh(
                y + offset, value - 1, height * 0.88, left=1, color=look.color, hatch=look.hatch, edgecolor="white",
                linewidth=0,
            )  # fmt: skip
            axes.annotate(
                ratio_text(value), (max(value, 1.0), y + offset), xytext=(5, 0), textcoords="offset points",
                va="center", fontsize=9, color=INK, fontweight="bold", path_effects=HALO,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(smallest * 0.75, largest * 1.9)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.xaxis.set_major_formatter(FuncFormatter(times))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(
        [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if smallest * 0.75 <= tick <= largest * 1.9]
    )
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    workload_labels(axes, entries)
    handles = [
        Patch(
            facecolor=LOOKS[key].color, hatch=LOOKS[key].hatch, edgecolor="white", label=f"than {label(entries, key)}"
        )
        for key in ("default", "fused")
    ]
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(-0.04, 0),
        borderaxespad=2.2,
        ncols=3,
        frameon=False,
        fontsize=9,
    )


def label(entries: Sequence[WorkloadReport], key: str) -> str:
    """A contender's name: in a pipeline, "fused" is what is best there."""
    return "torch best" if key == "fused" and entries[0].pipeline else LABELS[key]


def draw_limits(axes: Axes, entries: Sequence[WorkloadReport]) -> None:
    """A mark for each contender at its share of the memory limit's speed."""
    largest = 1.0
    for y, entry in enumerate(entries):
        axes.plot([0, 1], [y, y], color=GRID, linewidth=1, zorder=0)
        for key in reversed(LOOKS):
            row = entry.row(key)
            if row is None or row.of_memory_limit is None:
                continue
            largest = max(largest, row.of_memory_limit)
            look = LOOKS[key]
            is_ours = key == "ours"
            axes.plot(
                row.of_memory_limit, y, look.marker, color=look.color, markersize=11 if is_ours else 8,
                markeredgecolor="white", markeredgewidth=0.8, zorder=5 if is_ours else 4,
            )  # fmt: skip
            if is_ours:
                axes.annotate(
                    f"{row.of_memory_limit:.0%}", (row.of_memory_limit, y), xytext=(0, 9), textcoords="offset points",
                    ha="center", fontsize=9, fontweight="bold", color=look.color, path_effects=HALO, zorder=6,
                )  # fmt: skip
    limit = "memory\nlimit" if entries[0].device == "cpu" else "copy"
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set_xlim(-0.03, max(1.18, 1.1 * largest))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", limit])
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    workload_labels(axes, entries)
    present = [key for key in LOOKS if any(entry.row(key) for entry in entries)]
    handles = [
        Line2D(
            [],
            [],
            color=LOOKS[key].color,
            marker=LOOKS[key].marker,
            linestyle="none",
            markersize=8,
            label=label(entries, key),
        )
        for key in present
    ]
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(-0.06, 0), borderaxespad=3.4, ncols=3, frameon=False,
        fontsize=9, handletextpad=0.2, columnspacing=1.0,
    )  # fmt: skip


def draw_host_cost(axes: Axes, cost: HostCost) -> None:
    """Step time over the number of tensors, both logarithmic, each line labelled at its end."""
    keys = {label: key for key, label in LABELS.items()}
    for label, curve in cost.step_us.items():
        look = LOOKS[keys[label]]
        lengths = sorted(curve)
        values = [curve[length] for length in lengths]
        axes.plot(
            lengths, values, color=look.color, marker=look.marker, markersize=7, linewidth=1.8, markeredgecolor="white"
        )
        each = (values[-1] - values[0]) / (lengths[-1] - lengths[0]) * 1e3
        each_text = f"{each:,.0f} ns" if each < 1000 else f"{each / 1e3:.3g} µs"
        axes.annotate(
            f"{label}\n{each_text} a tensor", (lengths[-1], values[-1]), xytext=(8, 0), textcoords="offset points",
            va="center", fontsize=9, color=look.color if look.color != "#8c8c8c" else QUIET, fontweight="bold",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.8, max(max(curve) for curve in cost.step_us.values()) * 30)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    lengths = sorted({length for curve in cost.step_us.values() for length in curve})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes.set_xlabel("one-element tensors in the list", color=QUIET, fontsize=9)
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def duration(us: float) -> str:
    """Microseconds as "10 µs", "1 ms", "1 s"."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:g} {unit}"
    return f"{us:g} µs"


def speed_claim(entries: Sequence[WorkloadReport]) -> str:
    """The ratio panel's title: the range that was measured against torch's default."""
    ratios = [row.ours_times_faster for entry in entries if (row := entry.row("default")) and row.ours_times_faster]
    if not ratios:
        return "Times faster than torch"
    return f"{span([ratio_text(ratio) for ratio in sorted(ratios)])} the speed of torch's default"


def memory_claim(entries: Sequence[WorkloadReport]) -> str:
    """The memory panel's title: the range of ours on large models, and each of the others by name."""
    shares = [(entry, row.of_memory_limit) for entry in entries if (row := entry.row("ours")) and row.of_memory_limit]
    large = [share for entry, share in shares if entry.elements >= LARGE]
    claims = [f"{entry.workload}: {share:.0%}" for entry, share in shares if entry.elements < LARGE]
    if large:
        whose = "the memory's" if entries[0].device == "cpu" else "a copy's"
        claims.insert(0, f"{span([f'{share:.0%}' for share in sorted(large)])} of {whose} speed")
    return "; ".join(claims)


def span(texts: Sequence[str]) -> str:
    """ "first to last" of sorted figures; one of them where they read alike."""
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def draw(report: Report, path: Path) -> None:
    """Writes the picture of the run at its largest number of threads.

    Raises ValueError where the run holds nothing to draw.
    """
    if report.precisions:
        plot_precision.draw(report, path)
        return
    counts = {entry.threads for entry in report.workloads} | {cost.threads for cost in report.host_costs}
    threads = max(counts, default=0)
    entries = [entry for entry in report.workloads if entry.threads == threads and entry.row("ours")]
    against_torch = [entry for entry in entries if entry.row("default") or entry.row("fused")]
    against_memory = [entry for entry in entries if (row := entry.row("ours")) and row.of_memory_limit]
    costs = [cost for cost in report.host_costs if cost.threads == threads]
    right = [name for name, there in (("limits", against_memory), ("host", costs)) if there]
    if not against_torch and not right:
        raise ValueError("nothing to draw: no workload was measured")

    mosaic: list[Any] = [["ratios"] * bool(against_torch) + [name] for name in right] or [["ratios"]]
    width, height = 6.6 * len(mosaic[0]) + 0.4, max(2.0 + 0.75 * len(against_torch), 4.3 * len(mosaic))
    layout = ConstrainedLayoutEngine(
        w_pad=0.15, h_pad=0.15, wspace=0.06, hspace=0.06, rect=(0, 0, 1, 1 - 0.85 / height)
    )
    figure, panels = plt.subplot_mosaic(mosaic, figsize=(width, height), layout=layout)
    environment = report.environment
    on_gpu = "gpu" in environment
    dtypes = "fp32" if {entry.dtype for entry in entries} <= {"float32"} else "fp32 unless named"
    time = "the host's time" if on_gpu else "time"
    where = "a GPU" if on_gpu else "the CPU"
    yardstick = "a copy of as many" if on_gpu else "a plain native loop over the same"
    figure.suptitle(
        f"{PIPELINES.get(report.options.get('pipeline') or '', 'One step of SGD with momentum')} on {where}",
        x=0.012,
        y=1 - 0.14 / height,
        ha="left",
        va="top",
        fontsize=16,
        fontweight="bold",
        color=INK,
    )
    figure.text(
        0.012, 1 - 0.5 / height,
        f"{machine(environment, threads)}; {dtypes}; medians over interleaved rounds; {environment['date']}",
        ha="left", va="top", fontsize=9.5, color=QUIET,
    )  # fmt: skip

    if against_torch:
        plain_axes(panels["ratios"], speed_claim(against_torch), "times faster, logarithmic; further right is better")
        draw_ratios(panels["ratios"], against_torch)
    if against_memory:
        plain_axes(
            panels["limits"],
            memory_claim(against_memory),
            f"share of the speed of {yardstick} bytes",
        )
        draw_limits(panels["limits"], against_memory)
    if costs:
        plain_axes(
            panels["host"],
            f"{costs[0].ns_per_tensor:.0f} ns for each tensor more",
            f"{time} of a step, both axes logarithmic; lower is better",
        )
        draw_host_cost(panels["host"], costs[0])
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line program; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what bench_step.py --json wrote")
    parser.add_argument("picture", type=Path, help="the picture to write")
    options = parser.parse_args(arguments)
    draw(load(options.json), options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())

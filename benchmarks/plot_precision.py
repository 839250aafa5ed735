"""Draws a run of --precision: each mode's speed against fp32, its share of the memory's speed, and its bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from plot_style import GRID, INK, QUIET, machine, plain_axes, times
from report import ModeRow, Report
from tables import number, ratio_text

OURS, TORCH = "#0b4f8a", "#8c8c8c"


def is_torch(row: ModeRow) -> bool:
    """Whether the row is torch's own step."""
    return row.label.startswith("torch")


def color(row: ModeRow) -> str:
    """Ours dark, torch's light."""
    return TORCH if is_torch(row) else OURS


def bars(axes: Axes, rows: list[ModeRow], values: list[float | None], texts: list[str]) -> None:
    """A bar for each mode, with its figure at the end; torch's hatched."""
    for y, (row, value, text) in enumerate(zip(rows, values, texts, strict=True)):
        if value is None:
            continue
        hatch = "////" if is_torch(row) else ""
        axes.barh(y, value, 0.62, color=color(row), hatch=hatch, edgecolor="white", linewidth=0)
        axes.annotate(
            text, (value, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9.5, color=INK,
            fontweight="bold", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0}, zorder=6,
        )  # fmt: skip
    axes.set_ylim(len(rows) - 0.45, -0.6)
    axes.set_xlim(0, max([value for value in values if value is not None], default=1.0) * 1.22)
    axes.grid(axis="x", color=GRID, linewidth=0.8)


def draw_speeds(axes: Axes, rows: list[ModeRow]) -> None:
    """Times as fast as our fp32 step."""
    ratios = sorted(row.times_fp32 for row in rows if not is_torch(row) and row.mode != "fp32" and row.times_fp32)
    title = f"{span(ratio_text(ratios[0]), ratio_text(ratios[-1]))} the speed of fp32" if ratios else "Speed of a step"
    plain_axes(axes, title, "times as fast as our own step in fp32; further right is better")
    bars(axes, rows, [row.times_fp32 for row in rows], [ratio_text(row.times_fp32) for row in rows])
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.xaxis.set_major_formatter(times)


def draw_shares(axes: Axes, rows: list[ModeRow], device: str) -> None:
    """Of the memory limit's GB/s."""
    shares = sorted(row.of_memory_limit for row in rows if not is_torch(row) and row.of_memory_limit is not None)
    whose = "the memory's" if device == "cpu" else "a copy's"
    title = f"{span(f'{shares[0]:.0%}', f'{shares[-1]:.0%}')} of {whose} speed" if shares else "Not measured"
    plain_axes(axes, title, "share of the limit's GB/s, each mode with its own bytes")
    bars(axes, rows, [row.of_memory_limit for row in rows], [number(row.of_memory_limit, ".0%") for row in rows])
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def draw_bytes(axes: Axes, rows: list[ModeRow]) -> None:
    """What a step must move, and what is kept."""
    moved = sorted(row.moved_bytes for row in rows)
    plain_axes(
        axes, f"{span(f'{moved[0]:.3g}', f'{moved[-1]:.3g}')} bytes for each element",
        "that a step must move; state: kept beside the parameter",
    )  # fmt: skip
    bars(
        axes, rows, [row.moved_bytes for row in rows],
        [f"{row.moved_bytes:.3g}, state {row.state_bytes:.3g}" for row in rows],
    )  # fmt: skip
    axes.set_xlim(0, moved[-1] * 1.4)


def span(first: str, last: str) -> str:
    """ "first to last"; one of them where they read alike."""
    return first if first == last else f"{first} to {last}"


def draw(report: Report, path: Path) -> None:
    """Writes the picture of the first workload at its largest number of threads."""
    entry = max(report.precisions, key=lambda each: each.threads)
    rows = [row for row in entry.rows if row.median_ms is not None and row.reason is None]
    if not rows:
        raise ValueError("nothing to draw: no mode was measured")
    height = 2.3 + 0.46 * len(rows)
    figure, panels = plt.subplots(
        1, 3, figsize=(14, height), sharey=True,
        gridspec_kw={"left": 0.135, "right": 0.99, "top": 1 - 1.62 / height, "bottom": 0.3 / height, "wspace": 0.08},
    )  # fmt: skip
    environment = report.environment
    figure.text(
        0.012, 1 - 0.14 / height, "One step with low-precision states", va="top", fontsize=16, fontweight="bold",
        color=INK,
    )  # fmt: skip
    figure.text(
        0.012, 1 - 0.52 / height,
        f"{entry.what}; {machine(environment, entry.threads)}; medians over interleaved rounds; {environment['date']}",
        va="top", fontsize=9.5, color=QUIET,
    )  # fmt: skip
    draw_speeds(panels[0], rows)
    draw_shares(panels[1], rows, entry.device)
    draw_bytes(panels[2], rows)
    panels[0].set_yticks(range(len(rows)), [row.label for row in rows], fontsize=10, color=INK)
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)

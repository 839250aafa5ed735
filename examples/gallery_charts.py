"""Draws the gallery's charts: steps beside the theory, and the cases where momentum does not help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from gallery_descent import MOMENTUM, Method
from gallery_marks import LOOKS, label_ends, logarithmic_heights, over_steps, power, save
from matplotlib.ticker import FuncFormatter, NullLocator
from picture_style import GRID, HALO, QUIET, headline, style


class Count(NamedTuple):
    """Steps on one quadratic at one method's best constants."""

    method: Method
    condition: float
    steps: int
    theory_steps: float
    rate: float
    theory_rate: float


class Curve(NamedTuple):
    """A line of a panel, labelled at its end."""

    method: Method
    values: Sequence[float]
    label: str


class Panel(NamedTuple):
    """A panel of curves over steps."""

    title: str
    subtitle: str
    measured: str
    """What the figures in the labels are."""
    curves: Sequence[Curve]
    logarithmic: bool


def draw_conditions(
    counts: Sequence[Count],
    distances: Mapping[str, Sequence[float]],
    condition: float,
    until: float,
    words: tuple[str, str],
    path: Path,
) -> None:
    """Steps over the condition number beside the theory, and the distances of the descents at one condition number."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13.5, 6.6), width_ratios=(1, 1.15),
        gridspec_kw={"left": 0.055, "right": 0.985, "top": 0.74, "bottom": 0.085, "wspace": 0.16},
    )  # fmt: skip
    headline(figure, *words)
    style(
        left,
        f"Steps to {power(until)}: with the condition number or its root",
        "both axes logarithmic; marks are counted, thin lines are what the theory's rate gives",
    )
    labels = []
    for name in dict.fromkeys(count.method.name for count in counts):
        look = LOOKS[name]
        mine = [count for count in counts if count.method.name == name]
        conditions = [count.condition for count in mine]
        left.plot(
            conditions, [count.theory_steps for count in mine], color=look.color, linewidth=1.1, linestyle=look.dash
        )
        left.plot(
            conditions, [count.steps for count in mine], color=look.color, marker=look.marker, linestyle="none",
            markersize=8, markeredgecolor="white",
        )  # fmt: skip
        labels.append((conditions[-1], float(mine[-1].steps), f"{name}\n{mine[-1].steps:,}", look.color))
    left.set_xscale("log")
    logarithmic_heights(left)
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    left.set_xlim(7, max(count.condition for count in counts) * 12)
    left.set_xticks(sorted({count.condition for count in counts}))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    left.set_xlabel("condition number", fontsize=9, color=QUIET)
    left.grid(axis="y", color=GRID, linewidth=0.8)
    label_ends(left, labels)

    peak = max(distances[MOMENTUM])
    style(
        right,
        f"On the way, momentum first moves away: {peak:.1f}x the distance",
        f"condition number {condition:,.0f}; distance to the minimum as a share of the first; both axes logarithmic",
    )
    for name, curve in distances.items():
        look = LOOKS[name]
        right.plot(curve, color=look.color, linestyle=look.dash, linewidth=1.8)
        right.plot(
            len(curve) - 1, curve[-1], marker=look.marker, color=look.color, markeredgecolor="white", markersize=8,
            clip_on=False, zorder=6,
        )  # fmt: skip
        before = name == MOMENTUM  # its line ends close to Nesterov's
        right.annotate(
            f"{name}\n{len(curve) - 1:,} steps", (len(curve) - 1, curve[-1]), xytext=(-9 if before else 9, 6),
            textcoords="offset points", ha="right" if before else "left", fontsize=9.5, fontweight="bold",
            color=look.color, path_effects=HALO, zorder=8,
        )  # fmt: skip
    logarithmic_heights(right)
    over_steps(right, max(len(curve) for curve in distances.values()) - 1, "log", room=2)
    save(figure, path)


def draw_limits(panels: Sequence[Panel], words: tuple[str, str], path: Path) -> None:
    """Four panels, each a case where momentum does not help."""
    figure, grid = plt.subplots(
        2, 2, figsize=(13.5, 9.2),
        gridspec_kw={"left": 0.045, "right": 0.985, "top": 0.83, "bottom": 0.065, "hspace": 0.5, "wspace": 0.13},
    )  # fmt: skip
    headline(figure, *words)
    for axes, panel in zip(grid.flat, panels, strict=True):
        style(axes, panel.title, panel.subtitle)
        labels = []
        for curve in panel.curves:
            look = LOOKS[curve.method.name]
            values = np.asarray(curve.values)
            axes.plot(values, color=look.color, linestyle=look.dash, linewidth=1.7)
            axes.plot(
                len(values) - 1, values[-1], marker=look.marker, color=look.color, markeredgecolor="white",
                markersize=7, clip_on=False, zorder=6,
            )  # fmt: skip
            labels.append((float(len(values) - 1), float(values[-1]), curve.label, look.color))
        if panel.logarithmic:
            logarithmic_heights(axes)
        steps = max(len(curve.values) for curve in panel.curves) - 1
        over_steps(axes, steps, "linear", room=1.75)
        label_ends(axes, labels)
    save(figure, path)

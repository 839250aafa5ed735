"""Draws what gallery.py computed.

Methods differ in dash and marker as well as in colour, and are labelled where they stand: it reads in black and white.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from gallery_descent import GRADIENT_DESCENT, MOMENTUM, NESTEROV, SMALLER_STEPS, Method, Path
from gallery_landscapes import Landscape
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from picture_style import BLUE, GREEN, GRID, HALO, INK, ORANGE, QUIET, headline, style
from PIL import Image


class Look(NamedTuple):
    """How a method is drawn everywhere."""

    color: str
    dash: str | tuple[int, tuple[float, ...]]
    marker: str


LOOKS = {
    GRADIENT_DESCENT: Look(ORANGE, (0, (4, 1.6)), "o"),
    MOMENTUM: Look(BLUE, "-", "s"),
    NESTEROV: Look(GREEN, (0, (6, 1.5, 1.2, 1.5)), "D"),
    SMALLER_STEPS: Look(QUIET, (0, (1.2, 1.2)), "v"),
}
TERRAIN = LinearSegmentedColormap.from_list("terrain", ["#ffffff", "#eef1f4", "#dde2e7", "#c9cfd6"])
BANDS = 22
COLORS = 192
"""Of a file: contours, lines and the shades of their edges."""


class Card(NamedTuple):
    """The words of a picture of one landscape."""

    title: str
    subtitle: str
    losses_title: str
    floor: float
    """Losses are drawn as heights above the deepest minimum, down to this."""
    along: str = "log"
    """The scale of the steps: log or linear."""


# ---------------------------------------------------------------------------------------------------------------- parts


def draw_terrain(axes: Axes, landscape: Landscape) -> None:
    """Contours, lower is lighter; bands of equal area, so that valleys show whatever the heights around."""
    x = torch.linspace(*landscape.xlim, 500, dtype=torch.float64)
    y = torch.linspace(*landscape.ylim, 400, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    height = landscape.function(grid).numpy()
    levels = np.quantile(height, np.linspace(0, 1, BANDS))
    axes.contourf(x, y, height, levels, cmap=TERRAIN, norm=matplotlib.colors.BoundaryNorm(levels, 256))
    axes.contour(x, y, height, levels[1:-1], colors="#b4bbc3", linewidths=0.5, negative_linestyles="solid")
    for minimum in landscape.minima:
        deepest = math.isclose(landscape.at(minimum), landscape.lowest(), abs_tol=1e-9)
        axes.plot(*minimum, marker="*", color=INK if deepest else "white", markeredgecolor=INK, markersize=11, zorder=6)
    axes.set_xlim(*landscape.xlim)
    axes.set_ylim(*landscape.ylim)
    axes.xaxis.set_major_locator(NullLocator())
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)


def draw_path(axes: Axes, path: Path, steps: int) -> None:
    """The first `steps` steps, a mark for each of the first ones and for every so many of the later ones."""
    look = LOOKS[path.method.name]
    points = path.points[: steps + 1].numpy()
    every = max(1, steps // 60)
    axes.plot(
        points[:, 0], points[:, 1], color=look.color, linewidth=1.3, marker=look.marker, markersize=3.4,
        markevery=every, markerfacecolor="white", markeredgewidth=1, solid_joinstyle="round", zorder=5,
    )  # fmt: skip
    axes.plot(*points[0], marker="o", color="white", markeredgecolor=INK, markersize=8, markeredgewidth=1.5, zorder=7)
    axes.plot(*points[-1], marker=look.marker, color=look.color, markeredgecolor="white", markersize=8, zorder=7)


def label_ends(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Labels right of the points (x, y, text, colour); one that would lie upon another moves up."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    to_points = 72 / figure.dpi
    placed: list[tuple[float, Bbox]] = []

    def from_below(label: tuple[float, float, str, str]) -> tuple[float, float, float]:
        at_x, at_y = axes.transData.transform(label[:2])
        return round(at_y / 8), -at_x, at_y

    for x, y, text, color in sorted(labels, key=from_below):
        at_x = axes.transData.transform((x, y))[0] * to_points
        label = axes.annotate(
            text, (x, y), xytext=(9, 0), va="center", textcoords="offset points", fontsize=9.5, fontweight="bold",
            color=color, annotation_clip=False, path_effects=HALO, zorder=8,
        )  # fmt: skip
        up = 0.0
        right = at_x
        for other_x, other in placed:  # from below to above
            box = label.get_window_extent(renderer)
            if box.overlaps(other):
                # Above the label that it makes room for, and clear of the other's line.
                right = max(right, other_x)
                up += (other.y1 - box.y0) * to_points + 1
                label.set_position((9 + right - at_x, up))
        placed.append((right, label.get_window_extent(renderer)))


def label_arrivals(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Labels below the points (x, y, text, colour), where nothing is drawn; one that would cover another moves down."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    placed: list[Bbox] = []
    for x, y, text, color in sorted(labels, reverse=True):
        label = axes.annotate(
            text, (x, y), xytext=(-4, -9), va="top", textcoords="offset points", fontsize=9.5, fontweight="bold",
            color=color, annotation_clip=False, path_effects=HALO, zorder=8,
        )  # fmt: skip
        while any(label.get_window_extent(renderer).padded(2).overlaps(other) for other in placed):
            left, up = label.get_position()
            label.set_position((left, up - 1))
        placed.append(label.get_window_extent(renderer))


def over_steps(axes: Axes, steps: int, along: str, room: float) -> None:
    """The horizontal axis of curves over steps; on the right room for labels, this many times the steps."""
    if along == "log":
        axes.set_xscale("symlog", linthresh=10, linscale=0.6)
        axes.set_xlim(0, steps * room**4)
        ticks = [0, 10, 100, 1_000, 10_000, 100_000]
        axes.set_xticks([tick for tick in ticks if tick <= steps])
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, steps * room)
        axes.set_xticks([tick for tick in MaxNLocator(7, integer=True).tick_values(0, steps) if 0 <= tick <= steps])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("steps", fontsize=9, color=QUIET)
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def logarithmic_heights(axes: Axes) -> None:
    """A logarithmic vertical axis with few ticks, written as 1e-6 or 0.1."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(power))


def power(value: float, _: object = None) -> str:
    """ "1e-6", "0.01", "10"."""
    return f"{value:g}" if 1e-3 <= value < 1e4 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def draw_losses(axes: Axes, paths: Sequence[Path], lowest: float, card: Card) -> None:
    """The height above the deepest minimum against steps, one line for each method, labelled at its end."""
    arrivals: list[tuple[float, float, str, str]] = []
    ends: list[tuple[float, float, str, str]] = []
    longest = max(len(path.losses) for path in paths) - 1
    for path in paths:
        look = LOOKS[path.method.name]
        heights = (path.losses - lowest).numpy()
        arrived = path.arrives(lowest + card.floor)
        shown = np.maximum(heights if arrived is None else heights[: arrived + 1], card.floor)
        steps = len(shown) - 1
        axes.plot(np.arange(steps + 1), shown, color=look.color, linestyle=look.dash, linewidth=1.8)
        axes.plot(
            steps, shown[-1], marker=look.marker, color=look.color, markeredgecolor="white", markersize=8,
            clip_on=False, zorder=6,
        )  # fmt: skip
        count = f"{steps:,} steps" if arrived is not None else f"not in {steps:,} steps"
        labels = ends if arrived is None else arrivals
        labels.append((float(steps), float(shown[-1]), f"{path.method.name}: {count}", look.color))
    logarithmic_heights(axes)
    over_steps(axes, longest, card.along, room=1.36)
    # Below the floor there is room for the labels.
    low, high = math.log10(card.floor), math.log10(axes.get_ylim()[1])
    axes.set_ylim(10 ** (low - 0.25 * (high - low)), 10**high)
    axes.set_yticks(10.0 ** np.arange(low, high, 2))
    label_arrivals(axes, arrivals)
    label_ends(axes, ends)


def method_title(axes: Axes, path: Path, steps: int, lowest: float) -> None:
    """Name, constants, and how high above the minimum it stands after the steps that are drawn."""
    look = LOOKS[path.method.name]
    axes.set_title(path.method.name, loc="left", fontsize=12.5, fontweight="bold", color=look.color, pad=22)
    axes.annotate(
        f"{path.method.constants()}; height after {steps:,} steps: {power_text(float(path.losses[steps]) - lowest)}",
        (0, 1), xytext=(0, 7), xycoords="axes fraction", textcoords="offset points", color=QUIET, fontsize=9.5,
    )  # fmt: skip


def power_text(value: float) -> str:
    """Two digits: "0.45", "2.5e-05"."""
    return f"{value:.2g}"


def save(figure: Figure, path: FilePath) -> None:
    """Writes the picture in few colours, so that it stays small; nothing in the file depends on the day."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, facecolor="white", format="png")
    plt.close(figure)
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


# ------------------------------------------------------------------------------------------------------------- pictures


def draw_landscape(landscape: Landscape, paths: Sequence[Path], steps: int, card: Card, path: FilePath) -> None:
    """Three maps with the first steps of each method, and below the losses of the whole descents."""
    figure, panels = plt.subplot_mosaic(
        [["0", "1", "2"], ["losses", "losses", "losses"]],
        figsize=(13.5, 9.2),
        height_ratios=(1.75, 1),
        gridspec_kw={"left": 0.045, "right": 0.985, "top": 0.815, "bottom": 0.065, "hspace": 0.32, "wspace": 0.05},
    )
    headline(figure, card.title, card.subtitle)
    for place, descent in enumerate(paths):
        axes = panels[str(place)]
        draw_terrain(axes, landscape)
        draw_path(axes, descent, steps)
        method_title(axes, descent, steps, landscape.lowest())
    style(panels["losses"], card.losses_title, "height above the deepest minimum, logarithmic; lower is better")
    draw_losses(panels["losses"], paths, landscape.lowest(), card)
    save(figure, path)


def draw_ravine(landscape: Landscape, paths: Sequence[Path], steps: int, card: Card, path: FilePath) -> None:
    """For each method a long map and, beside it, the coordinate across the ravine; below the losses."""
    rows = len(paths)
    mosaic: list[Any] = [*([f"map{row}", f"across{row}"] for row in range(rows)), ["losses", "losses"]]
    figure, panels = plt.subplot_mosaic(
        mosaic,
        figsize=(13.5, 3.9 + 2.35 * rows),
        height_ratios=(*[1] * rows, 1.4),
        width_ratios=(1.9, 1),
        gridspec_kw={"left": 0.045, "right": 0.985, "top": 0.875, "bottom": 0.04, "hspace": 0.55, "wspace": 0.1},
    )
    headline(figure, card.title, card.subtitle)
    for row, descent in enumerate(paths):
        axes = panels[f"map{row}"]
        draw_terrain(axes, landscape)
        draw_path(axes, descent, steps)
        method_title(axes, descent, steps, landscape.lowest())
        draw_across(panels[f"across{row}"], descent, steps)
    style(panels["losses"], card.losses_title, "height above the minimum, logarithmic; lower is better")
    draw_losses(panels["losses"], paths, landscape.lowest(), card)
    save(figure, path)


def draw_across(axes: Axes, path: Path, steps: int) -> None:
    """The coordinate across the ravine against steps."""
    look = LOOKS[path.method.name]
    across = path.points[: steps + 1, 1].numpy()
    wide = np.flatnonzero(np.abs(across) > 0.1)[-1] + 1
    settled = f"within a tenth of the start from step {wide} on" if wide <= steps else f"still wide after {steps} steps"
    style(axes, "Across the ravine", f"y against steps; {settled}", size=11)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.plot(
        np.arange(steps + 1), across, color=look.color, linewidth=1.2, marker=look.marker, markersize=3.2,
        markerfacecolor="white", markeredgewidth=0.9,
    )  # fmt: skip
    axes.set_ylim(-1.12, 1.12)
    axes.set_yticks([-1, 0, 1])
    axes.set_xlim(-1, steps + 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def draw_basins(
    landscape: Landscape,
    methods: Sequence[Method],
    reached: Sequence[np.ndarray],
    words: tuple[str, str],
    path: FilePath,
) -> None:
    """For each start on the map: white where the deeper well is reached, dark where the shallower is.

    Args:
        landscape: the double well.
        methods: the three.
        reached: for each method bool [rows, columns] over the landscape's limits, from its lower left corner.
        words: title and subtitle.
        path: the file to write.
    """
    figure, panels = plt.subplots(
        1,
        3,
        figsize=(13.5, 4.9),
        gridspec_kw={"left": 0.02, "right": 0.985, "top": 0.66, "bottom": 0.03, "wspace": 0.05},
    )
    headline(figure, *words)
    for axes, method, deeper in zip(panels, methods, reached):
        look = LOOKS[method.name]
        draw_terrain(axes, landscape)
        axes.imshow(
            deeper, cmap=ListedColormap([look.color, "white"]), origin="lower", aspect="auto", alpha=0.8,
            extent=(*landscape.xlim, *landscape.ylim), zorder=4, interpolation="nearest", vmin=0, vmax=1,
        )  # fmt: skip
        style(axes, method.name, f"{method.constants()}; {deeper.mean():.0%} end in the deeper well")
        axes.spines["bottom"].set_visible(False)
        for (x, y), text in zip(landscape.minima, ("deeper", "shallower")):
            axes.annotate(
                text, (x, y), xytext=(0, -15), textcoords="offset points", ha="center", fontsize=9.5, color=INK,
                fontweight="bold", path_effects=HALO, zorder=7,
            )  # fmt: skip
    save(figure, path)


class Count(NamedTuple):
    """Steps on one quadratic at one method's best constants."""

    method: Method
    condition: float
    steps: int
    theory_steps: float
    rate: float
    theory_rate: float


def draw_conditions(
    counts: Sequence[Count],
    distances: Mapping[str, Sequence[float]],
    condition: float,
    until: float,
    words: tuple[str, str],
    path: FilePath,
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


def draw_limits(panels: Sequence[Panel], words: tuple[str, str], path: FilePath) -> None:
    """Four panels, each a case where momentum does not help."""
    figure, grid = plt.subplots(
        2, 2, figsize=(13.5, 9.2),
        gridspec_kw={"left": 0.045, "right": 0.985, "top": 0.83, "bottom": 0.065, "hspace": 0.5, "wspace": 0.13},
    )  # fmt: skip
    headline(figure, *words)
    for axes, panel in zip(grid.flat, panels):
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

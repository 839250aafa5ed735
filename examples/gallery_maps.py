"""Draws the gallery's landscapes: paths on maps, the losses below them, and which well every start reaches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from gallery_descent import Method, Path
from gallery_landscapes import Landscape
from gallery_marks import LOOKS, label_arrivals, label_ends, logarithmic_heights, over_steps, save
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
from matplotlib.ticker import MaxNLocator, NullLocator
from picture_style import HALO, INK, QUIET, headline, style

TERRAIN = LinearSegmentedColormap.from_list("terrain", ["#ffffff", "#eef1f4", "#dde2e7", "#c9cfd6"])
BANDS = 22


class Card(NamedTuple):
    """The words of a picture of one landscape."""

    title: str
    subtitle: str
    losses_title: str
    floor: float
    """Losses are drawn as heights above the deepest minimum, down to this."""
    along: str = "log"
    """The scale of the steps: log or linear."""


def draw_landscape(landscape: Landscape, paths: Sequence[Path], steps: int, card: Card, path: FilePath) -> None:
    """A map with the first steps of each method, three or two in a row, and below the losses of the whole descents."""
    columns = 3 if len(paths) % 3 == 0 else 2
    rows = len(paths) // columns
    maps: list[Any] = [[str(row * columns + column) for column in range(columns)] for row in range(rows)]
    figure, panels = plt.subplot_mosaic(
        [*maps, ["losses"] * columns],
        figsize=(13.5, 9.2 + 5.2 * (rows - 1)),
        height_ratios=(*[1.75] * rows, 1 if rows == 1 else 1.4),
        gridspec_kw={
            "left": 0.045, "right": 0.985, "top": 0.815 if rows == 1 else 0.88, "bottom": 0.065 if rows == 1 else 0.045,
            "hspace": 0.32, "wspace": 0.05,
        },
    )  # fmt: skip
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
    for axes, method, deeper in zip(panels, methods, reached, strict=True):
        look = LOOKS[method.name]
        draw_terrain(axes, landscape)
        axes.imshow(
            deeper, cmap=ListedColormap([look.color, "white"]), origin="lower", aspect="auto", alpha=0.8,
            extent=(*landscape.xlim, *landscape.ylim), zorder=4, interpolation="nearest", vmin=0, vmax=1,
        )  # fmt: skip
        style(axes, method.name, f"{method.constants()}; {deeper.mean():.0%} end in the deeper well")
        axes.spines["bottom"].set_visible(False)
        for (x, y), text in zip(landscape.minima, ("deeper", "shallower"), strict=True):
            axes.annotate(
                text, (x, y), xytext=(0, -15), textcoords="offset points", ha="center", fontsize=9.5, color=INK,
                fontweight="bold", path_effects=HALO, zorder=7,
            )  # fmt: skip
    save(figure, path)


def draw_terrain(axes: Axes, landscape: Landscape) -> None:
    """Contours, lower is lighter; bands of equal area, so that valleys show whatever the heights around."""
    x = torch.linspace(*landscape.xlim, 500, dtype=torch.float64)
    y = torch.linspace(*landscape.ylim, 400, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    height = landscape.function(grid).numpy()
    levels = np.quantile(height, np.linspace(0, 1, BANDS))
    axes.contourf(x, y, height, levels, cmap=TERRAIN, norm=BoundaryNorm(levels, 256))
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


def method_title(axes: Axes, path: Path, steps: int, lowest: float) -> None:
    """Name, constants, and how high above the minimum it stands after the steps that are drawn."""
    look = LOOKS[path.method.name]
    axes.set_title(path.method.name, loc="left", fontsize=12.5, fontweight="bold", color=look.color, pad=22)
    axes.annotate(
        f"{path.method.constants()}; height after {steps:,} steps: {float(path.losses[steps]) - lowest:.2g}",
        (0, 1), xytext=(0, 7), xycoords="axes fraction", textcoords="offset points", color=QUIET, fontsize=9.5,
    )  # fmt: skip


def draw_across(axes: Axes, path: Path, steps: int) -> None:
    """The coordinate across the ravine against steps."""
    look = LOOKS[path.method.name]
    across = path.points[: steps + 1, 1].numpy()
    wide = np.flatnonzero(np.abs(across) > 0.1)[-1] + 1
    swing = f"within a tenth of the start from step {wide} on" if wide <= steps else f"still wide after {steps} steps"
    style(axes, "Across the ravine", f"y against steps; {swing}", size=11)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.plot(
        np.arange(steps + 1), across, color=look.color, linewidth=1.2, marker=look.marker, markersize=3.2,
        markerfacecolor="white", markeredgewidth=0.9,
    )  # fmt: skip
    axes.set_ylim(-1.12, 1.12)
    axes.set_yticks([-1, 0, 1])
    axes.set_xlim(-1, steps + 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def draw_losses(axes: Axes, paths: Sequence[Path], lowest: float, card: Card) -> None:
    """The height above the deepest minimum against steps, one line for each method, labelled at its end."""
    arrivals: list[tuple[float, float, str, str]] = []
    ends: list[tuple[float, float, str, str]] = []
    longest = 0
    for path in paths:
        look = LOOKS[path.method.name]
        heights = (path.losses - lowest).numpy()
        arrived = path.arrives(lowest + card.floor)
        shown = np.maximum(heights if arrived is None else heights[: arrived + 1], card.floor)
        steps = len(shown) - 1
        longest = max(longest, steps)
        axes.plot(np.arange(steps + 1), shown, color=look.color, linestyle=look.dash, linewidth=1.8)
        axes.plot(
            steps, shown[-1], marker=look.marker, color=look.color, markeredgecolor="white", markersize=8,
            clip_on=False, zorder=6,
        )  # fmt: skip
        count = f"{steps:,} steps" if arrived is not None else f"not in {steps:,} steps"
        labels = ends if arrived is None else arrivals
        labels.append((float(steps), float(shown[-1]), f"{path.method.name}: {count}", look.color))
    logarithmic_heights(axes)
    over_steps(axes, longest, card.along, room=1.75 if card.along == "log" else 1.36)
    # Below the floor there is room for the labels.
    low, high = math.log10(card.floor), math.log10(axes.get_ylim()[1])
    axes.set_ylim(10 ** (low - 0.25 * (high - low)), 10**high)
    axes.set_yticks(10.0 ** np.arange(low, high, 2))
    label_arrivals(axes, arrivals)
    label_ends(axes, ends)

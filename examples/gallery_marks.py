"""What the gallery's pictures share: how methods look, labels, axes, and writing the file.

Methods differ in dash and marker as well as in colour, and are labelled where they stand: it reads in black and white.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from gallery_descent import ADAM, GRADIENT_DESCENT, MOMENTUM, NADAM, NESTEROV, SMALLER_STEPS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from picture_style import BLUE, CRIMSON, GREEN, GRID, HALO, ORANGE, PURPLE, QUIET
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
    ADAM: Look(PURPLE, "-", "^"),
    NADAM: Look(CRIMSON, (0, (6, 1.5, 1.2, 1.5)), "v"),
    SMALLER_STEPS: Look(QUIET, (0, (1.2, 1.2)), "v"),
}
COLORS = 192
"""Of a file: contours, lines and the shades of their edges."""


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
        while any(label.get_window_extent(renderer).padded(12, 2).overlaps(other) for other in placed):
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


def save(figure: Figure, path: Path) -> None:
    """Writes the picture in few colours, so that it stays small; nothing in the file depends on the day."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, facecolor="white", format="png")
    plt.close(figure)
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)

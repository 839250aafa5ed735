"""What the pictures of the examples share: colours, and panels with a title that says what to see and no box."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

INK = "#1a1a1a"
QUIET = "#6b6b6b"
GRID = "#e3e3e3"
BLUE = "#0b4f8a"
ORANGE = "#c8641b"
GREEN = "#3f8f5b"
PURPLE = "#7b4fa3"
CRIMSON = "#a8324a"
GRAY = "#8c8c8c"
HALO = [withStroke(linewidth=3.5, foreground="white")]
"""Drawn around labels, so that no line runs through them."""


def style(axes: Axes, title: str, subtitle: str, size: float = 12.5) -> None:
    """A panel's title and subtitle, from its left edge; no box."""
    axes.set_title(title, loc="left", fontsize=size, fontweight="bold", color=INK, pad=23)
    axes.annotate(
        subtitle, (0, 1), xytext=(0, 8), xycoords="axes fraction", textcoords="offset points", color=QUIET, fontsize=9.5
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(which="both", colors=QUIET, length=0, labelsize=9)
    axes.set_axisbelow(True)


def headline(figure: Figure, title: str, subtitle: str) -> None:
    """A picture's title and subtitle, at its top left; lengths are in inches, whatever the picture's size."""
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.2 / height, title, va="top", fontsize=18, fontweight="bold", color=INK)
    figure.text(0.012, 1 - 0.6 / height, subtitle, va="top", fontsize=10, color=QUIET, linespacing=1.5)

"""What the benchmark's pictures share: colours, and panels with a title that says what to see and no box."""

from __future__ import annotations

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from tables import counted

matplotlib.use("Agg")

INK = "#1a1a1a"
QUIET = "#6b6b6b"
GRID = "#dddddd"
HALO = [withStroke(linewidth=3, foreground="white")]
"""Drawn around labels, so that no line runs through them."""


def times(value: float, _: object = None) -> str:
    """An axis label for a ratio: "0.5x", "1x", "150x"."""
    return f"{value:g}x"


def plain_axes(axes: Axes, title: str, subtitle: str) -> None:
    """What all panels share: a title that says what to see, light grid along x, no box."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=24)
    axes.annotate(
        subtitle, (0, 1), xytext=(0, 9), xycoords="axes fraction", textcoords="offset points", color=QUIET, fontsize=9
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=QUIET, length=0, labelsize=9)
    axes.set_axisbelow(True)


def machine(environment: dict[str, str], threads: int) -> str:
    """What the figures are of, for a subtitle: the machine and the versions, instruction sets where they matter."""
    commit = f", commit {environment['commit']}" if "commit" in environment else ""
    torch, mine = environment["torch"], environment["momentum_ext"]
    if "gpu" in environment:
        return f"{environment['gpu']}; torch {torch.split()[0]}; momentum_ext {mine.split()[0]}{commit}"
    return f"{environment['cpu']}, {counted(threads, 'thread')}; torch {torch}; momentum_ext {mine}{commit}"

"""Draws what precision_training.py found: the losses of all modes, and where each ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from picture_style import BLUE, GREEN, GRID, HALO, INK, ORANGE, QUIET, headline, style
from precision_modes import Mode

import momentum_ext

SMOOTHED = 20
"""Steps whose losses are averaged."""
COLORS = {torch.float32: BLUE, torch.bfloat16: ORANGE, torch.float16: GREEN}
DASHES = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1)))


class Result(Protocol):
    """What is drawn of a run."""

    mode: Mode
    seed: int
    nudge: int
    losses: list[float]
    final: float


def smooth(losses: Sequence[float]) -> np.ndarray:
    """Means of `SMOOTHED` losses in a row, the first ones of as many as there are."""
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - SMOOTHED, 0)
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def mean_final(results: Sequence[Result], mode: Mode) -> float:
    """The held-out loss in a mode, mean over seeds."""
    return float(np.mean([result.final for result in results if result.mode == mode and not result.nudge]))


def baseline(results: Sequence[Result]) -> tuple[float, float]:
    """(fp32's mean final loss, by how much the mean of another mode may differ from it by chance).

    Two standard deviations of such a difference, from runs that differ by a nudge and start from the same seed.
    """
    mode = results[0].mode
    seeds = sorted({result.seed for result in results})
    spreads = [
        np.var([result.final for result in results if result.mode == mode and result.seed == seed], ddof=1)
        for seed in seeds
    ]
    return mean_final(results, mode), float(2 * np.sqrt(2 * np.mean(spreads) / len(seeds)))


def draw(found: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Writes the picture: a row for each training, curves on the left, final losses on the right."""
    rows = len(found)
    height = 1.0 + 5.1 * rows
    figure, panels = plt.subplots(
        rows, 2, figsize=(13.5, height), squeeze=False, width_ratios=(1.1, 1),
        gridspec_kw={
            "left": 0.045, "right": 0.985, "top": 1 - 1.55 / height, "bottom": 0.5 / height, "wspace": 0.5,
            "hspace": 0.38,
        },
    )  # fmt: skip
    headline(
        figure,
        "The same trainings, with parameters and momentum in fewer bits",
        "Same first weights, same batches. Blue: fp32 parameters, orange: bf16, green: fp16; forward and backward "
        f"compute in fp32 with their values. torch {torch.__version__}; momentum_ext {momentum_ext.__version__}",
    )
    for (left, right), (title, results) in zip(panels, found.items(), strict=True):
        draw_curves(left, title, [result for result in results if not result.nudge and not result.seed])
        draw_finals(right, results)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def draw_curves(axes: Axes, title: str, shown: Sequence[Result]) -> None:
    """Smoothed training losses; fp32 wide and light, under the others."""
    style(axes, title, f"training loss, cross-entropy, mean of {SMOOTHED} steps, logarithmic")
    seen: dict[torch.dtype, int] = {}
    for index, result in enumerate(shown):
        dtype = result.mode.param
        seen[dtype] = seen.get(dtype, -1) + 1
        steps = np.arange(1, len(result.losses) + 1)
        axes.plot(
            steps, smooth(result.losses), color=COLORS[dtype], linestyle=DASHES[seen[dtype] % len(DASHES)],
            linewidth=1.3 if index else 5, alpha=1 if index else 0.3, label=result.mode.name,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(frameon=False, fontsize=7.5, handlelength=4, loc="upper right", labelcolor=INK)
    axes.set_xlabel("steps", fontsize=9, color=QUIET)
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def draw_finals(axes: Axes, results: Sequence[Result]) -> None:
    """The held-out loss of each mode, mean and single seeds, upon what chance does to fp32."""
    base, noise = baseline(results)
    style(axes, "Where each ends", "held-out loss, mean of the seeds; small: each of them; band: chance")
    axes.axvspan(base - noise, base + noise, color=BLUE, alpha=0.15, linewidth=0)
    modes = list(dict.fromkeys(result.mode.name for result in results))
    finals = []
    for y, name in enumerate(modes):
        mine = [result for result in results if result.mode.name == name and not result.nudge]
        color, mean = COLORS[mine[0].mode.param], mean_final(results, mine[0].mode)
        finals += [result.final for result in mine]
        if len(mine) > 1:
            axes.plot([result.final for result in mine], [y] * len(mine), ".", color=color, alpha=0.5, markersize=5)
        axes.plot(mean, y, "o", color=color, markersize=8)
        axes.annotate(
            f"{mean:.4f}", (max(result.final for result in mine), y), xytext=(9, 0), textcoords="offset points",
            va="center", fontsize=9, color=INK, path_effects=HALO,
        )  # fmt: skip
    room = 0.05 * (max(finals) - min(finals)) + 1e-6
    axes.set_xlim(min(*finals, base - noise) - room, max(*finals, base + noise) + 5 * room)  # the figures on the right
    axes.set_yticks(range(len(modes)), modes, fontsize=9.5, color=INK)
    axes.set_ylim(len(modes) - 0.4, -0.6)
    axes.grid(axis="x", color=GRID, linewidth=0.8)

"""Draws what train_char_gpt.py found: the losses of all runs, and by how much they differ from torch's form.

Runs differ in dash and marker as well as in colour and are labelled where they stand: it reads in black and white.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from char_gpt_training import ADAPTIVE, ADAPTIVE_LR, Run, Settings
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from picture_style import BLUE, GREEN, GRID, HALO, INK, ORANGE, PURPLE, QUIET, headline, style

import momentum_ext

SMOOTHED = 50
"""Steps whose losses are averaged: a batch's own loss jumps by more than the runs differ."""


class Look(NamedTuple):
    """How a formulation is drawn everywhere."""

    color: str
    dash: str | tuple[int, tuple[float, ...]]
    width: float


LOOKS = {
    "torch": Look(BLUE, "-", 4.5),
    "classical": Look(ORANGE, (0, (4, 1.6)), 1.6),
    "ema": Look(INK, (0, (1.2, 1.6)), 1.6),
    "adamw": Look(PURPLE, "-", 1.8),
    "nadam": Look(PURPLE, (0, (3, 1, 1, 1, 1, 1)), 1.6),
}
NESTEROV_LOOK = Look(GREEN, (0, (6, 1.5, 1.2, 1.5)), 1.6)


def look(settings: Settings) -> Look:
    """The look of a run."""
    return NESTEROV_LOOK if settings.nesterov else LOOKS[settings.formulation]


def label(settings: Settings) -> str:
    """ "torch", "torch, Nesterov", "AdamW"."""
    if adaptive := ADAPTIVE.get(settings.formulation):
        return adaptive.__name__.removeprefix("Fused")
    return settings.formulation + ", Nesterov" * settings.nesterov


def reason(settings: Settings) -> str:
    """Why a run is not the same as that of torch's form."""
    reasons = {
        "torch": [],
        "classical": ["each gradient keeps its own step's learning rate"],
        "ema": [] if settings.nesterov else ["the same steps, rounded otherwise"],
    }[settings.formulation]
    return f"{label(settings)}: {'; '.join(reasons + ['the gradient is taken ahead'] * settings.nesterov)}"


def smooth(losses: Sequence[float]) -> np.ndarray:
    """Means of `SMOOTHED` losses in a row, the first ones of as many as there are."""
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - SMOOTHED, 0)
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def final_loss(run: Run) -> float:
    """The mean training loss of the last steps."""
    return float(smooth(run.losses)[-1])


def draw(runs: Sequence[Run], path: Path) -> None:
    """Writes the picture. The second panel needs a run with torch's form, without Nesterov, to compare with."""
    base = next((run for run in runs if run.settings.name == "torch"), None)
    others = [run for run in runs if run is not base and run.settings.formulation not in ADAPTIVE] if base else []
    adaptive = any(run.settings.formulation in ADAPTIVE for run in runs)
    figure, panels = plt.subplots(
        1, 1 + bool(others), figsize=(13.5, 6.2), squeeze=False,
        width_ratios=(1.15, 1)[: 1 + bool(others)],
        gridspec_kw={"left": 0.045, "right": 0.985, "top": 0.73, "bottom": 0.085, "wspace": 0.14},
    )  # fmt: skip
    adaptive_lr = f"; AdamW and NAdam: {ADAPTIVE_LR:g}" * adaptive
    first = runs[0]
    parameters = sum(parameter.numel() for parameter in first.model.parameters())
    settings = first.settings
    headline(
        figure,
        "A small GPT learns Python's standard library, with each form of momentum" + ", AdamW and NAdam" * adaptive,
        f"{parameters:,} parameters, {settings.steps:,} steps of {settings.batch} x {settings.context} characters, "
        f"{len(first.corpus.train):,} characters of source; momentum {settings.momentum:g}, one cycle of the learning "
        f"rate up to {settings.lr:g}\n(ema: divided by 1 - momentum{adaptive_lr}); the same weights and batches in all "
        f"runs. torch {torch.__version__}; momentum_ext {momentum_ext.__version__}",
    )
    draw_losses(panels[0, 0], runs)
    if base and others:
        draw_differences(panels[0, 1], base, others)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def draw_losses(axes: Axes, runs: Sequence[Run]) -> None:
    """Smoothed training losses as lines, held-out losses as marks."""
    held_out = [run.validation[-1][1] for run in runs]
    style(
        axes,
        f"In the end {min(held_out):.3f} to {max(held_out):.3f} on text that they never saw"
        if len(runs) > 1
        else f"In the end {held_out[0]:.3f} on text that it never saw",
        f"cross-entropy in nats per character; lines: training, mean of {SMOOTHED} steps; circles: held-out modules",
    )
    for run in runs:
        mine = look(run.settings)
        steps = np.arange(1, len(run.losses) + 1)
        pale = run.settings.name == "torch"  # wide and light, under the others
        axes.plot(
            steps, smooth(run.losses), color=mine.color, linestyle=mine.dash, linewidth=mine.width,
            alpha=0.35 if pale else 1, label=label(run.settings),
        )  # fmt: skip
        axes.plot(
            *zip(*run.validation, strict=True), color=mine.color, marker="o", linestyle="none",
            markersize=6 if pale else 3.5, markerfacecolor="white", zorder=5,
        )  # fmt: skip
    axes.legend(frameon=False, fontsize=10, handlelength=4.5, loc="upper right", labelcolor=INK)
    low = min(*(smooth(run.losses).min() for run in runs), *held_out)
    axes.set_ylim(low - 0.08, max(run.validation[0][1] for run in runs) * 1.12)
    over_steps(axes, runs[0].settings.steps)


def draw_differences(axes: Axes, base: Run, others: Sequence[Run]) -> None:
    """How far each run's loss is from that of torch's form in the same step, logarithmic."""
    style(
        axes,
        "How far each is from torch's form",
        f"difference of the losses in the same step, mean of {SMOOTHED} steps, logarithmic",
    )
    steps = np.arange(1, len(base.losses) + 1)
    labelled = int(0.7 * len(steps))
    curves = [smooth(np.abs(np.array(run.losses) - np.array(base.losses)).tolist()) for run in others]
    highest = max(curve[labelled] for curve in curves)
    for run, apart in zip(others, curves, strict=True):
        mine = look(run.settings)
        shown = apart > 0
        axes.plot(
            steps[shown], apart[shown], color=mine.color, linestyle=mine.dash, linewidth=1.6,
            label=reason(run.settings),
        )  # fmt: skip
        above = apart[labelled] == highest  # the others below their lines, clear of it
        axes.annotate(
            label(run.settings), (steps[labelled], apart[labelled]), xytext=(0, 13 if above else -15),
            textcoords="offset points", ha="center", va="center",
            fontsize=9.5, fontweight="bold", color=mine.color, path_effects=HALO, zorder=6,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))
    over_steps(axes, len(base.losses))
    axes.legend(frameon=False, fontsize=10, handlelength=4.5, loc="lower right", labelcolor=INK)


def over_steps(axes: Axes, steps: int) -> None:
    """The horizontal axis of both panels."""
    axes.set_xlim(1 - 0.01 * steps, steps * 1.012)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("steps", fontsize=9, color=QUIET)
    axes.grid(axis="y", color=GRID, linewidth=0.8)

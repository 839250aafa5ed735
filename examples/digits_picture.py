"""Draws what digits.py found: both loss curves and the test accuracy on the left, the optimizers' times on the right.

Marks differ in width, dash or hatch as well as in shade and are labelled where they stand: it reads in black and white.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from digits_training import Digits, Run, counted, median_ratio, ratio_text, step_quantiles, steps_per_epoch
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from picture_style import BLUE, GRID, HALO, INK, QUIET, style

import momentum_ext

OURS = BLUE
THEIRS = "#bdbdbd"
THEIRS_TEXT = "#5c5c5c"
THEIRS_HATCH = "////"
DETAIL_STEPS = 12
"""Steps that the inset shows one by one."""
SHOWN_WRONG = 4
BINS_PER_DECADE = 24


def draw(theirs: Run, ours: Run, digits: Digits, threads: int, path: Path) -> None:
    """Writes the picture of two runs that were trained side by side and found bit-identical."""
    figure, panels = plt.subplot_mosaic(
        [["losses", "times"], ["accuracy", "totals"]],
        figsize=(13.5, 8),
        height_ratios=(2.2, 1),
        width_ratios=(1.15, 1),
        gridspec_kw={"left": 0.045, "right": 0.985, "top": 0.79, "bottom": 0.095, "hspace": 0.52, "wspace": 0.13},
    )
    figure.text(
        0.012, 0.975, f"The same training, bit for bit; the optimizer {ratio_text(median_ratio(theirs, ours))} as fast",
        va="top", fontsize=18, fontweight="bold", color=INK,
    )  # fmt: skip
    parameters = sum(parameter.numel() for parameter in ours.model.parameters())
    figure.text(
        0.012, 0.925,
        f"A ResNet of {len(list(ours.model.parameters()))} tensors and {parameters:,} parameters learns scikit-learn's "
        f"handwritten digits on the CPU, twice from the same seed:\nwith torch.optim.SGD as it comes, and with "
        f"momentum_ext.FusedMomentum in its place. {counted(threads, 'thread')}; torch {torch.__version__}; "
        f"momentum_ext {momentum_ext.__version__}; {datetime.date.today()}",
        va="top", fontsize=10, color=QUIET, linespacing=1.5,
    )  # fmt: skip
    draw_losses(panels["losses"], theirs, ours)
    draw_accuracy(panels["accuracy"], ours, digits)
    draw_step_times(panels["times"], theirs, ours)
    draw_totals(panels["totals"], theirs, ours)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def draw_losses(axes: Axes, theirs: Run, ours: Run) -> None:
    """Both losses over the steps, theirs wide and light, ours thin and dark upon it; an inset shows the last steps."""
    style(
        axes,
        "The loss curves coincide in every bit of every step",
        f"cross-entropy, logarithmic; losses, weights and momentum have one SHA-256: {ours.fingerprint()[:8]}…",
    )
    steps = np.arange(1, len(ours.losses) + 1)
    axes.plot(steps, theirs.losses, color=THEIRS, linewidth=5, solid_joinstyle="round", solid_capstyle="round")
    axes.plot(steps, ours.losses, color=OURS, linewidth=1.1)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    over_steps(axes, len(steps))

    # Room above the curves for the inset, whose lines carry the labels.
    low, high = np.log10(axes.get_ylim())
    axes.set_ylim(10**low, 10 ** (high + 0.3 * (high - low)))
    shown = min(DETAIL_STEPS, len(steps))
    inset = axes.inset_axes((0.29, 0.7, 0.705, 0.3), zorder=5)
    for run, look in (
        (theirs, {"color": THEIRS, "linewidth": 10, "markersize": 15}),
        (ours, {"color": OURS, "linewidth": 1.6, "linestyle": (0, (3.5, 2)), "markersize": 4.5}),
    ):
        inset.plot(range(shown), run.losses[-shown:], marker="o", solid_joinstyle="round", **look)  # type: ignore[arg-type]
    inset.set_yscale("log")
    inset.xaxis.set_major_locator(NullLocator())
    inset.yaxis.set_major_locator(NullLocator())
    inset.yaxis.set_minor_locator(NullLocator())
    inset.set_xlim(-0.74 * shown, shown - 0.4)
    inset.margins(y=0.28)
    inset.spines[:].set_color("#c8c8c8")
    inset.text(0.015, 0.9, f"the last {shown} steps", transform=inset.transAxes, va="top", fontsize=9, color=QUIET)
    for y, run, color in ((0.5, theirs, THEIRS_TEXT), (0.22, ours, OURS)):
        inset.text(
            0.105, y, run.name, transform=inset.transAxes, va="center", fontsize=9.5, fontweight="bold", color=color
        )
    inset.plot([0.03, 0.08], [0.5, 0.5], color=THEIRS, linewidth=8, transform=inset.transAxes, solid_capstyle="round")
    inset.plot(
        [0.02, 0.09], [0.22, 0.22], color=OURS, linewidth=1.6, linestyle=(0, (3.5, 2)), transform=inset.transAxes
    )


def draw_accuracy(axes: Axes, ours: Run, digits: Digits) -> None:
    """The share of right test digits after each epoch, the last one labelled, and the digits that it gets wrong."""
    read = ours.read(digits.test_images)
    wrong = (read != digits.test_labels).nonzero().flatten().tolist()
    total = len(digits.test_labels)
    style(
        axes,
        f"Both read {total - len(wrong)} of {total} digits that they never saw: {ours.accuracies[-1]:.1%}",
        "share of the test digits that are right, after each epoch",
    )
    ends = np.arange(1, len(ours.accuracies) + 1) * steps_per_epoch(digits)
    axes.plot(ends, ours.accuracies, color=THEIRS, linewidth=5, solid_joinstyle="round", solid_capstyle="round")
    axes.plot(ends, ours.accuracies, color=OURS, linewidth=1.1, marker="o", markersize=3.5)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_yticks([0, 0.5, 1])
    axes.set_ylim(0, 1.06)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    over_steps(axes, len(ours.losses))
    axes.set_xlabel("training steps", fontsize=9, color=QUIET)

    shown = wrong[:SHOWN_WRONG]
    for place, index in enumerate(reversed(shown)):
        image = axes.inset_axes((0.915 - 0.125 * place, 0.22, 0.065, 0.44), zorder=5)
        image.imshow(digits.test_images[index, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        image.xaxis.set_major_locator(NullLocator())
        image.yaxis.set_major_locator(NullLocator())
        image.spines[:].set_color("#c8c8c8")
        caption = f"{int(digits.test_labels[index])} read as {int(read[index])}"
        image.set_xlabel(caption, fontsize=8, color=QUIET, labelpad=2, path_effects=HALO)
    if shown:
        which = "the one that they get wrong" if len(wrong) == 1 else f"of the {len(wrong)} that they get wrong"
        axes.text(
            0.89 - 0.125 * (len(shown) - 1), 0.415, which, transform=axes.transAxes, ha="right", va="center",
            fontsize=9, color=QUIET, path_effects=HALO, zorder=6,
        )  # fmt: skip


def over_steps(axes: Axes, steps: int) -> None:
    """The horizontal axis of the left panels."""
    axes.set_xlim(1 - 0.01 * steps, steps * 1.012)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def draw_step_times(axes: Axes, theirs: Run, ours: Run) -> None:
    """How the times of single steps are spread, on a logarithmic axis; the medians and the ratio between them."""
    us = [np.array(run.optimizer_ns) / 1e3 for run in (theirs, ours)]
    medians = [step_quantiles(run)[1] / 1e3 for run in (theirs, ours)]
    low = min(values.min() for values in us) / 1.15
    high = max(min(np.quantile(values, 0.985) * 1.1, 4 * median) for values, median in zip(us, medians, strict=True))
    style(
        axes,
        f"A step takes {medians[1]:,.0f} µs instead of {medians[0]:,.0f} µs",
        "number of steps by their time, logarithmic; the last bar is that and longer",
    )
    bins = np.geomspace(low, high, max(8, int(BINS_PER_DECADE * np.log10(high / low))))
    tallest = 0.0
    for run, values, median, color, text, hatch in (
        (theirs, us[0], medians[0], THEIRS, THEIRS_TEXT, THEIRS_HATCH),
        (ours, us[1], medians[1], OURS, OURS, ""),
    ):
        heights, _, _ = axes.hist(
            values.clip(low, high), bins.tolist(), facecolor=color, hatch=hatch, edgecolor="white", linewidth=0.6
        )
        tallest = max(tallest, float(np.max(heights)))
        axes.annotate(
            f"{run.name}\nmedian {median:,.0f} µs", (median, float(np.max(heights))), xytext=(0, 9),
            textcoords="offset points", ha="center", fontsize=10, fontweight="bold", color=text, linespacing=1.4,
            zorder=6, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, high * 1.25)
    axes.set_ylim(0, tallest * 1.55)
    axes.set_yticks([])
    marks = (1, 2, 5) if high / low < 40 else (1, 3)
    ticks = [m * 10**e for e in range(8) for m in marks if low <= m * 10**e <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f} µs"))
    axes.grid(axis="x", color=GRID, linewidth=0.8)

    arrow = tallest * 1.42
    for median in medians:
        axes.plot([median, median], [0, arrow], color=INK, linewidth=0.9, linestyle=(0, (1, 2)), zorder=4)
    axes.annotate(
        "", (medians[1], arrow), xytext=(medians[0], arrow),
        arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip
    axes.text(
        float(np.sqrt(medians[0] * medians[1])), arrow, f" {ratio_text(median_ratio(theirs, ours))} ", ha="center",
        va="center", fontsize=15, fontweight="bold", color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
    )  # fmt: skip


def draw_totals(axes: Axes, theirs: Run, ours: Run) -> None:
    """Bars of the time in all steps together, on a linear axis."""
    milliseconds = [sum(run.optimizer_ns) / 1e6 for run in (theirs, ours)]
    shares = [sum(run.optimizer_ns) / run.training_ns for run in (theirs, ours)]
    style(
        axes,
        f"All {len(ours.losses)} steps: {milliseconds[1]:,.0f} ms instead of {milliseconds[0]:,.0f} ms",
        f"time in the optimizer, linear; it was {shares[0]:.1%} of the training's time, and now is {shares[1]:.1%}",
    )
    longest = max(milliseconds)
    bars = axes.barh([1, 0], milliseconds, 0.62, color=[THEIRS, OURS], edgecolor="white", linewidth=0)
    bars[0].set_hatch(THEIRS_HATCH)
    for y, run, value, color in ((1, theirs, milliseconds[0], THEIRS_TEXT), (0, ours, milliseconds[1], OURS)):
        inside = value > 0.6 * longest
        axes.annotate(
            f"{run.name}  {value:,.0f} ms", (0 if inside else value, y), xytext=(9, 0), textcoords="offset points",
            va="center", fontsize=10, fontweight="bold", color=INK if inside and run is theirs else color,
            path_effects=HALO,
        )  # fmt: skip
    axes.set_xlim(0, longest * 1.02)
    axes.set_ylim(-0.5, 1.5)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f} ms"))
    axes.grid(axis="x", color=GRID, linewidth=0.8)

#!/usr/bin/env python3
"""How far each mode of low-precision states is from exact after 1,000 steps, beside torch's for-loop in the same dtype.

    python examples/precision_error.py            under a minute; needs matplotlib and tqdm

Every mode starts from the same weights and gets the same gradients, which bf16 and fp16 hold exactly; the reference is
torch.optim.SGD in fp64. Errors are root mean squares, relative to how far the reference has moved: at 1.0 nothing was
learned that was not lost again. The drift is what is systematic in them: by how much each element is ahead of the
reference (or, negative, behind) along its own slope. Prints a table and draws it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from picture_style import BLUE, GRAY, GRID, INK, headline, style
from precision_modes import BF16, MODES, Mode, truth
from torch import Tensor
from tqdm import tqdm

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "precision_error.png"

ELEMENTS = 1 << 15
STEPS = 1000
HYPER: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9}
SMALLEST = 2.0**-12
"""Values are at least this large, so that fp16 holds all that bf16 does."""


@dataclass
class Trial:
    """One mode in training, and the errors that it ended with."""

    mode: Mode
    param: Tensor
    optimizer: torch.optim.Optimizer
    of_truth: float = float("nan")
    of_param: float = float("nan")
    drift: float = float("nan")

    def step(self, grad: Tensor) -> None:
        """One step with this gradient."""
        self.param.grad = grad.to(self.param.dtype)
        self.optimizer.step()


def exact(values: Tensor) -> Tensor:
    """The nearest values that bf16 and fp16 both hold, none of them zero, in fp32."""
    sign = torch.where(values < 0, -1.0, 1.0)
    return (sign * values.abs().clamp(SMALLEST, 2.0**15)).to(BF16).float()


@dataclass
class Gradients:
    """A steady slope of each element's own sign under ten times as much noise; sizes that differ as a layer's do."""

    size: Tensor
    slope: Tensor
    generator: torch.Generator

    @classmethod
    def random(cls, generator: torch.Generator) -> Gradients:
        """Sizes are lognormal, as many slopes go up as down."""
        size = torch.randn(ELEMENTS, generator=generator).exp()
        up = torch.rand(ELEMENTS, generator=generator) < 0.5
        return cls(size, torch.where(up, -0.1, 0.1), generator)

    def draw(self) -> Tensor:
        """The next one."""
        return exact(self.size * (self.slope + torch.randn(ELEMENTS, generator=self.generator)))

    def along(self, values: Tensor) -> float:
        """The mean over elements of how far they are down their slopes, in units of each element's size."""
        return float((values.double() * -self.slope.sign() / self.size).mean())


def rms(values: Tensor) -> float:
    """The root of the mean square."""
    return float(values.double().square().mean().sqrt())


def run(modes: Sequence[Mode], steps: int, seed: int) -> list[Trial]:
    """All modes side by side on the same gradients."""
    generator = torch.Generator().manual_seed(seed)
    start = exact(torch.randn(ELEMENTS, generator=generator))
    reference = torch.nn.Parameter(start.double())
    exactly = torch.optim.SGD([reference], **HYPER, foreach=False)
    trials = []
    for mode in modes:
        param = torch.nn.Parameter(start.to(mode.param, copy=True))
        trials.append(Trial(mode, param, mode.optimizer([param], **HYPER)))
    gradients = Gradients.random(generator)
    for _ in tqdm(range(steps), unit="step", dynamic_ncols=True):
        grad = gradients.draw()
        reference.grad = grad.double()
        exactly.step()
        for trial in trials:
            trial.step(grad)
    moved = rms(reference.detach() - start.double())
    distance = gradients.along(reference.detach() - start)
    for trial in trials:
        trial.of_param = rms(trial.param.detach().double() - reference.detach()) / moved
        error = truth(trial.optimizer, trial.param).double() - reference.detach()
        trial.of_truth, trial.drift = rms(error) / moved, gradients.along(error) / distance
    return trials


def torchs(trial: Trial, trials: Sequence[Trial]) -> Trial:
    """torch's for-loop in the dtype of this mode's parameters."""
    return next(each for each in trials if each.mode.options is None and each.mode.param is trial.mode.param)


def table(trials: Sequence[Trial]) -> str:
    """The errors as text."""
    header = ("mode", "bytes", "error", "of the parameter", "drift", "of torch's error")
    rows = []
    for trial in trials:
        ratio = trial.of_truth / torchs(trial, trials).of_truth
        rows.append(
            (
                trial.mode.name,
                f"{trial.mode.bytes:.2f}",
                f"{trial.of_truth:.2e}",
                f"{trial.of_param:.2e}",
                "0.000%" if abs(trial.drift) < 5e-6 else f"{trial.drift:+.3%}",
                "" if trial.mode.options is None else f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}",
            )
        )
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in [header, *rows]
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    out = [lines[0]]
    for line, trial in zip(lines[1:], trials, strict=True):
        out += [rule] * (trial.mode.options is None) + [line]
    return "\n".join(out)


def draw(trials: Sequence[Trial], steps: int, path: Path) -> None:
    """The errors as a picture: filled marks for the values that are trained, rings for what forward sees."""
    height = 1.9 + 0.31 * len(trials)
    figure, axes = plt.subplots(
        figsize=(11, height),
        gridspec_kw={"left": 0.235, "right": 0.965, "top": 1 - 1.62 / height, "bottom": 0.4 / height},
    )
    headline(
        figure,
        f"How far from exact after {steps:,} steps",
        f"{ELEMENTS:,} elements, lr {HYPER['lr']:g}, momentum {HYPER['momentum']:g}; root mean square error against "
        f"fp64, relative to how far fp64 has moved; torch {torch.__version__}",
    )
    style(
        axes,
        "Plain bf16 loses most of the way; with a master it does not",
        "logarithmic; rings: the parameter beside a master; at 1 the error is as large as the distance moved",
    )
    for y, trial in enumerate(trials):
        is_torch = trial.mode.options is None
        color = GRAY if is_torch else BLUE
        if trial.of_param != trial.of_truth:
            axes.plot([trial.of_truth, trial.of_param], [y, y], color=color, linewidth=0.8, zorder=3)
            axes.plot(trial.of_param, y, "o", color=color, markersize=8, markerfacecolor="white", zorder=4)
        axes.plot(trial.of_truth, y, "^" if is_torch else "o", color=color, markersize=8, zorder=5)
        if trial.of_param > 1.5 * trial.of_truth:  # there is room for both
            label(axes, trial.of_truth, y, "right")
            label(axes, trial.of_param, y, "left")
        else:
            label(axes, max(trial.of_truth, trial.of_param), y, "left", trial.of_truth)
        if is_torch and y:
            axes.axhline(y - 0.5, color=GRID, linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(trials)), [trial.mode.name for trial in trials], fontsize=9.5, color=INK)
    axes.set_ylim(len(trials) - 0.4, -0.6)
    axes.set_xlim(min(trial.of_truth for trial in trials) / 6, 4)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def label(axes: Axes, x: float, y: float, ha: str, value: float | None = None) -> None:
    """The figure beside a mark; `ha` is the side of the text that is at the mark."""
    axes.annotate(
        f"{x if value is None else value:.1e}".replace("e-0", "e-"), (x, y), xytext=(9 if ha == "left" else -9, 0),
        textcoords="offset points", ha=ha, va="center", fontsize=9, color=INK, zorder=6,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
    )  # fmt: skip


def split_is_fp32(trials: Sequence[Trial]) -> bool | None:
    """Whether split bf16 with fp32 momentum has the bits of fp32; None where one of them was not run."""
    named = {trial.mode.name: trial for trial in trials}
    pair = [named.get(name) for name in ("fp32", "bf16 split, fp32 momentum")]
    if pair[0] is None or pair[1] is None:
        return None
    wide, split = (truth(trial.optimizer, trial.param).view(torch.int32) for trial in pair if trial is not None)
    return bool(torch.equal(wide, split))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line program; returns the exit status: 1 where split bf16 is not fp32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights and gradients (default: 0)")
    parser.add_argument("--output", type=Path, default=PICTURE, metavar="PNG", help="the picture")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    trials = run(MODES, options.steps, options.seed)
    print(f"\n{table(trials)}\n")
    same = split_is_fp32(trials)
    print(f"bf16 split, fp32 momentum: {'NOT ' * (not same)}the bits of fp32")
    draw(trials, options.steps, options.output)
    print(f"The picture is {options.output}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

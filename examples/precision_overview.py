#!/usr/bin/env python3
"""The modes that one would choose, side by side: bytes, speed, error against fp64, loss of a training, and stalls.

    python examples/precision_overview.py          a minute; needs matplotlib and tqdm

Errors are measured here. Losses are those that precision_training.py has left beside its picture, and speeds those of
the newest result file of an H100 in benchmarks/results/. Prints a table and draws it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import precision_error
import precision_stalls
import torch
from matplotlib.ticker import FuncFormatter, NullLocator
from picture_style import BLUE, GRID, HALO, INK, ORANGE, headline, style
from precision_modes import BF16, FLASH, FP32, INT4, INT8, MASTER, MASTER_24, SR, Mode

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "precision_overview.png"
LOSSES = ROOT / "docs" / "images" / "precision_training.json"
SPEEDS = ROOT / "benchmarks" / "results"
STALL_AT = 1e-7

MODES = (
    Mode("fp32", FP32),
    Mode("bf16 momentum", FP32, {"momentum_dtype": BF16}),
    Mode("int8 momentum SR", FP32, {"momentum_dtype": INT8, **SR}),
    Mode("int4 momentum SR", FP32, {"momentum_dtype": INT4, **SR}),
    Mode("bf16 split, fp32 momentum", BF16, {"momentum_dtype": FP32, **MASTER}),
    Mode("bf16 split", BF16, {"momentum_dtype": BF16, **MASTER}),
    Mode("bf16 split, int8 momentum SR", BF16, {"momentum_dtype": INT8, **MASTER, **SR}),
    Mode("bf16 24 bits, int8 momentum", BF16, {"momentum_dtype": INT8, **MASTER_24}),
    FLASH,
    Mode("bf16 24 bits, int4 momentum SR", BF16, {"momentum_dtype": INT4, **MASTER_24, **SR}),
    Mode("bf16 SR", BF16, SR),
    Mode("bf16, nothing else", BF16),
)
# By the names that benchmarks/precision.py has for them; only modes that have not changed since.
SPEED_OF = {
    "fp32": "fp32",
    "bf16 momentum": "bf16 momentum",
    "bf16 split": "bf16, split master",
    "bf16, nothing else": "bf16",
    "bf16 SR": "bf16, stochastic",
}


# By how many points labels are above their marks, where two marks are neighbours.
ABOVE = {"bf16 SR": 8, "bf16 24 bits, int4 momentum SR": -12, "bf16 24 bits, int8 momentum": -14, FLASH.name: -28}


@dataclass
class Row:
    """What is known of a mode; None: not measured."""

    mode: Mode
    error: float
    missing: float
    loss: float | None
    speed: float | None


def speeds() -> tuple[str, dict[str, float]]:
    """(date, share of copy bandwidth by label) of the newest file of an H100."""
    newest = sorted(SPEEDS.glob("*h100*-precision.json"))[-1]
    rows = json.loads(newest.read_text())["precisions"][0]["rows"]
    return newest.name[:10], {row["label"]: row["of_memory_limit"] for row in rows if row["of_memory_limit"]}


def table(rows: Sequence[Row], date: str) -> str:
    """As text."""
    header = ("mode", "bytes", "error", f"missing at {STALL_AT:.0e}", "GPT's loss", f"H100, {date}")
    cells = [
        (
            row.mode.name,
            f"{row.mode.bytes:.2f}",
            f"{row.error:.1e}",
            f"{abs(round(row.missing, 1)):.1f} %",
            "" if row.loss is None else f"{row.loss:.4f}",
            "" if row.speed is None else f"{row.speed:.2f}",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in [header, *cells]
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bytes against errors: what is lower and further left is better."""
    figure, axes = plt.subplots(
        figsize=(11, 6.6), gridspec_kw={"left": 0.065, "right": 0.975, "top": 0.76, "bottom": 0.085}
    )
    headline(
        figure,
        "What a weight costs, and what it is worth",
        "Bytes of parameter, gradient and state for each weight, and the error after 1,000 steps against fp64, "
        "relative to how far\nfp64 has moved. Orange: bf16 parameters; blue: fp32; ring: FlashOptim's formats. torch "
        f"{torch.__version__}",
    )
    style(axes, "Lower and further left is better", "error, logarithmic; at 1 it is as large as the distance moved")
    for row in rows:
        color = ORANGE if row.mode.param is BF16 else BLUE
        (mark,) = axes.plot(row.mode.bytes, row.error, "o", color=color, markersize=15 if row.mode is FLASH else 8)
        if row.mode is FLASH:
            mark.set(markerfacecolor="none", markeredgewidth=1.6)
        right = row.mode.bytes > 9.5
        axes.annotate(
            row.mode.name, (row.mode.bytes, row.error), xytext=(-10 if right else 10, ABOVE.get(row.mode.name, 0)),
            textcoords="offset points", ha="right" if right else "left", va="center", fontsize=9.5, color=INK,
            path_effects=HALO,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(5, 12.4)
    axes.set_ylim(1e-6, 2)
    axes.set_xlabel("bytes for each weight", fontsize=9.5, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def main(path: Path = PICTURE, steps: int = precision_error.STEPS) -> None:
    """Measures, prints, draws."""
    torch.set_num_threads(1)
    date, speed = speeds()
    losses = json.loads(LOSSES.read_text())
    rows = [
        Row(
            trial.mode,
            trial.of_truth,
            precision_stalls.losses(STALL_AT, trial.mode)[0],
            losses.get(trial.mode.name),
            speed.get(SPEED_OF.get(trial.mode.name, "")),
        )
        for trial in precision_error.run(MODES, steps, seed=0)
    ]
    print(f"\n{table(rows, date)}\n")
    draw(rows, path)
    print(f"The picture is {path}")


if __name__ == "__main__":
    main()

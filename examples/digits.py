#!/usr/bin/env python3
"""Trains a convolutional network on handwritten digits twice: with torch.optim.SGD and with FusedMomentum.

    python examples/digits.py            about half a minute; needs scikit-learn, matplotlib and tqdm
    python examples/digits.py --quick    a few seconds

The data come with scikit-learn. Both trainings start from the same seed and see the same batches, side by side. The
program compares them bit by bit, prints the test accuracy and the time that each optimizer took, and draws both. It
exits with status 1 if a single bit differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import digits_picture
import digits_training
import torch
from digits_training import Digits, DigitsNet, Run, RunsDiffer
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

import momentum_ext

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "digits.png"

PEAK_LR = 0.1
EPOCHS = 20
QUICK_EPOCHS = 3


def build(
    name: str,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    digits: Digits,
    epochs: int,
    seed: int,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Run:
    """A network as the seed makes it, with this optimizer and one cycle of the learning rate (Smith and Topin 2018).

    `wrap` makes of it the module that is trained.
    """
    torch.manual_seed(seed)
    model = wrap(DigitsNet())
    optimizer = make_optimizer(model.parameters(), lr=PEAK_LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * digits_training.steps_per_epoch(digits)
    schedule = OneCycleLR(optimizer, PEAK_LR, total_steps=steps + 1, cycle_momentum=False)
    return Run(name, model, optimizer, schedule)


def report(runs: Sequence[Run]) -> str:
    """The table of both runs; times in milliseconds and microseconds."""
    header = ("", "test accuracy", "final loss", "optimizer time", "a step, median", "5 % to 95 %", "of training")
    rows = [header]
    for run in runs:
        low, median, high = (value / 1e3 for value in digits_training.step_quantiles(run))
        total = sum(run.optimizer_ns)
        rows.append(
            (
                run.name,
                f"{run.accuracies[-1]:.2%}",
                f"{run.losses[-1]:.6f}",
                f"{total / 1e6:,.1f} ms",
                f"{median:,.0f} us",
                f"{low:,.0f} to {high:,.0f} us",
                f"{total / run.training_ns:.1%}",
            )
        )
    theirs, ours = runs
    rows.append(
        (
            "times faster",
            "",
            "",
            digits_training.ratio_text(digits_training.total_ratio(theirs, ours)),
            digits_training.ratio_text(digits_training.median_ratio(theirs, ours)),
            "",
            "",
        )
    )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with what depends on --quick filled in."""

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
        return value

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=positive, metavar="N", help=f"default: {EPOCHS}")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs instead of {EPOCHS}")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: 0)")
    parser.add_argument(
        "--threads", type=positive, default=1, metavar="N",
        help="for torch and FusedMomentum; with one, other programs disturb the times least (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=PICTURE, metavar="PNG", help="the picture (default: docs/images/digits.png)"
    )
    options = parser.parse_args(arguments)
    if options.epochs is None:
        options.epochs = QUICK_EPOCHS if options.quick else EPOCHS
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line program; returns the exit status."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)

    digits = digits_training.load()
    theirs = build("torch.optim.SGD", torch.optim.SGD, digits, options.epochs, options.seed)
    # The one line that changes:
    ours = build("FusedMomentum", momentum_ext.FusedMomentum, digits, options.epochs, options.seed)
    print(
        f"{len(digits.train_labels):,} handwritten digits to learn from, {len(digits.test_labels)} held out as a test; "
        f"{digits_training.counted(options.epochs, 'epoch')}, {digits_training.counted(options.threads, 'thread')}, "
        f"torch {torch.__version__}",
        flush=True,
    )
    try:
        digits_training.train([theirs, ours], digits, options.epochs, options.seed)
    except RunsDiffer as difference:
        print(f"NOT bit-identical: {difference}", file=sys.stderr)
        return 1

    print(f"\nBit-identical: {digits_training.what_was_compared(ours)}.")
    for run in (theirs, ours):
        print(f"  SHA-256 {run.fingerprint()}  {run.name}")
    print(f"\n{report([theirs, ours])}\n")

    options.output.parent.mkdir(parents=True, exist_ok=True)
    digits_picture.draw(theirs, ours, digits, options.threads, options.output)
    print(f"The picture is in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

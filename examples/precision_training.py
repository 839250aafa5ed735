#!/usr/bin/env python3
"""Trains the digits network and the character GPT in each mode of low-precision states, on the same batches.

    python examples/precision_training.py                      minutes; needs scikit-learn, matplotlib and tqdm
    python examples/precision_training.py --only digits        under three minutes
    python examples/precision_training.py --steps 200          of the character GPT, each mode

Parameters and gradients have the mode's dtype; forward and backward compute in fp32 with the parameters' values, so
that what differs is what the optimizer keeps. How much two runs differ by chance is measured by fp32 runs whose first
weights were nudged by a millionth. Prints a table and draws all runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import char_gpt_data
import char_gpt_training
import digits
import digits_training
import precision_picture
import torch
from precision_modes import BF16, FP8, FP16, FP32, INT8, MASTER, SR, Mode
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from tqdm import tqdm

from momentum_ext import FusedMomentum

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "precision_training.png"
EPOCHS = 20
STEPS = 800
NUDGE = 1e-6
NUDGED = 3

MODES: tuple[Mode, ...] = (
    Mode("fp32", FP32),
    Mode("bf16 momentum", FP32, {"momentum_dtype": BF16}),
    Mode("int8 momentum", FP32, {"momentum_dtype": INT8}),
    Mode("int8 momentum SR", FP32, {"momentum_dtype": INT8, **SR}),
    Mode("fp8 momentum", FP32, {"momentum_dtype": FP8}),
    Mode("bf16, nothing else", BF16),
    Mode("bf16 SR", BF16, SR),
    Mode("bf16 split", BF16, MASTER),
    Mode("bf16 split, int8 momentum SR", BF16, {"momentum_dtype": INT8, **MASTER, **SR}),
    Mode("fp16 master", FP16, MASTER),
)


class Cast(nn.Module):
    """A module whose parameters have the mode's dtype, and which computes in fp32 with their values."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        for param in module.parameters():
            param.data = param.data.to(dtype)

    def forward(self, *inputs: Tensor) -> Tensor:
        """As the module's."""
        wide = {name: param.float() for name, param in self.module.named_parameters()}
        output: Tensor = functional_call(self.module, wide, inputs)
        return output


@dataclass
class Result:
    """What a run came to: its losses step by step, and the loss on what it never saw."""

    mode: Mode
    nudge: int
    losses: list[float] = field(default_factory=list)
    final: float = float("nan")
    note: str = ""

    @property
    def name(self) -> str:
        """The mode's, or which of the nudged runs it is."""
        return f"{self.mode.name}, nudged {self.nudge}" if self.nudge else self.mode.name


def wrapper(mode: Mode, nudge: int) -> Callable[[Any], Any]:
    """Casts a model's parameters as the mode says, after a nudge."""

    def wrap(model: nn.Module) -> nn.Module:
        if nudge:
            generator = torch.Generator().manual_seed(nudge)
            for param in model.parameters():
                param.data *= 1 + NUDGE * torch.randn(param.shape, generator=generator)
        return Cast(model, mode.param)

    return wrap


def runs() -> list[Result]:
    """fp32 nudged a few times, then every mode once."""
    return [*(Result(MODES[0], nudge) for nudge in range(1, NUDGED + 1)), *(Result(mode, 0) for mode in MODES)]


def train_digits(epochs: int, seed: int) -> list[Result]:
    """The digits network in every mode, side by side."""
    data = digits_training.load()
    results = runs()
    trained = [
        digits.build(each.name, each.mode.optimizer, data, epochs, seed, wrapper(each.mode, each.nudge))
        for each in results
    ]
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=epochs * digits_training.steps_per_epoch(data), unit="step", desc="digits") as bar:
        for _ in range(epochs):
            for images, labels in digits_training.batches(data, generator):
                for run in trained:
                    run.train_step(images, labels)
                bar.update()
    for result, run in zip(results, trained):
        result.losses = run.losses
        run.model.eval()
        with torch.no_grad():
            scores = run.model(data.test_images)
        result.final = functional.cross_entropy(scores, data.test_labels).item()
        result.note = f"{(scores.argmax(1) == data.test_labels).double().mean().item():.1%} right"
    return results


def train_char_gpt(steps: int, seed: int) -> list[Result]:
    """The character GPT in every mode, one after the other."""
    corpus = char_gpt_data.load()
    settings = char_gpt_training.Settings(steps=steps, seed=seed, validate_every=steps, validation_batches=32)
    results = runs()
    with tqdm(total=steps * len(results), unit="step", desc="char-GPT") as bar:
        for result in results:
            wrap = cast(Any, wrapper(result.mode, result.nudge))
            make = partial(FusedMomentum, **(result.mode.options or {}))
            run = char_gpt_training.Run.start(settings, corpus, wrap, make)
            bar.set_postfix_str(result.name)
            for _ in range(steps):
                run.train_step()
                bar.update()
            result.losses, result.final = run.losses, run.validation[-1][1]
    return results


def table(title: str, results: Sequence[Result]) -> str:
    """Final losses beside what chance makes of fp32."""
    chance = [result.final for result in results if result.mode is MODES[0]]
    base = next(result.final for result in results if result.mode is MODES[0] and not result.nudge)
    width = max(len(result.mode.name) for result in results)
    lines = [f"{title}: loss on what was held out; fp32 by chance {min(chance):.4f} to {max(chance):.4f}"]
    for result in results:
        if not result.nudge:
            difference = f"{result.final - base:+.4f}" if result.mode is not MODES[0] else ""
            lines.append(
                f"  {result.mode.name:<{width}}  {result.mode.bytes:>5.2f} bytes  {result.final:.4f}  "
                f"{difference:>7}  {result.note}".rstrip()
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line program; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("digits", "char-gpt"), help="default: both")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help="of the digits (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of the GPT (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=PICTURE, metavar="PNG", help="the picture")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found: dict[str, list[Result]] = {}
    if options.only != "char-gpt":
        found["Handwritten digits"] = train_digits(options.epochs, options.seed)
        print("\n" + table("Handwritten digits", found["Handwritten digits"]), flush=True)
    if options.only != "digits":
        found["Character GPT"] = train_char_gpt(options.steps, options.seed)
        print("\n" + table("Character GPT", found["Character GPT"]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    precision_picture.draw(found, options.output)
    print(f"\nThe picture is {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

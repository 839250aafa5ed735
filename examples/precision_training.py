#!/usr/bin/env python3
"""Trains the digits network and the character GPT in each mode of low-precision states, on the same batches.

    python examples/precision_training.py                      minutes; needs scikit-learn, matplotlib and tqdm
    python examples/precision_training.py --only digits        under three minutes
    python examples/precision_training.py --steps 2000         of the character GPT, each run

Parameters and gradients have the mode's dtype; forward and backward compute in fp32 with the parameters' values, so
that what differs is what the optimizer keeps. Every mode is trained from several seeds. How much two runs differ by
chance alone is measured by fp32 runs whose first weights were nudged by a thousandth, less than rounding them to bf16
does. Prints a table and draws all runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import char_gpt_data
import char_gpt_training
import digits
import digits_training
import precision_picture
import torch
from precision_modes import BF16, FLASH, FP8, FP16, FP32, INT4, INT8, MASTER, MASTER_24, SR, Mode
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from tqdm import tqdm

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "precision_training.png"
EPOCHS = 12
STEPS = 400
DIGITS_SEEDS = 3
CHAR_GPT_SEEDS = 1
NUDGE = 1e-3
NUDGED = 3
"""fp32 runs from each seed that show what chance does, beside the one that is not nudged."""

MODES: tuple[Mode, ...] = (
    Mode("fp32", FP32),
    Mode("bf16 momentum", FP32, {"momentum_dtype": BF16}),
    Mode("int8 momentum", FP32, {"momentum_dtype": INT8}),
    Mode("int8 momentum SR", FP32, {"momentum_dtype": INT8, **SR}),
    Mode("fp8 momentum", FP32, {"momentum_dtype": FP8}),
    Mode("int4 momentum SR", FP32, {"momentum_dtype": INT4, **SR}),
    Mode("bf16, nothing else", BF16),
    Mode("bf16 SR", BF16, SR),
    Mode("bf16 split", BF16, {"momentum_dtype": BF16, **MASTER}),
    Mode("bf16 split, fp32 momentum", BF16, {"momentum_dtype": FP32, **MASTER}),
    Mode("bf16 split, int8 momentum SR", BF16, {"momentum_dtype": INT8, **MASTER, **SR}),
    Mode("bf16 24 bits, int8 momentum", BF16, {"momentum_dtype": INT8, **MASTER_24}),
    Mode("bf16 24 bits, int4 momentum SR", BF16, {"momentum_dtype": INT4, **MASTER_24, **SR}),
    FLASH,
    Mode("fp16 master", FP16, {"momentum_dtype": FP16, **MASTER}),
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
    seed: int
    nudge: int = 0
    losses: list[float] = field(default_factory=list)
    final: float = float("nan")


def wrapper(mode: Mode, nudge: int) -> Callable[[Any], Any]:
    """Casts a model's parameters as the mode says, after a nudge."""

    def wrap(model: nn.Module) -> nn.Module:
        if nudge:
            generator = torch.Generator().manual_seed(nudge)
            for param in model.parameters():
                param.data *= 1 + NUDGE * torch.randn(param.shape, generator=generator)
        return Cast(model, mode.param)

    return wrap


def runs(seeds: int) -> list[Result]:
    """From each seed every mode once, and fp32 nudged a few times."""
    out = []
    for seed in range(seeds):
        out += [Result(mode, seed) for mode in MODES]
        out += [Result(MODES[0], seed, nudge) for nudge in range(1, NUDGED + 1)]
    return out


def train_digits(epochs: int, seeds: int) -> list[Result]:
    """The digits network, one run after the other."""
    data = digits_training.load()
    results = runs(seeds)
    with tqdm(total=len(results) * epochs * digits_training.steps_per_epoch(data), unit="step", desc="digits") as bar:
        for result in results:
            mode, wrap = result.mode, wrapper(result.mode, result.nudge)
            run = digits.build(mode.name, mode.optimizer, data, epochs, result.seed, wrap)
            generator = torch.Generator().manual_seed(result.seed)
            bar.set_postfix_str(mode.name)
            for _ in range(epochs):
                for images, labels in digits_training.batches(data, generator):
                    run.train_step(images, labels)
                    bar.update()
            run.model.eval()
            with torch.no_grad():
                result.final = functional.cross_entropy(run.model(data.test_images), data.test_labels).item()
            result.losses = run.losses
    return results


def train_char_gpt(steps: int, seeds: int) -> list[Result]:
    """The character GPT, one run after the other."""
    corpus = char_gpt_data.load()
    results = runs(seeds)
    with tqdm(total=steps * len(results), unit="step", desc="char-GPT") as bar:
        for result in results:
            settings = char_gpt_training.Settings(
                steps=steps, seed=result.seed, validate_every=steps, validation_batches=32
            )
            wrap = cast(Any, wrapper(result.mode, result.nudge))

            def make(params: Any, formulation: str, mode: Mode = result.mode, **hyper: Any) -> Any:
                return mode.optimizer(params, **hyper)

            run = char_gpt_training.Run.start(settings, corpus, wrap, make)
            bar.set_postfix_str(result.mode.name)
            for _ in range(steps):
                run.train_step()
                bar.update()
            result.losses, result.final = run.losses, run.validation[-1][1]
    return results


def table(title: str, results: Sequence[Result]) -> str:
    """Final losses, mean over seeds, and their difference from fp32's beside what chance makes of fp32."""
    base, noise = precision_picture.baseline(results)
    width = max(len(mode.name) for mode in MODES)
    seeds = 1 + max(result.seed for result in results)
    lines = [
        f"{title}: loss on what was held out, mean of {seeds} seed{'s' * (seeds > 1)}; by chance fp32 is within "
        f"{noise:.4f} of {base:.4f}"
    ]
    for mode in MODES:
        final = precision_picture.mean_final(results, mode)
        difference = f"{final - base:+.4f}".replace("-0.0000", "+0.0000")
        verdict = "" if abs(final - base) <= noise else "better" if final < base else "worse"
        lines.append(f"  {mode.name:<{width}}  {mode.bytes:>5.2f} bytes  {final:.4f}  {difference}  {verdict}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line program; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("digits", "char-gpt"), help="default: both")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help="of the digits (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of the GPT (default: %(default)s)")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"default: {DIGITS_SEEDS} and {CHAR_GPT_SEEDS}")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=PICTURE, metavar="PNG", help="the picture")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found: dict[str, list[Result]] = {}
    if options.only != "char-gpt":
        found["Handwritten digits"] = train_digits(options.epochs, options.seeds or DIGITS_SEEDS)
        print("\n" + table("Handwritten digits", found["Handwritten digits"]), flush=True)
    if options.only != "digits":
        found["Character GPT"] = train_char_gpt(options.steps, options.seeds or CHAR_GPT_SEEDS)
        print("\n" + table("Character GPT", found["Character GPT"]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    precision_picture.draw(found, options.output)
    if results := found.get("Character GPT"):  # for precision_overview.py
        losses = {mode.name: round(precision_picture.mean_final(results, mode), 4) for mode in MODES}
        options.output.with_suffix(".json").write_text(json.dumps(losses, indent=2) + "\n")
    print(f"\nThe picture is {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

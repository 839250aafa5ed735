#!/usr/bin/env python3
"""Trains a small GPT on the sources of Python's standard library, once with each form of momentum, AdamW and NAdam.

    python examples/train_char_gpt.py            several minutes; needs matplotlib and tqdm
    python examples/train_char_gpt.py --quick    seconds, and nothing learned
    python examples/train_char_gpt.py --formulation classical ema --nesterov

Character by character. A run saves a checkpoint now and then and goes on from it when the program is started again; a
run that was killed and resumed has the losses of one that was not, bit for bit. At the end every model writes some
Python, and the losses are drawn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import char_gpt_data
import char_gpt_picture
import char_gpt_training
import torch
from char_gpt_data import Corpus
from char_gpt_training import ADAPTIVE, FORMULATIONS, Run, Settings
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "char_gpt.png"
RUNS = ROOT / "build" / "char_gpt"

QUICK: dict[str, Any] = {
    "steps": 30,
    "batch": 4,
    "context": 16,
    "width": 16,
    "heads": 2,
    "layers": 1,
    "validate_every": 10,
}
PROMPT = "class Reader:\n    def "
SAMPLE = 320
"""Characters that each model writes."""


def train(settings: Settings, corpus: Corpus, directory: Path, checkpoint_every: int, bar: tqdm[None]) -> Run:
    """A whole run, from its checkpoint in `directory` where there is one; writes its losses beside it."""
    checkpoint = directory / f"{settings.name}.pt"
    run = Run.resume(settings, corpus, checkpoint) if checkpoint.exists() else Run.start(settings, corpus)
    if run.losses:
        finished = len(run.losses) == settings.steps
        tqdm.write(f"{settings.name}: {'finished before' if finished else f'goes on from step {len(run.losses):,}'}")
    bar.set_description(settings.name)
    bar.update(len(run.losses))
    while len(run.losses) < settings.steps:
        run.train_step()
        bar.update()
        if len(run.losses) % checkpoint_every == 0 or len(run.losses) == settings.steps:
            run.save(checkpoint)
            bar.set_postfix_str(f"loss {run.losses[-1]:.3f}")
    run.write_losses(directory / f"{settings.name}.csv")
    return run


def report(runs: Sequence[Run]) -> str:
    """The table of the runs; losses in nats per character."""
    rows = [f"{'':<22}{'peak lr':>9}{'training loss':>15}{'held-out loss':>15}", "-" * 61]
    for run in runs:
        settings = run.settings
        rows.append(
            f"{char_gpt_picture.label(settings):<22}{settings.formulation_lr:>9.3g}"
            f"{char_gpt_picture.final_loss(run):>15.4f}{run.validation[-1][1]:>15.4f}"
        )
    return "\n".join(rows)


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[Settings]]:
    """The command line, and the runs that it asks for."""
    default = Settings()

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
        return value

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--formulation", nargs="+", choices=FORMULATIONS,
        help="the forms and rules to train (default: all without Nesterov, and torch's form with it)",
    )  # fmt: skip
    parser.add_argument(
        "--nesterov", action="store_true", help="with Nesterov's momentum (torch's form, if none is named)"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--steps", type=positive, metavar="N", help=f"default: {default.steps}")
    parser.add_argument(
        "--lr", type=float, default=default.lr,
        help="peak learning rate as torch.optim.SGD counts; ema takes lr / (1 - momentum) (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--momentum", type=float, default=default.momentum, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the weights and the batches (default: 0)")
    parser.add_argument(
        "--threads", type=positive, default=default.threads, metavar="N",
        help="another number gives other last bits (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint-every", type=positive, default=100, metavar="N", help="steps from one to the next (default: 100)"
    )
    parser.add_argument(
        "--directory", type=Path, default=RUNS, metavar="DIR",
        help="checkpoints and losses; a run that is found there goes on (default: build/char_gpt)",
    )  # fmt: skip
    parser.add_argument("--restart", action="store_true", help="begin anew, whatever checkpoints there are")
    parser.add_argument(
        "--output", type=Path, metavar="PNG",
        help="the picture (default: docs/images/char_gpt.png, with --quick in the directory of the runs)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.output is None:
        options.output = options.directory / "char_gpt.png" if options.quick else PICTURE

    common = replace(
        default, lr=options.lr, momentum=options.momentum, seed=options.seed, threads=options.threads,
        **(QUICK if options.quick else {}),
    )  # fmt: skip
    if options.steps is not None:
        common = replace(common, steps=options.steps)
    if options.formulation is None and not options.nesterov:
        chosen = [(name, False) for name in FORMULATIONS if name not in ADAPTIVE]
        chosen += [("torch", True), *((name, False) for name in ADAPTIVE)]
    elif options.nesterov and not ADAPTIVE.keys().isdisjoint(options.formulation or ()):
        parser.error("--nesterov: is a form of momentum; NAdam has it without")
    else:
        chosen = [(name, options.nesterov) for name in options.formulation or ["torch"]]
    return options, [replace(common, formulation=name, nesterov=nesterov) for name, nesterov in chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line program; returns the exit status."""
    options, all_settings = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    corpus = char_gpt_data.load()
    print(
        f"{corpus.modules} modules of Python {sys.version_info.major}.{sys.version_info.minor}'s standard library: "
        f"{len(corpus.train):,} characters to learn from, {len(corpus.validation):,} held out; "
        f"torch {torch.__version__}",
        flush=True,
    )
    options.directory.mkdir(parents=True, exist_ok=True)
    if options.restart:
        for settings in all_settings:
            (options.directory / f"{settings.name}.pt").unlink(missing_ok=True)
    try:
        with tqdm(total=sum(settings.steps for settings in all_settings), unit="step", smoothing=0.05) as bar:
            runs = [
                train(settings, corpus, options.directory, options.checkpoint_every, bar) for settings in all_settings
            ]
    except char_gpt_training.OtherRun as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130

    print(f"\n{report(runs)}")
    for run in runs:
        print(f"\n---- {char_gpt_picture.label(run.settings)} writes ----\n{run.sample(PROMPT, SAMPLE).rstrip()}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    char_gpt_picture.draw(runs, options.output)
    print(f"\nThe picture is {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

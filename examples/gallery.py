#!/usr/bin/env python3
"""Draws what momentum does: gradient descent, momentum and Nesterov on landscapes that are small enough to look at.

    python examples/gallery.py               under two minutes; needs matplotlib and tqdm

Everything is computed by our optimizers, in double precision and without chance: the same machine gives the same files.
Writes the pictures and the generated parts of the page to docs/gallery/.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import gallery_descent as descent
import gallery_landscapes as landscapes
import gallery_page
import torch
from gallery_charts import Count, Curve, Panel, draw_conditions, draw_limits
from gallery_descent import GRADIENT_DESCENT, SMALLER_STEPS, Method
from gallery_landscapes import RAVINE_CONDITION, Landscape
from gallery_maps import Card, draw_basins, draw_landscape, draw_ravine
from gallery_marks import power
from tqdm import tqdm

DIRECTORY = Path(__file__).resolve().parents[1] / "docs" / "gallery"

CONDITIONS = (10.0, 100.0, 1_000.0, 10_000.0)
DRAWN_CONDITION = 1_000.0
UNTIL = 1e-6
Fact = tuple[str, str]
"""A generated part of the page: its name and its text."""


def descents(landscape: Landscape, methods: Sequence[Method], steps: int) -> list[descent.Path]:
    """The paths of the methods from the landscape's start."""
    start = torch.tensor(landscape.start, dtype=torch.float64)
    return [descent.descend(landscape.function, start, method, steps) for method in methods]


def reached(paths: Sequence[descent.Path], landscape: Landscape, floor: float) -> str:
    """The sentence that says after how many steps each method comes within `floor` of the deepest minimum."""
    parts = []
    for path in paths:
        steps = path.arrives(landscape.lowest() + floor)
        steps_text = f"{steps:,} steps" if steps is not None else f"not within {len(path.losses) - 1:,}"
        parts.append(f"- {path.method.name} ({path.method.constants()}): {steps_text}")
    return f"Steps until the loss is within {power(floor)} of the minimum:\n\n" + "\n".join(parts)


def ravine(directory: Path) -> list[Fact]:
    """The ravine: gradient descent with two learning rates, momentum and Nesterov with the smaller one."""
    card = Card(
        "The ravine: gradient descent bounces or creeps, momentum gains speed along the bottom",
        f"A quadratic {RAVINE_CONDITION:.0f} times as steep across as along. The circle is the start, the star the "
        "minimum. Large steps bounce from wall to wall,\nsmall ones creep along the bottom. Momentum takes the small "
        "steps: along the ravine they have one sign and add up, across it they change sign and cancel.",
        "Momentum and Nesterov arrive first",
        1e-6,
        "linear",
    )
    plain = descent.best(1, RAVINE_CONDITION)[0]
    slow, momentum, nesterov = descent.alike(plain.lr / 2, 0.8)
    slow = dataclasses.replace(slow, name=SMALLER_STEPS)
    paths = descents(landscapes.RAVINE, (plain, slow, momentum, nesterov), 1_000)
    draw_ravine(landscapes.RAVINE, paths, 40, card, directory / "ravine.png")
    at_best = descents(landscapes.RAVINE, descent.best(1, RAVINE_CONDITION), 100)
    swings = ", ".join(f"{path.method.name} {float(path.points[1:, 1].abs().max()):.2f}" for path in at_best)
    return [
        ("ravine", reached(paths, landscapes.RAVINE, card.floor)),
        ("swings", f"The widest swing across the ravine at the best constants, the start being 1: {swings}."),
    ]


def rosenbrock(directory: Path) -> list[Fact]:
    """Rosenbrock's valley at one learning rate."""
    lr = 0.001
    hessian = torch.func.hessian(landscapes.rosenbrock)(torch.tensor(landscapes.ROSENBROCK.start, dtype=torch.float64))
    share = lr * float(torch.linalg.eigvalsh(hessian)[-1]) / 2
    card = Card(
        "Rosenbrock's valley: momentum follows the bend, gradient descent creeps along the floor",
        f"All three at the same learning rate, {share:.0%} of the largest at which gradient descent is stable where it "
        "starts. Circle: start; star: minimum.\nThe valley's floor is nearly flat: a step is tiny there unless earlier "
        "steps are added up.",
        "With the same learning rate gradient descent needs many times the steps",
        1e-6,
    )
    paths = descents(landscapes.ROSENBROCK, descent.alike(lr), 40_000)
    draw_landscape(landscapes.ROSENBROCK, paths, 200, card, directory / "rosenbrock.png")
    return [("rosenbrock", reached(paths, landscapes.ROSENBROCK, card.floor))]


def saddle(directory: Path) -> list[Fact]:
    """Past a saddle."""
    card = Card(
        "The saddle: all slow down beside it, momentum leaves it sooner",
        "The start lies almost on the ridge: a thousandth to one side. Circle: start; stars: the two minima.\n"
        "The small slope that leads away from the saddle adds up in the momentum, which then swings past the minimum.",
        "Each first falls to the saddle's height, waits there, then finds a way down",
        1e-6,
        "linear",
    )
    paths = descents(landscapes.SADDLE, descent.alike(0.05), 320)
    draw_landscape(landscapes.SADDLE, paths, 60, card, directory / "saddle.png")
    return [("saddle", reached(paths, landscapes.SADDLE, card.floor))]


def plateau(directory: Path) -> list[Fact]:
    """A plain with a slight slope."""
    card = Card(
        "The plateau: small slopes add up",
        "A plain that slopes slightly towards a well. With momentum 0.9 a steady slope moves the point ten times as "
        "far per step.\nA learning rate ten times as high does the same, where the well allows one. Circle: start; "
        "star: minimum.",
        "Momentum leaves the plain sooner; in the well it swings, and gradient descent does not",
        1e-6,
        "linear",
    )
    paths = descents(landscapes.PLATEAU, descent.alike(0.1), 420)
    draw_landscape(landscapes.PLATEAU, paths, 60, card, directory / "plateau.png")
    return [("plateau", reached(paths, landscapes.PLATEAU, card.floor))]


def double_well(directory: Path) -> list[Fact]:
    """Over the barrier, from one start."""
    card = Card(
        "The double well: momentum can carry over the barrier",
        "Two wells, the right one deeper. Gradient descent ends in the first well that it meets; with enough speed "
        "momentum rolls through it.\nFrom this start that is a gain. The next picture shows that it is luck. Circle: "
        "start; black star: the deeper minimum.",
        "Gradient descent stays at the shallower well's height",
        1e-6,
        "linear",
    )
    paths = descents(landscapes.DOUBLE_WELL, descent.alike(0.02), 420)
    draw_landscape(landscapes.DOUBLE_WELL, paths, 60, card, directory / "double_well.png")
    return [("double_well", reached(paths, landscapes.DOUBLE_WELL, card.floor))]


def basins(directory: Path) -> list[Fact]:
    """Over the barrier, from every start."""
    landscape = landscapes.DOUBLE_WELL
    x = torch.linspace(*landscape.xlim, 480, dtype=torch.float64)
    y = torch.linspace(*landscape.ylim, 360, dtype=torch.float64)
    starts = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    methods = descent.alike(0.02)
    deeper = [(descent.ends(landscape.function, starts, method, 500)[..., 0] > 0).numpy() for method in methods]
    words = (
        "Which well? With momentum it is luck",
        "White: descents from here end in the deeper well; dark: in the shallower one. Gradient descent stays on the "
        "side on which it starts.\nMomentum crosses the barrier both ways: from the dark stripes in the right half it "
        "leaves the deeper well.",
    )
    draw_basins(landscape, methods, deeper, words, directory / "basins.png")
    plain = deeper[0]
    parts = [f"- {methods[0].name}: {plain.mean():.0%} of the starts on the map end in the deeper well."]
    for method, there in zip(methods[1:], deeper[1:], strict=True):
        parts.append(
            f"- {method.name}: {there.mean():.0%}. Of the starts from which gradient descent reaches the deeper well "
            f"{(~there[plain]).mean():.0%} lose it, of the others {there[~plain].mean():.0%} gain it."
        )
    return [("basins", "\n".join(parts))]


def adaptive(directory: Path) -> list[Fact]:
    """Adam and NAdam as momentum and Nesterov."""
    card = Card(
        "NAdam is to Adam what Nesterov is to momentum",
        "The saddle again, with momentum 0.9 in all four. On the left the step follows the average of the gradients "
        "as it is, on the right\nas it will be. That brakes sooner: the paths on the right swing less. Circle: start; "
        "stars: the two minima.",
        "Here looking ahead saves more than a third of the steps, with Adam's scale or without",
        1e-6,
        "linear",
    )
    methods = (*descent.alike(0.05)[1:], *descent.adaptive(0.1))
    paths = descents(landscapes.SADDLE, methods, 320)
    draw_landscape(landscapes.SADDLE, paths, 60, card, directory / "adaptive.png")
    in_ravine = descents(landscapes.RAVINE, descent.adaptive(0.1), 1_000)
    return [
        ("adaptive", reached(paths, landscapes.SADDLE, card.floor)),
        ("adaptive_ravine", reached(in_ravine, landscapes.RAVINE, card.floor)),
    ]


def conditions(directory: Path) -> list[Fact]:
    """Steps on quadratics beside the theory."""
    counts = []
    drawn = {}
    for condition in CONDITIONS:
        for method in descent.best(1, condition):
            distances = descent.quadratic_distances(method, condition, UNTIL)
            steps = len(distances) - 1
            half = steps // 2
            theory = descent.theory_rate(method, condition)
            rate = (distances[-1] / distances[half]) ** (1 / (steps - half))
            counts.append(Count(method, condition, steps, math.log(UNTIL) / math.log(theory), rate, theory))
            if condition == DRAWN_CONDITION:
                drawn[method.name] = distances
    words = (
        "On quadratics momentum takes the square root of the condition number",
        "Quadratics of 50 dimensions with eigenvalues from 1 to the condition number, each method at its best "
        "constants for them.\nNesterov's form is a little slower than heavy ball here. Its rate holds for all smooth, "
        "strongly convex functions; heavy ball's holds for quadratics.",
    )
    draw_conditions(counts, drawn, DRAWN_CONDITION, UNTIL, words, directory / "conditions.png")
    return [("steps", gallery_page.table(counts, UNTIL))]


def limits(directory: Path) -> list[Fact]:
    """Where momentum does not help."""
    panels = [easy(), noisy(), overshoot(), shelf()]
    words = (
        "Where momentum does not help",
        "Four cases, each with the same optimizer: an easy problem, noisy gradients, too much momentum, and no slope.",
    )
    draw_limits(panels, words, directory / "limits.png")
    return [
        (
            "limits",
            "\n".join(
                f"- {panel.title}. {panel.measured}: {'; '.join(curve.label for curve in panel.curves)}."
                for panel in panels
            ),
        )
    ]


def easy() -> Panel:
    """A well-conditioned quadratic and the usual 0.9."""
    condition = 2.0
    plain = descent.best(1, condition)[0]
    methods = descent.alike(plain.lr)
    curves = []
    for method in methods:
        distances = descent.quadratic_distances(method, condition, UNTIL)
        curves.append(Curve(method, distances, f"{method.name}: {len(distances) - 1}"))
    return Panel(
        "An easy problem: momentum 0.9 is slower",
        f"condition number {condition:.0f}, lr {plain.lr:.2g}; distance to the minimum, logarithmic; steps to "
        f"{power(UNTIL)}",
        f"Steps to {power(UNTIL)}",
        curves,
        logarithmic=True,
    )


def noisy() -> Panel:
    """The noise floor: what counts is lr / (1 - momentum)."""
    lr = 0.01
    _, momentum, nesterov = descent.alike(lr)
    high = Method(GRADIENT_DESCENT, lr / (1 - momentum.momentum))
    low = Method(SMALLER_STEPS, lr)
    copies, last = 20_000, 100
    curves = []
    for method in (low, high, momentum, nesterov):
        losses = descent.noisy_losses(method, copies, steps=800, noise=1.0, start=2.0)
        name = method.name if method.momentum else f"Gradient descent, lr {method.lr:.2g}"
        curves.append(Curve(method, losses.tolist(), f"{name}: {float(losses[-last:].mean()):.4f}"))
    return Panel(
        "Noise: momentum comes down sooner, to a higher floor",
        f"w²/2, noisy gradients; lr {lr}, momentum {momentum.momentum}; mean loss of {copies:,} runs, and its floor",
        f"Mean loss of the last {last} steps",
        curves,
        logarithmic=True,
    )


def overshoot() -> Panel:
    """Too much momentum swings."""
    lr, momentum = 0.02, 0.99
    curves = []
    for method in descent.alike(lr, momentum):
        path = descent.descend(lambda w: (w**2 / 2).sum(-1), torch.ones(1, dtype=torch.float64), method, 400)
        values = path.points[:, 0].tolist()
        past = -min(values)
        curves.append(Curve(method, values, f"{method.name}: {max(past, 0.0):.0%}"))
    return Panel(
        f"Overshoot: momentum {momentum} swings for hundreds of steps",
        f"w against steps for the loss w²/2, lr {lr}; how far it swings past the minimum",
        "How far past the minimum, as a share of the way to it",
        curves,
        logarithmic=False,
    )


def shelf() -> Panel:
    """No slope."""
    curves = []
    for method in descent.alike(0.05):
        path = descent.descend(lambda x: torch.relu(-x).sum(-1), -torch.ones(1, dtype=torch.float64), method, 80)
        values = path.points[:, 0].tolist()
        curves.append(Curve(method, values, f"{method.name}: {values[-1]:.1f}"))
    return Panel(
        "No slope: momentum coasts, then stands still",
        "x against steps; slope -1 up to x = 0, none beyond; lr 0.05, momentum 0.9; where it stops",
        "Where it stops",
        curves,
        logarithmic=False,
    )


CHAPTERS: tuple[Callable[[Path], list[Fact]], ...] = (
    ravine,
    rosenbrock,
    saddle,
    plateau,
    double_well,
    basins,
    adaptive,
    conditions,
    limits,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line program; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, default=DIRECTORY, metavar="DIR", help="where to write (default: docs/gallery)"
    )
    parser.add_argument(
        "--only", choices=[chapter.__name__ for chapter in CHAPTERS], help="one picture and its part of the page"
    )
    options = parser.parse_args(arguments)
    # One thread: the sums of a picture then do not depend on the machine's number of cores.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    options.directory.mkdir(parents=True, exist_ok=True)
    facts: list[Fact] = []
    chosen = [chapter for chapter in CHAPTERS if options.only in (None, chapter.__name__)]
    with tqdm(chosen, unit="picture") as bar:
        for chapter in bar:
            bar.set_description(chapter.__name__.replace("_", " "))
            facts += chapter(options.directory)
    page = options.directory / "README.md"
    template = page if page.exists() else DIRECTORY / "README.md"
    page.write_text(gallery_page.fill(template.read_text(encoding="utf-8"), dict(facts)), encoding="utf-8")
    print(f"The page is {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

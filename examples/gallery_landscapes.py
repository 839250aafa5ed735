"""The functions of gallery.py: each a difficulty that training meets, small enough to be drawn.

Every function takes points [..., 2] and gives values [...], so that thousands of starts descend in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RAVINE_CONDITION = 100.0


@dataclass(frozen=True)
class Landscape:
    """A function of two variables, where to start, and the part of the plane to look at."""

    name: str
    function: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    xlim: tuple[float, float]
    ylim: tuple[float, float]
    minima: tuple[tuple[float, float], ...]
    """The deepest first."""

    def at(self, point: tuple[float, float]) -> float:
        """The value at a point."""
        return float(self.function(torch.tensor(point, dtype=torch.float64)))

    def lowest(self) -> float:
        """The value at the deepest minimum."""
        return self.at(self.minima[0])


def ravine(p: Tensor) -> Tensor:
    """A quadratic that is `RAVINE_CONDITION` times as steep across as along."""
    x, y = p.unbind(-1)
    return (x**2 + RAVINE_CONDITION * y**2) / 2


def rosenbrock(p: Tensor) -> Tensor:
    """The curved valley of Rosenbrock (1960)."""
    x, y = p.unbind(-1)
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def saddle(p: Tensor) -> Tensor:
    """Down along x to a saddle at the origin, from there down along y to either of two minima."""
    x, y = p.unbind(-1)
    return x**2 / 2 - y**2 / 2 + y**4 / 4


def plateau(p: Tensor) -> Tensor:
    """A round well in a plain that is ever so slightly inclined towards it."""
    return 1 - torch.exp(-(p**2).sum(-1) / 2)


def double_well(p: Tensor) -> Tensor:
    """Two wells in a bent valley, the right one deeper."""
    x, y = p.unbind(-1)
    return (x**2 - 1) ** 2 - 0.3 * x + (y - x**2 / 2) ** 2


def find_minimum(function: Callable[[Tensor], Tensor], start: tuple[float, float]) -> tuple[float, float]:
    """The minimum near `start`, for functions that have no formula for it; by Newton's method."""
    p = torch.tensor(start, dtype=torch.float64)
    for _ in range(20):
        gradient = torch.func.grad(function)(p)
        p = p - torch.linalg.solve(torch.func.hessian(function)(p), gradient)
    return float(p[0]), float(p[1])


RAVINE = Landscape("ravine", ravine, (-10, 1), (-11.5, 6.5), (-1.6, 1.6), ((0, 0),))
ROSENBROCK = Landscape("rosenbrock", rosenbrock, (-1.2, 1), (-1.75, 1.75), (-0.75, 1.9), ((1, 1),))
SADDLE = Landscape("saddle", saddle, (-1.8, 0.001), (-2.1, 1.5), (-1.6, 1.6), ((0, 1), (0, -1)))
PLATEAU = Landscape("plateau", plateau, (-2.6, 2.0), (-3.2, 1.6), (-1.6, 2.6), ((0, 0),))
DOUBLE_WELL = Landscape(
    "double_well",
    double_well,
    (-1.9, 0.2),
    (-2.3, 2.3),
    (-1.1, 2.3),
    (find_minimum(double_well, (1, 0.5)), find_minimum(double_well, (-1, 0.5))),
)

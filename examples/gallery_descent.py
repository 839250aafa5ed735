"""How gallery.py descends: three methods that are FusedMomentum, Adam and NAdam, and what theory says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from momentum_ext import FusedAdam, FusedMomentum, FusedNAdam


@dataclass(frozen=True)
class Method:
    """A name and the constants of FusedMomentum."""

    name: str
    lr: float
    momentum: float = 0.0
    nesterov: bool = False

    def optimizer(self, parameter: Tensor) -> torch.optim.Optimizer:
        """The optimizer of one tensor."""
        return FusedMomentum([parameter], lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)

    def constants(self) -> str:
        """ "lr 0.033, momentum 0.67"."""
        return f"lr {self.lr:.2g}" + (f", momentum {self.momentum:.3g}" if self.momentum else "")


class Adaptive(Method):
    """Adam; with Nesterov's momentum NAdam. beta1 is the momentum, all else as torch has it."""

    def optimizer(self, parameter: Tensor) -> torch.optim.Optimizer:
        """The optimizer of one tensor."""
        return (FusedNAdam if self.nesterov else FusedAdam)([parameter], lr=self.lr, betas=(self.momentum, 0.999))


GRADIENT_DESCENT = "Gradient descent"
MOMENTUM = "Momentum"
NESTEROV = "Nesterov"
ADAM = "Adam"
NADAM = "NAdam"
SMALLER_STEPS = "Gradient descent, smaller steps"
"""Gradient descent a second time, where there are two learning rates to show."""


def alike(lr: float, momentum: float = 0.9) -> tuple[Method, Method, Method]:
    """The three methods at one learning rate."""
    return (
        Method(GRADIENT_DESCENT, lr),
        Method(MOMENTUM, lr, momentum),
        Method(NESTEROV, lr, momentum, nesterov=True),
    )


def adaptive(lr: float) -> tuple[Adaptive, Adaptive]:
    """Adam and NAdam at one learning rate."""
    return Adaptive(ADAM, lr, 0.9), Adaptive(NADAM, lr, 0.9, nesterov=True)


def best(smallest: float, largest: float) -> tuple[Method, Method, Method]:
    """The three methods at the constants that are best for quadratics with eigenvalues from smallest to largest.

    Gradient descent and heavy ball: Polyak (1964); Nesterov: Lessard, Recht and Packard (2016), proposition 1.
    """
    condition = largest / smallest
    root = math.sqrt(condition)
    root3 = math.sqrt(3 * condition + 1)
    return (
        Method(GRADIENT_DESCENT, 2 / (largest + smallest)),
        Method(MOMENTUM, 4 / (math.sqrt(largest) + math.sqrt(smallest)) ** 2, ((root - 1) / (root + 1)) ** 2),
        Method(NESTEROV, 4 / (3 * largest + smallest), (root3 - 2) / (root3 + 2), nesterov=True),
    )


def theory_rate(method: Method, condition: float) -> float:
    """By what the distance to the minimum shrinks in a step, in the long run, at the constants of `best`."""
    root = math.sqrt(condition)
    return {
        GRADIENT_DESCENT: (condition - 1) / (condition + 1),
        MOMENTUM: (root - 1) / (root + 1),
        NESTEROV: 1 - 2 / math.sqrt(3 * condition + 1),
    }[method.name]


@dataclass(frozen=True)
class Path:
    """Where a descent went, the start included: points [steps + 1, ...] and losses [steps + 1, ...], both fp64."""

    method: Method
    points: Tensor
    losses: Tensor

    def arrives(self, loss: float) -> int | None:
        """Steps until the loss is at most this and stays so; None if it is above at the end."""
        above = (self.losses > loss).nonzero()
        arrived = int(above[-1]) + 1 if len(above) else 0
        return arrived if arrived < len(self.losses) else None


def descend(function: Callable[[Tensor], Tensor], start: Tensor, method: Method, steps: int) -> Path:
    """The whole path from `start` [..., 2]; many starts do not disturb each other."""
    p = start.clone().requires_grad_()
    optimizer = method.optimizer(p)
    points, losses = [p.detach().clone()], []
    for _ in range(steps):
        optimizer.zero_grad()
        values = function(p)
        values.sum().backward()
        losses.append(values.detach())
        optimizer.step()
        points.append(p.detach().clone())
    losses.append(function(p).detach())
    return Path(method, torch.stack(points), torch.stack(losses))


def ends(function: Callable[[Tensor], Tensor], starts: Tensor, method: Method, steps: int) -> Tensor:
    """Where descents from many starts [..., 2] end, without the paths."""
    p = starts.clone().requires_grad_()
    optimizer = method.optimizer(p)
    for _ in range(steps):
        optimizer.zero_grad()
        function(p).sum().backward()
        optimizer.step()
    return p.detach()


def quadratic_distances(
    method: Method, condition: float, until: float, dimensions: int = 50, limit: int = 200_000
) -> list[float]:
    """Distances to the minimum as shares of the first, step by step until one is at most `until`.

    The quadratic has eigenvalues from 1 to `condition` in equal ratios; the start has the same share of each direction.
    """
    eigenvalues = torch.logspace(0, math.log10(condition), dimensions, dtype=torch.float64)
    p = torch.full((dimensions,), dimensions**-0.5, dtype=torch.float64)
    p.grad = torch.empty_like(p)
    optimizer = method.optimizer(p)
    distances = [1.0]
    while distances[-1] > until and len(distances) <= limit:
        torch.mul(eigenvalues, p, out=p.grad)
        optimizer.step()
        distances.append(float(torch.linalg.vector_norm(p)))
    return distances


def noisy_losses(method: Method, copies: int, steps: int, noise: float, start: float) -> Tensor:
    """Mean loss after each step, fp64 [steps + 1], of many descents of w^2/2 whose gradients carry Gaussian noise."""
    generator = torch.Generator().manual_seed(0)
    w = torch.full((copies,), start, dtype=torch.float64)
    optimizer = method.optimizer(w)
    losses = [start**2 / 2]
    for _ in range(steps):
        w.grad = w + noise * torch.randn(copies, dtype=torch.float64, generator=generator)
        optimizer.step()
        losses.append(float((w**2).mean() / 2))
    return torch.tensor(losses, dtype=torch.float64)

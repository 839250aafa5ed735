"""The exponential moving average of the parameters that a step keeps beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["average_weight", "check_decay", "swapped"]

# A parameter's state has AVERAGE; the first group counts the updates, so that a checkpoint has the count.
AVERAGE = "ema"
COUNT = "ema_step"


def check_decay(decay: float | None, warmup: bool) -> None:
    if decay is None and warmup:
        raise ValueError("ema_warmup needs ema_decay")
    if decay is not None and not 0.0 <= decay < 1.0:
        raise ValueError(f"Invalid ema_decay value: {decay}; expected 0 <= ema_decay < 1")


def average_weight(decay: float, warmup: bool, count: int) -> float:
    """The new parameter's weight in its average, after `count` updates.

    1 - decay, but 1 at first, when the average starts as a copy (as in torch.optim.swa_utils.AveragedModel). With
    warm-up the decay is at most (1 + count) / (10 + count), as in TensorFlow's ExponentialMovingAverage, so that the
    average forgets the start sooner.
    """
    if count == 0:
        return 1.0
    return 1.0 - (min(decay, (1 + count) / (10 + count)) if warmup else decay)


@contextmanager
def swapped(state: dict[Tensor, Any]) -> Iterator[None]:
    """Parameters and averages in each other's memory; both come back bit for bit."""
    pairs = [(param, held[AVERAGE]) for param, held in state.items() if AVERAGE in held]
    for param, average in pairs:
        if (param.shape, param.dtype, param.device) != (average.shape, average.dtype, average.device):
            raise RuntimeError(
                f"an average is {average.dtype} {tuple(average.shape)} on {average.device} and its parameter "
                f"{param.dtype} {tuple(param.shape)} on {param.device}; delete it from the state to start a new one"
            )
    done = 0
    try:
        for pair in pairs:
            _swap(*pair)
            done += 1
        yield
    finally:
        for pair in reversed(pairs[:done]):  # parameters may share memory
            _swap(*pair)


@torch.no_grad()
def _swap(param: Tensor, average: Tensor) -> None:
    kept = param.clone()
    try:
        param.copy_(average)
        average.copy_(kept)
    except BaseException:
        param.copy_(kept)
        raise

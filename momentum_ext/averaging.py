"""The exponential moving average of the parameters that a step keeps beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from momentum_ext import _C
from momentum_ext.keys import AVERAGE

__all__ = ["HeldWeights", "UpdateCount", "average_weight", "check_decay", "swapped"]


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


class UpdateCount:
    """How many updates the averages have had.

    The host counts, as long as it knows which steps are left out for an overflow. Where only the CUDA device does, and
    where a captured graph is to warm up, the count goes there at that step and stays: the step counts itself, and
    ``int(count)``, for a checkpoint, waits for the device. A step that cannot stay on one device brings it back.
    """

    def __init__(self, count: int) -> None:
        self._on_host: int | Tensor = count  # a tensor after a compiled step, which must not read its value
        self._on_device: tuple[Tensor, Tensor] | None = None
        self._stays_on_host = False

    def __int__(self) -> int:
        return int(self._on_host) if self._on_device is None else int(self._on_device[1].item())

    @property
    def is_on_device(self) -> bool:
        return self._on_device is not None

    def as_tensor(self) -> Tensor:
        """The host's count for a graph, which would be another one for each number."""
        if not isinstance(self._on_host, Tensor):
            self._on_host = torch.full((), self._on_host, dtype=torch.int64, device="cpu")
        return self._on_host

    def add(self) -> None:
        """After a step."""
        if self._on_device is None:
            self._on_host += 1

    def on_device(self, device: torch.device, goes_there: bool) -> tuple[Tensor, Tensor] | None:
        """A place for the weight, and the count; None when the host counts, and goes on to."""
        if self._on_device is None and goes_there and device.type == "cuda" and not self._stays_on_host:
            if _C.is_capturing(device.index or 0):
                raise RuntimeError(
                    "step() is being captured into a CUDA graph and the averages' count of updates is not on the "
                    "device yet; run one step before the capture"
                )
            numbers = (1.0, float(self._on_host))
            weight, count = (torch.full((), each, dtype=torch.float64, device=device) for each in numbers)
            self._on_device = (weight, count)
        return self._on_device

    def bring_back(self) -> None:
        """The host counts from now on."""
        self._on_host = int(self)
        self._on_device = None
        self._stays_on_host = True


class HeldWeights:
    """Whether other weights are in the parameters' place, inside a context of this name.

    An object of its own, because wrappers (Lightning's, accelerate's) copy an optimizer's attributes: they then share
    this one, and a step inside raises in each of them.
    """

    def __init__(self) -> None:
        self.context: str | None = None

    def check(self) -> None:
        """Raises RuntimeError inside such a context."""
        if self.context is not None:
            raise RuntimeError(f"other weights are in the parameters' place; leave {self.context}() first")

    @contextmanager
    def hold(self, context: str) -> Iterator[None]:
        self.check()
        self.context = context
        try:
            yield
        finally:
            self.context = None


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
    _check_memory(pairs)
    done = 0
    try:
        for pair in pairs:
            _swap(*pair)
            done += 1
        yield
    finally:
        lost = None
        for pair in reversed(pairs[:done]):  # parameters may share memory
            try:
                _check_memory([pair])
                _swap(*pair)
            except RuntimeError as error:  # the others still come back
                lost = error
        if lost is not None:
            raise lost


def _check_memory(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for i, (param, average) in enumerate(pairs):
        _C.check_memory(param, f"parameter {i} with an average")
        _C.check_memory(average, f"ema of parameter {i}")


@torch.no_grad()
def _swap(param: Tensor, average: Tensor) -> None:
    kept = param.clone()
    try:
        param.copy_(average)
        average.copy_(kept)
    except BaseException:
        param.copy_(kept)
        raise

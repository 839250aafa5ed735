"""The devices of test_cuda.py: real ones, or emulated ones (tests/emulated_cuda) that say they are on cuda:N and lie in
the host's memory. Emulated ones know the few operators that a step calls; what a test computes, it computes on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from harness import Pair
from torch import Tensor
from values import memory_of

import momentum_ext

IS_EMULATION = momentum_ext._build_info.CUDA_VERSION == "emulated"
# Three devices and the CPU beside them, or what is there.
DEVICES = [0, 3, 1] if IS_EMULATION else list(range(torch.cuda.device_count())) or [0]
CPU = -1

real = pytest.mark.cuda
emulated = pytest.mark.skipif(not IS_EMULATION, reason="tells what only the emulated device reports")

if IS_EMULATION:
    ops = torch.ops.emulated_cuda
    lazy_init, torch.cuda._lazy_init = torch.cuda._lazy_init, lambda: None  # there is nothing to initialize


def cuda(tensor: Tensor, device: Any = 0) -> Tensor:
    """A tensor of this layout on the device of this number, or on the CPU: an emulated one has the same memory."""
    device = device if isinstance(device, int) else CPU if device.type == "cpu" else device.index
    if device == CPU:
        return tensor
    if IS_EMULATION:
        return ops.on_device(tensor.detach(), device)
    whole = memory_of(tensor.detach().untyped_storage(), tensor.dtype).to(f"cuda:{device}")
    return whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def cpu(tensor: Tensor) -> Tensor:
    """For looking at it: on an emulated device the same memory, else a copy."""
    if tensor.is_cuda and IS_EMULATION:
        return ops.on_device(tensor.detach(), CPU)
    return tensor.detach().cpu()


def launches() -> tuple[list[tuple[int, int]], int]:
    """(device, parameter bytes) of each launch since the last call, and how often the host read an emulated device."""
    log = ops.log()
    return [(log[i + 1], log[i + 2]) for i in range(0, len(log) - 1, 3)], log[-1]


@contextlib.contextmanager
def no_waiting(expected: Sequence[tuple[int, int]] | int | None = None, reads: int | None = 0) -> Iterator[None]:
    """Inside, the host waits for no device, or reads so often from it, or (None) as often as it likes.

    On emulated devices these launches are made, or so many.
    """
    if IS_EMULATION:
        launches()
        yield
        log, found = launches()
        assert reads in (None, found), f"the host has read the device {found} times"
        assert expected is None or (log == expected if isinstance(expected, list) else len(log) == expected), log
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error" if reads == 0 else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Into a graph. On emulated devices what is captured runs, too."""
    if not IS_EMULATION:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            yield
        return
    ops.set(True, False)
    try:
        yield
    finally:
        ops.set(False, False)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Captures a step into a graph and runs it once; what is returned replays it."""
    if IS_EMULATION:
        with capturing():
            step()
        return ops.replay  # type: ignore[no-any-return]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return graph.replay


@contextlib.contextmanager
def failing_launches() -> Iterator[None]:
    ops.set(False, True)
    try:
        yield
    finally:
        ops.set(False, False)


ONE_LAUNCH = [(0, 4096)]
COUNTED = [*ONE_LAUNCH, (0, 8)]  # and a step that random numbers depend on


class Twins(Pair):
    """The same training twice: FusedMomentum on these devices by turns, the oracle on the CPU."""

    put, get = staticmethod(cuda), staticmethod(cpu)

    def __init__(self, tensors: Sequence[Any], *args: Any, devices: Sequence[int] = (0,), **hyper: Any) -> None:
        self.devices = devices
        super().__init__(tensors, *args, **hyper)

    def step_ours(self, expected: Any = None, reads: int | None = 0) -> None:
        with no_waiting(expected, reads):
            self.mine.step()

    def step(self, expected: Any = None, missing: Any = (), reads: int | None = 0) -> None:
        """New gradients, a step of both that waits for nothing, a comparison."""
        self.new_grads(missing)
        self.step_ours(expected, reads)
        self.theirs.step()
        self.check()

    def scaled_step(
        self,
        overflows: bool,
        scale: float | None = 1024.0,
        expected: Any = None,
        missing: Any = (),
        on: int = 0,
        reads: int | None = 0,
    ) -> None:
        """As with a GradScaler that knows of an overflow on the device alone, which leaves parameters as they are."""
        self.new_grads(missing)
        before = [cpu(mine).clone() for mine, _ in self.params]
        for mine, theirs in self.params:
            if theirs.grad is not None and scale is not None:
                mine.grad = self.put(theirs.grad * scale, mine.device)
        self.mine.found_inf = cuda(torch.tensor(float(overflows)), on)
        if scale is not None:
            self.mine.grad_scale = cuda(torch.tensor(scale), on)
        self.step_ours(expected, reads)
        self.mine.__dict__.pop("grad_scale", None)
        del self.mine.found_inf
        if overflows:
            assert all(torch.equal(cpu(mine), old) for (mine, _), old in zip(self.params, before, strict=True))
        else:
            self.theirs.step()
            self.check()

    def check_params(self, rtol: float, atol: float) -> None:
        for mine, theirs in self.params:
            torch.testing.assert_close(cpu(mine), theirs.detach(), rtol=rtol, atol=atol)

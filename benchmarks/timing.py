"""How a step is timed: interleaved repetitions of several contenders, in nanoseconds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat

Step = Callable[[], object]
Clock = Callable[[Step, int], float]
"""Runs a step a number of times and returns the nanoseconds for all of them together."""

SHORTEST_REPETITION_NS = 2e6
"""A repetition takes as many steps as fill this time (2 ms), so that reading the clock (50 ns) costs nothing."""


@dataclass(frozen=True)
class Samples:
    """The times of one contender: nanoseconds per step, one value for each repetition, in the order measured."""

    steps_per_repetition: int
    ns_per_step: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, nanoseconds per step."""
        return statistics.median(self.ns_per_step)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, nanoseconds per step."""
        if len(self.ns_per_step) == 1:
            return self.ns_per_step[0], self.ns_per_step[0]
        first, _, third = statistics.quantiles(self.ns_per_step, n=4, method="inclusive")
        return first, third


def cpu_clock(step: Step, count: int) -> float:
    """Nanoseconds that `count` steps take on the CPU."""
    start = time.perf_counter_ns()
    for _ in repeat(None, count):
        step()
    return float(time.perf_counter_ns() - start)


def cuda_clock(step: Step, count: int) -> float:
    """Nanoseconds that `count` steps take on the GPU, by its own events, each with nothing useful in the L2 cache."""
    import torch

    size = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    scrub = torch.empty(size, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        scrub.zero_()
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return float(sum(start.elapsed_time(end) for start, end in events) * 1e6)


def cuda_host_clock(step: Step, count: int) -> float:
    """Nanoseconds that the host takes to launch `count` steps, which the GPU may still be working on then."""
    import torch

    torch.cuda.synchronize()
    elapsed = cpu_clock(step, count)
    torch.cuda.synchronize()
    return elapsed


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collects now, then keeps Python's collector off for the length of the block."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def steps_to_fill(step: Step, clock: Clock) -> int:
    """Steps that fill the shortest repetition; 1 for a step that fills it alone. Warms the step up on the way."""
    count = 1
    while True:
        elapsed = clock(step, count)
        if elapsed >= SHORTEST_REPETITION_NS:
            return count
        count = max(count + 1, min(count * 10, int(count * SHORTEST_REPETITION_NS / max(elapsed, 1.0) * 1.05)))


def repetitions(cycle_ns: float, seconds: float, fewest: int, most: int) -> int:
    """Repetitions of a cycle of `cycle_ns` nanoseconds that fit into `seconds`, but within [fewest, most]."""
    return max(fewest, min(most, int(seconds * 1e9 / max(cycle_ns, 1.0))))


def interleave(
    steps: Mapping[str, Step],
    *,
    clock: Clock,
    seconds: float,
    repeats: int | None = None,
    fewest: int = 5,
    most: int = 200,
    warm: bool = False,
    progress: Callable[[float], object] = lambda share: None,
) -> dict[str, Samples]:
    """Times all `steps` in turn, A B C A B C ..., so that whatever disturbs the machine disturbs each of them alike.

    Args:
        steps: what to time, by name, in the order to run it. Each must have been warmed up.
        clock: how to time a number of steps.
        seconds: how long to go on, about; rounds are whole and at least `fewest`, at most `most`.
        repeats: exactly so many rounds instead.
        warm: begin each turn with one step off the clock, so that a contender finds its own tensors in the caches and
            not what the one before it left there. Of no effect where the tensors are larger than the caches.
        progress: told after each round what share of all the rounds it was.
    """
    with no_garbage_collection():
        counts = {name: steps_to_fill(step, clock) for name, step in steps.items()}
        if repeats is None:
            cycle = sum(clock(step, counts[name]) for name, step in steps.items())
            repeats = repetitions(cycle, seconds, fewest, most)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats):
            for name, step in steps.items():
                if warm:
                    step()
                times[name].append(clock(step, counts[name]) / counts[name])
            progress(1 / repeats)
    return {name: Samples(counts[name], tuple(times[name])) for name in steps}


def median_ratio(numerator: Samples, denominator: Samples) -> float:
    """Median over rounds of one contender's time over another's in the same round (a pure number)."""
    pairs = zip(numerator.ns_per_step, denominator.ns_per_step, strict=True)
    return statistics.median(first / second for first, second in pairs)

"""What the optimizer is meant to reach, as data, in one place.

Origin: the goals for the CPU set before any of it was written, for two cores, fp32 and medians from one run.
They say nothing about another number of threads, and are not shown there.
"""

from __future__ import annotations

from dataclasses import dataclass

ORIGIN = "goals set for two cores and fp32 before the code was written; ratios of medians from one run"
THREADS = 2
"""The number of threads that the targets were set for."""


@dataclass(frozen=True)
class Target:
    """At least so many times faster than two of torch's ways, and at least this share of the memory limit's speed."""

    times_default: float | None
    times_fused: float
    of_memory_limit: float | None = None


TARGETS: dict[str, Target] = {
    "one_64m": Target(4, 1.0, 0.95),
    "gpt2": Target(3.5, 1.1, 0.93),
    "resnet50": Target(2.5, 1.2, 0.90),
    "small_1000x1024": Target(30, 12),
    "small_5000x64": Target(150, 40),
    "small_200x16": Target(100, 25),
    "groups_465": Target(100, 40),
}

PIPELINE_TARGETS: dict[str, dict[str, Target]] = {
    "clip": {"gpt2": Target(5, 1.6), "resnet50": Target(5, 1.6), "small_1000x1024": Target(None, 20)},
    "amp_clip": {"gpt2": Target(None, 1.9), "resnet50": Target(None, 1.9)},
    "ema": {"gpt2": Target(None, 1.5), "resnet50": Target(None, 1.5)},
}
"""For --pipeline, against torch's default way and its best."""

PRECISION_TARGETS: dict[str, dict[str, float]] = {
    "gpt2": {"bf16-momentum": 1.2, "bf16-sr": 1.6, "split": 1.3, "int8-momentum": 1.0},
}
"""For --precision: so many times faster than our own step in fp32."""

PRECISION_OF_COPY = 0.9
"""For --precision on one H100: the share of a copy's bandwidth that each of our modes is to reach."""

CUDA_TARGETS: dict[str, Target] = {
    "one_64m": Target(2, 1.0, 0.95),
    "gpt2_xl": Target(2, 1.0, 0.95),
    "resnet50": Target(3, 1.3, 0.75),
    "small_5000x64": Target(15, 8),
    "moe_6000": Target(20, 10),
    "groups_465": Target(20, 10),
}
"""For one H100, fp32, by CUDA events; the memory limit is a copy's bandwidth in the same run."""

HOST_NS_PER_TENSOR = 60.0
"""At most so many nanoseconds for each tensor more in the list."""

HOST_FIXED_US = 5.0
"""At most so many microseconds for a step whatever the list, with no profiler and no hook active."""


def target_for(
    workload: str, contender: str, threads: int, device: str = "cpu", pipeline: str | None = None
) -> float | None:
    """What the figure in a contender's row of a workload's table is to reach; None where nothing was set.

    The row "ours" carries the share of the memory limit, the others how many times faster ours is than they.
    """
    if pipeline is not None:
        table = PIPELINE_TARGETS[pipeline] if device == "cpu" else {}
    else:
        table = CUDA_TARGETS if device == "cuda" else TARGETS
    target = table.get(workload)
    if target is None or (threads != THREADS and device == "cpu"):
        return None
    return {"ours": target.of_memory_limit, "default": target.times_default, "fused": target.times_fused}.get(contender)


def precision_target(workload: str, mode: str, threads: int, device: str = "cpu") -> float | None:
    """What --precision is to reach: on the CPU times faster than fp32, on a GPU the share of a copy's bandwidth."""
    table = PRECISION_TARGETS.get(workload, {})
    if device == "cuda":
        return PRECISION_OF_COPY if mode in ("fp32", "fp8-momentum", *PRECISION_TARGETS["gpt2"]) else None
    return table.get(mode) if threads == THREADS else None

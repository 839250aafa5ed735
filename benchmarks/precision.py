"""Low-precision states, for --precision: our step in each mode against our own step in fp32, and torch's in bf16.

Each mode moves other bytes, so the figures are its time against fp32's, and its GB/s against those of a memory limit
that goes over arrays of the same sizes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import workloads
from contenders import Model, Settings, fault_of_fused, flash_sgd, reason_of, torch_step, warm
from memory_limit import MemoryLimit, MemoryLimitUnavailable, Traffic, copies, copies_held, make_arena
from report import ModeRow, PrecisionReport
from timing import Clock, Samples, Step, interleave, median_ratio

FP32, BF16 = torch.float32, torch.bfloat16
BASE = "fp32"
LIMIT = "limit"
BLOCK = 32
"""Elements that share a scale of two bytes in an 8-bit buffer."""


@dataclass(frozen=True)
class Mode:
    """How a parameter, its gradient and momentum are held; `options` of FusedMomentum, or `build` for torch's step."""

    key: str
    label: str
    param: torch.dtype
    grad: torch.dtype
    momentum: float
    """Bytes of a buffer's element."""
    options: Mapping[str, Any] | None = None
    build: Callable[[Model, Settings], Step] | None = None
    remainder: int = 0
    """Bytes of a master's, beside the parameter."""

    @property
    def state_bytes(self) -> float:
        """Bytes of state beside the parameter, for each element."""
        return self.momentum + (2 / BLOCK if self.momentum <= 1 else 0.0) + self.remainder

    @property
    def traffic(self) -> Traffic:
        """The arrays of whole bytes that a step goes over, scales left out."""
        states = tuple(int(size) for size in (self.momentum, self.remainder) if size >= 1)
        return Traffic((self.param.itemsize, *states), (self.grad.itemsize,))

    @property
    def moved_bytes(self) -> float:
        """Bytes that must move in a step for each element: read the gradient, read and write all else."""
        return self.grad.itemsize + 2 * (self.param.itemsize + self.state_bytes)

    @property
    def held_bytes(self) -> float:
        """Bytes of memory for each element, gradient included."""
        return self.param.itemsize + self.grad.itemsize + self.state_bytes

    def start(self, model: Model, settings: Settings) -> Step:
        """The step, warmed up."""
        if self.build is not None:
            return self.build(model, settings)
        from momentum_ext import FusedMomentum  # imported late, so that --help works where nothing is built

        return warm(FusedMomentum(model.groups, **settings.sgd, **(self.options or {})).step)


INT8, SR = {"momentum_dtype": torch.int8}, {"stochastic_rounding": True}
INT4_SR = {"momentum_dtype": "int4", **SR}
SPLIT = {"momentum_dtype": BF16, "master_weights": True}
MODES: tuple[Mode, ...] = (
    Mode(BASE, "fp32", FP32, FP32, 4, {}),
    Mode("bf16-momentum", "bf16 momentum", FP32, FP32, 2, {"momentum_dtype": BF16}),
    Mode("int8-momentum", "int8 momentum", FP32, FP32, 1, INT8),
    Mode("fp8-momentum", "fp8 momentum", FP32, FP32, 1, {"momentum_dtype": torch.float8_e4m3fn}),
    Mode("int4-momentum", "int4 momentum, stochastic", FP32, FP32, 0.5, INT4_SR),
    Mode("split", "bf16, split master", BF16, BF16, 2, SPLIT, None, 2),
    Mode("24-int8", "bf16, 24 bits, int8", BF16, BF16, 1, {**INT8, "master_weights": 24}, None, 1),
    Mode("24-int4", "bf16, 24 bits, int4", BF16, BF16, 0.5, {**INT4_SR, "master_weights": 24}, None, 1),
    Mode("24-int8-flash", "FlashOptim, 24 bits, int8", BF16, BF16, 1, None, flash_sgd, 1),
    Mode("bf16", "bf16", BF16, BF16, 2, {}),
    Mode("bf16-sr", "bf16, stochastic", BF16, BF16, 2, SR),
    Mode("bf16-for-loop", "torch for-loop, bf16", BF16, BF16, 2, None, torch_step(foreach=False, fused=False)),
    Mode("bf16-fused", "torch fused, bf16", BF16, BF16, 2, None, torch_step(fused=True)),
)  # fmt: skip


def memory_limits(
    modes: Sequence[Mode], elements: int, settings: Settings, reasons: dict[str, str]
) -> dict[Traffic, Step]:
    """What memory allows, for the bytes of each mode: a plain native loop; on a GPU copies."""
    traffics = list(dict.fromkeys(mode.traffic for mode in modes))
    if settings.device == "cuda":
        return {traffic: warm(copies(elements * traffic.moved)) for traffic in traffics}
    try:
        arena = make_arena(traffics, elements)
        return {traffic: warm(MemoryLimit(traffic, elements, settings.threads, arena).step) for traffic in traffics}
    except MemoryLimitUnavailable as error:
        reasons[LIMIT] = f"not measured: {error}"
        return {}


def largest_difference(model: Model, base: Model) -> float:
    """The largest absolute difference of a parameter from that of the fp32 run."""
    pairs = zip(model.params, base.params, strict=True)
    return max(float((one.detach().float() - other.detach()).abs().max()) for one, other in pairs)


def measure(
    name: str, settings: Settings, clock: Clock, seconds: float, repeats: int | None, free_bytes: float,
    progress: Callable[[float], object],
) -> PrecisionReport:  # fmt: skip
    """Every mode on one workload: all in turn where they fit in `free_bytes` together, else each beside its limit."""
    workload = workloads.build(name)
    reasons: dict[str, str] = {}
    samples: dict[str, Samples] = {}
    limits: dict[str, Samples] = {}
    differences: dict[str, float] = {}
    batches = in_batches(workload, settings.device, free_bytes, reasons)
    for batch in batches:
        of_memory = memory_limits(batch, workload.elements, settings, reasons)
        models: dict[str, Model] = {}
        steps: dict[str, Step] = {}
        for mode in batch:
            model = Model.random(workload, settings, mode.param, mode.grad)
            try:
                steps[mode.key] = mode.start(model, settings)
            except Exception as error:  # belongs in this row, not in the way of the others
                reasons[mode.key] = reason_of(error)
            else:
                models[mode.key] = model
        if BASE in models:
            ours = [mode.key for mode in batch if mode.options is not None and mode.key in models]
            differences |= {key: largest_difference(models[key], models[BASE]) for key in ours}
        found = interleave(
            {**{f"{LIMIT} {traffic}": step for traffic, step in of_memory.items()}, **steps},
            clock=clock, seconds=seconds / len(batches), repeats=repeats,
            progress=lambda share: progress(share / len(batches)),
        )  # fmt: skip
        limits |= {mode.key: found[f"{LIMIT} {mode.traffic}"] for mode in batch if mode.traffic in of_memory}
        samples |= {key: found[key] for key in steps}
        del models, model, steps, of_memory
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()

    def row(mode: Mode) -> ModeRow:
        if mode.key not in samples:
            return ModeRow(
                mode=mode.key,
                label=mode.label,
                moved_bytes=mode.moved_bytes,
                state_bytes=mode.state_bytes,
                reason=reasons[mode.key],
            )
        mine, moved = samples[mode.key], mode.moved_bytes * workload.elements
        first, third = mine.quartiles
        beside_base = BASE in samples and any({BASE, mode.key} <= {other.key for other in batch} for batch in batches)
        share = None
        if mode.key in limits:
            share = median_ratio(limits[mode.key], mine) * mode.moved_bytes / mode.traffic.moved
        return ModeRow(
            mode=mode.key,
            label=mode.label,
            moved_bytes=mode.moved_bytes,
            state_bytes=mode.state_bytes,
            median_ms=mine.median / 1e6,
            quartiles_ms=(first / 1e6, third / 1e6),
            gb_per_s=moved / mine.median,
            of_memory_limit=share,
            times_fp32=median_ratio(samples[BASE], mine) if beside_base else None,
            difference=differences.get(mode.key),
            samples_ms=tuple(time / 1e6 for time in mine.ns_per_step),
        )

    of_fp32 = limits.get(BASE)
    without_limit = [
        ModeRow(mode=LIMIT, label="memory limit", moved_bytes=0, state_bytes=0, reason=reason)
        for key, reason in reasons.items()
        if key == LIMIT
    ]
    return PrecisionReport(
        workload=name,
        what=workload.what,
        source=workload.source,
        threads=settings.threads,
        device=settings.device,
        tensors=workload.tensors,
        elements=workload.elements,
        limit_gb_per_s=None if of_fp32 is None else MODES[0].traffic.moved * workload.elements / of_fp32.median,
        rows=(*map(row, MODES), *without_limit),
    )


def in_batches(
    workload: workloads.Workload, device: str, free_bytes: float, reasons: dict[str, str]
) -> list[list[Mode]]:
    """The modes that are timed in turn with each other: all, or one by one; a reason for what is left out."""
    modes = list(MODES)
    if fault := fault_of_fused(replace(workload, dtype="bfloat16"), Settings(device=device)):
        reasons["bf16-fused"] = f"not run: {fault}"
        modes = [mode for mode in MODES if mode.key != "bf16-fused"]

    def fit(batch: list[Mode], beside: int = 0) -> bool:
        if device == "cuda":
            limit = sum(copies_held(workload.elements * each.moved) for each in {mode.traffic for mode in batch})
        else:
            limit = workload.elements * max(mode.traffic.held for mode in batch)
        held = sum(mode.held_bytes for mode in batch) + beside
        return workload.elements * held + limit <= free_bytes

    if fit(modes):
        return [modes]
    # torch's for-loop makes a copy of a tensor or two
    alone = [[mode] for mode in modes if fit([mode], beside=2 if mode.build else 0)]
    for mode in modes:
        if [mode] not in alone:
            needed, free = mode.held_bytes * workload.elements / 1e9, free_bytes / 1e9
            reasons[mode.key] = f"not run: it needs {needed:,.1f} GB of memory, {free:,.1f} are usable"
    return alone


def wrong_results(report: PrecisionReport) -> list[str]:
    """The modes that have computed something else than the fp32 run, by more than their own roundings explain."""
    most = {
        mode.key: 1e-5 + 1e-4 * (mode.momentum < 1) + 4 * torch.finfo(mode.param).eps * (mode.param is not FP32)
        for mode in MODES
    }
    return [
        f"{report.workload}, {row.label}" for row in report.rows if (row.difference or 0.0) > most.get(row.mode, 0.0)
    ]

"""Low-precision states, for --precision: our step in each mode against our own step in fp32, and torch's in bf16.

Each mode moves other bytes, so the figures are its time against fp32's, and its GB/s against those of the memory limit.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import targets
import torch
import workloads
from contenders import Model, Settings, torch_sgd, warm
from memory_limit import BYTES_PER_ELEMENT, MemoryLimit, MemoryLimitUnavailable
from report import ModeRow, PrecisionReport, aligned, counted, number, ratio_text, time_text, verdict
from timing import Clock, Samples, Step, interleave, median_ratio

FP32, BF16 = torch.float32, torch.bfloat16
BASE = "fp32"
LIMIT = "limit"
COPIED_BYTES = 1 << 31
"""What the memory limit copies on a GPU: much more than its caches, little beside a large model."""
BLOCK = 256
"""Elements that share an fp32 scale in an 8-bit buffer."""


@dataclass(frozen=True)
class Mode:
    """How a parameter, its gradient and momentum are held; `options` of FusedMomentum, or `build` for torch's step."""

    key: str
    label: str
    param: torch.dtype
    grad: torch.dtype
    momentum: torch.dtype
    options: Mapping[str, Any] | None = None
    build: Callable[[Model, Settings], Step] | None = None

    @property
    def state_bytes(self) -> float:
        """Bytes of state beside the parameter, for each element."""
        scale = 4 / BLOCK if self.momentum.itemsize == 1 else 0.0
        remainder = 2 if (self.options or {}).get("master_weights") else 0
        return self.momentum.itemsize + scale + remainder

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


MODES: tuple[Mode, ...] = (
    Mode(BASE, "fp32", FP32, FP32, FP32, {}),
    Mode("bf16-momentum", "bf16 momentum", FP32, FP32, BF16, {"momentum_dtype": BF16}),
    Mode("int8-momentum", "int8 momentum", FP32, FP32, torch.int8, {"momentum_dtype": torch.int8}),
    Mode(
        "fp8-momentum", "fp8 momentum", FP32, FP32, torch.float8_e4m3fn, {"momentum_dtype": torch.float8_e4m3fn}
    ),
    Mode(
        "split", "bf16, split master", BF16, BF16, BF16, {"momentum_dtype": BF16, "master_weights": True}
    ),
    Mode("bf16-sr", "bf16, stochastic", BF16, BF16, BF16, {"stochastic_rounding": True}),
    Mode("bf16-for-loop", "torch for-loop, bf16", BF16, BF16, BF16, build=torch_sgd(foreach=False, fused=False)),
    Mode("bf16-fused", "torch fused, bf16", BF16, BF16, BF16, build=torch_sgd(fused=True)),
)  # fmt: skip


def memory_limit(elements: int, settings: Settings) -> tuple[Step, float]:
    """(a step that does nothing but move memory, its bytes). Raises MemoryLimitUnavailable."""
    if settings.device == "cuda":
        source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return warm(lambda: target.copy_(source)), 2.0 * COPIED_BYTES
    limit = MemoryLimit(elements, settings.threads, settings.momentum, settings.lr)
    return warm(limit.step), float(BYTES_PER_ELEMENT * elements)


def largest_difference(model: Model, base: Model) -> float:
    """The largest absolute difference of a parameter from that of the fp32 run."""
    pairs = zip(model.params, base.params, strict=True)
    return max(float((one.detach().float() - other.detach()).abs().max()) for one, other in pairs)


def measure(
    name: str, settings: Settings, clock: Clock, seconds: float, repeats: int | None, free_bytes: float,
    progress: Callable[[float], object],
) -> PrecisionReport:  # fmt: skip
    """Every mode on one workload: all in turn where they fit in `free_bytes` together, else each beside the limit."""
    workload = workloads.build(name)
    reasons: dict[str, str] = {}
    try:
        limit, limit_bytes = memory_limit(workload.elements, settings)
        always = {LIMIT: limit}
    except MemoryLimitUnavailable as error:
        always, limit_bytes = {}, 0.0
        reasons[LIMIT] = f"not measured: {error}"
    samples: dict[str, Samples] = {}
    limits: dict[str, Samples] = {}
    differences: dict[str, float] = {}
    batches = in_batches(workload, free_bytes, reasons)
    for batch in batches:
        models = {mode.key: Model.random(workload, settings, mode.param, mode.grad) for mode in batch}
        steps = {mode.key: mode.start(models[mode.key], settings) for mode in batch}
        if BASE in models:
            ours = [mode.key for mode in batch if mode.options]
            differences |= {key: largest_difference(models[key], models[BASE]) for key in ours}
        found = interleave(
            {**always, **steps}, clock=clock, seconds=seconds / len(batches), repeats=repeats,
            progress=lambda share: progress(share / len(batches)),
        )  # fmt: skip
        if always:
            limits |= dict.fromkeys(steps, found[LIMIT])
        samples |= {key: found[key] for key in steps}
        del models, steps
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
        beside_base = any({BASE, mode.key} <= {other.key for other in batch} for batch in batches)
        share = None
        if mode.key in limits:
            share = median_ratio(limits[mode.key], mine) * moved / limit_bytes
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

    first_limit = next(iter(limits.values()), None)
    return PrecisionReport(
        workload=name,
        what=workload.what,
        source=workload.source,
        threads=settings.threads,
        device=settings.device,
        tensors=workload.tensors,
        elements=workload.elements,
        limit_gb_per_s=None if first_limit is None else limit_bytes / first_limit.median,
        rows=tuple(map(row, MODES)),
    )


def in_batches(workload: workloads.Workload, free_bytes: float, reasons: dict[str, str]) -> list[list[Mode]]:
    """The modes that are timed in turn with each other: all, or one by one; a reason for what does not fit at all."""
    room = 0.85 * free_bytes / workload.elements
    if sum(mode.held_bytes for mode in MODES) <= room:
        return [list(MODES)]
    alone = [mode for mode in MODES if mode.held_bytes + 2 <= room]  # torch's for-loop makes a copy of a tensor or two
    for mode in MODES:
        if mode not in alone:
            reasons[mode.key] = f"not run: {mode.held_bytes * workload.elements / 1e9:,.0f} GB do not fit in the memory"
    return [[mode] for mode in alone]


def wrong_results(report: PrecisionReport) -> list[str]:
    """The modes that have computed something else than the fp32 run, by more than their own roundings explain."""
    most = {mode.key: 1e-5 + 4 * torch.finfo(mode.param).eps * (mode.param is not FP32) for mode in MODES}
    return [f"{report.workload}, {row.label}" for row in report.rows if (row.difference or 0.0) > most[row.mode]]


# Text

HEADER = (
    "mode", "ms", "IQR", "GB/s", "of limit", "B moved", "B state", "vs fp32", "target", "reached"
)  # fmt: skip


def cells(report: PrecisionReport, row: ModeRow) -> list[str]:
    """A row's cells, in the order of HEADER."""
    target = targets.precision_target(report.workload, row.mode, report.threads, report.device)
    figure = row.of_memory_limit if report.device == "cuda" else row.times_fp32
    as_text = number(target, ".2f") if report.device == "cuda" else ratio_text(target)
    return [
        row.label,
        time_text(row.median_ms),
        number(row.spread, ".1%"),
        number(row.gb_per_s, ".1f"),
        number(row.of_memory_limit, ".3f"),
        number(row.moved_bytes, ".2f"),
        number(row.state_bytes, ".2f"),
        ratio_text(row.times_fp32),
        as_text,
        verdict(figure, target),
    ]


def text(report: PrecisionReport) -> str:
    """A workload's title and table; bytes are for each element."""
    counts = ", ".join([counted(report.tensors, "tensor"), counted(report.elements, "element")])
    limit = number(report.limit_gb_per_s, ".1f")
    details = f"{counts}, {counted(report.threads, 'thread')}" + f", memory limit {limit} GB/s" * bool(limit)
    table = aligned(HEADER, [cells(report, row) for row in report.rows if row.median_ms is not None])
    notes = [f"  {row.label}: {row.reason}" for row in report.rows if row.reason]
    return "\n".join([f"{report.workload}: {report.what}, by precision", f"  {details}", table, *notes])

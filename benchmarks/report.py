"""What a run found, as data, and as JSON. `tables.py` makes the tables for people."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What is timed in turn with others, milliseconds a step. None and a `reason` where nothing was measured."""

    label: str
    reason: str | None = None
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    gb_per_s: float | None = None
    """Bytes that must move over the median time."""
    of_memory_limit: float | None = None
    """How near to the memory limit's speed, median over rounds."""
    samples_ms: tuple[float, ...] = ()

    @property
    def spread(self) -> float | None:
        """Interquartile range over median (a pure number)."""
        if self.median_ms is None or self.quartiles_ms is None:
            return None
        return (self.quartiles_ms[1] - self.quartiles_ms[0]) / self.median_ms


@dataclass(frozen=True, kw_only=True)
class Row(Timing):
    """One contender on one workload."""

    contender: str
    ours_times_faster: float | None = None
    """Median over rounds of this one's time over ours."""
    ns_per_tensor: float | None = None
    state_bytes: float | None = None
    """Of the optimizer's state for each element, measured."""
    steps_per_repetition: int | None = None


@dataclass(frozen=True)
class WorkloadReport:
    """All rows of one workload at one number of threads."""

    workload: str
    what: str
    source: str
    threads: int
    tensors: int
    elements: int
    groups: int
    bytes_per_step: int
    rows: tuple[Row, ...]
    difference_from_default: float | None = None
    """Largest absolute difference of a parameter between ours and torch's default after the warm-up steps."""
    device: str = "cpu"
    pipeline: str | None = None
    """What is timed around the step, if anything."""
    dtype: str = "float32"
    """torch's name for the dtype of parameters, gradients and momentum buffers."""
    rule: str = "momentum"

    def row(self, contender: str) -> Row | None:
        """The row of a contender, if it has one with figures."""
        return next((row for row in self.rows if row.contender == contender and row.median_ms is not None), None)


@dataclass(frozen=True)
class HostCost:
    """Step times over lists of one-element tensors, in microseconds, by the list's length."""

    threads: int
    step_us: dict[str, dict[int, float]]
    ns_per_tensor: float
    """Ours: the slope between the shortest and the longest list."""
    fixed_us: float
    """Ours: what is left of the shortest list's time when its tensors are taken off."""


@dataclass(frozen=True, kw_only=True)
class ModeRow(Timing):
    """One mode on one workload."""

    mode: str
    moved_bytes: float
    """Bytes that must move for each element."""
    state_bytes: float
    times_fp32: float | None = None
    """Median over rounds of the fp32 step's time over this one's."""
    difference: float | None = None
    """Ours: the largest absolute difference of a parameter from the fp32 run's after the warm-up steps."""


@dataclass(frozen=True)
class PrecisionReport:
    """All modes on one workload at one number of threads."""

    workload: str
    what: str
    source: str
    threads: int
    device: str
    tensors: int
    elements: int
    limit_gb_per_s: float | None
    rows: tuple[ModeRow, ...]

    def row(self, mode: str) -> ModeRow | None:
        """The row of a mode, if it has figures."""
        return next((row for row in self.rows if row.mode == mode and row.median_ms is not None), None)


@dataclass(frozen=True)
class LeftOut:
    """A workload without figures, and why."""

    workload: str
    threads: int
    reason: str


Entry: TypeAlias = WorkloadReport | HostCost | PrecisionReport | LeftOut


@dataclass(frozen=True)
class Report:
    """One run of the benchmark."""

    environment: dict[str, str]
    options: dict[str, Any]
    workloads: tuple[WorkloadReport, ...] = ()
    host_costs: tuple[HostCost, ...] = ()
    precisions: tuple[PrecisionReport, ...] = ()
    """What --precision has measured."""
    left_out: tuple[LeftOut, ...] = ()
    """What has no figures at all."""
    schema: int = field(default=SCHEMA)

    def with_entry(self, entry: Entry) -> Report:
        """The report, and one entry more."""
        kinds = {
            WorkloadReport: "workloads",
            HostCost: "host_costs",
            PrecisionReport: "precisions",
            LeftOut: "left_out",
        }
        name = kinds[type(entry)]
        more: dict[str, Any] = {name: (*getattr(self, name), entry)}
        return dataclasses.replace(self, **more)


def save(report: Report, path: Path) -> None:
    """Writes the report, every sample included, as JSON. A file of that name is whole at any time."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    os.replace(unfinished, path)


def load(path: Path) -> Report:
    """Reads what `save` wrote, by this version or an earlier one. Raises ValueError for another schema."""
    data = json.loads(path.read_text())
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: expected schema {SCHEMA}, got {data.get('schema')}")

    def entries(kind: Any, row: Any, name: str) -> tuple[Any, ...]:
        found = data.get(name, ())
        return tuple(kind(**{**entry, "rows": tuple(row(**cells) for cells in entry["rows"])}) for entry in found)

    return Report(
        environment=data["environment"],
        options=data["options"],
        workloads=entries(WorkloadReport, Row, "workloads"),
        host_costs=tuple(
            HostCost(**{**entry, "step_us": _integer_keys(entry["step_us"])}) for entry in data["host_costs"]
        ),
        precisions=entries(PrecisionReport, ModeRow, "precisions"),
        left_out=tuple(LeftOut(**entry) for entry in data.get("left_out", ())),
    )


def _integer_keys(curves: dict[str, dict[str, float]]) -> dict[str, dict[int, float]]:
    return {name: {int(length): time for length, time in curve.items()} for name, curve in curves.items()}

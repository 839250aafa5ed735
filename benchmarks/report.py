"""What a run found, as data, and its two texts: tables for people and JSON for everything else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import targets

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
class Report:
    """One run of the benchmark."""

    environment: dict[str, str]
    options: dict[str, Any]
    workloads: tuple[WorkloadReport, ...] = ()
    host_costs: tuple[HostCost, ...] = ()
    precisions: tuple[PrecisionReport, ...] = ()
    """What --precision has measured."""
    targets_origin: str = targets.ORIGIN
    schema: int = field(default=SCHEMA)


def save(report: Report, path: Path) -> None:
    """Writes the report, every sample included, as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")


def load(path: Path) -> Report:
    """Reads what `save` wrote. Raises ValueError for another schema."""
    data = json.loads(path.read_text())
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: expected schema {SCHEMA}, got {data.get('schema')}")
    workloads = tuple(
        WorkloadReport(**{**entry, "rows": tuple(Row(**row) for row in entry["rows"])}) for entry in data["workloads"]
    )
    host_costs = tuple(
        HostCost(**{**entry, "step_us": _integer_keys(entry["step_us"])}) for entry in data["host_costs"]
    )
    precisions = tuple(
        PrecisionReport(**{**entry, "rows": tuple(ModeRow(**row) for row in entry["rows"])})
        for entry in data.get("precisions", ())
    )
    return Report(**{**data, "workloads": workloads, "host_costs": host_costs, "precisions": precisions})


def _integer_keys(curves: dict[str, dict[str, float]]) -> dict[str, dict[int, float]]:
    return {name: {int(length): time for length, time in curve.items()} for name, curve in curves.items()}


# Text


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, indent: str = "  ") -> str:
    """A table as text; the first `left` columns are flushed left, the others right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return (indent + "  ".join(padded)).rstrip()

    rule = indent + "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(header), rule, *(line(cells) for cells in rows)])


def time_text(ms: float | None) -> str:
    """Milliseconds with four significant digits, "0.01234", "1.234", "123.4"."""
    if ms is None:
        return ""
    decimals = 4 if ms < 0.1 else 3 if ms < 10 else 2 if ms < 100 else 1
    return f"{ms:.{decimals}f}"


def ratio_text(ratio: float | None) -> str:
    """A ratio with the digits that mean something: "1.04x", "12.3x", "152x"."""
    if ratio is None:
        return ""
    decimals = 2 if ratio < 10 else 1 if ratio < 100 else 0
    return f"{ratio:.{decimals}f}x"


def verdict(value: float | None, target: float | None, at_most: bool = False) -> str:
    """ "yes" or "no" where there is a target and a figure, else nothing."""
    if value is None or target is None:
        return ""
    return "yes" if (value <= target if at_most else value >= target) else "no"


def row_figure(row: Row) -> float | None:
    """The figure of a row that its target speaks about."""
    return row.of_memory_limit if row.contender == "ours" else row.ours_times_faster


def number(value: float | None, pattern: str) -> str:
    """`value` by a format pattern; nothing for None."""
    return "" if value is None else format(value, pattern)


def row_cells(report: WorkloadReport, row: Row) -> list[str]:
    """A row's cells, in the order of WORKLOAD_HEADER."""
    target = targets.target_for(report.workload, row.contender, report.threads, report.device, report.pipeline)
    as_text = number(target, ".2f") if row.contender == "ours" else ratio_text(target)
    return [
        row.label,
        time_text(row.median_ms),
        number(row.spread, ".1%"),
        number(row.gb_per_s, ".1f"),
        number(row.of_memory_limit, ".3f"),
        number(row.ns_per_tensor, ",.0f"),
        "" if row.contender == "ours" else ratio_text(row.ours_times_faster),
        as_text,
        verdict(row_figure(row), target),
    ]


WORKLOAD_HEADER = (
    "contender", "ms", "IQR", "GB/s", "of limit", "ns/tensor", "ours faster by", "target", "reached"
)  # fmt: skip


def counted(count: int, noun: str) -> str:
    """ "1 thread", "2 threads"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def workload_text(report: WorkloadReport) -> str:
    """One workload's title, table, and the rows that have no figures with the reason."""
    counts = ", ".join(
        [counted(report.tensors, "tensor"), counted(report.elements, "element"), counted(report.groups, "group")]
    )
    title = f"{report.workload}: {report.what}"
    details = f"{counts}, {megabytes(report.bytes_per_step)} to move a step, {counted(report.threads, 'thread')}"
    table = aligned(WORKLOAD_HEADER, [row_cells(report, row) for row in report.rows if row.median_ms is not None])
    notes = [f"  {row.label}: {row.reason}" for row in report.rows if row.reason]
    if report.difference_from_default:
        notes.append(
            f"  results: NOT those of torch's default, largest difference {report.difference_from_default:.3g}"
        )
    elif report.difference_from_default is not None:
        notes.append("  results: those of torch's default, bit for bit")
    return "\n".join([title, f"  {details}", table, *notes])


def megabytes(count: int) -> str:
    """Bytes as "1.34 GB", "512 MB", "64 kB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def summary_text(reports: Sequence[WorkloadReport]) -> str:
    """One line for each workload: ours against torch's default, torch's fused and the memory limit."""
    rows = []
    for report in reports:
        default, fused, ours = (report.row(key) for key in ("default", "fused", "ours"))
        if ours is None:
            continue
        cells = [report.workload, str(report.threads), time_text(ours.median_ms), number(ours.gb_per_s, ".1f")]
        for key, row in (("default", default), ("fused", fused), ("ours", ours)):
            figure = row_figure(row) if row else None
            target = (
                targets.target_for(report.workload, key, report.threads, report.device, report.pipeline)
                if figure is not None
                else None
            )
            text = number if key == "ours" else None
            cells += [
                text(figure, ".3f") if text else ratio_text(figure),
                text(target, ".2f") if text else ratio_text(target),
                verdict(figure, target),
            ]
        rows.append(cells)
    header = ["workload", "threads", "ms", "GB/s"]
    best = "vs best" if any(report.pipeline for report in reports) else "vs fused"
    for name in ("vs default", best, "of limit"):
        header += [name, "target", ""]
    return "In short: FusedMomentum, times faster than torch's, and share of the memory limit\n" + aligned(header, rows)


def host_cost_text(cost: HostCost) -> str:
    """The host cost: step times by list length, then slope and fixed cost against their targets."""
    lengths = sorted({length for curve in cost.step_us.values() for length in curve})
    header = ["us a step, by number of tensors", *(f"{length:,}" for length in lengths)]
    rows = [
        [label, *(number(curve.get(length), ",.1f") for length in lengths)] for label, curve in cost.step_us.items()
    ]
    judged = cost.threads == targets.THREADS
    figures = [
        ("ns for each tensor more", cost.ns_per_tensor, targets.HOST_NS_PER_TENSOR if judged else None),
        ("us for a step, whatever the list", cost.fixed_us, targets.HOST_FIXED_US if judged else None),
    ]
    verdicts = [
        [name, f"{value:.1f}", number(target, "<.0f"), verdict(value, target, at_most=True)]
        for name, value, target in figures
    ]
    title = f"host cost: lists of one-element tensors, {counted(cost.threads, 'thread')}"
    judged_table = aligned(["FusedMomentum", "measured", "at most", "reached"], verdicts)
    return "\n".join([title, aligned(header, rows), "", judged_table])


def header_text(report: Report) -> str:
    """The environment and the options that matter, one per line."""
    hyperparameters = ", ".join(
        f"{key}={report.options[key]}" for key in ("lr", "momentum", "weight_decay", "nesterov")
    )
    dtype = "each mode's dtypes" if report.options.get("precision") else "fp32"
    lines = {**report.environment, "step": f"{dtype}, {hyperparameters}"}
    width = max(map(len, lines))
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in lines.items())

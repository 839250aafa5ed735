"""The tables of a run, as text for people."""

from __future__ import annotations

from collections.abc import Sequence

from report import Entry, HostCost, LeftOut, ModeRow, PrecisionReport, Report, Row, WorkloadReport


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


def number(value: float | None, pattern: str) -> str:
    """`value` by a format pattern; nothing for None."""
    return "" if value is None else format(value, pattern)


WORKLOAD_HEADER = ("contender", "ms", "IQR", "GB/s", "of limit", "ns/tensor", "B state", "ours faster by")


def row_cells(row: Row) -> list[str]:
    """A row's cells, in the order of WORKLOAD_HEADER."""
    return [
        row.label,
        time_text(row.median_ms),
        number(row.spread, ".1%"),
        number(row.gb_per_s, ".1f"),
        number(row.of_memory_limit, ".3f"),
        number(row.ns_per_tensor, ",.0f"),
        number(row.state_bytes, ".2f"),
        "" if row.contender == "ours" else ratio_text(row.ours_times_faster),
    ]


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
    table = aligned(WORKLOAD_HEADER, [row_cells(row) for row in report.rows if row.median_ms is not None])
    notes = [f"  {row.label}: {row.reason}" for row in report.rows if row.reason]
    if report.difference_from_default and report.rule != "momentum":
        difference = report.difference_from_default
        notes.append(
            f"  results: within {difference:.2g} of torch's default, whose square roots are not rounded exactly"
        )
    elif report.difference_from_default:
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


def summary_text(report: Report) -> str:
    """One line for each workload: ours against torch's default, its fused and the memory limit; what was left out."""
    rows = []
    for entry in report.workloads:
        default, fused, ours = (entry.row(key) for key in ("default", "fused", "ours"))
        if ours is None:
            continue
        rows.append([
            entry.workload,
            str(entry.threads),
            time_text(ours.median_ms),
            number(ours.gb_per_s, ".1f"),
            ratio_text(default.ours_times_faster if default else None),
            ratio_text(fused.ours_times_faster if fused else None),
            number(ours.of_memory_limit, ".3f"),
        ])  # fmt: skip
    best = "vs best" if report.options.get("pipeline") else "vs fused"
    header = ["workload", "threads", "ms", "GB/s", "vs default", best, "of limit"]
    title = "In short: ours, times faster than torch's, and share of the memory limit"
    return "\n".join([title, aligned(header, rows), *(f"  {left_out_text(entry)}" for entry in report.left_out)])


def host_cost_text(cost: HostCost) -> str:
    """The host cost: step times by list length, then slope and fixed cost of ours."""
    lengths = sorted({length for curve in cost.step_us.values() for length in curve})
    header = ["us a step, by number of tensors", *(f"{length:,}" for length in lengths)]
    rows = [
        [label, *(number(curve.get(length), ",.1f") for length in lengths)] for label, curve in cost.step_us.items()
    ]
    title = f"host cost: lists of one-element tensors, {counted(cost.threads, 'thread')}"
    ours = f"{cost.ns_per_tensor:.1f} ns for each tensor more, {cost.fixed_us:.1f} us whatever the list"
    return "\n".join([title, aligned(header, rows), f"  {next(iter(cost.step_us))}: {ours}"])


MODE_HEADER = ("mode", "ms", "IQR", "GB/s", "of limit", "B moved", "B state", "vs fp32")


def mode_cells(row: ModeRow) -> list[str]:
    """A row's cells, in the order of MODE_HEADER."""
    return [
        row.label,
        time_text(row.median_ms),
        number(row.spread, ".1%"),
        number(row.gb_per_s, ".1f"),
        number(row.of_memory_limit, ".3f"),
        number(row.moved_bytes, ".2f"),
        number(row.state_bytes, ".2f"),
        ratio_text(row.times_fp32),
    ]


def precision_text(report: PrecisionReport) -> str:
    """A workload's title and table by precision; bytes are for each element."""
    counts = ", ".join([counted(report.tensors, "tensor"), counted(report.elements, "element")])
    limit = number(report.limit_gb_per_s, ".1f")
    details = f"{counts}, {counted(report.threads, 'thread')}" + f", memory limit of fp32 {limit} GB/s" * bool(limit)
    table = aligned(MODE_HEADER, [mode_cells(row) for row in report.rows if row.median_ms is not None])
    notes = [f"  {row.label}: {row.reason}" for row in report.rows if row.reason]
    return "\n".join([f"{report.workload}: {report.what}, by precision", f"  {details}", table, *notes])


def left_out_text(entry: LeftOut) -> str:
    """What was left out, and why."""
    return f"{entry.workload}, {counted(entry.threads, 'thread')}: {entry.reason}"


def entry_text(entry: Entry) -> str:
    """What a run found about one workload."""
    if isinstance(entry, WorkloadReport):
        return workload_text(entry)
    if isinstance(entry, HostCost):
        return host_cost_text(entry)
    return precision_text(entry) if isinstance(entry, PrecisionReport) else left_out_text(entry)


def header_text(report: Report) -> str:
    """The environment and the options that matter, one per line."""
    hyperparameters = ", ".join(
        f"{key}={report.options[key]}"
        for key in ("rule", "lr", "momentum", "weight_decay", "nesterov")
        if key in report.options
    )
    dtype = "each mode's dtypes" if report.options.get("precision") else "fp32 unless a workload says otherwise"
    lines = {**report.environment, "step": f"{dtype}, {hyperparameters}"}
    if hogs := report.options.get("hogs"):
        lines["busy processes"] = str(hogs)
    width = max(map(len, lines))
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in lines.items())

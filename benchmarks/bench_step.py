#!/usr/bin/env python3
"""Measures one optimizer step: FusedMomentum against every way that torch has, and against the memory's limit.

    python benchmarks/bench_step.py --quick                       about a minute
    python benchmarks/bench_step.py --json step.json --plot step.png
    python benchmarks/bench_step.py --workload gpt2 --workload resnet50 --threads 1 2

How to read what it prints stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cycles
import environment
import measure
import precision
import report as reports
import tables
import torch
import workloads
from contenders import KEYS, RULES, WARMUP_STEPS, Settings
from hogs import hogs
from measure import CLOCKS, HOST_COST
from peers import PEERS
from pipelines import PIPELINES, WORKLOADS
from report import Report
from tqdm import tqdm

MOST_BUSY_CORES = 0.1
"""Above this many cores' worth of other programs, a run starts with a warning."""


def device(name: str) -> str:
    """The --device argument; an error that says what can be measured."""
    if name not in CLOCKS:
        raise argparse.ArgumentTypeError(f"{name!r}: this benchmark measures {' and '.join(CLOCKS)} only so far")
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda: torch finds no GPU")
    return name


def default_workloads(device: str, quick: bool) -> list[str]:
    """All that fit the device and the time, and the host cost."""
    left_out = (*(workloads.NOT_QUICK if quick else ()), *(workloads.FOR_GPUS if device == "cpu" else ()))
    left_out += workloads.FOR_RULES[-2:]
    return [name for name in workloads.NAMES if name not in left_out] + [HOST_COST]


def positive(text: str) -> int:
    """An integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with what depends on --quick and on the machine filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute in all: fewer rounds, nothing compiled")
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--threads", type=positive, nargs="+", metavar="N", help="numbers of threads to measure with (default: all)"
    )
    parser.add_argument(
        "--workload", action="append", choices=[*workloads.NAMES, HOST_COST], metavar="NAME",
        help=f"repeatable; of {', '.join(workloads.NAMES)}, host_cost (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--contender", action="append", choices=[*KEYS, *(peer.key for peer in PEERS)], metavar="NAME",
        help=f"repeatable; of {', '.join(KEYS)} (default: all; ours always runs)",
    )  # fmt: skip
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, help="torch.compile too (default: if not --quick)"
    )
    parser.add_argument("--seconds", type=float, help="time for each workload, about (default: 15, with --quick 2)")
    parser.add_argument("--repeats", type=positive, help="rounds of each workload, exactly, instead of --seconds")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="lists that fit in the caches: leave out the step off the clock that begins each turn",
    )
    parser.add_argument(
        "--pipeline", choices=PIPELINES, help="time the step with what trainers put around it, against torch's two ways"
    )
    parser.add_argument("--rule", choices=RULES, default="momentum", help="whose step (default: momentum)")
    parser.add_argument(
        "--precision", action="store_true",
        help="time the step in each mode of low-precision states against our own in fp32 "
        "(default workload: gpt2, on a GPU llama3_8b)",
    )  # fmt: skip
    parser.add_argument(
        "--cycles", action="store_true",
        help="nothing but cycles for each element in each mode, in the nearest cache, with each instruction set",
    )  # fmt: skip
    parser.add_argument(
        "--hogs", type=int, default=0, metavar="N", help="so many busy processes beside the benchmark (default: none)"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--nesterov", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample and the environment")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures (needs matplotlib)")
    options = parser.parse_args(arguments)
    options.threads = options.threads or [environment.cores()]
    if options.precision:
        if options.pipeline or options.contender or HOST_COST in (options.workload or ()):
            parser.error("--precision: takes no --pipeline and no --contender, and has no host_cost")
        options.workload = options.workload or ["llama3_8b" if options.device == "cuda" else "gpt2"]
    if options.rule != "momentum":
        if options.pipeline or options.precision or options.plot:
            parser.error("--rule: takes no --pipeline, no --precision and no --plot")
        options.workload = options.workload or [*workloads.FOR_RULES, HOST_COST]
    if options.pipeline and not options.workload:
        options.workload = list(WORKLOADS)
    options.workload = list(dict.fromkeys(options.workload or default_workloads(options.device, options.quick)))
    options.compiled = not options.quick if options.compiled is None else options.compiled
    options.seconds = options.seconds or (2.0 if options.quick else 15.0)
    if options.momentum <= 0:
        parser.error("--momentum: must be above 0; without a momentum buffer a step moves other bytes")
    return options


def run(options: argparse.Namespace) -> Report:
    """Measures everything that was asked for; prints each table, and writes the file, as soon as it is there."""
    if (busy := environment.busy_cores()) > MOST_BUSY_CORES:
        print(
            f"warning: other programs keep {busy:.1f} cores busy; figures of several threads mean little",
            file=sys.stderr,
        )
    shown = {**vars(options), "warmup_steps": WARMUP_STEPS, "json": None, "plot": None}
    result = Report(environment.describe(options.device), shown)
    print(tables.header_text(result), flush=True)
    jobs = [(threads, name) for threads in options.threads for name in options.workload]
    bar_format = "{desc:<24} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with (
        hogs(options.hogs),
        tqdm(total=len(jobs), bar_format=bar_format, file=sys.stderr, leave=False, disable=None) as bar,
    ):
        for done, (threads, name) in enumerate(jobs):
            bar.set_description(name)
            torch.set_num_threads(threads)
            settings = Settings(
                options.lr, options.momentum, options.weight_decay, options.nesterov, threads, options.device,
                RULES[options.rule],
            )  # fmt: skip
            entry = measure.measure(name, options, settings, bar.update)
            measure.release_memory(options.device)
            result = result.with_entry(entry)
            if options.json:
                reports.save(result, options.json)
            bar.update(done + 1 - bar.n)
            bar.write("\n" + tables.entry_text(entry), file=sys.stdout)
            sys.stdout.flush()
    if result.workloads:
        print("\n" + tables.summary_text(result))
    return result


def failures(result: Report) -> list[str]:
    """What has failed by anything but a lack of memory: whole workloads, and ours on the others."""
    rows = [(f"{entry.workload}, {row.label}", row.reason) for entry in result.workloads for row in entry.rows
            if row.contender == "ours"]  # fmt: skip
    rows += [(f"{entry.workload}, {row.label}", row.reason) for entry in result.precisions for row in entry.rows]
    rows += [(entry.workload, entry.reason) for entry in result.left_out]
    return [name for name, reason in rows if (reason or "").startswith("failed")]


def wrong_results(result: Report) -> list[str]:
    """The workloads on which ours and torch's default differ by more than rounding explains.

    In a pipeline torch has clipped gradients that it clipped before, which makes them a little smaller still.
    """
    most = 1e-6 if not result.options.get("pipeline") else 1e-5
    wrong = [entry.workload for entry in result.workloads if (entry.difference_from_default or 0.0) > most]
    return wrong + [name for entry in result.precisions for name in precision.wrong_results(entry)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line program; returns the exit status: 1 where ours failed or computed something else than torch."""
    options = parse_arguments(arguments)
    try:
        import momentum_ext  # noqa: F401
    except ImportError as error:
        print(
            f"momentum_ext does not import ({error}); build it with: pip install --no-build-isolation .",
            file=sys.stderr,
        )
        return 2
    if options.cycles:
        print(cycles.table(options.quick), end="")
        return 0
    result = run(options)
    if options.json:
        print(f"wrote {options.json}")
    if options.plot:
        import plot

        plot.draw(result, options.plot)
        print(f"wrote {options.plot}")
    if wrong := wrong_results(result):
        print(f"WRONG RESULTS on {', '.join(wrong)}: these figures mean nothing", file=sys.stderr)
    if failed := failures(result):
        print(f"FAILED: {'; '.join(failed)}", file=sys.stderr)
    return int(bool(wrong or failed))


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Measures one optimizer step: FusedMomentum against every way that torch has, and against the memory's limit.

    python benchmarks/bench_step.py --quick                       about a minute
    python benchmarks/bench_step.py --json step.json --plot step.png
    python benchmarks/bench_step.py --workload gpt2 --workload resnet50 --threads 1 2

How to read what it prints stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import environment
import precision
import report as reports
import torch
import workloads
from contenders import (
    CONTENDERS,
    KEYS,
    STEP,
    WARMUP_STEPS,
    Contender,
    Model,
    NotRun,
    Pass,
    Settings,
    largest_difference,
    memory_limit,
)
from memory_limit import MemoryLimitUnavailable
from pipelines import PIPELINES
from report import HostCost, PrecisionReport, Report, Row, WorkloadReport
from targets import PIPELINE_TARGETS
from timing import Clock, Samples, Step, cpu_clock, cuda_clock, cuda_host_clock, interleave, median_ratio
from tqdm import tqdm

CLOCKS: dict[str, Clock] = {"cpu": cpu_clock, "cuda": cuda_clock}
"""How each device is timed."""

HOST_CLOCKS: dict[str, Clock] = {"cpu": cpu_clock, "cuda": cuda_host_clock}
"""How the host's part is timed."""

MOST_BUSY_CORES = 0.1
"""Above this many cores' worth of other programs, a run starts with a warning."""

LIMIT = "limit"
HOST_COST_LENGTHS = (1, 10, 100, 1000, 5000)
HOST_COST_CONTENDERS = ("ours", "fused", "default")

Progress = Callable[[float], object]


def device(name: str) -> str:
    """The --device argument; an error that says what can be measured."""
    if name not in CLOCKS:
        raise argparse.ArgumentTypeError(f"{name!r}: this benchmark measures {' and '.join(CLOCKS)} only so far")
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda: torch finds no GPU")
    return name


def default_workloads(device: str) -> list[str]:
    """All that fit the device, and the host cost."""
    return [name for name in workloads.NAMES if device == "cuda" or name not in workloads.FOR_GPUS] + ["host_cost"]


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
        "--workload", action="append", choices=[*workloads.NAMES, "host_cost"], metavar="NAME",
        help=f"repeatable; of {', '.join(workloads.NAMES)}, host_cost (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--contender", action="append", choices=KEYS, metavar="NAME",
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
    parser.add_argument(
        "--precision", action="store_true",
        help="time the step in each mode of low-precision states against our own in fp32 "
        "(default workload: gpt2, on a GPU llama3_8b)",
    )  # fmt: skip
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--nesterov", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample and the environment")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures (needs matplotlib)")
    options = parser.parse_args(arguments)
    options.threads = options.threads or [environment.cores()]
    if options.precision:
        if options.pipeline or options.contender or "host_cost" in (options.workload or ()):
            parser.error("--precision: takes no --pipeline and no --contender, and has no host_cost")
        options.workload = options.workload or ["llama3_8b" if options.device == "cuda" else "gpt2"]
    if options.pipeline and not options.workload:
        options.workload = list(PIPELINE_TARGETS[options.pipeline])
    options.workload = list(dict.fromkeys(options.workload or default_workloads(options.device)))
    options.compiled = not options.quick if options.compiled is None else options.compiled
    options.seconds = options.seconds or (2.0 if options.quick else 15.0)
    if options.momentum <= 0:
        parser.error("--momentum: must be above 0; without a momentum buffer a step moves other bytes")
    return options


def chosen(options: argparse.Namespace) -> list[Contender]:
    """The contenders to run, ours among them, in their fixed order."""
    wanted = {"ours", *(options.contender or KEYS)}
    if options.pipeline:
        return [contender for contender in PIPELINES[options.pipeline][1] if contender.key in wanted]
    if not options.compiled and "compiled" not in (options.contender or ()):
        wanted.discard("compiled")
    return [contender for contender in CONTENDERS if contender.key in wanted]


def timed_pass(options: argparse.Namespace) -> Pass:
    """What is timed, for its bytes."""
    return PIPELINES[options.pipeline][0] if options.pipeline else STEP


def free_gb(device: str) -> float:
    """Gigabytes of memory that are free on the device."""
    return float(torch.cuda.mem_get_info()[0] / 1e9 if device == "cuda" else environment.memory_gb("MemAvailable"))


def room_for_copies(workload: workloads.Workload, device: str) -> int:
    """How many contenders' tensors (and the memory limit's arrays) fit in what memory is free, temporaries included."""
    gb_each = workload.elements * workload.itemsize * STEP.tensor_copies / 1e9
    free = free_gb(device)
    return int((free * 0.9 - gb_each) / max(gb_each, 1e-9))


def fits_in_caches(workload: workloads.Workload, device: str) -> bool:
    """Whether one contender's tensors fit in the largest cache: then memory is not what limits the step."""
    if device == "cuda":
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    else:
        cache = environment.largest_cache_bytes()
    return workload.elements * workload.itemsize * STEP.tensor_copies <= cache


def take_turns(
    steps: dict[str, Step], options: argparse.Namespace, progress: Progress, warm: bool, clocks: dict[str, Clock]
) -> dict[str, Samples]:
    """Times the steps in turn as the options say; `warm` where the tensors fit in the caches."""
    return interleave(
        steps,
        clock=clocks[options.device],
        seconds=options.seconds,
        repeats=options.repeats,
        warm=warm and not options.cold,
        progress=progress,
    )


def prepare(
    workload: workloads.Workload, contenders: Sequence[Contender], settings: Settings, accesses: int, with_limit: bool
) -> tuple[dict[str, Step], dict[str, str], float | None]:
    """Builds and warms up every contender on a copy of its own.

    Returns the steps by key (the memory limit's first), the reasons of those that have none, and the largest difference
    between our parameters and those of torch's default after the same number of steps (None without the default).
    """
    steps: dict[str, Step] = {}
    reasons: dict[str, str] = {}
    room = room_for_copies(workload, settings.device)
    if with_limit and not fits_in_caches(workload, settings.device):
        try:
            steps[LIMIT] = memory_limit(workload, settings, accesses)
        except MemoryLimitUnavailable as error:
            reasons[LIMIT] = f"not measured: {error}"
    first = Model.random(workload, settings)
    models = {contender.key: first.copy() for contender in contenders[1 : max(room - 1, 1)]}
    models[contenders[0].key] = first
    for contender in contenders:
        if contender.key not in models:
            reasons[contender.key] = "not run: its copy of the tensors does not fit in the free memory"
            continue
        try:
            steps[contender.key] = contender.build(models[contender.key], settings)
        except NotRun as error:
            reasons[contender.key] = str(error)
    difference = None
    if "default" in steps and workload.dtype == "float32":  # in 16 bits torch rounds more often than we do
        difference = largest_difference(models["ours"].params, models["default"].params)
    return steps, reasons, difference


def make_row(
    key: str,
    label: str,
    samples: dict[str, Samples],
    reasons: dict[str, str],
    workload: workloads.Workload,
    accesses: int,
) -> Row:
    """The row of one contender, or the reason why it has no figures."""
    if key not in samples:
        return Row(contender=key, label=label, reason=reasons[key])
    mine = samples[key]
    first, third = mine.quartiles
    bytes_per_step = workload.elements * workload.itemsize * accesses
    return Row(
        contender=key,
        label=label,
        median_ms=mine.median / 1e6,
        quartiles_ms=(first / 1e6, third / 1e6),
        gb_per_s=bytes_per_step / mine.median,
        of_memory_limit=median_ratio(samples[LIMIT], mine) if LIMIT in samples else None,
        ours_times_faster=median_ratio(mine, samples["ours"]),
        ns_per_tensor=mine.median / workload.tensors,
        steps_per_repetition=mine.steps_per_repetition,
        samples_ms=tuple(time / 1e6 for time in mine.ns_per_step),
    )


def measure_workload(name: str, options: argparse.Namespace, settings: Settings, progress: Progress) -> WorkloadReport:
    """Every chosen contender on one workload."""
    workload = workloads.build(name)
    contenders = chosen(options)
    accesses = timed_pass(options).accesses
    with_limit = not options.pipeline or options.device == "cuda"  # the CPU's is that of a plain step
    steps, reasons, difference = prepare(workload, contenders, settings, accesses, with_limit)
    samples = take_turns(steps, options, progress, warm=fits_in_caches(workload, options.device), clocks=CLOCKS)
    labels = {
        LIMIT: "memory limit" if options.device == "cpu" else "copy",
        **{contender.key: contender.label for contender in contenders},
    }
    rows = [
        make_row(key, label, samples, reasons, workload, accesses)
        for key, label in labels.items()
        if key in samples or key in reasons
    ]
    return WorkloadReport(
        workload=name,
        what=workload.what,
        source=workload.source,
        threads=settings.threads,
        tensors=workload.tensors,
        elements=workload.elements,
        groups=len(workload.groups),
        bytes_per_step=workload.elements * workload.itemsize * accesses,
        pipeline=options.pipeline,
        device=settings.device,
        rows=tuple(rows),
        difference_from_default=difference,
    )


def measure_host_cost(options: argparse.Namespace, settings: Settings, progress: Progress) -> HostCost:
    """Step times over lists of one-element tensors: what a step costs beside the memory's time."""
    contenders = [contender for contender in chosen(options) if contender.key in HOST_COST_CONTENDERS]
    steps: dict[str, Step] = {}
    for length in HOST_COST_LENGTHS:
        model = Model.random(workloads.same(length, 1), settings)
        for contender in contenders:
            steps[f"{contender.key} {length}"] = contender.build(model.copy(), settings)
    samples = take_turns(steps, options, progress, warm=True, clocks=HOST_CLOCKS)
    curves = {
        contender.label: {length: samples[f"{contender.key} {length}"].median / 1e3 for length in HOST_COST_LENGTHS}
        for contender in contenders
    }
    shortest, longest = HOST_COST_LENGTHS[0], HOST_COST_LENGTHS[-1]
    ours = curves["FusedMomentum"]
    slope_us = (ours[longest] - ours[shortest]) / (longest - shortest)
    return HostCost(
        settings.threads, curves, ns_per_tensor=slope_us * 1e3, fixed_us=ours[shortest] - slope_us * shortest
    )


def measure_precision(
    name: str, options: argparse.Namespace, settings: Settings, progress: Progress
) -> PrecisionReport:
    """Every mode of low-precision states on one workload."""
    clock, free = CLOCKS[options.device], free_gb(options.device) * 1e9
    return precision.measure(name, settings, clock, options.seconds, options.repeats, free, progress)


def run(options: argparse.Namespace) -> Report:
    """Measures everything that was asked for, printing each table as soon as it is there."""
    if (busy := environment.busy_cores()) > MOST_BUSY_CORES:
        print(
            f"warning: other programs keep {busy:.1f} cores busy; figures of several threads mean little",
            file=sys.stderr,
        )
    shown = {**vars(options), "warmup_steps": WARMUP_STEPS, "json": None, "plot": None}
    result = Report(environment.describe(options.device), shown)
    print(reports.header_text(result), flush=True)
    jobs = [(threads, name) for threads in options.threads for name in options.workload]
    measured: list[WorkloadReport] = []
    host_costs: list[HostCost] = []
    precisions: list[PrecisionReport] = []
    bar_format = "{desc:<24} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=len(jobs), bar_format=bar_format, file=sys.stderr, leave=False, disable=None) as bar:
        for done, (threads, name) in enumerate(jobs):
            bar.set_description(name)
            torch.set_num_threads(threads)
            settings = Settings(
                options.lr, options.momentum, options.weight_decay, options.nesterov, threads, options.device
            )
            if options.precision:
                precisions.append(measure_precision(name, options, settings, bar.update))
                text = precision.text(precisions[-1])
            elif name == "host_cost":
                cost = measure_host_cost(options, settings, bar.update)
                host_costs.append(cost)
                text = reports.host_cost_text(cost)
            else:
                measured.append(measure_workload(name, options, settings, bar.update))
                text = reports.workload_text(measured[-1])
            bar.update(done + 1 - bar.n)
            bar.write("\n" + text, file=sys.stdout)
            sys.stdout.flush()
            gc.collect()
    if measured:
        print("\n" + reports.summary_text(measured))
    return Report(result.environment, result.options, tuple(measured), tuple(host_costs), tuple(precisions))


def wrong_results(result: Report) -> list[str]:
    """The workloads on which ours and torch's default differ by more than rounding explains.

    In a pipeline torch has clipped gradients that it clipped before, which makes them a little smaller still.
    """
    most = 1e-6 if not result.options.get("pipeline") else 1e-5
    wrong = [entry.workload for entry in result.workloads if (entry.difference_from_default or 0.0) > most]
    return wrong + [name for entry in result.precisions for name in precision.wrong_results(entry)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line program; returns the exit status: 1 where ours computed something else than torch."""
    options = parse_arguments(arguments)
    try:
        import momentum_ext  # noqa: F401
    except ImportError as error:
        print(
            f"momentum_ext does not import ({error}); build it with: pip install --no-build-isolation .",
            file=sys.stderr,
        )
        return 2
    result = run(options)
    if options.json:
        reports.save(result, options.json)
        print(f"wrote {options.json}")
    if options.plot:
        import plot

        plot.draw(result, options.plot)
        print(f"wrote {options.plot}")
    if wrong := wrong_results(result):
        print(f"WRONG RESULTS on {', '.join(wrong)}: these figures mean nothing", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

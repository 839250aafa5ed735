"""Measures one workload: builds the contenders that fit into the memory, times them in turn, makes their rows."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence

import environment
import precision
import torch
import workloads
from contenders import (
    CONTENDERS,
    RULES,
    STEP,
    Contender,
    Model,
    NotRun,
    Pass,
    Settings,
    fault_of_fused,
    largest_difference,
    reason_of,
    step_of,
    warm,
)
from memory_limit import MemoryLimit, MemoryLimitUnavailable, Traffic, copies, copies_held
from peers import PEERS, state_bytes
from pipelines import PIPELINES
from report import Entry, HostCost, LeftOut, Row, WorkloadReport
from timing import Clock, Samples, Step, cpu_clock, cuda_clock, cuda_host_clock, interleave, median_ratio

CLOCKS: dict[str, Clock] = {"cpu": cpu_clock, "cuda": cuda_clock}
"""How each device is timed."""

HOST_CLOCKS: dict[str, Clock] = {"cpu": cpu_clock, "cuda": cuda_host_clock}
"""How the host's part is timed."""

LIMIT = "limit"
HOST_COST = "host_cost"
HOST_COST_LENGTHS = (1, 10, 100, 1000, 5000)
HOST_COST_CONTENDERS = ("ours", "momentum", "fused", "default")
USABLE = 0.9
"""The share of the free memory that is filled."""

Progress = Callable[[float], object]


def chosen(options: argparse.Namespace) -> list[Contender]:
    """The contenders to run, ours among them, in their fixed order."""
    peers = {"momentum": (), "adamw": PEERS}.get(options.rule, PEERS[:1])
    known = [each for each in (*CONTENDERS, *peers) if each.key != "fused" or RULES[options.rule].has_fused]
    wanted = {"ours", *(options.contender or [each.key for each in known])}
    if options.pipeline:
        return [contender for contender in PIPELINES[options.pipeline][1] if contender.key in wanted]
    if not options.compiled and "compiled" not in (options.contender or ()):
        wanted.discard("compiled")
    return [contender for contender in known if contender.key in wanted]


def label_of(contender: Contender, settings: Settings) -> str:
    """A contender's name in tables; ours is named by its rule."""
    return settings.rule.ours if contender.key == "ours" else contender.label


def free_bytes(device: str) -> float:
    """Bytes of memory that are free on the device."""
    return float(torch.cuda.mem_get_info()[0]) if device == "cuda" else environment.memory_gb("MemAvailable") * 1e9


def limit_held(workload: workloads.Workload, traffic: Traffic, device: str) -> int:
    """Bytes of memory that the memory limit's arrays take."""
    if device == "cuda":
        return copies_held(workload.elements * traffic.moved)
    return 0 if fits_in_caches(workload, device) else workload.elements * traffic.held


def room_for_models(workload: workloads.Workload, traffic: Traffic, device: str) -> int:
    """How many contenders' tensors fit into the free memory, beside the memory limit's and torch's temporaries.

    Raises NotRun where ours alone do not.
    """
    each, limit = workload.elements * traffic.held, limit_held(workload, traffic, device)
    free = free_bytes(device)
    if each + limit > USABLE * free:
        raise NotRun(f"not run: it needs {(each + limit) / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} are free")
    temporaries = 2 * workload.elements * workload.itemsize  # torch's foreach makes lists of the parameters' size
    return 1 + int(max(0, (USABLE * free - limit - each - temporaries) / each))


def fits_in_caches(workload: workloads.Workload, device: str) -> bool:
    """Whether one contender's tensors fit in the largest cache: then memory is not what limits the step."""
    if device == "cuda":
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    else:
        cache = environment.largest_cache_bytes()
    return workload.elements * STEP.traffic(workload.itemsize).held <= cache


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


def memory_limit(workload: workloads.Workload, settings: Settings, traffic: Traffic) -> Step:
    """What memory allows for these bytes: a plain native loop; on a GPU copies. Raises MemoryLimitUnavailable."""
    if settings.device == "cuda":
        return warm(copies(workload.elements * traffic.moved))
    return warm(MemoryLimit(traffic, workload.elements, settings.threads).step)


def prepare(
    workload: workloads.Workload, contenders: Sequence[Contender], settings: Settings, traffic: Traffic
) -> tuple[dict[str, Step], dict[str, str], float | None]:
    """Builds and warms up every contender on a copy of its own.

    Returns the steps by key (the memory limit's first), the reasons of those that have none, and the largest difference
    between our parameters and those of torch's default after the same number of steps (None without the default).
    """
    steps: dict[str, Step] = {}
    reasons: dict[str, str] = {}
    room = room_for_models(workload, traffic, settings.device)
    if not fits_in_caches(workload, settings.device):
        try:
            steps[LIMIT] = memory_limit(workload, settings, traffic)
        except MemoryLimitUnavailable as error:
            reasons[LIMIT] = f"not measured: {error}"
    first = Model.random(workload, settings)
    models = {contender.key: first.copy() for contender in contenders[1:room]}
    models[contenders[0].key] = first
    for contender in contenders:
        if contender.key not in models:
            reasons[contender.key] = "not run: its copy of the tensors does not fit in the free memory"
        elif contender.key == "fused" and (fault := fault_of_fused(workload, settings)):
            reasons[contender.key] = f"not run: {fault}"
        else:
            try:
                steps[contender.key] = contender.build(models[contender.key], settings)
            except Exception as error:  # belongs in this row, not in the way of the others
                reasons[contender.key] = reason_of(error)
        if contender.key in reasons:
            models.pop(contender.key, None)
    difference = None
    if {"ours", "default"} <= steps.keys() and workload.dtype == "float32":  # in 16 bits torch rounds more often
        difference = largest_difference(models["ours"].params, models["default"].params)
    return steps, reasons, difference


def make_row(
    key: str,
    label: str,
    samples: dict[str, Samples],
    reasons: dict[str, str],
    workload: workloads.Workload,
    traffic: Traffic | None,
    state_bytes: int | None,
) -> Row:
    """The row of one contender, or the reason why it has no figures; without `traffic` its bytes are not known."""
    if key not in samples:
        return Row(contender=key, label=label, reason=reasons[key])
    mine = samples[key]
    first, third = mine.quartiles
    return Row(
        contender=key,
        label=label,
        median_ms=mine.median / 1e6,
        quartiles_ms=(first / 1e6, third / 1e6),
        gb_per_s=workload.elements * traffic.moved / mine.median if traffic else None,
        of_memory_limit=median_ratio(samples[LIMIT], mine) if traffic and LIMIT in samples else None,
        state_bytes=None if state_bytes is None else state_bytes / workload.elements,
        ours_times_faster=median_ratio(mine, samples["ours"]) if "ours" in samples else None,
        ns_per_tensor=mine.median / workload.tensors,
        steps_per_repetition=mine.steps_per_repetition,
        samples_ms=tuple(time / 1e6 for time in mine.ns_per_step),
    )


def measure_workload(name: str, options: argparse.Namespace, settings: Settings, progress: Progress) -> WorkloadReport:
    """Every chosen contender on one workload."""
    workload = workloads.build(name)
    contenders = chosen(options)
    timed: Pass = PIPELINES[options.pipeline][0] if options.pipeline else step_of(settings.rule)
    traffic = timed.traffic(workload.itemsize)
    steps, reasons, difference = prepare(workload, contenders, settings, traffic)
    held = {key: state_bytes(step) for key, step in steps.items()}
    samples = take_turns(steps, options, progress, warm=fits_in_caches(workload, options.device), clocks=CLOCKS)
    others = {contender.key for contender in contenders if not contender.moves_the_pass}
    labels = {
        LIMIT: "memory limit" if options.device == "cpu" else "copy",
        **{contender.key: label_of(contender, settings) for contender in contenders},
    }
    return WorkloadReport(
        workload=name,
        what=workload.what,
        source=workload.source,
        threads=settings.threads,
        tensors=workload.tensors,
        elements=workload.elements,
        groups=len(workload.groups),
        bytes_per_step=workload.elements * traffic.moved,
        pipeline=options.pipeline,
        device=settings.device,
        dtype=workload.dtype,
        rule=options.rule,
        rows=tuple(
            make_row(key, label, samples, reasons, workload, traffic if key not in others else None, held.get(key))
            for key, label in labels.items()
            if key in samples or key in reasons
        ),
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
        label_of(contender, settings): {
            length: samples[f"{contender.key} {length}"].median / 1e3 for length in HOST_COST_LENGTHS
        }
        for contender in contenders
    }
    shortest, longest = HOST_COST_LENGTHS[0], HOST_COST_LENGTHS[-1]
    ours = curves[settings.rule.ours]
    slope_us = (ours[longest] - ours[shortest]) / (longest - shortest)
    return HostCost(
        settings.threads, curves, ns_per_tensor=slope_us * 1e3, fixed_us=ours[shortest] - slope_us * shortest
    )


def measure(name: str, options: argparse.Namespace, settings: Settings, progress: Progress) -> Entry:
    """What the options ask for of one workload. What cannot run costs its own entry, which says why."""
    try:
        if options.precision:
            clock, free = CLOCKS[options.device], USABLE * free_bytes(options.device)
            return precision.measure(name, settings, clock, options.seconds, options.repeats, free, progress)
        if name == HOST_COST:
            return measure_host_cost(options, settings, progress)
        return measure_workload(name, options, settings, progress)
    except Exception as error:
        return LeftOut(name, settings.threads, reason_of(error))


def release_memory(device: str) -> None:
    """Gives back what the last workload held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()

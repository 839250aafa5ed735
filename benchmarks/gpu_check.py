#!/usr/bin/env python3
"""Everything that needs a GPU, in one go (make gpu-check): build, tests, compute-sanitizer, ncu, and the benchmark.

    python benchmarks/gpu_check.py --quick             at most 6 minutes on 16 cores: what is most worth knowing
    python benchmarks/gpu_check.py --quick --dry-run   only says what it would run

It builds in place with the interpreter that runs it, for this machine's GPU alone. That needs torch with CUDA, nvcc,
a C++ compiler, setuptools and ninja; the tests need pytest, and run in parallel where pytest-xdist is installed; the
benchmark needs tqdm. What is missing costs the stages that need it.

Each stage has a time limit and a line with its outcome. What it has found is in a file as soon as it exists: log.txt,
summary.txt and the benchmark's JSON files. Exits 0 when everything that can run here passed, and where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import environment
import torch
from stages import ROOT, Stage, run_stages

QUICK_SECONDS = 360.0
LONG_LIMIT = 3600.0
"""A stage's time limit in the long form, in seconds."""

QUICK_WORKLOADS = (
    "gpt2", "gpt2_bf16", "gpt2_transposed", "resnet50_channels_last", "small_1000x1024", "small_5000x64",
    "groups_465_full", "llama3_8b", "host_cost",
)  # fmt: skip
QUICK_SANITIZED = ("test_groups_and_long_lists", "test_layouts", "test_clip_and_step", "test_low_precision_gradients")
SANITIZED = (
    "test_bits_of_torch", "test_formulations_when", "test_layouts", "test_groups", "test_an_overflow", "test_norm",
    "test_clip_and_step", "test_averages", "test_low_precision",
)  # fmt: skip
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")
PROFILED = """
import torch, momentum_ext
params = [torch.nn.Parameter(torch.randn(2**26, device="cuda"))]
params[0].grad = torch.randn(2**26, device="cuda")
optimizer = momentum_ext.FusedMomentum(params, lr=1e-3, momentum=0.9, weight_decay=1e-4)
for _ in range(3):
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
torch.cuda.synchronize()
"""


@dataclass(frozen=True)
class Machine:
    """What the stages depend on."""

    device: str
    arch: str
    """The GPU's compute capability, "9.0"."""
    cores: int
    modules: frozenset[str]
    """Those of pytest, xdist and tqdm that are installed."""
    tools: dict[str, str]
    """compute-sanitizer and ncu, where they are."""

    @classmethod
    def here(cls) -> Machine:
        """This one; without a GPU the device is "no GPU"."""
        from torch.utils.cpp_extension import CUDA_HOME

        name, arch = "no GPU", "0.0"
        if torch.cuda.is_available():
            name, arch = torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))
        path = os.environ.get("PATH", "") + (f"{os.pathsep}{CUDA_HOME}/bin" if CUDA_HOME else "")
        tools = {tool: shutil.which(tool, path=path) for tool in ("compute-sanitizer", "ncu")}
        modules = (module for module in ("pytest", "xdist", "tqdm") if importlib.util.find_spec(module))
        found = {tool: where for tool, where in tools.items() if where}
        return cls(name, arch, environment.cores(), frozenset(modules), found)

    def without(self, *needed: str) -> str:
        """Why a stage that needs these modules and tools cannot run; empty where it can."""
        missing = [name for name in needed if name not in self.modules and name not in self.tools]
        return f"not installed: {', '.join(missing)}" if missing else ""


def cuda_tests() -> list[str]:
    """The files that have tests for a GPU."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.cuda" in file.read_text()]


def plan(machine: Machine, prefix: Path, quick: bool) -> list[Stage]:
    """The stages, in order of what they tell; benchmark results go to PREFIX[-NAME].json."""
    python = sys.executable
    here = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    # Options for pytest stand in pyproject.toml, which is strict about plugins that may be missing here.
    pytest = (python, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--device", "cuda")
    parallel = ("-n", str(max(1, min(8, machine.cores // 2)))) if "xdist" in machine.modules else ()

    def limit(quick_seconds: float) -> float:
        return quick_seconds if quick else LONG_LIMIT

    def sanitized(tool: str, tests: Sequence[str]) -> Stage:
        command = (machine.tools.get("compute-sanitizer", ""), "--tool", tool, "--error-exitcode", "9", *pytest, "-x")
        selected = (*cuda_tests(), "-k", " or ".join(tests))
        return Stage(
            tool, (*command, *selected), limit(75), here, missing=machine.without("compute-sanitizer", "pytest")
        )

    def benchmark(name: str, quick_seconds: float, quick_options: str, options: str = "") -> Stage:
        file = f"{prefix}.json" if name == "step" else f"{prefix}-{name}.json"
        command = (python, "benchmarks/bench_step.py", "--device", "cuda", "--json", file, *options.split())
        quick_part = ("--quick", *quick_options.split()) if quick else ()
        return Stage(name, (*command, *quick_part), limit(quick_seconds), here, missing=machine.without("tqdm"))

    only = "--contender ours --contender default --contender fused"
    workloads = " ".join(f"--workload {name}" for name in QUICK_WORKLOADS)
    build = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": machine.arch}
    stages = [
        Stage("build", (python, "setup.py", "-q", "build_ext", "--inplace"), limit(100), build, required=True),
        Stage(
            "tests", (*pytest, *parallel, *(["-m", "cuda", *cuda_tests()] if quick else ["tests"])), limit(90), here,
            missing=machine.without("pytest"),
        ),
        benchmark("step", 75, f"--seconds 1 {only} {workloads}"),
        benchmark("precision", 30, "--seconds 3 --workload gpt2", "--precision"),
        benchmark("clip", 25, "--seconds 1", "--pipeline clip"),
        benchmark("amp_clip", 25, "--seconds 1", "--pipeline amp_clip"),
        benchmark("ema", 25, "--seconds 1", "--pipeline ema"),
        benchmark(
            "busy", 25, f"--seconds 1 {only}", f"--hogs {machine.cores} --workload small_1000x1024 --workload gpt2"
        ),
    ]  # fmt: skip
    if quick:
        return [*stages, sanitized("memcheck", QUICK_SANITIZED)]
    kernels = ("--set", "basic", "--kernel-name", "regex:update_flat|update_low_precision|norm_of_all")
    ncu = (machine.tools.get("ncu", ""), *kernels, python, "-c", PROFILED)
    return [
        *stages,
        *(sanitized(tool, SANITIZED) for tool in SANITIZER_TOOLS),
        Stage("ncu", ncu, LONG_LIMIT, here, missing=machine.without("ncu")),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line program; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most 6 minutes, the build included")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and run nothing")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where results go (default: benchmarks/results/DATE-DEVICE)"
    )
    options = parser.parse_args(arguments)
    machine = Machine.here()
    if machine.arch == "0.0" and not options.dry_run:
        print("gpu-check: there is no GPU here that torch can use: nothing was run")
        return 0
    device = re.sub(r"[^a-z0-9]+", "-", machine.device.lower()).strip("-")
    name = f"{datetime.date.today()}-{device}"
    folder = (options.output or ROOT / "benchmarks" / "results" / name).resolve()
    stages = plan(machine, folder / name, options.quick)
    if options.dry_run:
        for stage in stages:
            env = " ".join(f"{key}={shlex.quote(value)}" for key, value in stage.env.items())
            print(f"{stage.name}, {stage.missing or f'at most {stage.seconds:.0f} s'}")
            print(f"    {env} {shlex.join(stage.command)}")
        return 0
    print(f"gpu-check: {machine.device}, {machine.cores} cores; results go to {folder}")
    return int(not run_stages(stages, folder, QUICK_SECONDS if options.quick else math.inf))


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Everything that needs a GPU, in one go (make gpu-check): all tests, compute-sanitizer, ncu, and the benchmark.

What is not installed is said and left out. The benchmark's result goes to benchmarks/results/, named by date and
device. Exits 0 when everything that ran passed, and where there is no GPU.
"""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")
SANITIZER_TESTS = ["tests/test_cuda.py", "--device", "cuda", "-q", "-x", "-p", "no:cacheprovider", "-k",
                   "test_bits_of_torch or test_16_bit or test_layouts or test_groups or test_an_overflow or "
                   "test_norm or test_clip_and_step or test_averages"]  # fmt: skip
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


def stage(name: str, *command: str) -> bool:
    """Runs a command in the source tree; whether it succeeded."""
    print(f"\n==== {name}", flush=True)
    return subprocess.run(command, cwd=ROOT).returncode == 0


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-check: there is no GPU here that torch can use: nothing was run")
        return 0
    from momentum_ext import _C

    if not _C.HAS_CUDA_KERNELS:
        print("gpu-check: this build has no CUDA kernels; build with FORCE_CUDA=1, nvcc, and a torch with CUDA")
        return 1
    passed = {"tests": stage("tests", sys.executable, "-m", "pytest", "tests", "-q", "--device", "cuda")}
    for tool in SANITIZER_TOOLS:
        if shutil.which("compute-sanitizer") is None:
            print("\ncompute-sanitizer was not found: left out")
            break
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest"]
        passed[tool] = stage(f"compute-sanitizer, {tool}", *command, *SANITIZER_TESTS)
    if shutil.which("ncu") is None:
        print("\nncu was not found: left out")
    else:
        command = [
            "ncu",
            "--set",
            "basic",
            "--kernel-name",
            "regex:update_flat|norm_of_all",
            sys.executable,
            "-c",
            PROFILED,
        ]
        passed["ncu"] = stage("ncu", *command)
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    for pipeline in ("", "clip", "amp_clip", "ema"):  # each against a copy of as many bytes: 24 for fp32 clip + step
        name = f"{datetime.date.today()}-{device}" + (f"-{pipeline}" if pipeline else "")
        command = [sys.executable, "benchmarks/bench_step.py", "--device", "cuda"]
        command += ["--json", f"benchmarks/results/{name}.json", *(["--pipeline", pipeline] if pipeline else [])]
        passed[f"benchmark {pipeline}".strip()] = stage(f"benchmark {pipeline}", *command)
    print("\ngpu-check: " + ", ".join(f"{name} {'passed' if ok else 'FAILED'}" for name, ok in passed.items()))
    return int(not all(passed.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Where a benchmark ran: the machine and the versions, as plain text for headers and JSON. No names, no paths."""

from __future__ import annotations

import datetime
import math
import os
import platform
import subprocess
import time
from pathlib import Path

import torch
from memory_limit import compiler_version


def cpu_model() -> str:
    """The CPU's name from /proc/cpuinfo; else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Hardware"))]
    return names[0] if names else (platform.processor() or platform.machine())


def caches() -> dict[str, str]:
    """The first core's caches, as {"L1d": "32K", "L2": "1024K", …}; empty where the system does not say."""
    found: dict[str, str] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}{'d' if kind == 'Data' else ''}"] = size
    return found


def largest_cache_bytes() -> int:
    """Bytes of the largest cache of one core; 32 MiB where the system does not say."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [int(size[:-1]) * units[size[-1]] for size in caches().values() if size[-1:] in units]
    return max(sizes, default=32 * 2**20)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gb(field: str) -> float:
    """A figure of /proc/meminfo ("MemTotal", "MemAvailable") in GB; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    values = [float(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(field + ":")]
    return values[0] if values else float("inf")


def busy_cores(seconds: float = 0.5) -> float:
    """Cores that other programs keep busy (0.0 when idle), watched for so long; NaN where it cannot be told."""
    try:
        before = _idle_seconds()
        time.sleep(seconds)
        idle = _idle_seconds() - before
    except OSError:
        return math.nan
    return max(0.0, (os.cpu_count() or 1) - idle / seconds)


def _idle_seconds() -> float:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def commit() -> str:
    """This source tree's commit, with a "+" where files differ from it; $MOMENTUM_EXT_COMMIT where git is no help."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MOMENTUM_EXT_COMMIT", "unknown")


def describe(device: str = "cpu") -> dict[str, str]:
    """Everything a reader needs to judge the figures, in the order to show it."""
    import momentum_ext
    from momentum_ext import _C

    gpu = {}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = {
            "gpu": f"{properties.name}, {properties.multi_processor_count} multiprocessors",
            "gpu memory": f"{properties.total_memory / 1e9:.0f} GB, L2 {properties.L2_cache_size / 2**20:.0f} MB",
            "cuda": f"{torch.version.cuda} (torch), {_C.build_info()['cuda']} (momentum_ext)",
        }
    cache_text = ", ".join(f"{name} {size}" for name, size in caches().items()) or "unknown"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **gpu,
        "cpu": cpu_model(),
        "cores": f"{cores()}, {busy_cores():.1f} of them busy with something else",
        "caches": cache_text,
        "memory": f"{memory_gb('MemTotal'):.0f} GB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()})",
        "commit": commit(),
        "momentum_ext": f"{momentum_ext.__version__} ({_C.isa()})",
        "compiler of the memory limit": compiler_version(),
    }

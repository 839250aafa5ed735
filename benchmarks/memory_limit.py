"""Compiles `memory_limit.cpp` for this machine and loads it next to torch: what memory allows, measured."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch  # loads the OpenMP runtime that the compiled loop borrows: it has to come before ctypes.CDLL

SOURCE = Path(__file__).with_name("memory_limit.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
BYTES_PER_ELEMENT = 20
"""Bytes moved for each fp32 element: read p, g and m, write p and m."""


class MemoryLimitUnavailable(RuntimeError):
    """The plain loop could not be compiled or loaded here; the message says why, in one line."""


def compiler() -> str:
    """The C++ compiler to use: $CXX, or the first of c++, g++, clang++ on the path."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise MemoryLimitUnavailable("no C++ compiler found (set CXX)")


@cache
def compiler_version() -> str:
    """The compiler's name and version, one line; "none" where there is no compiler."""
    try:
        command = [compiler(), "--version"]
    except MemoryLimitUnavailable:
        return "none"
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0].strip()


def cache_directory() -> Path:
    """Where compiled loops are kept: outside the source tree, private to the user."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(root) / "momentum_ext" / "benchmarks"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        directory = Path(tempfile.mkdtemp(prefix="momentum_ext_benchmarks_"))
    return directory


def cpu_flags() -> str:
    """What tells one CPU from another for -march=native, so that a cache shared between machines stays right."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def compile_loop() -> Path:
    """The compiled loop's path; compiles it where it is not in the cache. Raises MemoryLimitUnavailable."""
    key = "\n".join([SOURCE.read_text(), compiler(), compiler_version(), *FLAGS, cpu_flags()])
    library = cache_directory() / f"memory_limit_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    # compiled under another name and renamed, so that two benchmarks starting at once cannot load half a file
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    command = [compiler(), *FLAGS, str(SOURCE), "-o", unfinished]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        os.unlink(unfinished)
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise MemoryLimitUnavailable(f"the plain loop does not compile: {reason}")
    os.replace(unfinished, library)
    return library


class MemoryLimit:
    """The plain loop over `numel` fp32 elements in three arrays of its own, on `threads` of torch's OpenMP threads.

    Raises MemoryLimitUnavailable where there is no compiler, the loop does not load, torch's OpenMP runtime cannot be
    borrowed, or fewer threads than asked for take part.
    """

    def __init__(self, numel: int, threads: int, momentum: float = 0.9, lr: float = 1e-3) -> None:
        try:
            self._library = ctypes.CDLL(str(compile_loop()))
        except OSError as error:
            raise MemoryLimitUnavailable(f"the plain loop does not load: {error}") from error
        if threads > 1 and not self._library.memory_limit_has_openmp():
            raise MemoryLimitUnavailable(
                "torch's OpenMP runtime offers no GOMP_parallel, so only 1 thread can be measured"
            )
        self._arrays = [torch.full((numel,), value, dtype=torch.float32) for value in (0.5, 0.01, 0.1)]
        pointers = [ctypes.c_void_p(array.data_ptr()) for array in self._arrays]
        constants = (ctypes.c_int64(numel), ctypes.c_float(momentum), ctypes.c_float(lr), ctypes.c_int(threads))
        self._arguments = (*pointers, *constants)
        self._check_threads(threads)

    def step(self) -> None:
        """One pass: m = momentum * m + g; p = p - lr * m."""
        self._library.memory_limit_step(*self._arguments)

    def _check_threads(self, threads: int) -> None:
        self._library.memory_limit_threads_seen()
        self.step()
        seen = self._library.memory_limit_threads_seen()
        if seen != threads:
            raise MemoryLimitUnavailable(f"asked for {threads} threads, {seen} took part")

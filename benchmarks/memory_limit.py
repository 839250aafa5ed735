"""What memory allows, measured for the bytes of one pass: compiles `memory_limit.cpp` for it and for this machine."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch  # loads the OpenMP runtime that the compiled loop borrows: it has to come before ctypes.CDLL

SOURCE = Path(__file__).with_name("memory_limit.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
LINE = 64
"""Elements that the loop takes at a time."""
LONGEST_COPY = 1 << 31
"""Bytes that one copy on a GPU reads: much more than its caches, little beside a large model."""


@dataclass(frozen=True)
class Traffic:
    """The arrays that a pass goes over, each by the bytes that an element has in it."""

    updated: tuple[int, ...]
    """Read and written: parameter, momentum buffer."""
    read: tuple[int, ...]
    """Only read: the gradient."""
    read_before: bool = False
    """Whether the latter are read once more before: for the norm of all gradients."""

    @property
    def held(self) -> int:
        """Bytes of memory for each element."""
        return sum(self.updated) + sum(self.read)

    @property
    def moved(self) -> int:
        """Bytes that must move for each element."""
        return 2 * sum(self.updated) + (1 + self.read_before) * sum(self.read)


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


def compile_loop(traffic: Traffic) -> Path:
    """The compiled loop's path; compiles it where it is not in the cache. Raises MemoryLimitUnavailable."""
    updated, read = (",".join(map(str, sizes)) for sizes in (traffic.updated, traffic.read))
    flags = [*FLAGS, f"-DUPDATED={updated}", f"-DREAD={read}", f"-DREAD_BEFORE={int(traffic.read_before)}"]
    key = "\n".join([SOURCE.read_text(), compiler(), compiler_version(), *flags, cpu_flags()])
    library = cache_directory() / f"memory_limit_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    # compiled under another name and renamed, so that two benchmarks starting at once cannot load half a file
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    command = [compiler(), *flags, str(SOURCE), "-o", unfinished]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        os.unlink(unfinished)
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise MemoryLimitUnavailable(f"the plain loop does not compile: {reason}")
    os.replace(unfinished, library)
    return library


class MemoryLimit:
    """The plain loop over `elements` elements, rounded up to whole lines, on `threads` of torch's OpenMP threads.

    Its arrays lie in `arena` one after the other, in memory of its own where none is given. Raises
    MemoryLimitUnavailable where there is no compiler, the loop does not load, torch's OpenMP runtime cannot be
    borrowed, or fewer threads than asked for take part.
    """

    def __init__(self, traffic: Traffic, elements: int, threads: int, arena: torch.Tensor | None = None) -> None:
        try:
            self._library = ctypes.CDLL(str(compile_loop(traffic)))
        except OSError as error:
            raise MemoryLimitUnavailable(f"the plain loop does not load: {error}") from error
        if threads > 1 and not self._library.memory_limit_has_openmp():
            raise MemoryLimitUnavailable(
                "torch's OpenMP runtime offers no GOMP_parallel, so only 1 thread can be measured"
            )
        self._arena = make_arena([traffic], elements) if arena is None else arena
        lines = -(-elements // LINE)
        starts, sizes = [self._arena.data_ptr()], (*traffic.updated, *traffic.read)
        for size in sizes[:-1]:
            starts.append(starts[-1] + lines * LINE * size)
        pointers = (ctypes.c_void_p * len(sizes))(*starts)
        self._arguments = (pointers, ctypes.c_int64(lines), ctypes.c_int(threads))
        self._check_threads(threads)

    def step(self) -> None:
        """One pass."""
        self._library.memory_limit_pass(*self._arguments)

    def _check_threads(self, threads: int) -> None:
        self._library.memory_limit_threads_seen()
        self.step()
        seen = self._library.memory_limit_threads_seen()
        if seen != threads:
            raise MemoryLimitUnavailable(f"asked for {threads} threads, {seen} took part")


def make_arena(traffics: Sequence[Traffic], elements: int) -> torch.Tensor:
    """Memory for the arrays of any of these passes, which take turns in it."""
    lines = -(-elements // LINE)
    return torch.full((lines * LINE * max(traffic.held for traffic in traffics) // 4,), 0.01)


def copies(moved_bytes: int) -> Callable[[], object]:
    """What stands for the memory limit on a GPU: copies that move so many bytes, half of them read and half written."""
    count = -(-moved_bytes // (2 * LONGEST_COPY))
    source = torch.empty(moved_bytes // 2 // count, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(count):
            target.copy_(source)

    return copy


def copies_held(moved_bytes: int) -> int:
    """Bytes of memory that these copies take, about."""
    return min(moved_bytes, 2 * LONGEST_COPY)

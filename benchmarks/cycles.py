"""Cycles for each element in each mode, in the nearest cache: compiles `cycles.cpp` with the kernels, and runs it."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from memory_limit import compiler

ROOT = Path(__file__).resolve().parent.parent
ROUNDS, QUICK_ROUNDS = 60, 5


def sources() -> list[Path]:
    """The program, and the CPU kernels that it times."""
    return [Path(__file__).with_name("cycles.cpp"), *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]


def table(quick: bool) -> str:
    """What the program prints: modes in rows, this machine's instruction sets in columns."""
    from momentum_ext import _build_info  # the flags that the extension was compiled with

    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "cycles"
        command = [compiler(), *_build_info.CXX_FLAGS.split(), *map(str, sources()), "-o", str(program)]
        subprocess.run(command, check=True)
        rounds = str(QUICK_ROUNDS if quick else ROUNDS)
        return subprocess.run([str(program), rounds], check=True, capture_output=True, text=True).stdout

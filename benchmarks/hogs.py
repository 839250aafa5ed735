"""Busy cores beside a benchmark: what a training's host looks like while its data loader works."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    sum(range(100_000))"
"""What each process runs; it ends when its parent has ended, however that came."""


@contextmanager
def hogs(count: int) -> Iterator[None]:
    """Keeps so many processes busy for the length of the block."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()

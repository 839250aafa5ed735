"""Compiles the sources of tests once: objects are kept between runs, found by what they were made of.

They lie outside the source tree, so that a fresh clone finds them too, and several processes share them.
"""

import functools
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "momentum_ext" / "objects"
KEPT = 4
"""Of each source, compiler and list of flags: so many versions, the newest."""


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@functools.cache
def version_of(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout


def inputs_now(names: Sequence[str]) -> dict[str, str]:
    return {name: digest((ROOT / name).read_text()) if (ROOT / name).exists() else "gone" for name in names}


def compiled(compiler: str, flags: Sequence[str], source: Path) -> Path:
    """The object of a source of this tree; what it includes from elsewhere belongs to the compiler's version.

    Raises subprocess.CalledProcessError where it does not compile.
    """
    name = str(source.relative_to(ROOT))
    command = [compiler, *(flag.replace(f"{ROOT}/", "") for flag in flags), "-c", name]
    kind = CACHE / f"{source.stem}-{digest(version_of(compiler), *command)}"
    kind.mkdir(parents=True, exist_ok=True)
    with FileLock(kind / "lock"):
        for made in kind.glob("*/inputs.json"):
            inputs = json.loads(made.read_text())
            if inputs == inputs_now(list(inputs)):
                made.touch()
                return made.parent / "object.o"
        into = kind / "unfinished"
        into.mkdir(exist_ok=True)
        command += ["-MMD", "-MF", f"{into}/inputs.d", "-o", f"{into}/object.o"]
        subprocess.run(command, check=True, cwd=ROOT)
        words = (into / "inputs.d").read_text().replace("\\\n", " ").partition(": ")[2].split()
        inputs = inputs_now(sorted({word for word in words if not os.path.isabs(word)}))
        (into / "inputs.json").write_text(json.dumps(inputs))
        done = kind / digest(json.dumps(inputs))
        into.rename(done)
        for old in sorted(kind.glob("*/inputs.json"), key=os.path.getmtime, reverse=True)[KEPT:]:
            shutil.rmtree(old.parent)
        return done / "object.o"


def compiled_all(compiler: str, flags: Sequence[str], sources: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [str(path) for path in pool.map(lambda source: compiled(compiler, flags, source), sources)]

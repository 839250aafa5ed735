"""Builds momentum_ext against the torch that is installed, and against no other.

What can be set from outside: CC and CXX (compilers), FORCE_CPU=1 and FORCE_CUDA=1 (override detection), MAX_JOBS
(parallel compilations), CUDA_HOME and TORCH_CUDA_ARCH_LIST (as for every torch extension). Everything that is not code
stands in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NoReturn

import setuptools

ROOT = Path(__file__).resolve().parent
COMMAND = "pip install --no-build-isolation ."
MIN_SETUPTOOLS = 65  # what Python 3.11 brings; also in pyproject.toml
MIN_TORCH = (2, 10)  # before, gradients have no dtype of their own; also in pyproject.toml


def stop(reason: str) -> NoReturn:
    sys.exit(f"momentum_ext: {reason}")


def find_torch() -> None:
    """Make importable, for this build, the torch that will import the result.

    pip's isolated build hides the environment's packages by two variables, yet runs the environment's own interpreter:
    asked without them, that interpreter says where its torch is. Other front ends (uv, build) use an environment of
    their own, whose interpreter knows of no torch: then the build stops, rather than guess.
    """
    if importlib.util.find_spec("torch") is not None:
        return
    probe = "import importlib.util, json, sys;print(json.dumps(sys.path if importlib.util.find_spec('torch') else []))"
    hidden_by = ("PYTHONPATH", "PYTHONNOUSERSITE")
    env = {name: value for name, value in os.environ.items() if name not in hidden_by}
    with tempfile.TemporaryDirectory() as empty:
        answer = subprocess.run([sys.executable, "-c", probe], env=env, cwd=empty, capture_output=True, text=True)
    paths = json.loads(answer.stdout.splitlines()[-1]) if answer.returncode == 0 else []
    if not paths:
        stop(
            "this build sees no torch, and it builds only against the torch that is already "
            f"installed. Run: {COMMAND}   (after pip install torch==2.13.0, if there is none)"
        )
    sys.path += [path for path in paths if path and path not in sys.path]


def check_tools() -> None:
    """One line for each thing that a fresh machine may lack, before a compiler says it in a hundred."""
    version = tuple(int(part) for part in setuptools.__version__.split(".")[:2])
    upgrade = "Run: pip install --upgrade setuptools wheel ninja"
    if version < (MIN_SETUPTOOLS, 0):
        stop(f"needs setuptools >= {MIN_SETUPTOOLS}, found {setuptools.__version__}. {upgrade}")
    makes_wheel = {"dist_info", "bdist_wheel", "editable_wheel"} & set(sys.argv)
    if makes_wheel and version < (70, 1) and importlib.util.find_spec("wheel") is None:
        stop(f"setuptools {setuptools.__version__} needs the package wheel beside it. {upgrade}")
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        stop(f"no C++ compiler: {compiler!r} was not found. Install g++ or clang++, or set CC and CXX.")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        stop(f"Python's headers are missing from {headers}. On Debian or Ubuntu: apt-get install python3-dev")


check_tools()
find_torch()
os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # for ninja, if not activated

import torch  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
    stop(f"needs torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}, found {torch.__version__}. Update torch, then run: {COMMAND}")


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def sources(pattern: str) -> list[str]:
    """Sorted, relative to this file, as setuptools wants them."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(pattern))


def missing_for_cuda() -> list[str]:
    """What stands between this tree on this machine and a CUDA build; empty if nothing does."""
    missing = []
    if not sources("cuda/*.cu"):
        missing.append("this version has no CUDA kernels (csrc/cuda/*.cu)")
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is built without CUDA")
    elif cpp_extension.CUDA_HOME is None or not shutil.which("nvcc", path=f"{cpp_extension.CUDA_HOME}/bin"):
        missing.append("nvcc was not found (set CUDA_HOME)")
    return missing


def choose_backend() -> tuple[bool, str]:
    """(build CUDA?, the line that says so)."""
    force_cpu, force_cuda = flag("FORCE_CPU"), flag("FORCE_CUDA")
    if force_cpu and force_cuda:
        stop("FORCE_CPU=1 and FORCE_CUDA=1 contradict each other: unset one of them.")
    missing = missing_for_cuda()
    if force_cuda and missing:
        stop(f"FORCE_CUDA=1, but {'; '.join(missing)}.")
    if force_cpu:
        return False, "CPU build, because FORCE_CPU=1."
    if missing:
        return False, f"CPU build: {'; '.join(missing)}."
    return True, f"CUDA build for CUDA {torch.version.cuda}."


def nvcc_version() -> tuple[int, int]:
    nvcc = f"{cpp_extension.CUDA_HOME}/bin/nvcc"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        stop(f"{nvcc} --version does not say which version it is. Set CUDA_HOME to another toolkit, or FORCE_CPU=1.")
    return int(found[1]), int(found[2])


def check_cuda_version() -> None:
    """A minor difference between nvcc and torch works, by CUDA's own rules; a major one does not."""
    nvcc = nvcc_version()
    of_torch = tuple(int(part) for part in str(torch.version.cuda).split(".")[:2])
    if nvcc[0] != of_torch[0]:
        stop(
            f"nvcc in {cpp_extension.CUDA_HOME} is of CUDA {nvcc[0]}.{nvcc[1]}, torch of CUDA {torch.version.cuda}: "
            f"the major versions must be the same. Set CUDA_HOME to a CUDA {of_torch[0]} toolkit, or FORCE_CPU=1."
        )
    if nvcc < (12, 1):
        stop(f"needs nvcc of CUDA 12.1 or newer, found {nvcc[0]}.{nvcc[1]} in {cpp_extension.CUDA_HOME}.")
    if nvcc != of_torch:
        print(
            f"momentum_ext: warning: nvcc is of CUDA {nvcc[0]}.{nvcc[1]}, torch of CUDA {torch.version.cuda}; "
            "a difference in the minor version alone should do no harm.",
            file=sys.stderr,
        )


def cuda_archs() -> str:
    """TORCH_CUDA_ARCH_LIST, or the architectures that torch was built for, with PTX of the newest for newer ones."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if chosen:
        for arch in re.findall(r"\d+\.\d+", chosen):
            if float(arch) < 7.0:
                stop(f"TORCH_CUDA_ARCH_LIST names {arch}, but the kernels need 7.0 (Volta) or newer.")
        return chosen
    flags = torch._C._cuda_getArchFlags() or ""
    nvcc = f"{cpp_extension.CUDA_HOME}/bin/nvcc"
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    numbers = {int(n) for n in re.findall(r"sm_(\d+)\b", flags)}
    usable = sorted(n for n in numbers if n >= 70 and f"compute_{n}" in known)
    if not usable:
        stop(f"none of torch's architectures ({flags}) is known to {nvcc}. Set TORCH_CUDA_ARCH_LIST.")
    names = [f"{n // 10}.{n % 10}" for n in usable]
    return ";".join([*names[:-1], f"{names[-1]}+PTX"])


WITH_CUDA, BACKEND_LINE = choose_backend()
CUDA_ARCHS = None
if WITH_CUDA:
    check_cuda_version()
    CUDA_ARCHS = os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs()

# Contraction is off everywhere: every fma is written out, so that results do not depend on the compiler.
# No -march: each instruction set has a target region of its own. No -fopenmp: torch's own OpenMP runtime is called.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-trapping-math",  # nobody reads the flags of exceptions, and conditions become selections
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vectors are passed within one file alone
]
NVCC_FLAGS = ["-std=c++20", "-O3", "--fmad=false"]
NVCC_COMPRESS = ["-Xfatbin", "-compress-all"]  # an eighth of the size; torch does so, too


def extension() -> setuptools.Extension:
    device = "cuda" if WITH_CUDA else "cpu"
    # Torch's headers are for the host compiler alone, since the kernels do not see torch; and they are system headers,
    # so that the warnings that appear are ours.
    torch_headers = [word for path in cpp_extension.include_paths(device) for word in ("-isystem", path)]
    # The version is part of every command line, so that no object of another torch is ever reused from build/.
    recorded = [f"-DMOMENTUM_EXT_TORCH_VERSION={torch.__version__}"]
    cuda = ["-DMOMENTUM_EXT_WITH_CUDA"] if WITH_CUDA else []
    cuda_libraries = ["cudart", "c10_cuda"] if WITH_CUDA else []
    return setuptools.Extension(
        "momentum_ext._C",
        sources=[
            *sources("binding/*.cpp"),
            *sources("cpu/*.cpp"),
            *(sources("cuda/*.cu") if WITH_CUDA else []),
        ],
        include_dirs=[str(ROOT / "csrc")],  # absolute, because ninja runs elsewhere
        libraries=["c10", "torch", "torch_cpu", "torch_python", *cuda_libraries],
        library_dirs=cpp_extension.library_paths(device),
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *torch_headers, *recorded, *cuda],
            "nvcc": [*NVCC_FLAGS, *NVCC_COMPRESS, *cuda],
        },
        language="c++",
    )


def jobs() -> int:
    """Parallel compilations: one for each core, and for each 2 GiB of free memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return min(4, cores)
    available = re.search(r"MemAvailable: *(\d+) kB", meminfo)
    return max(1, min(cores, int(available[1]) // 2**21)) if available else min(4, cores)


class BuildExtension(cpp_extension.BuildExtension):
    """Also writes momentum_ext/_build_info.py beside the module: what it was built for."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # a lasting place for objects, so that only what changed is compiled
            tag = f"{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / f"temp.{tag}")

    def run(self) -> None:
        print(f"momentum_ext: {BACKEND_LINE}", file=sys.stderr)
        os.environ.setdefault("MAX_JOBS", str(jobs()))
        super().run()
        text = (
            f'"""Written by setup.py when momentum_ext._C was compiled. Not under version control."""\n\n'
            f"TORCH_VERSION = {str(torch.__version__)!r}\n"
            f"CUDA_VERSION = {'.'.join(map(str, nvcc_version())) if WITH_CUDA else None!r}\n"
            f"CUDA_ARCHS = {CUDA_ARCHS!r}\n"
            f"CXX_FLAGS = {' '.join(CXX_FLAGS)!r}\n"
        )
        for path in self.build_info_paths():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def build_info_paths(self) -> list[Path]:
        paths = [Path(self.build_lib) / "momentum_ext" / "_build_info.py"]
        if self.inplace:
            paths.append(ROOT / "momentum_ext" / "_build_info.py")
        return paths

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(self.build_info_paths()[0])]


# The license stands here because setuptools before 77 refuses pyproject.toml's expression, and newer ones deprecate the
# table that the old ones read there.
setuptools.setup(license="MIT", ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})

"""Builds momentum_ext with its CUDA path for a torch without CUDA: build.py DIRECTORY makes DIRECTORY/momentum_ext."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "-std=c++20",
    "-O1",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
    "-DMOMENTUM_EXT_WITH_CUDA",
]


def build(directory: Path) -> None:
    package = directory / "momentum_ext"
    package.mkdir()
    for path in (ROOT / "momentum_ext").glob("*.py"):
        shutil.copy(path, package)
    (package / "_build_info.py").write_text(
        f'TORCH_VERSION = "{torch.__version__}"\nCUDA_VERSION = "emulated"\nCUDA_ARCHS = "none"\nCXX_FLAGS = ""\n'
    )
    os.environ.setdefault("MAX_JOBS", "2")
    sources = [ROOT / "csrc/bindings.cpp", *(ROOT / "csrc/binding").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")]
    sources += (ROOT / "tests/emulated_cuda").glob("*.cpp")
    load(
        name="_C",
        sources=[str(path) for path in sources],
        extra_cflags=FLAGS,
        # In front of torch's own: these stand in for some of its headers, and for CUDA's.
        extra_include_paths=[str(ROOT / "tests/emulated_cuda"), str(ROOT / "tests/native/cuda_on_host")],
        build_directory=str(package),
        is_python_module=False,
    )


if __name__ == "__main__":
    build(Path(sys.argv[1]))

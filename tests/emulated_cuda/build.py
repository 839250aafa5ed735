"""Builds momentum_ext with its CUDA path for a torch without CUDA: build.py DIRECTORY makes DIRECTORY/momentum_ext."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compiling import ROOT, compiled_all

CXX = "g++"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
    "-DMOMENTUM_EXT_WITH_CUDA",
    "-DTORCH_EXTENSION_NAME=_C",
    "-DTORCH_API_INCLUDE_EXTENSION_H",
    f"-DMOMENTUM_EXT_TORCH_VERSION={torch.__version__}",  # no object of another torch is ever used
    # In front of torch's own: these stand in for some of its headers, and for CUDA's.
    f"-I{ROOT}/tests/emulated_cuda",
    f"-I{ROOT}/tests/native/cuda_on_host",
    *(word for path in [*cpp_extension.include_paths(), sysconfig.get_path("include")] for word in ("-isystem", path)),
]


def build(directory: Path) -> None:
    package = directory / "momentum_ext"
    package.mkdir()
    for path in (ROOT / "momentum_ext").glob("*.py"):
        shutil.copy(path, package)
    (package / "_build_info.py").write_text(
        f'TORCH_VERSION = "{torch.__version__}"\nCUDA_VERSION = "emulated"\nCUDA_ARCHS = "none"\nCXX_FLAGS = ""\n'
    )
    sources: list[Path] = []
    for part in ("csrc/binding", "csrc/cpu", "tests/emulated_cuda"):
        sources += sorted((ROOT / part).glob("*.cpp"))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    module = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([CXX, "-shared", *compiled_all(CXX, FLAGS, sources), *libraries, "-o", str(module)], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))

"""The C++ tests of the kernels, built without torch and run under AddressSanitizer and UndefinedBehaviorSanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]


@pytest.mark.parametrize("program", ["test_kernels", "test_cuda_kernels", "test_cuda_norm", "test_cuda_on_host"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_kernels_under_sanitizers(compiler, program, tmp_path):
    sources = [ROOT / f"tests/native/{program}.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    binary = tmp_path / program
    flags = [
        "-std=c++20",
        "-O1",
        "-g1",
        "-ffp-contract=off",
        "-fno-trapping-math",
        "-fno-math-errno",
        "-pthread",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",  # as in setup.py
    ]
    if "cuda" in program:  # the CUDA kernels as C++, which know #pragma unroll and move any type as uint4
        flags += [f"-I{ROOT}/tests/native/cuda_on_host", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
    if compiler == "clang++":
        flags += ["-Wno-pass-failed"]  # it would say that -O1 does not vectorise
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    # The kernels take OpenMP from the process, where torch has brought it; here the linker brings it.
    openmp = ["-Wl,--no-as-needed", "-l:libgomp.so.1"]
    subprocess.run([compiler, *flags, *sanitizers, *map(str, sources), *openmp, "-o", str(binary)], check=True)
    result = subprocess.run([str(binary)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failures" in result.stdout, result.stdout


def test_a_compiler_was_found():
    assert COMPILERS, "the native tests need g++ or clang++"

"""The C++ tests of the kernels, built without torch and run under AddressSanitizer and UndefinedBehaviorSanitizer."""

import shutil
import subprocess

import pytest
from compiling import ROOT, compiled_all

COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]


SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def flags_of(compiler):
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
    if compiler == "clang++":
        flags += ["-Wno-pass-failed"]  # it would say that -O1 does not vectorise
    return flags + SANITIZERS


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(
    "program",
    [
        "test_kernels",
        "test_cuda_kernels",
        "test_cuda_low_precision",
        "test_cuda_norm",
        "test_cuda_on_host",
        "test_cuda_rules",
    ],
)
def test_kernels_under_sanitizers(compiler, program, tmp_path):
    binary = tmp_path / program
    flags = flags_of(compiler)
    objects = compiled_all(compiler, flags, sorted((ROOT / "csrc/cpu").glob("*.cpp")))
    if "cuda" in program:  # the CUDA kernels as C++, which know #pragma unroll and move any type as uint4
        flags += [f"-I{ROOT}/tests/native/cuda_on_host", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
    objects += compiled_all(compiler, flags, [ROOT / f"tests/native/{program}.cpp"])
    # The kernels take OpenMP from the process, where torch has brought it; here the linker brings it.
    openmp = ["-Wl,--no-as-needed", "-l:libgomp.so.1"]
    subprocess.run([compiler, *SANITIZERS, "-pthread", *objects, *openmp, "-o", str(binary)], check=True)
    result = subprocess.run([str(binary)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failures" in result.stdout, result.stdout


def test_a_compiler_was_found():
    assert COMPILERS, "the native tests need g++ or clang++"

"""make house turns red for each rule that it checks, and only where the rule says."""

import shutil
import subprocess

import pytest
from harness import ROOT

FILES = [
    ".ci/house", "csrc/binding/module.cpp", "csrc/rules/sgd.h", "csrc/binding/layout.h", "csrc/cpu/norm_fma.h",
    "momentum_ext/__init__.py", "tests/native/checks.h",
]  # fmt: skip
HEADERS, FORMULA, LENGTH = "Torch and Python headers", "No formula of the update", "more than 400 lines"


@pytest.fixture
def tree(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def house(tree, name=None, text=""):
    """(exit status, what it printed) for the tree with a line added to the file of that name."""
    if name:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        with open(tree / name, "a") as file:
            file.write(text + "\n")
    done = subprocess.run([tree / ".ci/house"], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name, text, rule",
    [
        ("csrc/formats/dtype.h", "#include <torch/extension.h>", HEADERS),
        ("csrc/rules/sgd.h", '#  include "ATen/ATen.h"', HEADERS),
        ("csrc/cuda/step.cu", "# include <c10/cuda/CUDAStream.h>", HEADERS),
        ("csrc/cuda/step.cuh", "#include <pybind11/pybind11.h>", HEADERS),
        ("tests/native/checks.h", "#include <Python.h>", HEADERS),
        ("csrc/cpu/loop.h", "y = fma(a, b, c);", FORMULA),
        ("csrc/cpu/loop.cpp", "y = std::fmaf (a, b, c);", FORMULA),
        ("csrc/binding/module.cpp", "y = __builtin_fma(a, b, c);", FORMULA),
        ("csrc/binding/layout.h", "y = Fma::apply(a, b, c);", FORMULA),
        ("csrc/cuda/step.cu", "y = _mm256_fmadd_ps(a, b, c);", FORMULA),
        ("csrc/cpu/isa.cpp", "y = _mm512_fnmadd_pd(a, b, c);", FORMULA),
        ("csrc/cpu/isa.h", "y = vfmaq_f32(a, b, c);", FORMULA),
        ("momentum_ext/long.py", "pass\n" * 400, LENGTH),
        ("momentum_ext/long.pyi", "pass\n" * 400, LENGTH),
        ("csrc/binding/long.cpp", "\n" * 400, LENGTH),
        ("csrc/long.h", "\n" * 400, LENGTH),
        ("csrc/cuda/long.cu", "\n" * 400, LENGTH),
    ],
)
def test_red(tree, name, text, rule):
    status, said = house(tree, name, text)
    assert status == 1
    first, *found = said.strip().splitlines()
    assert rule in first
    assert found and all(line.startswith(name + ":") for line in found), said


@pytest.mark.parametrize(
    "name, text",
    [
        (None, ""),
        ("csrc/binding/module.cpp", "#include <torch/extension.h>"),
        ("csrc/binding/new.cpp", "#include <ATen/ATen.h>"),
        ("csrc/rules/sgd.h", "y = fma(a, b, c);"),
        ("csrc/formats/block8.h", "y = std::fma(a, b, c);"),
        ("csrc/cpu/norm_fma.h", "y = _mm256_fmadd_pd(a, b, c);"),
        ("tests/native/test_new.cpp", "y = fma(a, b, c);"),
        ("momentum_ext/long.py", "pass\n" * 399),
        ("csrc/long.h", "\n" * 399),
    ],
)
def test_green(tree, name, text):
    assert house(tree, name, text) == (0, "house: every rule holds\n")

"""Building, installing and importing: what is promised, and one clear line wherever it cannot be done.

What has to be built is built from stand-in sources, a C++ file of a few lines, so that a build takes seconds.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from harness import ROOT, run_program

import momentum_ext
from momentum_ext import _C

PACKAGE = Path(momentum_ext.__file__).parent
COMMAND = "pip install --no-build-isolation ."

STAND_IN = r"""
#include <Python.h>
static PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString("stand-in"); }
static PyObject* isas(PyObject*, PyObject*) { return Py_BuildValue("[s]", "stand-in"); }
static PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{ssss}", "compiler", __VERSION__, "threads", "none");
}
static PyMethodDef methods[] = {{"isa", isa, METH_NOARGS, nullptr},
                                {"isas", isas, METH_NOARGS, nullptr},
                                {"build_info", build_info, METH_NOARGS, nullptr},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""


def run(*command, cwd, **env):
    """The command's result, in a process that sees nothing of this one's settings but what is given."""
    without = ("PYTHONPATH", "MOMENTUM_EXT_ISA", "FORCE_CPU", "FORCE_CUDA")
    return run_program(*command, cwd=cwd, env=env, without=without)


def import_error(site, **env):
    """The message of the ImportError that importing from `site` raises, before the compiled module is loaded."""
    code = (
        "import sys\n"
        "try: import momentum_ext\n"
        "except ImportError as error: print(error)\n"
        "assert 'momentum_ext._C' not in sys.modules\n"
    )
    result = run(sys.executable, "-W", "ignore", "-c", code, cwd=site.parent, PYTHONPATH=str(site), **env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1, "the message is one line"
    return result.stdout


# ---- importing -----------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path):
    """A copy of the built package, to break."""
    shutil.copytree(PACKAGE, tmp_path / "site" / "momentum_ext", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "site"


def test_import_under_another_torch_says_both_versions_and_the_remedy(installed):
    info = installed / "momentum_ext" / "_build_info.py"
    info.write_text(re.sub(r"TORCH_VERSION = .*", "TORCH_VERSION = '2.11.0+cu130'", info.read_text()))
    message = import_error(installed)
    assert "built for torch 2.11.0+cu130" in message
    assert f"torch {torch.__version__} is running" in message
    assert COMMAND in message


def test_import_without_the_compiled_module_says_the_remedy(installed):
    for module in (installed / "momentum_ext").glob("_C*.so"):
        module.unlink()
    message = import_error(installed)
    assert "not compiled for this Python" in message
    assert COMMAND in message


def test_import_from_a_source_tree_that_is_not_built_says_the_remedy(installed):
    for module in (installed / "momentum_ext").glob("_C*.so"):
        module.unlink()
    (installed / "setup.py").touch()
    assert f"cd {installed} && pip install --no-build-isolation -e ." in import_error(installed)


def test_import_with_an_unknown_instruction_set_names_the_choices(installed):
    message = import_error(installed, MOMENTUM_EXT_ISA="pentium")
    assert "pentium" in message
    assert all(isa in message for isa in _C.isas())


def test_show_config(capsys):
    momentum_ext.show_config()
    lines = capsys.readouterr().out.splitlines()
    table = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    assert table["momentum_ext"] == momentum_ext.__version__
    assert table["built for torch"] == table["running torch"] == torch.__version__
    assert table["compiler"] == _C.build_info()["compiler"].strip()
    assert "-ffp-contract=off" in table["compiler flags"] and "-march" not in table["compiler flags"]
    assert "CUDA" in table
    assert table["instruction set"].startswith(_C.isa())
    assert all(isa in table["instruction set"] for isa in _C.isas())
    assert table["threads"].startswith(str(torch.get_num_threads()))
    starts = {re.match(r".*?  +", line).end() for line in lines}
    assert len(starts) == 1, "the values stand in one column"


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()
    declared = set(re.findall(r"^(?:def |class )?(\w+)(?=[(:])", (PACKAGE / "_C.pyi").read_text(), re.MULTILINE))
    assert declared == {name for name in dir(_C) if not name.startswith("_")}


def test_version_and_requirements():
    assert importlib.metadata.version("momentum_ext") == momentum_ext.__version__
    requirements = importlib.metadata.requires("momentum_ext")
    assert [r for r in requirements if "extra" not in r] == ["torch>=2.10"]
    assert importlib.metadata.metadata("momentum_ext")["License"] == "MIT"


# ---- building ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """This source tree with stand-in sources."""
    root = tmp_path / "tree"
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py")
    shutil.copytree(ROOT / "momentum_ext", root / "momentum_ext", ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, root)
    (root / "README.md").touch()
    (root / "csrc" / "binding").mkdir(parents=True)
    (root / "csrc" / "binding" / "module.cpp").write_text(STAND_IN)
    (root / "momentum_ext" / "momentum.py").write_text("class FusedMomentum: ...\n")
    return root


def environment(path, wanted):
    """A fresh virtual environment that has the packages of this one for which `wanted(name)`; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    python = path / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    for entry in {*Path(sysconfig.get_path("purelib")).iterdir(), *Path(sysconfig.get_path("platlib")).iterdir()}:
        if wanted(entry.name) and "momentum_ext" not in entry.name:
            (site / entry.name).symlink_to(entry)
    return python


@pytest.fixture
def with_torch(tmp_path):
    return environment(tmp_path / "with_torch", lambda name: True)


@pytest.fixture
def without_torch(tmp_path):
    return environment(tmp_path / "without_torch", lambda name: re.match("setuptools|_distutils|distutils", name))


def the_line(result):
    """The one line with which setup.py stopped."""
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("momentum_ext:")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


def test_a_build_that_sees_no_torch_stops_with_the_right_command(tree, without_torch):
    """As in the build environments that uv and `python -m build` make."""
    assert COMMAND in the_line(run(without_torch, "setup.py", "--version", cwd=tree))


def test_a_build_in_pips_isolation_finds_the_environments_torch(tree, tmp_path):
    """pip hides site-packages by a sitecustomize of its own, on PYTHONPATH."""
    hidden = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    isolation = tmp_path / "isolation"
    isolation.mkdir()
    (isolation / "sitecustomize.py").write_text(
        f"import sys\nsys.path = [path for path in sys.path if path not in {hidden!r}]\n"
    )
    for entry in Path(hidden[0]).glob("setuptools*"):
        (isolation / entry.name).symlink_to(entry)
    isolated = {"PYTHONPATH": str(isolation), "PYTHONNOUSERSITE": "1"}
    assert run(sys.executable, "-c", "import torch", cwd=tmp_path, **isolated).returncode == 1
    result = run(sys.executable, "-W", "ignore", "setup.py", "--version", cwd=tree, **isolated)
    assert result.stdout.strip().endswith(momentum_ext.__version__), result.stderr


@pytest.mark.parametrize(
    "version, command, expected",
    [
        ("64.0.3", "--version", "needs setuptools >= 65, found 64.0.3"),
        ("65.5.0", "bdist_wheel", "setuptools 65.5.0 needs the package wheel beside it"),
        ("65.5.0", "dist_info", "setuptools 65.5.0 needs the package wheel beside it"),
        ("65.5.0", "egg_info", "this build sees no torch"),  # that command asks pip for the package wheel
        ("70.1.0", "bdist_wheel", "this build sees no torch"),
    ],
)
def test_setuptools_that_cannot_build_says_the_remedy(tree, without_torch, version, command, expected):
    pretend = f"""import runpy, setuptools, sys
setuptools.__version__, sys.argv[1:] = {version!r}, [{command!r}]
sys.modules["wheel"] = None  # new setuptools bring their own
runpy.run_path("setup.py", run_name="__main__")"""
    line = the_line(run(without_torch, "-c", pretend, cwd=tree))
    assert expected in line
    assert ("pip install --upgrade setuptools wheel ninja" in line) == ("setuptools" in expected)


def test_the_oldest_torch_and_setuptools_stand_in_both_files():
    setup, project = ((ROOT / name).read_text() for name in ("setup.py", "pyproject.toml"))
    oldest = re.search(r"^MIN_SETUPTOOLS = (\d+)", setup, re.MULTILINE)[1]
    assert f'requires = ["setuptools>={oldest}", "ninja"]' in project
    major, minor = re.search(r"^MIN_TORCH = \((\d+), (\d+)\)", setup, re.MULTILINE).groups()
    assert f'dependencies = ["torch>={major}.{minor}"]' in project


def test_force_cuda_names_what_is_missing(tree):
    line = the_line(run(sys.executable, "-W", "ignore", "setup.py", "--version", cwd=tree, FORCE_CUDA="1"))
    assert "FORCE_CUDA=1" in line and "csrc/cuda/*.cu" in line
    assert ("is built without CUDA" in line) == (torch.version.cuda is None)


def test_force_cpu_and_force_cuda_contradict_each_other(tree):
    result = run(sys.executable, "-W", "ignore", "setup.py", "--version", cwd=tree, FORCE_CPU="1", FORCE_CUDA="1")
    assert "FORCE_CPU=1 and FORCE_CUDA=1" in the_line(result)


PRETEND = """
import runpy, sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = sys.argv[1:]
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    "of_torch, archs, expected",
    [
        ("12.8", "9.0", "nvcc in {home} is of CUDA 13.1, torch of CUDA 12.8: the major versions must be the same"),
        ("13.1", "6.0;9.0", "TORCH_CUDA_ARCH_LIST names 6.0, but the kernels need 7.0"),
        ("13.0", "9.0", None),
    ],
)
def test_versions_of_cuda(tree, tmp_path, of_torch, archs, expected):
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/step.cu").write_text("")
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "bin/nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.1, V13.1.0'\n")
    (home / "bin/nvcc").chmod(0o755)
    pretend = run(sys.executable, "-W", "ignore", "-c", PRETEND, of_torch, home, cwd=tree, TORCH_CUDA_ARCH_LIST=archs)
    if expected is None:
        assert pretend.returncode == 0, pretend.stderr
        assert "warning: nvcc is of CUDA 13.1, torch of CUDA 13.0" in pretend.stderr
    else:
        assert expected.format(home=home) in the_line(pretend)


def test_no_compiler_is_one_line(tree):
    result = run(sys.executable, "-W", "ignore", "setup.py", "--version", cwd=tree, CXX="no-such-compiler")
    assert "no-such-compiler" in the_line(result)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--no-build-isolation", "."], ["--no-build-isolation", "-e", "."], ["."]], ids=" ".join
)
def test_pip_install(tree, with_torch, tmp_path, arguments):
    result = run(with_torch, "-m", "pip", "install", "--no-deps", "-v", *arguments, cwd=tree)
    if "pip subprocess to install build dependencies did not run successfully" in result.stdout + result.stderr:
        pytest.skip("an isolated build needs a package index, for setuptools and ninja")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (result.stdout + result.stderr).count("momentum_ext: CPU build") == 1

    code = "import momentum_ext; momentum_ext.show_config(); print(momentum_ext.__file__)"
    shown = run(with_torch, "-W", "ignore", "-c", code, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert re.search(rf"^built for torch +{re.escape(torch.__version__)}$", shown.stdout, re.MULTILINE)
    package = Path(shown.stdout.splitlines()[-1]).parent
    assert package.is_relative_to(tree if "-e" in arguments else with_torch.parent.parent)
    shipped = {path.name for path in package.iterdir()}
    assert {"py.typed", "_C.pyi", "_build_info.py", "_build_info.pyi", "reference.py"} <= shipped

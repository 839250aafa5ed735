"""Fixtures: instruction sets, thread counts, and a clean process state around every test."""

import os
import sys

import pytest
import torch
from harness import ROOT
from values import matching_isas

from momentum_ext import _C

try:
    import hypothesis
except ImportError:  # a rented machine may lack it, and the tests that need a GPU do without
    pass
else:
    # The default is reproducible: the same examples on every run. HYPOTHESIS_PROFILE=explore looks for new ones.
    hypothesis.settings.register_profile(
        "ci",
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.register_profile("explore", parent=hypothesis.settings.get_profile("ci"), derandomize=False)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: also what needs a GPU")


def reason_without_cuda(config):
    """Why the tests marked `cuda` cannot run; None when they can."""
    if config.getoption("--device") != "cuda":
        return "needs a GPU: pytest --device cuda"
    if not _C.HAS_CUDA_KERNELS:
        return "this build has no CUDA kernels (FORCE_CUDA=1 builds them)"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return None


def pytest_collection_modifyitems(config, items):
    if reason := reason_without_cuda(config):
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def clean_process():
    threads, isa = torch.get_num_threads(), _C.isa()
    torch.manual_seed(0)
    _C.set_elements_per_thread(1 << 15)  # small tensors are divided among threads, too
    yield
    torch.set_num_threads(threads)
    _C.set_isa(isa)


@pytest.fixture(params=matching_isas())
def isa(request):
    """Each instruction set that must agree with this process's torch bit for bit, forced."""
    _C.set_isa(request.param)
    return request.param


@pytest.fixture(params=[1, 3], ids=["1thread", "3threads"])
def threads(request):
    torch.set_num_threads(request.param)
    return request.param


@pytest.fixture
def programs(monkeypatch):
    """Makes the modules of examples/ and benchmarks/ importable."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:  # they are no packages, and others may have modules of these names
        if (getattr(sys.modules[name], "__file__", None) or "").startswith((f"{ROOT}/examples", f"{ROOT}/benchmarks")):
            del sys.modules[name]

"""Instruction sets: listed, forced in the process and by environment, and the one without fma right as well."""

import sys

import pytest
import torch
from harness import TESTS, Pair, assert_same, for_loop, run_program, run_python
from values import FLOAT_DTYPES, matching_isas

from momentum_ext import _C, FusedMomentum

ORDER = ["avx512", "avx2", "neon", "baseline"]


def test_the_list_is_in_order_of_preference():
    isas = _C.isas()
    assert isas and set(isas) <= set(ORDER)
    assert isas == sorted(isas, key=ORDER.index)


def test_the_best_is_the_default():
    code = "from momentum_ext import _C; assert _C.isa() == _C.isas()[0], _C.isa()"
    done = run_python(code, without=["MOMENTUM_EXT_ISA"])
    assert done.returncode == 0, done.stderr


def test_what_the_processor_has_is_listed():
    """An instruction set that torch can use on this machine and that we don't list would never be tested."""
    machine = torch.backends.cpu.get_cpu_capability()
    if machine == "AVX512":
        assert {"avx512", "avx2", "baseline"} <= set(_C.isas())
    elif machine == "AVX2":
        assert {"avx2", "baseline"} <= set(_C.isas())


@pytest.mark.parametrize("name", _C.isas())
def test_forced_in_the_process(name):
    _C.set_isa(name)
    assert _C.isa() == name


@pytest.mark.parametrize("name", ["sse9", "", "AVX2", "auto"])
def test_unknown_name_in_the_process(name):
    before = _C.isa()
    with pytest.raises(ValueError, match=".*".join(_C.isas())):
        _C.set_isa(name)
    assert _C.isa() == before


@pytest.mark.parametrize("name", _C.isas())
def test_forced_by_environment(name):
    done = run_python("from momentum_ext import _C; print(_C.isa())", env={"MOMENTUM_EXT_ISA": name})
    assert done.stdout.strip() == name, done.stderr


@pytest.mark.parametrize("name", ["sse9", "AVX-512"])
def test_unknown_name_in_the_environment(name):
    """The import fails with an ImportError that lists the choices."""
    code = "try:\n    import momentum_ext\nexcept ImportError as error:\n    print('refused:', error)"
    done = run_python(code, env={"MOMENTUM_EXT_ISA": name})
    assert done.stdout.startswith("refused:"), done.stdout + done.stderr
    assert name in done.stdout and all(choice in done.stdout for choice in _C.isas())


def test_changed_between_steps():
    """The step after set_isa runs under the new one; those that agree with torch may alternate unnoticed."""
    pair = Pair([torch.randn(n) for n in (300, 33, 32_001, 32_003, 5_001)], lr=0.1, momentum=0.9, nesterov=True)
    for name in matching_isas() * 3:
        _C.set_isa(name)
        pair.step()


@FLOAT_DTYPES
def test_all_with_fma_agree_bit_for_bit(dtype):
    results = []
    for name in _C.isas():
        if name == "baseline":
            continue
        torch.manual_seed(5)
        _C.set_isa(name)
        param = torch.nn.Parameter(torch.randn(5003).to(dtype))
        opt = FusedMomentum([param], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)
        for _ in range(10):
            param.grad = torch.randn(5003).to(dtype)
            opt.step()
        results.append(param)
    for other in results[1:]:
        assert_same(other, results[0])


@FLOAT_DTYPES
def test_every_instruction_set_is_close_to_the_reference(dtype):
    """Also the one whose roundings differ from this process's torch."""
    for name in _C.isas():
        _C.set_isa(name)
        torch.manual_seed(1)
        start = torch.randn(5003).to(dtype)
        param, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())
        hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
        mine, theirs = FusedMomentum([param], **hyper), for_loop([exact], **hyper)
        for _ in range(3):
            param.grad = torch.randn(5003).to(dtype)
            exact.grad = param.grad.double()
            mine.step()
            theirs.step()
        tolerance = 20 * torch.finfo(dtype).eps
        torch.testing.assert_close(param.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif("baseline" not in _C.isas(), reason="this machine's lowest instruction set has fma")
def test_baseline_is_torch_without_fma_bit_for_bit():
    """The whole matrix of test_matches_torch.py, and sizes and layouts, beside a torch that runs without fma."""
    environment = {"ATEN_CPU_CAPABILITY": "default", "MOMENTUM_EXT_ISA": "baseline"}
    without = ["PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"]
    probe = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import torch, values; " + (
        "print(torch.backends.cpu.get_cpu_capability(), values.matching_isas())"
    )
    found = run_python(probe, env=environment, without=without).stdout.strip()
    assert found in ("DEFAULT ['baseline']", "NO AVX ['baseline']")
    files = [TESTS / "rules" / name for name in ("test_matches_torch.py", "test_sizes.py", "test_low_precision.py")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "not of_a_training and not 1thread",
    ]
    done = run_program(*command, *files, env=environment, without=without, cwd=TESTS.parent, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "[baseline" not in done.stdout and " passed" in done.stdout and "skipped" not in done.stdout

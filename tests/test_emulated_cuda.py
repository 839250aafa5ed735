"""The binding's CUDA path without a GPU: tensors that say they are on cuda:N and lie in the host's memory.

The extension is built a second time, its kernels compiled for the host, and this file runs in a process of its own
that imports that build. It needs a torch without CUDA. What only a GPU can show is in test_cuda.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import momentum_ext
from momentum_ext import FusedMomentum

IS_EMULATION = momentum_ext._build_info.CUDA_VERSION == "emulated"
ROOT = Path(__file__).resolve().parent.parent

if IS_EMULATION:
    ops = torch.ops.emulated_cuda
else:

    @pytest.mark.slow
    @pytest.mark.skipif(torch.version.cuda is not None, reason="it stands in for CUDA in a torch without CUDA")
    def test_in_a_process_of_its_own(tmp_path):
        build = [sys.executable, ROOT / "tests/emulated_cuda/build.py", tmp_path]
        made = subprocess.run(build, capture_output=True, text=True, timeout=900)
        assert made.returncode == 0, (made.stdout + made.stderr)[-5000:]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, env=env)
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout


pytestmark = pytest.mark.filterwarnings("error")
emulated = pytest.mark.skipif(not IS_EMULATION, reason="runs inside test_in_a_process_of_its_own")


def cuda(tensor, device=0):
    return ops.on_device(tensor.detach(), device)


def cpu(tensor):
    return ops.on_device(tensor.detach(), -1) if tensor.is_cuda else tensor.detach()


def launches():
    """(device, parameter bytes) of each launch since the last call, and how often the host read the device."""
    log = ops.log()
    return [(log[i + 1], log[i + 2]) for i in range(0, len(log) - 1, 3)], log[-1]


class Twins:
    """The same parameters twice: here on the devices that are named, there on the CPU with torch's for-loop."""

    def __init__(self, shapes, devices, dtype=torch.float32, groups=None, **options):
        torch.manual_seed(0)
        values = [torch.randn(shape, dtype=dtype) for shape in shapes]
        self.devices = [devices[i % len(devices)] for i in range(len(values))]
        self.ours = [
            torch.nn.Parameter(cuda(v.clone(), d) if d >= 0 else v.clone()) for v, d in zip(values, self.devices)
        ]
        self.theirs = [torch.nn.Parameter(v.clone()) for v in values]
        split = groups or [{}]

        def make(params):
            return [{"params": params[i :: len(split)], **group} for i, group in enumerate(split)]

        self.optimizer = FusedMomentum(make(self.ours), **options)
        self.oracle = torch.optim.SGD(make(self.theirs), foreach=False, fused=False, **options)

    def set_grads(self, which=None):
        for i, (ours, theirs, device) in enumerate(zip(self.ours, self.theirs, self.devices)):
            if which is not None and i not in which:
                ours.grad = theirs.grad = None
                continue
            grad = torch.randn_like(theirs)
            theirs.grad = grad.clone()
            ours.grad = cuda(grad.clone(), device) if device >= 0 else grad.clone()

    def check(self):
        for ours, theirs in zip(self.ours, self.theirs):
            assert torch.equal(cpu(ours), theirs.detach())
            mine = self.optimizer.state.get(ours, {}).get("momentum_buffer")
            other = self.oracle.state.get(theirs, {}).get("momentum_buffer")
            assert (mine is None) == (other is None)
            if mine is not None:
                assert mine.device == ours.device
                assert torch.equal(cpu(mine), other)

    def step(self, which=None):
        self.set_grads(which)
        self.optimizer.step()
        self.oracle.step()
        self.check()


SHAPES = [(5,), (64, 33), (), (3, 0), (1000,), (7, 5, 3), (2, 2)]


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "maximize": True},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ],
)
def test_matches_torch_in_one_launch_without_reading(dtype, options):
    twins = Twins(SHAPES, [0], dtype, **options)
    launches()
    for _ in range(4):
        twins.step()
        assert launches() == ([(0, 4096)], 0)


@emulated
def test_several_devices_and_the_cpu():
    twins = Twins(SHAPES * 3, [0, -1, 3], lr=0.1, momentum=0.9)
    for which in (None, range(5), None, range(4, 9), None):
        launches()
        twins.step(which)
        assert {device for device, _ in launches()[0]} == {0, 3}
    twins = Twins(SHAPES, [2], lr=0.1, momentum=0.9)
    launches()
    twins.step()
    assert launches() == ([(2, 4096)], 0)


@emulated
def test_groups_share_a_launch():
    groups = [{"lr": 0.1 * 0.9**i, "momentum": 0.9 * (i % 3 != 0), "weight_decay": 0.1 * (i % 2)} for i in range(40)]
    twins = Twins([(i % 50,) for i in range(200)], [0], groups=groups, lr=0.1, dampening=0.5)
    for _ in range(3):
        launches()
        twins.step()
        assert launches() == ([(0, 32760)], 0)
        for ours, theirs in zip(twins.optimizer.param_groups, twins.oracle.param_groups):
            ours["lr"] = theirs["lr"] = ours["lr"] * 0.7


@emulated
def test_long_lists_take_few_launches():
    for count, expected in ((1021, 1), (1022, 2), (5000, 5)):
        twins = Twins([(4,)] * count, [0], lr=0.1, momentum=0.9)
        launches()
        twins.step()
        assert len(launches()[0]) == expected


@emulated
def test_layouts():
    twins = Twins([(4, 6, 5, 5), (30, 40), (16, 16)], [0], lr=0.1, momentum=0.9, weight_decay=0.1)
    twins.ours[0].data = cuda(cpu(twins.ours[0]).contiguous(memory_format=torch.channels_last))
    wide = torch.zeros(30, 100)
    wide[:, 5:85:2] = cpu(twins.ours[1])
    twins.ours[1].data = cuda(wide[:, 5:85:2])
    twins.step()
    twins.set_grads()
    twins.ours[2].grad = cuda(cpu(twins.ours[2].grad).t().contiguous().t())
    twins.optimizer.step()
    twins.oracle.step()
    twins.check()
    assert wide[:, :5].eq(0).all() and wide[:, 6:85:2].eq(0).all()


@emulated
def test_low_precision_matches_the_cpu():
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        values = [torch.randn(n, dtype=dtype) for n in (1, 100, 5000)]
        ours = [torch.nn.Parameter(cuda(v.clone())) for v in values]
        theirs = [torch.nn.Parameter(v.clone()) for v in values]
        one, other = (FusedMomentum(p, lr=0.1, momentum=0.9, weight_decay=0.1) for p in (ours, theirs))
        for _ in range(3):
            for a, b in zip(ours, theirs):
                b.grad = torch.randn_like(b)
                a.grad = cuda(b.grad.clone())
            one.step()
            other.step()
        assert all(torch.equal(cpu(a), b.detach()) for a, b in zip(ours, theirs))


# ---------------------------------------------------------------------------------------- numbers on the device


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_on_the_device_are_not_read_by_the_host(dtype):
    twins = Twins(SHAPES, [1], lr=0.1, momentum=0.9, weight_decay=0.01)
    group, other = twins.optimizer.param_groups[0], twins.oracle.param_groups[0]
    values = {name: torch.tensor(other[name], dtype=dtype) for name in ("lr", "momentum", "weight_decay")}
    group.update({name: cuda(value, 1) for name, value in values.items()})
    for _ in range(3):
        other.update({name: value.item() for name, value in values.items()})
        launches()
        twins.step()
        assert launches() == ([(1, 4096)], 0)
        values["lr"].mul_(0.5)
        values["momentum"].mul_(0.9)
        values["weight_decay"].zero_()


@emulated
def test_numbers_of_another_device_are_read_by_the_host():
    for devices in ([-1], [0, -1], [2]):
        twins = Twins(SHAPES, devices, lr=0.1, momentum=0.9)
        twins.optimizer.param_groups[0]["lr"] = cuda(torch.tensor(0.1, dtype=torch.float64), 1)
        twins.step()
        assert launches()[1] > 0


# ------------------------------------------------------------------------------------------------- GradScaler


def scaler_step(twins, found_inf, scale=1024.0, device=0):
    twins.optimizer.found_inf = cuda(torch.tensor(float(found_inf)), device)
    twins.optimizer.grad_scale = cuda(torch.tensor(scale), device)
    twins.set_grads()
    for ours in twins.ours:
        cpu(ours.grad).mul_(scale)
    twins.optimizer.step()
    if not found_inf:
        twins.oracle.step()
    del twins.optimizer.found_inf, twins.optimizer.grad_scale


OPTIONS = {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.01}


@emulated
@pytest.mark.parametrize("device", [0, 1])
def test_overflow_on_the_first_step(device):
    twins = Twins(SHAPES, [0], **OPTIONS)
    before = [cpu(p).clone() for p in twins.ours]
    launches()
    for _ in range(2):
        scaler_step(twins, True, device=device)
        assert all(torch.equal(cpu(p), b) for p, b in zip(twins.ours, before))
    for _ in range(3):
        scaler_step(twins, False, device=device)
        twins.check()
    log, reads = launches()
    assert reads == 0
    assert len(log) == 5 + 3  # two overflows and the step after them are followed by the record of it
    twins.step()
    scaler_step(twins, True)
    twins.check()
    scaler_step(twins, False)
    twins.check()


@emulated
def test_tensors_that_begin_at_different_times():
    twins = Twins([(9,), (8,), (7,)], [0], **OPTIONS)
    for rounds, overflow in enumerate([True, True, False, True, False, False]):
        twins.set_grads(range(min(rounds + 1, 3)))
        twins.optimizer.found_inf = cuda(torch.tensor(float(overflow)))
        twins.optimizer.step()
        if not overflow:
            twins.oracle.step()
            twins.check()
    assert launches()[1] == 0


@emulated
@pytest.mark.parametrize("present", [[0], [1], [0, 2], [2]])
def test_a_first_step_that_overflowed_waits_for_its_gradient(present):
    """Another tensor's first step, of the same or of a later cohort, is not that of one without a gradient."""
    twins = Twins([(9,), (8,), (7,)], [0], **OPTIONS)
    for which, overflow in [
        ([0, 1], True),
        ([0, 1, 2], True),
        (present, False),
        (present, False),
        ([1], True),
        ([0, 1, 2], False),
        ([0, 1, 2], True),
        ([0, 1, 2], False),
    ]:
        twins.set_grads(which)
        twins.optimizer.found_inf = cuda(torch.tensor(float(overflow)))
        twins.optimizer.step()
        if not overflow:
            twins.oracle.step()
        for ours, theirs in zip(twins.ours, twins.theirs):
            assert torch.equal(cpu(ours), theirs.detach())
    twins.check()


@emulated
def test_unstarted_buffers_do_not_leave():
    twins = Twins(SHAPES, [0], **OPTIONS)
    scaler_step(twins, True)
    assert len(twins.optimizer.state) == len(SHAPES)
    assert twins.optimizer.state_dict()["state"] == {}
    assert len(twins.optimizer.state) == 0
    scaler_step(twins, False)
    twins.check()
    assert len(twins.optimizer.state_dict()["state"]) == len(SHAPES)
    twins.step()

    twins = Twins(SHAPES, [0], **OPTIONS)
    scaler_step(twins, True)
    del twins.optimizer.param_groups[0]["params"][1:]  # the plan is built anew
    del twins.oracle.param_groups[0]["params"][1:]
    scaler_step(twins, False)
    assert torch.equal(cpu(twins.ours[0]), twins.theirs[0].detach())


@emulated
def test_the_host_reads_where_the_cpu_must_know():
    twins = Twins(SHAPES, [0, -1], **OPTIONS)
    for overflow in (True, False, True, False):
        scaler_step(twins, overflow)
        twins.check()


# ------------------------------------------------------------------------------------------------------ errors


@emulated
def test_a_failed_launch_names_it_and_leaves_no_buffers():
    twins = Twins(SHAPES, [1], **OPTIONS)
    twins.set_grads()
    ops.set(False, True)
    with pytest.raises(RuntimeError, match=r"FusedMomentum.step on cuda:1: launching .*cudaErrorLaunchFailure"):
        twins.optimizer.step()
    ops.set(False, False)
    assert not any(twins.optimizer.state.values())
    twins.step()


@emulated
def test_a_capture_needs_buffers():
    twins = Twins(SHAPES, [0], **OPTIONS)
    twins.set_grads()
    ops.set(True, False)
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\].*run one step before the capture"):
        twins.optimizer.step()
    ops.set(False, False)
    twins.step()
    ops.set(True, False)
    twins.step()
    ops.set(False, False)


@emulated
def test_what_changes_between_steps():
    twins = Twins(SHAPES, [0], **OPTIONS)
    twins.step()
    for i, (ours, theirs) in enumerate(zip(twins.ours, twins.theirs)):  # other memory, then another device
        device = i % 3
        twins.devices[i] = device
        ours.grad = None
        ours.data = cuda(cpu(ours).clone(), device)
        state = twins.optimizer.state[ours]
        state["momentum_buffer"] = cuda(cpu(state["momentum_buffer"]).clone(), device)
        assert torch.equal(cpu(ours), theirs.detach())
    launches()
    twins.step()
    assert {device for device, _ in launches()[0]} == {0, 1, 2}
    twins.optimizer.state.clear()
    twins.oracle.state.clear()
    twins.step()


@emulated
def test_a_build_without_kernels_says_so_once(monkeypatch):
    monkeypatch.setattr(momentum_ext._C, "HAS_CUDA_KERNELS", False)
    twins = Twins([(5,)], [0], differentiable=True, lr=0.1)  # takes torch's path, which has no CUDA here
    twins.set_grads()
    with pytest.warns(UserWarning, match="built without CUDA kernels.*FORCE_CUDA=1"), pytest.raises(AssertionError):
        twins.optimizer.step()
    with pytest.raises(AssertionError):  # no second warning, which would be an error
        twins.optimizer.step()

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
ROOT = Path(__file__).resolve().parents[2]

if IS_EMULATION:
    ops = torch.ops.emulated_cuda
    lazy_init, torch.cuda._lazy_init = torch.cuda._lazy_init, lambda: None  # there is nothing to initialize
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
            torch.nn.Parameter(cuda(v.clone(), d) if d >= 0 else v.clone())
            for v, d in zip(values, self.devices, strict=True)
        ]
        self.theirs = [torch.nn.Parameter(v.clone()) for v in values]
        split = groups or [{}]

        def make(params):
            return [{"params": params[i :: len(split)], **group} for i, group in enumerate(split)]

        self.optimizer = FusedMomentum(make(self.ours), **options)
        self.oracle = torch.optim.SGD(make(self.theirs), foreach=False, fused=False, **options)

    def set_grads(self, which=None):
        for i, (ours, theirs, device) in enumerate(zip(self.ours, self.theirs, self.devices, strict=True)):
            if which is not None and i not in which:
                ours.grad = theirs.grad = None
                continue
            grad = torch.randn_like(theirs)
            theirs.grad = grad.clone()
            ours.grad = cuda(grad.clone(), device) if device >= 0 else grad.clone()

    def check(self):
        for ours, theirs in zip(self.ours, self.theirs, strict=True):
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
        for ours, theirs in zip(twins.optimizer.param_groups, twins.oracle.param_groups, strict=True):
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
            for a, b in zip(ours, theirs, strict=True):
                b.grad = torch.randn_like(b)
                a.grad = cuda(b.grad.clone())
            one.step()
            other.step()
        assert all(torch.equal(cpu(a), b.detach()) for a, b in zip(ours, theirs, strict=True))


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
        assert all(torch.equal(cpu(p), b) for p, b in zip(twins.ours, before, strict=True))
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
        for ours, theirs in zip(twins.ours, twins.theirs, strict=True):
            assert torch.equal(cpu(ours), theirs.detach())
    twins.check()


@emulated
def test_unstarted_buffers_do_not_leave():
    twins = Twins(SHAPES, [0], **OPTIONS)
    scaler_step(twins, True)
    assert len(twins.optimizer.state) == len(SHAPES)
    assert not any(twins.optimizer.state_dict()["state"].values())
    assert len(twins.optimizer.state) == len(SHAPES)  # who only looks changes nothing
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


# ---------------------------------------------------------------------------------------- clipping, unscaling


def exact_norm(params, norm_type=2.0):
    values = torch.cat([cpu(p.grad).abs().double().reshape(-1) for p in params])
    return torch.linalg.vector_norm(values, norm_type).item()


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_the_norm_stays_on_the_device(norm_type, dtype):
    params = [torch.nn.Parameter(cuda(torch.zeros(shape, dtype=dtype), 1)) for shape in SHAPES]
    for param in params:
        param.grad = cuda(torch.randn(param.shape).to(dtype), 1)
    optimizer = FusedMomentum(params, lr=0.1)
    optimizer.clip_grad_norm_(1.0, norm_type)
    launches()
    norm = optimizer.clip_grad_norm_(1.0, norm_type)
    assert launches() == ([(1, 4096)], 0)
    assert (norm.dtype, norm.shape, norm.device) == (dtype, (), torch.device("cuda:1"))
    optimizer.zero_grad()
    for param in params:
        param.grad = cuda(torch.randn(param.shape).to(dtype), 1)
    expected = torch.tensor(exact_norm(params, norm_type), dtype=torch.float64).to(dtype)
    norm = cpu(optimizer.clip_grad_norm_(1.0, norm_type))
    torch.testing.assert_close(norm, expected, rtol=max(1e-13, torch.finfo(dtype).eps), atol=0)


@emulated
@pytest.mark.parametrize("how", ["call", "twice", "constructor"])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_clip_and_step(how, max_norm):
    twins = Twins(SHAPES, [0], **OPTIONS)
    other = FusedMomentum(twins.theirs, **OPTIONS)
    if how == "constructor":
        twins.optimizer.max_grad_norm = other.max_grad_norm = max_norm
    for _ in range(4):
        twins.set_grads()
        given = [cpu(p.grad).clone() for p in twins.ours]
        launches()
        for optimizer in (twins.optimizer, other):
            for factor in {"call": [1.0], "twice": [2.0, 1.0], "constructor": []}[how]:
                optimizer.clip_grad_norm_(max_norm * factor)
            optimizer.step()
        log, reads = launches()
        assert reads == 0
        assert len(log) == (3 if how == "twice" else 2)
        assert all(torch.equal(cpu(p.grad), g) for p, g in zip(twins.ours, given, strict=True))
        for ours, theirs in zip(twins.ours, twins.theirs, strict=True):
            torch.testing.assert_close(cpu(ours), theirs.detach(), rtol=1e-6, atol=1e-7)


@emulated
def test_what_becomes_of_a_clipping_on_the_device():
    twins = Twins([(9,), (70,)], [0], lr=0.1)
    for change in ("replaced", "zeroed", "written", "none"):  # partly replaced: test_cuda.py, torch multiplies there
        twins.set_grads()
        twins.optimizer.clip_grad_norm_(1e-3)
        if change == "written":
            twins.ours[1].grad.zero_()
            with pytest.raises(RuntimeError, match="zero_grad"):
                twins.optimizer.step()
            twins.optimizer.zero_grad()
            continue
        if change == "replaced":
            twins.set_grads()
        elif change == "zeroed":
            twins.optimizer.zero_grad()
            twins.set_grads()
        else:
            twins.optimizer.zero_grad()
            twins.oracle.zero_grad()
        twins.optimizer.step()
        twins.oracle.step()
        twins.check()


@emulated
def test_error_if_nonfinite_waits():
    twins = Twins([(9,), (70,)], [0], lr=0.1)
    twins.set_grads()
    cpu(twins.ours[1].grad)[3] = float("nan")
    launches()
    with pytest.raises(RuntimeError, match="non-finite"):
        twins.optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert launches()[1] == 1
    assert cpu(twins.optimizer.clip_grad_norm_(1.0)).isnan()


@emulated
def test_a_failed_step_keeps_the_clipping_before_it():
    twins = Twins([(9,), (70,)], [0], lr=0.1)
    other = FusedMomentum(twins.theirs, lr=0.1)
    twins.step()
    twins.optimizer.max_grad_norm = other.max_grad_norm = 0.25
    twins.set_grads()
    for optimizer in (twins.optimizer, other):
        optimizer.clip_grad_norm_(0.5)
    before = [cpu(p).clone() for p in twins.ours]
    group = twins.optimizer.param_groups[0]
    group["formulation"] = "none"
    with pytest.raises(ValueError, match="formulation"):
        twins.optimizer.step()
    assert all(torch.equal(cpu(p), b) for p, b in zip(twins.ours, before, strict=True))
    group["formulation"] = "torch"
    twins.optimizer.step()
    other.step()
    for ours, theirs in zip(twins.ours, twins.theirs, strict=True):
        torch.testing.assert_close(cpu(ours), theirs.detach(), rtol=1e-6, atol=1e-7)


def scaled_steps(twins, scaler, order, overflow_at=(), steps=8):
    """As a training with this GradScaler; yields after each step, with how often the host has read the device."""
    for step in range(steps):
        twins.set_grads()
        scale = 1024.0
        for ours in twins.ours:
            cpu(ours.grad).mul_(scale)
            if step in overflow_at and ours.numel():
                cpu(ours.grad).fill_(float("inf"))
        launches()
        found_inf = None
        factor = twins.optimizer._grad_factor
        if "unscale" in order:
            inv_scale, unscales = cuda(torch.tensor(1 / scale)), True
        else:
            inv_scale, unscales = cuda(torch.tensor(1.0)), False
        if "clip-first" in order:
            twins.optimizer.clip_grad_norm_(0.5 * scale)
        found_inf = scaler._unscale_grads_(twins.optimizer, inv_scale, None, not unscales)
        (found_inf,) = found_inf.values()
        if "then-clip" in order:
            twins.optimizer.clip_grad_norm_(0.5)
        twins.optimizer.found_inf = found_inf
        twins.optimizer.grad_scale = None if unscales else cuda(torch.tensor(scale))
        twins.optimizer.step()
        del twins.optimizer.found_inf, twins.optimizer.grad_scale
        assert factor.is_active is False
        assert (cpu(found_inf) != 0) == (step in overflow_at)
        yield step, launches()


@emulated
@pytest.mark.parametrize("order", ["step", "unscale", "unscale-then-clip", "constructor", "clip-first"])
@pytest.mark.parametrize("overflow_at", [(), (0, 1, 4)], ids=str)
def test_our_scaler_reads_nothing(order, overflow_at):
    twins = Twins([(5,), (64, 33), (3, 0), (9000,)], [0], **OPTIONS)
    clips = order in ("unscale-then-clip", "constructor", "clip-first")
    if order == "constructor":
        twins.optimizer.max_grad_norm = 0.5
    scaler = momentum_ext.GradScaler("cpu")
    before = None
    for step, (log, reads) in scaled_steps(twins, scaler, order, overflow_at):
        assert reads == 0
        if step in overflow_at:
            if before is not None:
                assert all(torch.equal(cpu(p), b) for p, b in zip(twins.ours, before, strict=True))
        else:
            if clips:
                torch.nn.utils.clip_grad_norm_(twins.theirs, 0.5)
            twins.oracle.step()
        before = [cpu(p).clone() for p in twins.ours]
        for ours, theirs in zip(twins.ours, twins.theirs, strict=True):
            torch.testing.assert_close(cpu(ours), theirs.detach(), rtol=1e-6, atol=1e-6)
        if step > 5:  # one pass of the norm, one of the step, and what is drawn from the norm without a pass
            extra = {"unscale-then-clip": 1, "constructor": 1, "clip-first": 2}.get(order, 0)
            assert len(log) == 2 + extra


@emulated
def test_mixed_devices_are_clipped_by_the_host():
    params = [torch.nn.Parameter(torch.randn(9)), torch.nn.Parameter(cuda(torch.randn(9)))]
    for param in params:
        param.grad = torch.ones(9) if not param.is_cuda else cuda(torch.ones(9))
    optimizer = FusedMomentum(params, lr=0.1)
    assert optimizer._grad_factor._norms.compute(optimizer.param_groups, 2.0) is None


# ------------------------------------------------------------------------------------------------------ averages


def averaged_twins(shapes, dtype=torch.float32, devices=(0,), **options):
    twins = Twins(shapes, list(devices), dtype, **OPTIONS)
    for name, value in options.items():
        setattr(twins.optimizer, name, value)
    other = FusedMomentum(twins.theirs, **OPTIONS, **options)
    return twins, other


def check_averages(twins, other):
    for ours, theirs in zip(twins.ours, twins.theirs, strict=True):
        assert torch.equal(cpu(ours), theirs.detach())
        mine, expected = (o.state.get(p, {}).get("ema") for o, p in ((twins.optimizer, ours), (other, theirs)))
        assert (mine is None) == (expected is None)
        if mine is not None:
            assert torch.equal(cpu(mine), expected)


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("warmup", [False, True])
def test_averages_in_the_same_launch(dtype, warmup):
    twins, other = averaged_twins(SHAPES, dtype, ema_decay=0.9, ema_warmup=warmup)
    for _ in range(12):
        twins.set_grads()
        launches()
        twins.optimizer.step()
        log, reads = launches()
        assert reads == 0 and len(log) == 1 + warmup
        other.step()
        check_averages(twins, other)
    assert int(twins.optimizer._ema_count) == 12
    assert twins.optimizer.state_dict()["param_groups"][0]["ema_step"] == 12


@emulated
@pytest.mark.parametrize("warmup", [False, True])
def test_averages_when_the_device_finds_an_overflow(warmup):
    twins, other = averaged_twins(SHAPES, ema_decay=0.75, ema_warmup=warmup)
    launches()
    for overflow in (True, True, False, False, True, False, False):
        twins.set_grads()
        twins.optimizer.found_inf = cuda(torch.tensor(float(overflow)))
        twins.optimizer.step()
        if not overflow:
            other.step()
            check_averages(twins, other)
    assert launches()[1] == 0
    del twins.optimizer.found_inf
    assert int(twins.optimizer._ema_count) == 4
    for _ in range(2):  # goes on without the scaler
        twins.set_grads()
        twins.optimizer.step()
        other.step()
        check_averages(twins, other)
    assert twins.optimizer.state_dict()["param_groups"][0]["ema_step"] == 6


@emulated
@pytest.mark.parametrize("overflows", [False, True])
def test_averages_of_tensors_without_a_gradient(overflows):
    twins, other = averaged_twins(SHAPES, ema_decay=0.75, ema_warmup=True)
    for step, which in enumerate([range(4), None, [1], None, range(5), None]):
        twins.set_grads(which)
        if overflows:
            twins.optimizer.found_inf = cuda(torch.tensor(float(step in (0, 3))))
        twins.optimizer.step()
        if not overflows or step not in (0, 3):
            other.step()
            check_averages(twins, other)


@emulated
def test_averages_of_layouts():
    twins, other = averaged_twins([(4, 6, 5, 5), (16, 16)], ema_decay=0.75)
    twins.ours[0].data = cuda(cpu(twins.ours[0]).contiguous(memory_format=torch.channels_last))
    for _ in range(3):
        twins.set_grads()
        twins.ours[1].grad = cuda(cpu(twins.ours[1].grad).t().contiguous().t())
        twins.optimizer.step()
        other.step()
        check_averages(twins, other)


@emulated
def test_the_count_comes_back_where_a_step_cannot_stay_on_one_device():
    twins, other = averaged_twins(SHAPES, devices=(0,), ema_decay=0.75, ema_warmup=True)
    for step in range(6):
        if step == 3:
            moved = twins.ours[1]
            moved.data = cuda(cpu(moved).clone(), 1)
            twins.devices[1] = 1
            state = twins.optimizer.state[moved]
            for name, value in state.items():
                state[name] = cuda(cpu(value).clone(), 1)
        twins.set_grads()
        twins.optimizer.step()
        other.step()
        check_averages(twins, other)
    assert int(twins.optimizer._ema_count) == 6


@emulated
def test_a_capture_needs_what_outlives_it():
    twins = Twins([(9,), (70,)], [0], **OPTIONS)
    twins.step()
    twins.set_grads()
    ops.set(True, False)
    with pytest.raises(RuntimeError, match="run one step before the capture"):
        twins.optimizer.clip_grad_norm_(1.0)
    ops.set(False, False)
    twins.optimizer.clip_grad_norm_(1e6)
    twins.optimizer.step()
    twins.oracle.step()
    ops.set(True, False)
    twins.set_grads()
    twins.optimizer.clip_grad_norm_(1e6)
    twins.optimizer.step()
    twins.oracle.step()
    ops.set(False, False)
    twins.check()


# ----------------------------------------------------------------------------------------- low-precision state

LOW_SHAPES = [(1,), (8,), (257,), (64, 33), (), (0,), (5000,), (6, 5, 7, 3)]
EXTRA_STATE = ("momentum_buffer", "momentum_scale", "param_remainder", "master_param", "ema")


class LowPrecisionTwins:
    """The same parameters and options on an emulated CUDA device and on the CPU."""

    def __init__(self, dtype, options, shapes=LOW_SHAPES, ema_decay=None):
        torch.manual_seed(0)
        values = [torch.randn(shape).to(dtype) for shape in shapes]
        self.ours = [torch.nn.Parameter(cuda(v.clone())) for v in values]
        self.theirs = [torch.nn.Parameter(v.clone()) for v in values]
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "dampening": 0.3, **options}
        self.optimizer = FusedMomentum(self.ours, **options, ema_decay=ema_decay)
        self.oracle = FusedMomentum(self.theirs, **options, ema_decay=ema_decay)

    def set_grads(self, which=None, dtype=None, scale=1.0):
        for i, (ours, theirs) in enumerate(zip(self.ours, self.theirs, strict=True)):
            ours.grad = theirs.grad = None
            if which is not None and i not in which:
                continue
            grad = torch.randn(theirs.shape).to(dtype or theirs.dtype)
            ours.grad_dtype = theirs.grad_dtype = None  # any
            theirs.grad = grad.clone()
            ours.grad = cuda(grad * scale)

    def check(self):
        for ours, theirs in zip(self.ours, self.theirs, strict=True):
            assert torch.equal(cpu(ours), theirs.detach())
            state, other = self.optimizer.state.get(ours, {}), self.oracle.state.get(theirs, {})
            assert set(state) == set(other) <= set(EXTRA_STATE)
            for name, value in state.items():
                assert (value.dtype, value.device) == (other[name].dtype, ours.device), name
                assert torch.equal(bytes_of(cpu(value)), bytes_of(other[name])), name

    def step(self, which=None, dtype=None):
        self.set_grads(which, dtype)
        self.optimizer.step()
        self.oracle.step()
        self.check()

    def scaler_step(self, found_inf):
        self.set_grads(scale=1024.0)
        self.optimizer.found_inf = cuda(torch.tensor(float(found_inf)))
        self.optimizer.grad_scale = cuda(torch.tensor(1024.0))
        self.optimizer.step()
        del self.optimizer.found_inf, self.optimizer.grad_scale


def bytes_of(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@emulated
@pytest.mark.parametrize("stochastic_rounding", [False, True])
@pytest.mark.parametrize(
    "momentum_dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
)
@pytest.mark.parametrize(
    "dtype, master_weights",
    [(torch.float32, False), (torch.float64, False)]
    + [(d, m) for d in (torch.bfloat16, torch.float16) for m in (False, True)],
)
def test_low_precision_state_is_the_cpus(dtype, master_weights, momentum_dtype, stochastic_rounding):
    options = {"momentum_dtype": momentum_dtype, "master_weights": master_weights}
    options |= {"stochastic_rounding": stochastic_rounding, "rounding_seed": 12345678901}
    twins = LowPrecisionTwins(dtype, options)
    launches()
    for which, grad_dtype in ((None, None), (range(5), torch.float32), (None, torch.bfloat16), (None, None)):
        if dtype != torch.float64 or grad_dtype is None:
            twins.step(which, grad_dtype)
            assert launches() == ([(0, 4096)], 0)


FORMULATIONS = pytest.mark.parametrize(
    "options",
    [
        {"formulation": formulation, "dampening": 0.0, **rest}
        for formulation in ("classical", "ema")
        for rest in ({}, {"nesterov": True, "decoupled_weight_decay": True, "maximize": True})
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)


@emulated
@FORMULATIONS
@pytest.mark.parametrize("low_precision", [{}, {"momentum_dtype": torch.int8, "stochastic_rounding": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_formulations_are_the_cpus(dtype, low_precision, options):
    twins = LowPrecisionTwins(dtype, {**options, **low_precision})
    launches()
    for step, which in enumerate([None, range(5), None, None]):
        for optimizer in (twins.optimizer, twins.oracle):
            optimizer.param_groups[0]["lr"] = 0.1 * 0.5**step
        twins.step(which)
        assert launches() == ([(0, 4096)], 0)


@emulated
@FORMULATIONS
def test_formulations_with_numbers_that_the_host_reads(options):
    """Their coefficients are computed from several numbers, on the host."""
    twins = LowPrecisionTwins(torch.float32, options)
    group, other = twins.optimizer.param_groups[0], twins.oracle.param_groups[0]
    values = {name: torch.tensor(other[name], dtype=torch.float64) for name in ("lr", "weight_decay")}
    group.update({name: cuda(value) for name, value in values.items()})
    launches()
    for _ in range(3):
        other.update({name: value.item() for name, value in values.items()})
        twins.step()
        assert launches() == ([(0, 4096)], 2)
        values["lr"].mul_(0.5)
        values["weight_decay"].mul_(3)


@emulated
@FORMULATIONS
def test_formulations_when_the_first_steps_overflow(options):
    twins = LowPrecisionTwins(torch.float32, options)
    before = [cpu(p).clone() for p in twins.ours]
    for overflow in (True, True, False, True, False):
        twins.scaler_step(overflow)
        if overflow and before:
            assert all(torch.equal(cpu(p), b) for p, b in zip(twins.ours, before, strict=True))
        elif not overflow:
            before = []
            twins.oracle.step()
            twins.check()


@emulated
@pytest.mark.parametrize("momentum_dtype", [torch.bfloat16, torch.int8])
def test_low_precision_layouts_and_averages(momentum_dtype):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        options = {"momentum_dtype": momentum_dtype, "master_weights": True, "stochastic_rounding": True}
        twins = LowPrecisionTwins(dtype, options, [(4, 6, 5, 7), (30, 40), (20, 30)], ema_decay=0.75)
        for params, on in ((twins.ours, cuda), (twins.theirs, lambda tensor: tensor)):
            params[0].data = on(cpu(params[0]).contiguous(memory_format=torch.channels_last))
            params[1].data = on(cpu(params[1]).repeat(1, 2)[:, ::2])
        for _ in range(3):
            twins.set_grads()
            for params, on in ((twins.ours, cuda), (twins.theirs, lambda tensor: tensor)):
                params[2].grad = on(cpu(params[2].grad).t().contiguous().t())
            twins.optimizer.step()
            twins.oracle.step()
            if dtype == torch.float32:
                twins.check()
            else:  # torch's lerp follows the step on the CPU where tensors lie differently
                for ours, theirs in zip(twins.ours, twins.theirs, strict=True):
                    assert torch.equal(cpu(ours), theirs.detach())


@emulated
@pytest.mark.parametrize("momentum_dtype", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_overflow_leaves_low_precision_state(dtype, momentum_dtype):
    twins = LowPrecisionTwins(dtype, {"momentum_dtype": momentum_dtype, "master_weights": True})
    before = [cpu(p).clone() for p in twins.ours]
    launches()
    for _ in range(2):
        twins.scaler_step(True)
        for ours, value in zip(twins.ours, before, strict=True):
            assert torch.equal(cpu(ours), value)
            state = twins.optimizer.state[ours]
            for name in ("momentum_buffer", "momentum_scale", "param_remainder"):
                assert name not in state or not bytes_of(cpu(state[name])).any()
            if "master_param" in state:
                assert torch.equal(cpu(state["master_param"]), value.float())
    for _ in range(2):
        twins.scaler_step(False)
        twins.oracle.step()
        twins.check()
    kept = [{name: bytes_of(cpu(v)).clone() for name, v in twins.optimizer.state[p].items()} for p in twins.ours]
    twins.scaler_step(True)
    for ours, state in zip(twins.ours, kept, strict=True):
        assert all(torch.equal(bytes_of(cpu(twins.optimizer.state[ours][name])), v) for name, v in state.items())
    assert launches()[1] == 0


@emulated
def test_unstarted_scales_do_not_leave():
    twins = LowPrecisionTwins(torch.bfloat16, {"momentum_dtype": torch.int8})
    twins.scaler_step(True)
    assert all("momentum_scale" in twins.optimizer.state[p] for p in twins.ours)
    assert not any(twins.optimizer.state_dict()["state"].values())
    twins.scaler_step(False)
    twins.oracle.step()
    twins.check()


@emulated
def test_a_buffer_that_is_converted_before_its_first_step():
    twins = LowPrecisionTwins(torch.float32, {"momentum_dtype": torch.bfloat16})
    twins.scaler_step(True)
    for optimizer in (twins.optimizer, twins.oracle):
        optimizer.param_groups[0]["momentum_dtype"] = torch.float16
    for _ in range(2):
        twins.scaler_step(False)
        twins.oracle.step()
        twins.check()


@emulated
def test_random_numbers_are_not_captured():
    for dtype, options in (
        (torch.bfloat16, {}),
        (torch.float32, {"momentum_dtype": torch.float16}),
        (torch.bfloat16, {"momentum_dtype": torch.int8, "master_weights": True}),
    ):
        twins = LowPrecisionTwins(dtype, {"stochastic_rounding": True, **options})
        twins.step()
        before = [cpu(p).clone() for p in twins.ours]
        twins.set_grads()
        ops.set(True, False)
        with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\]: stochastic_rounding.*captured"):
            twins.optimizer.step()
        assert all(torch.equal(cpu(p), b) for p, b in zip(twins.ours, before, strict=True))
        if not options.get("master_weights"):
            ops.set(False, False)
            twins.optimizer.step()
            twins.oracle.step()
            twins.check()
    ops.set(True, False)
    twins = LowPrecisionTwins(torch.float32, {"momentum_dtype": torch.int8})
    twins.set_grads()
    with pytest.raises(RuntimeError, match=r"state is not stored yet.*run one step before the capture"):
        twins.optimizer.step()
    ops.set(False, False)
    twins.optimizer.step()
    ops.set(True, False)
    twins.optimizer.step()
    ops.set(False, False)


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
    for i, (ours, theirs) in enumerate(zip(twins.ours, twins.theirs, strict=True)):  # other memory, then another device
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
    monkeypatch.setattr(torch.cuda, "_lazy_init", lazy_init)
    torchs_error = (AssertionError, RuntimeError)
    twins = Twins([(5,)], [0], differentiable=True, lr=0.1)  # takes torch's path, which has no CUDA here
    twins.set_grads()
    with (
        pytest.warns(UserWarning, match="built without CUDA kernels.*FORCE_CUDA=1"),
        pytest.raises(torchs_error, match="leaf Variable"),
    ):
        twins.optimizer.step()
    with pytest.raises(torchs_error, match="leaf Variable"):  # no second warning, which would be an error
        twins.optimizer.step()

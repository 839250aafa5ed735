"""bf16 and fp16: computed in float, rounded once per stored value, so never worse than torch's for-loop."""

import math

import pytest
import torch
from harness import Oracle, Pair, assert_same, for_loop
from values import BF16, FP16, FP32, FP64, HALF_DTYPES, all_values

from momentum_ext import FusedMomentum

HYPERS = pytest.mark.parametrize(
    "hyper",
    [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.2},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True, "maximize": True},
    ],
    ids=lambda hyper: "-".join(hyper),
)
FLOAT_ERROR = 2e-6  # what float arithmetic itself is off by, on values of this size
SIZES = [1, 7, 8, 15, 16, 31, 63, 64, 65, 255, 257, 1000, 5003]


def error(param, exact):
    return (param.detach().double() - exact.detach()).abs()


@HALF_DTYPES
@HYPERS
def test_one_step_is_the_exact_value_rounded_once(dtype, hyper, isa):
    """From the same 16-bit state, each step gives what float arithmetic gives, rounded to the dtype: bit for bit."""
    Pair([torch.randn(n).to(dtype) for n in SIZES], Oracle, **hyper).step(20)


@HALF_DTYPES
@HYPERS
def test_error_of_one_step_is_no_larger_than_torchs(dtype, hyper, isa):
    """Against the same step in fp64 from the same 16-bit state, no element is further off than torch's for-loop."""
    pair = Pair([torch.randn(5003).to(dtype)], **hyper)
    pair.new_grads()
    pair.both(lambda opt: opt.step())
    worse = better = 0
    for _ in range(10):
        (mine, theirs), exact = pair.params[0], torch.nn.Parameter(pair.params[0][0].detach().double())
        reference = for_loop([exact], **hyper)
        buffer = pair.mine.state[mine].get("momentum_buffer") if hyper.get("momentum") else None
        if buffer is not None:
            reference.state[exact]["momentum_buffer"] = buffer.double()
            pair.theirs.state[theirs]["momentum_buffer"] = buffer.clone()
        theirs.data.copy_(mine.detach())
        pair.new_grads()
        exact.grad = mine.grad.double()
        for opt in (*pair.optimizers, reference):
            opt.step()
        ours, torchs = error(mine, exact), error(theirs, exact)
        half_ulp = exact.detach().abs() * torch.finfo(dtype).eps / 2
        assert (ours <= half_ulp + FLOAT_ERROR).all(), "more than one rounding"
        worse += (ours > torchs + FLOAT_ERROR).sum().item()
        better += (ours < torchs).sum().item()
        assert ours.sum() <= torchs.sum()
    assert worse == 0
    assert better > 0 or not hyper.get("momentum")


@HALF_DTYPES
@HYPERS
def test_error_of_a_training_is_no_larger_than_torchs(dtype, hyper):
    """200 steps beside fp64 from the same start: the mean error is no larger than torch's for-loop's."""
    pair = Pair([torch.randn(20_000).to(dtype)], **{**hyper, "lr": 0.01})
    mine, theirs = pair.params[0]
    exact = torch.nn.Parameter(mine.detach().double())
    reference = for_loop([exact], **{**hyper, "lr": 0.01})
    for _ in range(200):
        pair.new_grads()
        exact.grad = mine.grad.double()
        for opt in (*pair.optimizers, reference):
            opt.step()
    # one percent for what chance does to two sets of 20,000 rounding errors
    assert error(mine, exact).mean() <= error(theirs, exact).mean() * 1.01


@HALF_DTYPES
@pytest.mark.parametrize("size", SIZES)
def test_every_element_moves(dtype, size, isa):
    for hyper in ({"lr": 1.0}, {"lr": 1.0, "momentum": 0.9}, {"lr": 1.0, "momentum": 0.9, "nesterov": True}):
        param = torch.nn.Parameter(torch.full((size,), 0.5, dtype=dtype))
        opt = FusedMomentum([param], **hyper)
        for _ in range(3):
            before = param.detach().clone()
            param.grad = torch.full((size,), 0.25, dtype=dtype)
            opt.step()
            assert (param.detach() < before).all()


@HALF_DTYPES
def test_overflow_becomes_infinity(dtype, isa):
    largest = torch.finfo(dtype).max
    pair = Pair([torch.full((100,), largest).to(dtype)], Oracle, lr=1.0, momentum=0.9)
    pair.set_grad(0, torch.full((100,), -largest, dtype=dtype))
    pair.step_as_is()
    assert torch.isposinf(pair.params[0][0].detach()).all()


@HALF_DTYPES
def test_rounding_at_every_midpoint(dtype, isa):
    """Sums that fall just below, on and above the midpoint between two neighbours, and around the overflow edge."""
    ulp = torch.finfo(dtype).eps
    params, grads = [], []
    for base in (1.0, 1.0 + ulp, 2.0 - ulp, torch.finfo(dtype).max, torch.finfo(dtype).tiny):
        step = base * ulp / 2
        for factor in (0.25, 0.5, 0.999, 1.0, 1.001, 1.5, 2.0, 3.0):
            params += [base, -base]
            grads += [-step * factor, step * factor]
    pair = Pair([torch.tensor(params).to(dtype)], Oracle, lr=1.0)
    for _ in range(2):
        pair.set_grad(0, torch.tensor(grads).to(dtype))
        pair.step_as_is()


@HALF_DTYPES
def test_every_bit_pattern(dtype, isa):
    """All 65,536 values as parameter, gradient and buffer, in different orders: normal, subnormal, inf and NaN."""
    everything = all_values(dtype)
    pair = Pair([everything.clone()], Oracle, lr=0.3, momentum=0.7, weight_decay=0.1)
    for shift in (1, 4097, 30011):
        pair.set_grad(0, everything.roll(shift).clone())
        for opt, param in pair.each(0):
            opt.state[param]["momentum_buffer"] = everything.roll(-7 * shift).clone()
            param.data.copy_(everything)
        pair.step_as_is()


@HALF_DTYPES
def test_conversion_round_trip_of_every_value(dtype, isa):
    """With lr == 0 and finite gradients nothing may change, whatever the parameter holds."""
    everything = all_values(dtype)
    pair = Pair([everything.clone()], Oracle, lr=0.0)
    pair.set_grad(0, torch.ones(1 << 16, dtype=dtype))
    pair.step_as_is()
    stays = ~everything.isnan() & (everything != 0)
    assert_same(pair.params[0][0].detach()[stays], everything[stays])


@HALF_DTYPES
def test_nan_stays_nan(dtype, isa):
    pair = Pair([torch.randn(100).to(dtype)], Oracle, lr=0.1, momentum=0.9)
    pair.new_grads()
    for param in pair.params[0]:
        param.grad[::3] = math.nan
    pair.step_as_is()
    assert pair.params[0][0].isnan()[::3].all() and not pair.params[0][0].isnan()[1::3].any()


@HALF_DTYPES
def test_subnormals(dtype, isa):
    smallest = torch.finfo(dtype).smallest_normal
    for scale in (1.0, smallest):
        pair = Pair([(torch.randn(500) * smallest).to(dtype)], Oracle, lr=0.3, momentum=0.9, weight_decay=0.1)
        for _ in range(5):
            pair.set_grad(0, (torch.randn(500) * scale).to(dtype))
            pair.step_as_is()


# ------------------------------------------------------------------------------------------------------ mixed dtypes

MIXED = [
    (FP32, BF16, None),
    (FP32, FP16, None),
    (BF16, FP32, None),
    (BF16, BF16, FP32),
    (FP16, FP16, FP32),
    (FP16, BF16, None),
    (BF16, FP32, FP32),
    (FP32, FP32, BF16),
    (FP32, FP64, None),
    (FP64, FP32, None),
    (FP64, FP64, FP32),
    (FP32, FP32, FP64),
]


@pytest.mark.parametrize("param_dtype, grad_dtype, buffer_dtype", MIXED, ids=str)
@HYPERS
def test_mixed_dtypes(param_dtype, grad_dtype, buffer_dtype, hyper, isa):
    """A gradient of another dtype than its parameter: the wider arithmetic, rounded once. The buffer is converted."""
    pair = Pair([torch.randn(n).to(param_dtype) for n in (1, 33, 300, 1000)], Oracle, **hyper)
    for index in range(4):
        for opt, param in pair.each(index):
            param.grad_dtype = None
            if buffer_dtype is not None and hyper.get("momentum"):
                values = torch.linspace(-1, 1, param.numel(), dtype=FP64).to(buffer_dtype)
                opt.state[param]["momentum_buffer"] = values if opt is pair.mine else values.to(param_dtype)
    for _ in range(5):
        for index, (param, _) in enumerate(pair.params):
            pair.set_grad(index, pair.random_like(param, grad_dtype))
        pair.step_as_is()
    if hyper.get("momentum"):
        assert all(pair.mine.state[p]["momentum_buffer"].dtype is param_dtype for p, _ in pair.params)

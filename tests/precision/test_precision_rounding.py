"""Stochastic rounding has no bias, and training does not stall where rounding to nearest would stop it."""

import math

import pytest
import torch
from harness import assert_all_same
from values import BF16, EIGHT_BITS, FP32, HALF_DTYPES, INT4, INT8, all_values, dtype_name

from momentum_ext import _C, FusedMomentum

COUNT = 1 << 17


def neighbours(value, dtype):
    """The two values of a dtype around a number."""
    grid = all_values(dtype).double()
    grid = grid[grid.isfinite()]
    return grid[grid <= value].max().item(), grid[grid >= value].min().item()


def assert_unbiased(found, value, below, above):
    """The share that was rounded up is that of the distance, within five standard deviations."""
    found = found.double()
    assert ((found == below) | (found == above)).all(), "not a neighbour"
    share = (value - below) / (above - below)
    deviation = math.sqrt(share * (1 - share) / len(found))
    assert abs((found == above).double().mean().item() - share) < 5 * deviation + 2**-12


@HALF_DTYPES
@pytest.mark.parametrize("value", [1.0017, -0.7501, 3.1e-6, -240.3])
def test_parameters_are_rounded_without_bias(dtype, value):
    param = torch.nn.Parameter(torch.zeros(COUNT, dtype=dtype))
    param.grad_dtype = None
    param.grad = torch.full((COUNT,), -value)
    FusedMomentum([param], lr=1.0, stochastic_rounding=True, rounding_seed=11).step()
    value = torch.tensor(value).double().item()
    assert_unbiased(param.detach(), value, *neighbours(value, dtype))


@HALF_DTYPES
@pytest.mark.parametrize("value", [1.0017, -0.7501, 3.1e-6, -240.3])
def test_momentum_is_rounded_without_bias(dtype, value):
    param = torch.nn.Parameter(torch.zeros(COUNT))
    param.grad = torch.full((COUNT,), value)
    opt = FusedMomentum([param], lr=1.0, momentum=0.9, momentum_dtype=dtype, stochastic_rounding=True)
    opt.step()
    value = torch.tensor(value).double().item()
    assert_unbiased(opt.state[param]["momentum_buffer"], value, *neighbours(value, dtype))


@pytest.mark.parametrize("dtype", [*EIGHT_BITS, INT4], ids=dtype_name)
@pytest.mark.parametrize("value", [0.3017, -0.00101, 0.9, -0.9985, 1.0])
def test_momentum_in_blocks_is_rounded_without_bias(dtype, value):
    """Scales are rounded, too; the largest values of their blocks, and what is close to them, stay right on average."""
    param = torch.nn.Parameter(torch.zeros(COUNT))
    param.grad = torch.full((COUNT,), value)
    param.grad[::32] = 1.0  # the largest of each block
    opt = FusedMomentum([param], lr=1.0, momentum=0.9, momentum_dtype=dtype, stochastic_rounding=True)
    opt.step()
    state = opt.state[param]
    assert len(state["momentum_scale"].unique(dim=0)) == 2
    values = _C.dequantize(state["momentum_buffer"], state["momentum_scale"], param.shape)
    found = values.double().view(-1, 32)[:, 1:].flatten()
    assert found.std() > 0
    wanted = torch.tensor(value).double().item()
    # Values of a block share a scale: so many means as there are blocks, at least.
    assert abs(found.mean().item() - wanted) < 5 * found.std().item() / math.sqrt(COUNT / 32)


def test_roundings_are_independent():
    """No half-word of Philox is used twice: correlations of neighbours at every small distance are those of chance.

    A parameter and its buffer share a draw: neither direction may tell of the other's, in this step or as the buffer's
    error comes in.
    """
    param = torch.nn.Parameter(torch.zeros(COUNT, dtype=BF16))
    param.grad_dtype = None
    param.grad = torch.full((COUNT,), -(1 + 2.0**-8))
    opt = FusedMomentum([param], lr=1.0, momentum=0.9, stochastic_rounding=True)
    opt.step()
    up = (param.detach() > 1).double() * 2 - 1
    down = (opt.state[param]["momentum_buffer"] < -1).double() * 2 - 1
    chance = 5 / math.sqrt(COUNT)
    for directions in (up, down):
        assert abs(directions.mean()) < chance
        for distance in [*range(1, 34), 64, 128, 256, 512, 2048]:
            assert abs((directions[distance:] * directions[:-distance]).mean().item()) < chance, distance
    assert abs((up * down).mean().item()) < chance


def test_a_long_training_drifts_as_fp32_does():
    """300 steps, each below half a unit in the last place; nearest never moves, the stochastic mean is on time."""
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(20_000, generator=generator) + 1
    params = {name: torch.nn.Parameter(start.to(BF16)) for name in ("nearest", "stochastic")}
    exact = start.to(BF16).double()
    for name, param in params.items():
        opt = FusedMomentum([param], lr=1.0, stochastic_rounding=name == "stochastic")
        for _ in range(300):
            param.grad = torch.full_like(param, 2.0**-11)
            opt.step()
    moved = {name: (exact - param.detach().double()).mean().item() for name, param in params.items()}
    assert moved["nearest"] < 0.01 * 300 * 2**-11
    assert moved["stochastic"] == pytest.approx(300 * 2**-11, rel=0.01)


# ------------------------------------------------------------------------------------------------------------- stalls


def descend(dtype, steps, **options):
    """From 1.0, down a constant slope of 2^-12 a step, less than half of the distance to the next bf16 or fp16."""
    param = torch.nn.Parameter(torch.ones(512, dtype=dtype))
    opt = FusedMomentum([param], lr=1.0, **options)
    for _ in range(steps):
        param.grad = torch.full((512,), 2.0**-12 if dtype is BF16 else 2.0**-13, dtype=dtype)
        opt.step()
    return 1 - param.detach().double().mean().item()


@HALF_DTYPES
def test_small_updates_stall_plain_and_only_plain(dtype):
    way = 512 * (2.0**-12 if dtype is BF16 else 2.0**-13)
    assert descend(dtype, 512) == 0.0
    assert descend(dtype, 512, momentum_dtype=FP32) == 0.0
    assert descend(dtype, 512, master_weights=True) == way
    assert descend(dtype, 512, stochastic_rounding=True) == pytest.approx(way, rel=0.02)


def accumulate(**options):
    """A momentum of 0.999: a bf16 buffer stops at a quarter of what it should reach, and so the step is too small."""
    param = torch.nn.Parameter(torch.ones(64, dtype=BF16))
    opt = FusedMomentum([param], lr=4e-6, momentum=0.999, **options)
    for _ in range(1500):
        param.grad = torch.ones(64, dtype=BF16)
        opt.step()
    return param.detach().double().mean().item(), opt.state[param]["momentum_buffer"].double().mean().item()


def test_small_additions_stall_a_bf16_buffer():
    wanted = (1 - 0.999**1500) / (1 - 0.999)
    param, buffer = accumulate()
    assert param == 1.0 and buffer == 256
    for options in ({"momentum_dtype": FP32}, {"stochastic_rounding": True}, {"master_weights": True}):
        param, buffer = accumulate(**options)
        assert param < 0.999 and buffer == pytest.approx(wanted, rel=0.05)
    param, buffer = accumulate(master_weights=True, momentum_dtype=BF16)  # the parameter counts each step
    assert param < 0.999 and buffer == 256


def test_rounding_does_not_depend_on_what_else_is_trained():
    """An element's random numbers are its own: threads and tensors after it in the list do not matter."""
    results = []
    for others, threads in ((0, 1), (5, 2)):
        torch.set_num_threads(threads)
        params = [torch.nn.Parameter(torch.ones(70_001, dtype=BF16))]
        params += [torch.nn.Parameter(torch.ones(333)) for _ in range(others)]
        opt = FusedMomentum(params, lr=1.0, momentum=0.9, momentum_dtype=INT8, stochastic_rounding=True)
        for _ in range(3):
            for param in params:
                param.grad = torch.full_like(param, 2.0**-10)
            opt.step()
        results.append((params[0].detach(), opt.state[params[0]]["momentum_buffer"]))
    assert_all_same(*results)

"""Masters of 24 bits: bf16 and 8 bits more, rounded by chance."""

import copy

import pytest
import torch
from harness import assert_same, refused
from precision_twin import Twin, give_grads, optimizer_of
from test_precision_rounding import COUNT, assert_unbiased
from values import BF16, FP16, FP32, INT8

from momentum_ext import FusedMomentum


def values_of(opt, param):
    """In 24 bits, as fp32."""
    model = torch.nn.ParameterList([param])
    return opt.fp32_state_dict(model)["0"]


def rounded(value, stochastic_rounding):
    param = torch.nn.Parameter(torch.zeros(COUNT, dtype=BF16))
    param.grad_dtype = None
    param.grad = torch.full((COUNT,), -value)
    options = {"master_weights": 24, "stochastic_rounding": stochastic_rounding, "rounding_seed": 11}
    opt = FusedMomentum([param], lr=1.0, **options)
    opt.step()
    return param, values_of(opt, param)


def neighbours(value):
    """The two values of 24 bits around an fp32 number."""
    bits = torch.tensor(value).view(torch.int32)
    return tuple(sorted(((bits + step) & -256).view(FP32).item() for step in (0, 255)))


@pytest.mark.parametrize("value", [1.0017, -0.7501, 3.1e-6, -240.3, 1e-39, 3.4e38])
def test_rounded_without_bias(value):
    """And the parameter is the master rounded to nearest."""
    value = torch.tensor(value).item()
    param, found = rounded(value, None)
    assert_unbiased(found, value, *neighbours(value))
    away = (found.view(torch.int32) + 0x8000 & -0x10000).view(FP32)
    assert_same(param.detach().float(), away)


@pytest.mark.parametrize("value", [1.0017, -0.7501, 3.1e-6, -240.3])
def test_rounded_to_nearest(value):
    value = torch.tensor(value).item()
    _, found = rounded(value, False)
    assert found.unique().tolist() == [min(neighbours(value), key=lambda each: abs(each - value))]


@pytest.mark.parametrize("lr", [1e-5, 1e-6])
def test_small_steps_are_not_lost(lr):
    """1,000 steps of less than the unit, 1.5e-5, from 1.0. To nearest each is none or a whole one."""
    lost = {}
    for stochastic_rounding in (None, False):
        param = torch.nn.Parameter(torch.ones(4096, dtype=BF16))
        opt = FusedMomentum([param], lr=lr, master_weights=24, stochastic_rounding=stochastic_rounding)
        param.grad = torch.ones_like(param)
        for _ in range(1000):
            opt.step()
        lost[stochastic_rounding] = 1 - (1 - values_of(opt, param).double().mean().item()) / (1000 * lr)
    assert abs(lost[None]) < 0.02
    assert abs(lost[False]) > 0.5


def test_the_kinds_of_master_change_in_mid_run():
    """To nearest, beside the same parameter, whatever is there: also in checkpoints."""
    twin = Twin([torch.randn(size).to(BF16) for size in (1, 256, 600)], momentum=0.9, momentum_dtype=INT8)
    for master, stochastic in (
        (True, None),
        (24, None),
        (True, None),
        (24, False),
        (False, None),
        (24, True),
        (32, None),
    ):
        twin.edit(master_weights=master, stochastic_rounding=stochastic)
        twin.check_state_dict(twin.opt.state_dict())
        twin.step(2)


def test_what_it_takes():
    """2 bytes of parameter, 1 of master, 1 1/16 of momentum."""
    param = torch.nn.Parameter(torch.randn(3200).to(BF16))
    summary = optimizer_of(param, steps=1, master_weights=24, momentum_dtype=INT8).memory_summary()
    kinds = ("params", "param_remainder", "momentum_buffer", "momentum_scale")
    assert [summary[kind] for kind in kinds] == [6400, 3200, 3200, 200]


def test_groups_say_what_is_used():
    """The steps are counted where they matter; what says no more than the default is not there."""

    def keys(**options):
        param = torch.nn.Parameter(torch.randn(5).to(BF16))
        opt = optimizer_of(param, steps=1, **options)
        return {key for key in opt.state_dict()["param_groups"][0] if "master" in key or "rounding" in key}

    assert keys(master_weights=24) == {"master_weights", "rounding_step"}
    assert keys(master_weights=24, stochastic_rounding=False) == {"master_weights", "stochastic_rounding"}
    assert keys(master_weights=32) == {"master_weights"}
    assert keys(stochastic_rounding=None) == set()


def test_a_false_is_kept_for_later():
    """It says how masters of 24 bits are rounded once the option is edited, whatever it meant before."""
    twin = Twin([torch.randn(600).to(BF16)], momentum=0.9, stochastic_rounding=False)
    twin.step()
    twin.edit(master_weights=24)
    twin.step(2)


def test_fp16_is_refused():
    params = [torch.nn.Parameter(torch.randn(5).to(dtype)) for dtype in (BF16, FP16)]
    opt = FusedMomentum(params, lr=0.1, momentum=0.9, master_weights=24)
    give_grads(opt)
    with refused(
        opt, ValueError, r"params'\]\[1\]: it is fp16, and master_weights=24 is for bf16.*master_weights=True"
    ):
        opt.step()


def test_weights_out_and_in():
    """What comes in is rounded to nearest; what went out comes back to the bit."""
    model = torch.nn.Linear(7, 33).bfloat16()
    opt = FusedMomentum(model.parameters(), lr=0.1, momentum=0.9, master_weights=24)
    for _ in range(3):
        give_grads(opt)
        opt.step()
    weights = copy.deepcopy(opt.fp32_state_dict(model))
    assert not torch.equal(weights["weight"], model.weight.float())
    other = torch.nn.Linear(7, 33).bfloat16()
    mine = FusedMomentum(other.parameters(), lr=0.1, momentum=0.9, master_weights=24)
    mine.load_fp32_state_dict(other, weights)
    for name, value in mine.fp32_state_dict(other).items():
        assert_same(value, weights[name])
    assert mine.state[other.weight]["param_remainder"].dtype is torch.int8
    exact = {name: value * 1.0001 for name, value in weights.items()}
    mine.load_fp32_state_dict(other, exact)
    for name, value in mine.fp32_state_dict(other).items():
        wanted = (exact[name].view(torch.int32) + 128 & -256).view(FP32)
        assert_same(value, wanted)

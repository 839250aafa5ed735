"""reference.py, the rule in plain torch, says what torch's for-loop does and what the compiled code does."""

import itertools

import pytest
import torch
from harness import assert_same

from momentum_ext import FusedMomentum
from momentum_ext.reference import update

COMBINATIONS = [
    {"momentum": mu, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay, "maximize": maximize}
    for mu, dampening, nesterov, decay, maximize in itertools.product(
        (0, 0.9), (0, 0.3), (False, True), (0, 0.02), (False, True)
    )
]


@pytest.mark.parametrize("hyper", COMBINATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_trajectory_of_torch(hyper, dtype):
    param = torch.nn.Parameter(torch.randn(1003, dtype=dtype))
    value, buffer = param.detach().clone(), None
    theirs = torch.optim.SGD([param], lr=0.1, foreach=False)
    theirs.param_groups[0].update(hyper)
    for _ in range(20):
        param.grad = torch.randn(1003, dtype=dtype)
        theirs.step()
        value, buffer = update(value, param.grad, buffer, lr=0.1, **hyper)
        assert_same(value, param)
        if hyper["momentum"]:
            assert_same(buffer, theirs.state[param]["momentum_buffer"])
        else:
            assert buffer is None


def test_out_of_place():
    param, grad, buffer = (torch.randn(33) for _ in range(3))
    before = [t.clone() for t in (param, grad, buffer)]
    versions = [t._version for t in (param, grad, buffer)]
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "maximize": True}
    for first in (buffer, None):
        new_param, new_buffer = update(param, grad, first, **hyper, grad_scale=3.0)
        held = [t.data_ptr() for t in (param, grad, buffer)]
        assert new_param.data_ptr() not in held and new_buffer.data_ptr() not in held
    assert [t._version for t in (param, grad, buffer)] == versions
    for tensor, kept in zip((param, grad, buffer), before, strict=True):
        assert_same(tensor, kept)


@pytest.mark.parametrize("scale", [3.0, 65536.0, 1000.1])
def test_grad_scale_is_that_of_the_optimizer(scale):
    param = torch.nn.Parameter(torch.randn(1003))
    value, buffer = param.detach().clone(), None
    mine = FusedMomentum([param], lr=0.1, momentum=0.9, weight_decay=0.02)
    mine.grad_scale = scale
    for _ in range(5):
        param.grad = torch.randn(1003) * scale
        mine.step()
        value, buffer = update(value, param.grad, buffer, lr=0.1, momentum=0.9, weight_decay=0.02, grad_scale=scale)
        torch.testing.assert_close(value, param.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(buffer, mine.state[param]["momentum_buffer"], rtol=1e-6, atol=1e-6)


def test_the_formula_by_hand():
    """Two steps of one number in fp64, worked out: the first step is not dampened, the second is."""
    one = torch.ones(1, dtype=torch.float64)
    param, buffer = update(one, 2 * one, None, lr=0.5, momentum=0.5, dampening=0.25, weight_decay=0.5)
    assert (param.item(), buffer.item()) == (1 - 0.5 * 2.5, 2.5)
    param, buffer = update(param, 2 * one, buffer, lr=0.5, momentum=0.5, dampening=0.25, weight_decay=0.5)
    grad = 2 - 0.125
    assert buffer.item() == 0.5 * 2.5 + 0.75 * grad
    assert param.item() == -0.25 - 0.5 * buffer.item()


FORMULATIONS = [
    {"formulation": formulation, "momentum": mu, "nesterov": nesterov, "weight_decay": decay, "maximize": maximize}
    | {"decoupled_weight_decay": decoupled}
    for formulation, mu, nesterov, decay, decoupled, maximize in itertools.product(
        ("torch", "classical", "ema"), (0, 0.9), (False, True), (0, 0.02), (False, True), (False, True)
    )
    if mu or not nesterov
]


@pytest.mark.parametrize("hyper", FORMULATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_every_formulation_is_that_of_the_optimizer(hyper, dtype, isa):
    """With another learning rate in each step."""
    param = torch.nn.Parameter(torch.randn(1003, dtype=dtype))
    value, buffer = param.detach().clone(), None
    mine = FusedMomentum([param], **hyper)
    for step in range(8):
        lr = 0.1 / (1 + step)
        mine.param_groups[0]["lr"] = lr
        param.grad = torch.randn(1003, dtype=dtype)
        mine.step()
        value, buffer = update(value, param.grad, buffer, lr=lr, **hyper)
        assert_same(value, param)
        if hyper["momentum"]:
            assert_same(buffer, mine.state[param]["momentum_buffer"])
        else:
            assert buffer is None


def test_formulations_by_hand():
    """Two steps of one number with binary fractions for constants, so that every result is exact; lr changes."""
    one = torch.ones(1, dtype=torch.float64)
    hyper = {"momentum": 0.5, "formulation": "classical"}
    param, buffer = update(one, 2 * one, None, lr=0.25, **hyper)
    assert (param.item(), buffer.item()) == (0.5, 0.5)
    param, buffer = update(param, 4 * one, buffer, lr=0.125, **hyper)
    assert (param.item(), buffer.item()) == (-0.25, 0.75)
    param, buffer = update(param, 4 * one, buffer, lr=0.125, **hyper, nesterov=True)
    assert (param.item(), buffer.item()) == (-0.25 - (0.5 * 0.875 + 0.5), 0.875)

    hyper = {"momentum": 0.75, "formulation": "ema"}
    param, buffer = update(one, 2 * one, None, lr=0.5, **hyper)
    assert (param.item(), buffer.item()) == (0.75, 0.5)
    param, buffer = update(param, 4 * one, buffer, lr=0.25, **hyper)
    assert (param.item(), buffer.item()) == (0.75 - 0.25 * 1.375, 1.375)
    param, buffer = update(0 * one, 4 * one, buffer, lr=0.25, **hyper, nesterov=True)
    assert buffer.item() == 0.75 * 1.375 + 1
    assert param.item() == -0.25 * (0.75 * buffer.item() + 1)


def test_decoupled_weight_decay_by_hand():
    one = torch.ones(1, dtype=torch.float64)
    hyper = {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25}
    param, buffer = update(4 * one, one, one, **hyper, decoupled_weight_decay=True)
    assert (param.item(), buffer.item()) == (4 * 0.875 - 0.75, 1.5)
    param, buffer = update(4 * one, one, one, **hyper)
    assert (param.item(), buffer.item()) == (4 - 0.5 * 2.5, 2.5)


def test_unknown_formulation():
    with pytest.raises(ValueError, match="polyak"):
        update(torch.ones(3), torch.ones(3), None, lr=0.1, formulation="polyak")

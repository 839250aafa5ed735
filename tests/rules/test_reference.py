"""reference.py, the rule in plain torch, says what torch's for-loop does, what the field writes, and what the compiled
code does: so it may be the other tests' oracle.
"""

import itertools

import pytest
import torch
from harness import Oracle, Pair, assert_all_same, assert_same, for_loop
from values import EXACT_DTYPES

from momentum_ext import FusedMomentum
from momentum_ext.reference import update

FORMULATIONS = ("torch", "classical", "ema")


def products(**values):
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


class FieldsForLoop:
    """The formulations as the field writes them, in torch's own operators: an oracle for the oracle, which is why it
    shares nothing with it. Velocities start from zero.
    """

    def __init__(self, value, formulation, momentum, nesterov, weight_decay, decoupled_weight_decay, maximize):
        self.value, self.velocity, self.formulation = value.clone(), torch.zeros_like(value), formulation
        self.mu, self.nesterov, self.maximize = momentum, nesterov, maximize
        self.weight_decay, self.decoupled = weight_decay, decoupled_weight_decay

    def step(self, grad, lr):
        p, v, mu = self.value, self.velocity, self.mu
        g = -grad if self.maximize else grad
        if self.weight_decay and self.decoupled:
            p.mul_(1 - lr * self.weight_decay)
        elif self.weight_decay:
            g = g.add(p, alpha=self.weight_decay)
        if mu == 0:
            p.sub_(g, alpha=lr)
        elif self.formulation == "torch":
            v.mul_(mu).add_(g)
            p.sub_(g.add(v, alpha=mu) if self.nesterov else v, alpha=lr)
        elif self.formulation == "classical":
            v.mul_(mu).add_(g, alpha=lr)
            p.sub_(g.mul(lr).add_(v, alpha=mu) if self.nesterov else v)
        else:
            v.mul_(mu).add_(g, alpha=1 - mu)
            p.sub_(g.mul(1 - mu).add_(v, alpha=mu) if self.nesterov else v, alpha=lr)


@pytest.mark.parametrize(
    "hyper",
    products(
        momentum=(0, 0.9), dampening=(0, 0.3), nesterov=(False, True), weight_decay=(0, 0.02), maximize=(False, True)
    ),
    ids=str,
)
@EXACT_DTYPES
def test_trajectory_of_torch(hyper, dtype):
    param = torch.nn.Parameter(torch.randn(1003, dtype=dtype))
    value, buffer = param.detach().clone(), None
    theirs = for_loop([param], lr=0.1)
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


EVERY_FORMULATION = [
    hyper
    for hyper in products(
        formulation=FORMULATIONS,
        momentum=(0, 0.9),
        nesterov=(False, True),
        weight_decay=(0, 0.02),
        decoupled_weight_decay=(False, True),
        maximize=(False, True),
    )
    if hyper["momentum"] or not hyper["nesterov"]
]


@pytest.mark.parametrize("hyper", EVERY_FORMULATION, ids=str)
@EXACT_DTYPES
def test_every_formulation_is_the_fields_and_the_optimizers(hyper, dtype, isa):
    """With another learning rate in each step."""
    pair = Pair([torch.randn(1003, dtype=dtype)], Oracle, **hyper)
    field = FieldsForLoop(pair.params[0][0].detach(), **hyper)
    value, buffer = field.value.clone(), None
    for step in range(8):
        lr = 0.1 / (1 + step)
        pair.edit(lr=lr)
        pair.step()
        grad = pair.params[0][0].grad
        field.step(grad, lr)
        value, buffer = update(value, grad, buffer, lr=lr, **hyper)
        assert_same(value, pair.params[0][0])
        assert_same(field.value, value)
        if hyper["momentum"]:
            assert_same(buffer, pair.mine.state[pair.params[0][0]]["momentum_buffer"])
            assert_same(field.velocity, buffer)
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
    assert_all_same((param, grad, buffer), before)


@pytest.mark.parametrize("scale", [3.0, 65536.0, 1000.1])
def test_grad_scale_is_that_of_the_optimizer(scale):
    param = torch.nn.Parameter(torch.randn(1003))
    value, buffer = param.detach().clone(), None
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02}
    mine = FusedMomentum([param], **hyper)
    mine.grad_scale = scale
    for _ in range(5):
        param.grad = torch.randn(1003) * scale
        mine.step()
        value, buffer = update(value, param.grad, buffer, **hyper, grad_scale=scale)
        torch.testing.assert_close(value, param.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(buffer, mine.state[param]["momentum_buffer"], rtol=1e-6, atol=1e-6)


ONE = torch.ones(1, dtype=torch.float64)


def test_the_formula_by_hand():
    """Two steps of one number in fp64, worked out: the first step is not dampened, the second is."""
    hyper = {"lr": 0.5, "momentum": 0.5, "dampening": 0.25, "weight_decay": 0.5}
    param, buffer = update(ONE, 2 * ONE, None, **hyper)
    assert (param.item(), buffer.item()) == (1 - 0.5 * 2.5, 2.5)
    param, buffer = update(param, 2 * ONE, buffer, **hyper)
    grad = 2 - 0.125
    assert buffer.item() == 0.5 * 2.5 + 0.75 * grad
    assert param.item() == -0.25 - 0.5 * buffer.item()


def test_formulations_by_hand():
    """Two steps of one number with binary fractions for constants, so that every result is exact; lr changes."""
    hyper = {"momentum": 0.5, "formulation": "classical"}
    param, buffer = update(ONE, 2 * ONE, None, lr=0.25, **hyper)
    assert (param.item(), buffer.item()) == (0.5, 0.5)
    param, buffer = update(param, 4 * ONE, buffer, lr=0.125, **hyper)
    assert (param.item(), buffer.item()) == (-0.25, 0.75)
    param, buffer = update(param, 4 * ONE, buffer, lr=0.125, **hyper, nesterov=True)
    assert (param.item(), buffer.item()) == (-0.25 - (0.5 * 0.875 + 0.5), 0.875)

    hyper = {"momentum": 0.75, "formulation": "ema"}
    param, buffer = update(ONE, 2 * ONE, None, lr=0.5, **hyper)
    assert (param.item(), buffer.item()) == (0.75, 0.5)
    param, buffer = update(param, 4 * ONE, buffer, lr=0.25, **hyper)
    assert (param.item(), buffer.item()) == (0.75 - 0.25 * 1.375, 1.375)
    param, buffer = update(0 * ONE, 4 * ONE, buffer, lr=0.25, **hyper, nesterov=True)
    assert buffer.item() == 0.75 * 1.375 + 1
    assert param.item() == -0.25 * (0.75 * buffer.item() + 1)


def test_decoupled_weight_decay_by_hand():
    hyper = {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25}
    param, buffer = update(4 * ONE, ONE, ONE, **hyper, decoupled_weight_decay=True)
    assert (param.item(), buffer.item()) == (4 * 0.875 - 0.75, 1.5)
    param, buffer = update(4 * ONE, ONE, ONE, **hyper)
    assert (param.item(), buffer.item()) == (4 - 0.5 * 2.5, 2.5)


def test_unknown_formulation():
    with pytest.raises(ValueError, match="polyak"):
        update(torch.ones(3), torch.ones(3), None, lr=0.1, formulation="polyak")

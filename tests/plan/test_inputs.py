"""What torch.optim.SGD accepts means the same here, what it rejects is rejected alike."""

import copy
import fractions
import math
import sys

import numpy as np
import pytest
import torch
from harness import Pair, Snapshot, assert_all_same, params_of
from values import EXACT_DTYPES

from momentum_ext import FusedMomentum

# ------------------------------------------------------------------------------------------------------- constructor

BASE = {"lr": 0.1, "momentum": 0.9}
VALUES = [
    0, 1, True, -0.1, 0.1, 1e-3, math.nan, math.inf, -math.inf, np.float32(0.1), np.float64(0.1),
    torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64), torch.tensor(1), torch.tensor([0.1]),
    torch.tensor([0.1, 0.2]), torch.tensor(-0.1), torch.tensor([]),
    "0.1", None, 1j, [0.1], fractions.Fraction(1, 10),
]  # fmt: skip
CALLS = [{**BASE, key: value} for key in ("lr", "momentum", "dampening", "weight_decay") for value in VALUES]
CALLS += [{**BASE, "lr": value} for value in (np.array(0.1), torch.tensor([[0.1]]))]
CALLS += [
    {},
    {"lr": 0.1},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"nesterov": 1, "momentum": 0.9},
    {"nesterov": None},
    {"maximize": True},
    {"maximize": 1, **BASE},
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"fused": False},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
    {"foreach": True, "differentiable": True},
    {"differentiable": True},
    {"learning_rate": 0.1},
    {"betas": (0.9, 0.999)},
]


# torch 2.6 takes an lr of shape (1,) and fails at the step; newer ones take it as the number that it holds.
SHAPED_LR_FAILS = not hasattr(sys.modules["torch.optim.optimizer"], "_to_scalar")


def outcome(kind, params, **hyper):
    """The optimizer, or the type of what it raised."""
    lr = hyper.get("lr")
    if kind is torch.optim.SGD and SHAPED_LR_FAILS and isinstance(lr, torch.Tensor) and lr.numel() == 1:
        hyper["lr"] = lr.reshape(())
    try:
        return kind(params, **copy.deepcopy(hyper))
    except Exception as error:
        return type(error)


def trajectory(opt, generator_seed=3):
    """Parameters after three steps, or the type of what a step raised. A step that raises must change nothing."""
    generator = torch.Generator().manual_seed(generator_seed)
    params = params_of(opt)
    try:
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            before = Snapshot(opt)
            opt.step()
    except Exception as error:
        if isinstance(opt, FusedMomentum):
            before.assert_unchanged()
        return type(error)
    return params


@EXACT_DTYPES
@pytest.mark.parametrize(
    "hyper", CALLS, ids=lambda hyper: ",".join(f"{k}={v!r}" for k, v in hyper.items()) or "defaults"
)
def test_arguments(hyper, dtype):
    """Accepted and rejected alike, in the constructor or at the step, with the same type and the same trajectory."""
    values = [torch.randn(300, dtype=dtype), torch.randn(33, 5, dtype=dtype)]
    mine, theirs = (
        outcome(kind, [torch.nn.Parameter(v.clone()) for v in values], **hyper)
        for kind in (FusedMomentum, torch.optim.SGD)
    )
    if isinstance(theirs, type):
        assert mine is theirs
        return
    assert isinstance(mine, FusedMomentum), mine
    for group in theirs.param_groups:
        group.update(foreach=False, fused=False)
    ours, torchs = trajectory(mine), trajectory(theirs)
    if isinstance(torchs, type):
        assert ours is torchs
        return
    assert not isinstance(ours, type), ours
    assert_all_same(ours, torchs)


def w(*shape):
    return torch.nn.Parameter(torch.ones(shape))


PARAMS = {
    "list": lambda: [w(3), w(2, 2)],
    "generator": lambda: (w(3) for _ in range(2)),
    "tuple": lambda: (w(3),),
    "module": lambda: torch.nn.Linear(3, 2).parameters(),
    "named": lambda: torch.nn.Linear(3, 2).named_parameters(),
    "groups": lambda: [{"params": [w(3)], "lr": 0.5}, {"params": w(2)}],
    "group-of-generator": lambda: [{"params": (w(3) for _ in range(2))}],
    "leaf-without-grad": lambda: [torch.ones(3)],
    "set": lambda: {w(3)},
    "set-in-group": lambda: [{"params": {w(3)}}],
    "tensor": lambda: w(3),
    "empty": list,
    "empty-group": lambda: [{"params": []}],
    "no-params-key": lambda: [{"lr": 0.1}],
    "number": lambda: 5,
    "none": lambda: None,
    "list-of-number": lambda: [5],
    "list-of-none": lambda: [None],
    "non-leaf": lambda: [w(3) * 2],
    "twice-in-two-groups": lambda: [{"params": (p := [w(3)])}, {"params": p}],
    "tensor-and-group": lambda: [w(3), {"params": [w(2)]}],
    "group-and-tensor": lambda: [{"params": [w(2)]}, w(3)],
    "integers": lambda: [torch.arange(3)],
    "string": lambda: "abc",
    "dict-of-params": lambda: {"params": [w(3)]},
    "names-missing": lambda: [("a", w(3)), w(2)],
}


@pytest.mark.parametrize("params", PARAMS)
def test_params_argument(params):
    mine, theirs = (outcome(kind, PARAMS[params](), lr=0.1) for kind in (FusedMomentum, torch.optim.SGD))
    if isinstance(theirs, type):
        assert mine is theirs
    else:
        assert [len(g["params"]) for g in mine.param_groups] == [len(g["params"]) for g in theirs.param_groups]
        assert [list(g) for g in mine.param_groups] == [list(g) for g in theirs.param_groups]


def test_missing_params():
    with pytest.raises(TypeError, match="'params'"):
        FusedMomentum()


def test_positional_arguments_in_torchs_order():
    values = torch.randn(300)
    mine, theirs = (
        kind([torch.nn.Parameter(values.clone())], 0.05, 0.9, 0, 0.02, True, foreach=False)
        for kind in (FusedMomentum, torch.optim.SGD)
    )
    Pair.of(mine, theirs).step(3)
    with pytest.raises(TypeError, match="positional"):
        FusedMomentum([w(3)], 0.05, 0.9, 0, 0.02, True, True)


def test_defaults_are_torchs():
    mine, theirs = (kind([w(3)]) for kind in (FusedMomentum, torch.optim.SGD))
    assert mine.defaults == theirs.defaults
    assert isinstance(mine, torch.optim.SGD)


@pytest.mark.parametrize("option", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}], ids=str)
def test_foreach_and_fused_have_no_effect(option):
    values = [
        torch.randn(300),
        torch.randn(300, 5)[:, 2],
        torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last),
    ]
    Pair(values, **BASE, nesterov=True, mine=option).step(3)


@pytest.mark.parametrize("step", ["step(None)", "step(closure=None)", "step()"])
def test_ways_to_call_step(step):
    pair = Pair([torch.randn(300)], **BASE)
    pair.new_grads()
    for opt in pair.optimizers:
        assert eval(f"opt.{step}", {"opt": opt}) is None
    pair.check()


def test_integer_parameters_step_where_torch_steps_them():
    """With integer hyperparameters torch.optim.SGD does update integers."""
    pair = Pair([torch.arange(300), torch.randn(33)], lr=1, momentum=1)
    for _ in range(3):
        pair.set_grad(0, torch.randint(-5, 5, (300,)))
        pair.set_grad(1, torch.randn(33))
        pair.step_as_is()

"""What torch.optim.SGD accepts means the same here, what it rejects is rejected alike, a failing step is no step."""

import copy
import fractions
import math
import sys

import numpy as np
import pytest
import torch
from harness import Pair, Snapshot, assert_same

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
    params = [p for group in opt.param_groups for p in group["params"]]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
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
    for a, b in zip(ours, torchs, strict=True):
        assert_same(a, b)


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
    pair = Pair([torch.zeros(1)])
    pair.mine = FusedMomentum([torch.nn.Parameter(values.clone())], 0.05, 0.9, 0, 0.02, True)
    pair.theirs = torch.optim.SGD([torch.nn.Parameter(values.clone())], 0.05, 0.9, 0, 0.02, True, foreach=False)
    pair.step(3)
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
    pair = Pair(values, **BASE, nesterov=True)
    plain = pair.mine
    pair.mine = FusedMomentum(plain.param_groups[0]["params"], **BASE, nesterov=True, **option)
    pair.step(3)


@pytest.mark.parametrize("step", ["step(None)", "step(closure=None)", "step()"])
def test_ways_to_call_step(step):
    pair = Pair([torch.randn(300)], **BASE)
    pair.new_grads()
    for opt in pair.optimizers:
        assert eval(f"opt.{step}", {"opt": opt}) is None
    pair.check()


# ------------------------------------------------------------------------------ errors at the step change nothing


def training(count=5):
    """Warm on some, fresh on others: parameters 0 and 1 have buffers, the others none yet."""
    pair = Pair([torch.randn(300) for _ in range(count)], lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01)
    pair.new_grads()
    for index in range(2, count):
        pair.set_grad(index, None)
    pair.step_as_is()
    pair.new_grads()
    return pair


def last(opt):
    return opt.param_groups[-1]["params"][-1]


def expanded_parameter(opt):
    p = last(opt)
    p.grad = None
    p.data = torch.randn(1).expand(300)
    p.grad = torch.randn(300)


def self_overlapping_parameter(opt):
    p = last(opt)
    p.grad = None
    p.data = torch.randn(600).as_strided((30, 10), (2, 1))
    p.grad = torch.randn(30, 10)


def integer_parameter(opt):
    opt.param_groups[0]["params"][-1] = p = torch.arange(300)
    p.grad = torch.ones(300, dtype=torch.int64)


def gradient_of_another_shape(opt):
    p = last(opt)
    p.data = torch.randn(7)


def buffer_of_another_shape(opt):
    opt.state[last(opt)]["momentum_buffer"] = torch.randn(7)


def buffer_larger_than_its_parameter(opt):
    opt.state[last(opt)]["momentum_buffer"] = torch.randn(5, 300)


def buffer_that_is_no_tensor(opt):
    opt.state[last(opt)]["momentum_buffer"] = "buffer"


def expanded_buffer(opt):
    opt.state[last(opt)]["momentum_buffer"] = torch.randn(1).expand(300)


def integer_buffer(opt):
    opt.state[last(opt)]["momentum_buffer"] = torch.ones(300, dtype=torch.int64)


def complex_buffer(opt):
    opt.state[last(opt)]["momentum_buffer"] = torch.ones(300, dtype=torch.complex64)


def complex_gradient(opt):
    p = last(opt)
    p.grad_dtype = None
    p.grad = torch.ones(300, dtype=torch.complex64)


def lr_that_is_text(opt):
    opt.add_param_group({"params": [w(300)]})
    last(opt).grad = torch.randn(300)
    opt.param_groups[-1]["lr"] = "fast"


def lr_of_two_elements(opt):
    opt.add_param_group({"params": [w(300)]})
    last(opt).grad = torch.randn(300)
    opt.param_groups[-1]["lr"] = torch.tensor([0.1, 0.2])


def momentum_none(opt):
    opt.add_param_group({"params": [w(300)]})
    last(opt).grad = torch.randn(300)
    opt.state[last(opt)]["momentum_buffer"] = torch.randn(300)
    opt.param_groups[-1]["momentum"] = None


def missing_key(opt):
    opt.add_param_group({"params": [w(300)]})
    last(opt).grad = torch.randn(300)
    del opt.param_groups[-1]["dampening"]


SHARED_PLACE = r"\['params'\]\[4\].*share one place in memory \(shape \[.*clone\(\)"
# Each with what the message says: the tensor, what was found and the remedy, where torch does not speak first.
BREAKAGES = {
    expanded_parameter: SHARED_PLACE,
    self_overlapping_parameter: SHARED_PLACE,
    integer_parameter: "integral input tensors",
    gradient_of_another_shape: r"gradient of .*\['params'\]\[4\].*\[7\].*\[300\]; set it to None",
    buffer_of_another_shape: r"momentum_buffer of .*\['params'\]\[4\].*\[300\].*\[7\]; delete it",
    buffer_larger_than_its_parameter: r"momentum_buffer of .*\['params'\]\[4\].*\[300\].*\[5, 300\]; delete it",
    buffer_that_is_no_tensor: r"\['params'\]\[4\].*momentum_buffer.*str; delete the entry",
    expanded_buffer: "momentum_buffer of .*" + SHARED_PLACE,
    integer_buffer: "can't be cast to the desired output type Long",
    complex_buffer: "can't be cast to the desired output type Float",
    complex_gradient: "can't be cast to the desired output type Float",
    lr_that_is_text: "'str'",
    lr_of_two_elements: "must be Number, not Tensor",
    momentum_none: "must be Tensor, not NoneType",
    missing_key: r"param_groups\[1\]\['dampening'\] is missing; every group needs it",
}
# Where our type isn't torch's: torch computes something for overlapping elements, and stumbles over a missing method.
OUR_TYPE = {self_overlapping_parameter: RuntimeError, buffer_that_is_no_tensor: TypeError}


def type_of_torchs_error(breakage, pair):
    breakage(pair.theirs)
    with pytest.raises(Exception) as raised:
        pair.theirs.step()
    return raised.type


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda f: f.__name__)
def test_a_step_that_raises_has_changed_nothing(breakage):
    """The bad tensor or group stands last, so whoever writes before having checked everything is caught."""
    pair = training()
    breakage(pair.mine)
    before = Snapshot(pair.mine)
    with pytest.raises(Exception, match=BREAKAGES[breakage]) as raised:
        pair.mine.step()
    before.assert_unchanged()
    expected = OUR_TYPE.get(breakage) or type_of_torchs_error(breakage, pair)
    assert raised.type is expected, repr(raised.value)


@pytest.mark.parametrize("breakage", list(BREAKAGES)[:-4], ids=lambda f: f.__name__)
@pytest.mark.parametrize("why", ["tensor lr that requires grad", "differentiable"])
def test_a_step_that_raises_on_torchs_path_has_changed_nothing(why, breakage):
    """The same where all tensors go through torch's functional sgd, one after the other."""
    pair = training()
    if why == "differentiable":
        pair.mine = FusedMomentum(
            [p.detach().clone() for p, _ in pair.params], lr=0.1, momentum=0.9, differentiable=True
        )
        for param, _ in pair.params:
            param.grad = torch.randn(300)
            pair.mine.state[param]["momentum_buffer"] = torch.randn(300)
    else:
        pair.mine.param_groups[0]["lr"] = torch.tensor(0.1, requires_grad=True)
    breakage(pair.mine)
    before = Snapshot(pair.mine)
    with pytest.raises((RuntimeError, TypeError), match=BREAKAGES[breakage]):
        pair.mine.step()
    before.assert_unchanged()


@pytest.mark.parametrize("breakage", list(BREAKAGES)[:4], ids=lambda f: f.__name__)
def test_training_goes_on_after_an_error(breakage):
    """Once the cause is gone the next step is the one that torch would have taken."""
    pair = training()
    param = last(pair.mine)
    data, grad = param.data, param.grad
    breakage(pair.mine)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=BREAKAGES[breakage]):
            pair.mine.step()
    param.grad = None
    param.data = data
    param.grad = grad
    pair.mine.param_groups[0]["params"][-1] = param
    pair.step_as_is()
    pair.step(3)


@pytest.mark.parametrize("what", ["param", "grad", "momentum_buffer"])
@pytest.mark.parametrize("left", [0, 100], ids=["freed", "too-small"])
def test_storage_that_was_freed_or_cut(what, left):
    """What a sharding wrapper may leave behind: torch would read or write beyond the end."""
    pair = training()
    pair.mine.step()
    param = pair.params[1][0]
    tensor = {"param": param, "grad": param.grad, "momentum_buffer": pair.mine.state[param]["momentum_buffer"]}[what]
    others = [p for p, _ in pair.params if p is not param]
    before = [p.detach().clone() for p in others]
    tensor.untyped_storage().resize_(left * 4)
    with pytest.raises(RuntimeError, match=r"\[1\].*storage"):
        pair.mine.step()
    for p, value in zip(others, before, strict=True):
        assert_same(p, value)


def test_integer_parameters_step_where_torch_steps_them():
    """With integer hyperparameters torch.optim.SGD does update integers."""
    pair = Pair([torch.arange(300), torch.randn(33)], lr=1, momentum=1)
    for _ in range(3):
        pair.set_grad(0, torch.randint(-5, 5, (300,)))
        pair.set_grad(1, torch.randn(33))
        pair.step_as_is()


def test_closure_that_raises():
    pair = training()
    before = Snapshot(pair.mine)

    def closure():
        raise ZeroDivisionError("the closure's")

    with pytest.raises(ZeroDivisionError, match="the closure's"):
        pair.mine.step(closure)
    before.assert_unchanged()
    assert torch.is_grad_enabled()
    pair.step(2)

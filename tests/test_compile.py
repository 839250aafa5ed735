"""torch.compile: the step in a graph gives the bits of the eager step, from few graphs; torch's own checks of operators."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same
from torch._dynamo.testing import CompileCounterWithBackend

import momentum_ext
from momentum_ext import FusedMomentum

# The backward pass in the graph too: torch's own switch, off by default.
BACKWARD = torch._dynamo.config.patch(trace_autograd_ops=True)


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(19, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5)).to(dtype)


def inputs(step, dtype=torch.float32):
    return torch.randn(8, 19, generator=torch.Generator().manual_seed(step)).to(dtype)


def tensors_of(opt):
    """Everything that a step writes, by name."""
    found = {}
    for g, group in enumerate(opt.param_groups):
        for i, param in enumerate(group["params"]):
            found[f"params[{g}][{i}]"] = param
            for key, value in opt.state.get(param, {}).items():
                found[f"{key}[{g}][{i}]"] = value
    return found


def assert_same_state(actual, expected):
    actual, expected = tensors_of(actual), tensors_of(expected)
    assert list(actual) == list(expected)
    for name, tensor in actual.items():
        assert_same(tensor, expected[name], name)


def train(net, opt, step, times, dtype=torch.float32, start=0):
    for i in range(start, start + times):
        opt.zero_grad()
        net(inputs(i, dtype)).float().square().mean().backward()
        step()


def twins(make, dtype=torch.float32):
    nets = [model(dtype) for _ in range(2)]
    return [(net, make(net)) for net in nets]


def everything(**hyper):
    return lambda net: FusedMomentum(net.parameters(), **{"lr": 0.1, "momentum": 0.9, **hyper})


def two_groups(net):
    first, _, last = net
    groups = [
        {"params": list(first.parameters()), "lr": 0.05, "nesterov": True, "formulation": "classical"},
        {"params": list(last.parameters()), "weight_decay": 0.1, "decoupled_weight_decay": True, "momentum": 0.0},
    ]
    return FusedMomentum(groups, lr=0.2, momentum=0.9)


CASES = {
    "momentum": everything(),
    "sgd": everything(momentum=0.0),
    "nesterov": everything(nesterov=True),
    "dampening": everything(dampening=0.3),
    "decay": everything(weight_decay=0.1),
    "decoupled": everything(weight_decay=0.1, decoupled_weight_decay=True),
    "maximize": everything(maximize=True, lr=1e-3),
    "classical": everything(formulation="classical", nesterov=True),
    "ema": everything(formulation="ema", weight_decay=0.01),
    "groups": two_groups,
    "average": everything(ema_decay=0.9),
    "average-warmup": everything(ema_decay=0.99, ema_warmup=True, momentum=0.0),
    "clip": everything(max_grad_norm=0.05),
    "all": everything(max_grad_norm=0.05, ema_decay=0.9, nesterov=True, weight_decay=0.1),
    "tensors": lambda net: everything(lr=torch.tensor(0.1), weight_decay=torch.tensor(0.01))(net),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_step(name):
    """torch.compile(optimizer.step): the graphs are that of the first step and that of all others."""
    (net, opt), (theirs, eager) = twins(CASES[name])
    counter = CompileCounterWithBackend("aot_eager")
    train(net, opt, torch.compile(opt.step, fullgraph=True, backend=counter), 5)
    train(theirs, eager, eager.step, 5)
    assert_same_state(opt, eager)
    assert counter.frame_count == (1 if name == "sgd" else 2)
    if opt.max_grad_norm is not None:
        assert_same(opt.grad_norm, eager.grad_norm)


@pytest.mark.parametrize("name", CASES)
@BACKWARD
def test_compiled_training_step(name):
    """zero_grad, forward, backward and step in one graph, bit for bit with the same graph around an eager step."""
    (net, opt), (theirs, eager) = twins(CASES[name])
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def whole(x):
        opt.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        opt.step()
        return loss.detach()

    losses = [whole(inputs(i)) for i in range(5)]
    train(theirs, eager, eager.step, 5)
    assert_same_state(opt, eager)
    assert counter.frame_count == 2
    assert losses[-1] < losses[0] or opt.param_groups[0]["maximize"]

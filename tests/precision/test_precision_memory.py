"""memory_summary() says before the first step what will be held after it, and counts what is there."""

import pytest
import torch
from precision_twin import MODES, STATE, give_grads, mode_name, optimizer_of, options_of_mode
from values import BF16, FP16, FP32, INT8

from momentum_ext import FusedMomentum


def held(opt, params):
    """What is allocated, by kind."""
    sizes = {"params": sum(p.nbytes for p in params), "grads": sum(p.grad.nbytes for p in params if p.grad is not None)}
    for name in (*STATE, "ema"):
        sizes[name] = sum(opt.state[p][name].nbytes for p in params if name in opt.state.get(p, {}))
    return sizes


@pytest.mark.parametrize("mode", MODES, ids=mode_name)
def test_before_and_after(mode):
    params = [torch.nn.Parameter(torch.randn(size).to(mode["dtype"])) for size in (0, 1, 31, 32, 33, 3000)]
    opt = FusedMomentum(params, lr=0.1, momentum=0.9, **options_of_mode(mode))
    before = opt.memory_summary()
    assert not opt.state, "counted before anything is there"
    give_grads(opt)
    opt.step()
    wanted = held(opt, params)
    for summary in (before, opt.memory_summary()):
        assert {kind: size for kind, size in summary.items() if size} == {k: v for k, v in wanted.items() if v}
        assert summary.total == sum(wanted.values())
        assert summary.num_params == 3097


def test_8_bits_take_at_most_1_063_bytes_an_element():
    param = torch.nn.Parameter(torch.randn(100_003))
    summary = optimizer_of(param, steps=1, momentum_dtype=INT8).memory_summary()
    assert (summary["momentum_buffer"] + summary["momentum_scale"]) / summary.num_params <= 1.063


def test_split_takes_four_bytes_a_weight():
    param = torch.nn.Parameter(torch.randn(1000, dtype=BF16))
    summary = FusedMomentum([param], lr=0.1, momentum=0.9, master_weights=True).memory_summary()
    assert summary["momentum_buffer"] == 4000
    assert summary["params"] + summary["param_remainder"] == 4000


def test_groups_frozen_parameters_averages_and_no_momentum():
    params = [torch.nn.Parameter(torch.randn(300).to(dtype)) for dtype in (FP32, BF16, FP16, FP32)]
    params[3].requires_grad_(False)
    groups = [
        {"params": params[:1], "momentum": 0},
        {"params": params[1:2], "master_weights": True},
        {"params": params[2:], "momentum_dtype": INT8},
    ]
    opt = FusedMomentum(groups, lr=0.1, momentum=0.9, ema_decay=0.9)
    before = opt.memory_summary()
    give_grads(opt)
    params[3].grad = None
    opt.step()
    wanted = held(opt, params)
    assert {k: v for k, v in before.items() if v} == {k: v for k, v in wanted.items() if v}


def test_it_prints_as_a_table_that_lines_up():
    opt = FusedMomentum([torch.nn.Parameter(torch.randn(300, dtype=BF16))], lr=0.1, momentum=0.9, master_weights=True)
    text = str(opt.memory_summary())
    assert all(kind in text for kind in ("params", "grads", "momentum_buffer", "param_remainder", "total"))
    lines = text.splitlines()[1:]
    assert len({len(line) for line in lines}) == 1, text

"""What random sequences of actions have found, reduced; test_properties.py goes on looking."""

import copy
import pickle

import pytest
import torch
from harness import assert_same_training
from values import EACH_COPY

from momentum_ext import FusedMomentum

FP64 = torch.float64


def make(*values, dtype=FP64, **options):
    """A parameter of zeros, and gradients of these values."""
    param = torch.nn.Parameter(torch.zeros(len(values), dtype=dtype))
    param.grad = torch.tensor(values, dtype=dtype)
    return param, FusedMomentum([param], **options)


def test_formulation_edited_while_momentum_is_0():
    """b = 2, 2 plain steps, v = lr b = .4; then v = .5 * .4 + .2 * 2."""
    param, opt = make(2.0, lr=0.2, momentum=0.5)
    opt.step()
    opt.param_groups[0].update(momentum=0, formulation="classical")
    opt.step()
    opt.state_dict()
    opt.step()
    assert opt.state[param]["momentum_buffer"].item() == 2
    assert "buffer_formulation" not in opt.param_groups[0]
    opt.param_groups[0]["momentum"] = 0.5
    opt.step()
    assert opt.state[param]["momentum_buffer"].item() == pytest.approx(0.6, rel=1e-12)
    assert param.item() == pytest.approx(-0.4 - 0.8 - 0.6, rel=1e-12)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("refusal", ["ema_weights", "iterate_weights"])
def test_refused_step_under_max_grad_norm_leaves_the_old_coefficient_to_its_gradients(refusal, written):
    param, opt = make(30.0, 40.0, lr=0.5, max_grad_norm=50.0, ema_decay=0.9)
    opt.clip_grad_norm_(0.25)
    param.grad = torch.tensor([0.6, 0.8], dtype=FP64)
    with getattr(opt, refusal)(), pytest.raises(RuntimeError, match=rf"leave {refusal}\(\) first"):
        opt.step()
    if written:
        param.grad.mul_(3)
    opt.step()
    factor = 3 if written else 1
    assert torch.allclose(param.detach(), torch.tensor([-0.3, -0.4], dtype=FP64) * factor, rtol=1e-12)
    assert float(opt.grad_norm) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("lr", "first", "then"), [(0.07, "torch", "classical"), (0.3, "classical", "torch")])
def test_16_bit_buffers_are_converted_in_fp32_and_rounded_once(dtype, lr, first, then):
    torch.manual_seed(3)
    param, opt = make(*torch.randn(3_000).tolist(), dtype=dtype, lr=lr, momentum=0.8, formulation=first)
    opt.step()
    wide = opt.state[param]["momentum_buffer"].float()
    opt.param_groups[0]["formulation"] = then
    once = (wide * lr if then == "classical" else wide / lr).to(dtype)
    assert torch.equal(opt.state_dict()["state"][0]["momentum_buffer"], once)
    assert torch.equal(opt.state[param]["momentum_buffer"].float(), wide)


LOOKS = {
    "nothing": lambda opt: None,
    "state_dict": FusedMomentum.state_dict,
    "torch_state_dict": FusedMomentum.torch_state_dict,
    "memory_summary": FusedMomentum.memory_summary,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "plain step": lambda opt: (
        opt.param_groups[0].update(momentum=0),
        opt.step(),
        opt.param_groups[0].update(momentum=0.9),
    ),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("stored", [torch.float16, torch.int8])
def test_momentum_dtype_taken_back_is_converted_whatever_comes_between(look, stored):
    param, opt = make(1.0, 0.5, -2.25, dtype=torch.float32, lr=0.01, momentum=0.9, momentum_dtype=stored)
    opt.step()
    opt.param_groups[0]["momentum_dtype"] = None
    LOOKS[look](opt)
    assert opt.state[param]["momentum_buffer"].dtype is stored
    opt.step()
    assert opt.state[param]["momentum_buffer"].dtype is torch.float32
    assert set(opt.state[param]) == {"momentum_buffer"}


@EACH_COPY
def test_copies_convert_what_the_original_would(copied):
    param, opt = make(1.0, 3.0, dtype=torch.float32, lr=0.1, momentum=0.9, momentum_dtype="float16")
    for _ in range(2):
        opt.step()
    opt.param_groups[0].update(momentum_dtype=None, formulation="classical")
    twin, original = copied((param, opt)), (param, opt)
    twin[0].grad = param.grad.clone()
    for _, optimizer in (twin, original):
        optimizer.step()
    assert_same_training(twin[1], opt)
    assert opt.state[param]["momentum_buffer"].dtype is torch.float32

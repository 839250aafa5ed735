"""Options edited in mid-run take effect in the next step: the state is converted, and nothing is lost on the way."""

import itertools

import pytest
import torch
from harness import assert_same
from precision_oracle import buffer_values
from precision_twin import MOMENTUM_DTYPES, Twin, give_grads, optimizer_of
from values import BF16, FP8, FP16, FP32, HALF_DTYPES, INT4, INT8, dtype_name

from momentum_ext import FusedMomentum

DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=dtype_name)


@DTYPES
@pytest.mark.parametrize("before, after", list(itertools.permutations(MOMENTUM_DTYPES, 2)), ids=dtype_name)
def test_every_change_of_the_momentum_dtype(dtype, before, after):
    for stochastic in (False, True):
        params = [torch.randn(size).to(dtype) for size in (1, 256, 600)]
        twin = Twin(params, momentum=0.9, momentum_dtype=before, stochastic_rounding=stochastic)
        twin.step(2)
        twin.edit(momentum_dtype=after)
        twin.step(2)
        twin.edit(momentum_dtype=before)
        twin.step()


@HALF_DTYPES
@pytest.mark.parametrize("momentum_dtype", [None, FP32, INT8], ids=dtype_name)
def test_master_weights_on_and_off(dtype, momentum_dtype):
    twin = Twin([torch.randn(size).to(dtype) for size in (1, 256, 600)], momentum=0.9, momentum_dtype=momentum_dtype)
    for master in (False, True, False, True):
        twin.edit(master_weights=master)
        twin.step(2)


@DTYPES
def test_stochastic_rounding_on_and_off(dtype):
    twin = Twin([torch.randn(600).to(dtype)], momentum=0.9, momentum_dtype=BF16)
    for stochastic in (True, False, True):
        twin.edit(stochastic_rounding=stochastic)
        twin.step(2)
        twin.edit(rounding_seed=twin.taken)


@DTYPES
def test_all_at_once(dtype):
    twin = Twin([torch.randn(size).to(dtype) for size in (1, 256, 600)], momentum=0.9)
    for momentum_dtype, master, stochastic in ((INT8, True, True), (None, False, True), (FP8, True, False)):
        twin.edit(momentum_dtype=momentum_dtype, master_weights=master, stochastic_rounding=stochastic)
        twin.step(2)


@pytest.mark.parametrize("momentum_dtype", [FP32, BF16, FP16, INT8, FP8, INT4], ids=dtype_name)
def test_conversion_changes_the_buffer_by_one_rounding(momentum_dtype):
    """What is there after a conversion is the old buffer in the new dtype: seen in a checkpoint, before any step."""
    param = torch.nn.Parameter(torch.randn(1000))
    opt = optimizer_of(param, steps=1)
    kept = opt.state[param]["momentum_buffer"].clone()
    opt.param_groups[0]["momentum_dtype"] = momentum_dtype
    param.grad = torch.zeros(1000)
    opt.param_groups[0].update(lr=0.0, momentum=1.0)
    opt.step()
    found = torch.from_numpy(buffer_values(opt.state[param], param))
    of_largest = {INT8: 509 / 81280 + 2**-9, INT4: 11.5 / 119 + 2**-9}
    coarsest = {FP32: 0.0, BF16: 2**-8, FP16: 2**-11, FP8: 2**-4 + 2**-9, **of_largest}[momentum_dtype]
    largest = kept.abs().max().item()
    assert ((found - kept).abs() <= coarsest * (largest if momentum_dtype in of_largest else kept.abs() + 2e-3)).all()


@DTYPES
@pytest.mark.parametrize("formulation", ["torch", "classical"])
@pytest.mark.parametrize("momentum_dtype", MOMENTUM_DTYPES, ids=dtype_name)
def test_formulations_convert_low_precision_buffers(dtype, formulation, momentum_dtype):
    """torch's form and the classical one change into each other, rounded once: in a checkpoint, and in the next step.

    Also of a tensor without a gradient, and together with another dtype.
    """
    params = [torch.randn(size).to(dtype) for size in (600, 9)]
    twin = Twin(params, momentum=0.9, formulation=formulation, momentum_dtype=momentum_dtype)
    twin.step(2)
    for edited in ({}, {"momentum_dtype": FP16}):
        formulation = "classical" if formulation == "torch" else "torch"
        twin.edit(formulation=formulation, lr=0.3, **edited)
        twin.check_state_dict(twin.opt.state_dict())
        twin.check()
        twin.new_grads()
        twin.params[1].grad = None
        twin.step_as_is()
        twin.step()


@DTYPES
def test_the_state_has_what_the_options_need_and_nothing_else(dtype):
    param = torch.nn.Parameter(torch.randn(300).to(dtype))
    opt = optimizer_of(param)
    for momentum_dtype, master in itertools.product(MOMENTUM_DTYPES, (True, False)):
        opt.param_groups[0].update(momentum_dtype=momentum_dtype, master_weights=master)
        give_grads(opt)
        opt.step()
        wanted = {"momentum_buffer": (momentum_dtype or (FP32 if master else dtype), (300,))}
        if momentum_dtype is INT4:
            wanted["momentum_buffer"] = (torch.uint8, (150,))
        if momentum_dtype in (INT8, FP8, INT4):
            wanted["momentum_scale"] = (torch.uint8, (10, 2))
        if master and dtype is not FP32:
            wanted |= {"param_remainder": (torch.int16, (300,))} if dtype is BF16 else {"master_param": (FP32, (300,))}
        assert {name: (value.dtype, value.shape) for name, value in opt.state[param].items()} == wanted


def test_a_buffer_found_in_another_dtype_is_converted():
    for dtype, found in itertools.product((FP32, BF16), (FP16, BF16, FP32)):
        twin = Twin([torch.randn(300).to(dtype)], momentum=0.9)
        buffer = torch.randn(300).to(found)
        twin.opt.state[twin.params[0]]["momentum_buffer"] = buffer.clone()
        twin.entries[0].state = {"momentum_buffer": buffer}
        twin.step(2)
        assert twin.opt.state[twin.params[0]]["momentum_buffer"].dtype is dtype


def test_an_average_is_taken_of_the_parameter():
    """ema_decay beside every mode: torch's average of what forward sees."""
    for dtype, options in ((BF16, {"master_weights": True}), (BF16, {"stochastic_rounding": True}), (FP32, {})):
        params = [torch.nn.Parameter(torch.randn(300).to(dtype)) for _ in range(2)]
        params[1].data.copy_(params[0])
        opts = [
            FusedMomentum([p], lr=0.1, momentum=0.9, momentum_dtype=INT8, ema_decay=decay, **options)
            for p, decay in zip(params, (0.9, None), strict=True)
        ]
        average = None
        for _ in range(4):
            params[0].grad = torch.randn(300).to(dtype)
            params[1].grad = params[0].grad
            for opt in opts:
                opt.step()
            assert_same(params[0].detach(), params[1].detach())
            now = params[1].detach()
            average = now.clone() if average is None else torch.lerp(average.float(), now.float(), 1 - 0.9).to(dtype)
            assert_same(opts[0].state[params[0]]["ema"], average, "ema")

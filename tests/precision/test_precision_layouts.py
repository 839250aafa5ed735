"""Low-precision states in every memory layout: the oracle's bits, in the layout that torch gives a buffer."""

import pytest
import torch
from precision_twin import BF16, FEW, FP8, FP16, FP32, INT8, Twin, dtype_name, mode_name, options_of_mode
from values import LAYOUTS, in_layout, storage_of

SHAPES = [(3, 5, 7, 4), (600,), (17, 33), ()]


@pytest.mark.parametrize("mode", FEW, ids=mode_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameter_layouts(mode, layout):
    options = options_of_mode(mode)
    params = [in_layout(torch.randn(shape).to(mode["dtype"]), layout) for shape in SHAPES]
    twin = Twin(params, momentum=0.9, weight_decay=0.02, **options)
    twin.step(2)
    for grad_layout in ("permuted", "column"):
        twin.new_grads()
        for param in twin.params:
            param.grad = in_layout(param.grad, grad_layout)
        twin.step_as_is()


@pytest.mark.parametrize("mode", FEW, ids=mode_name)
def test_channels_last_with_another_gradient(mode):
    options = options_of_mode(mode)
    param = torch.randn(4, 6, 5, 9).to(mode["dtype"]).to(memory_format=torch.channels_last)
    twin = Twin([param], momentum=0.9, **options)
    for grad_layout in (torch.contiguous_format, torch.channels_last):
        twin.new_grads()
        twin.params[0].grad = twin.params[0].grad.to(memory_format=grad_layout)
        twin.step_as_is()
    assert twin.opt.state[twin.params[0]]["momentum_buffer"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype, momentum_dtype", [(FP32, INT8), (BF16, FP8), (FP16, INT8)], ids=dtype_name)
def test_neighbours_in_memory_are_left_alone(dtype, momentum_dtype):
    base = torch.full((40, 3), 7.0, dtype=dtype)
    param = torch.nn.Parameter(base[:, 1])
    twin = Twin([param], momentum=0.9, momentum_dtype=momentum_dtype, master_weights=True)
    twin.step(3)
    assert (storage_of(twin.params[0].detach()).view(40, 3)[:, [0, 2]] == 7).all()

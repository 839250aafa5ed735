"""Every mode gives the oracle's bits: all combinations of dtypes and options, every size, every instruction set."""

import itertools

import pytest
import torch
from precision_twin import FEW, HYPERS, LARGE, MODES, Twin, mode_name, twin_of
from values import BF16, EIGHT_BITS, FP8, FP16, FP32, HALF_DTYPES, INT8, all_values, dtype_name

from momentum_ext import _C, FusedMomentum

GRADS = (FP32, BF16, FP16)


@pytest.mark.parametrize("mode", MODES, ids=mode_name)
def test_every_mode(mode):
    """Gradients of all three dtypes in turn, under several hyperparameters; a first step and two later ones."""
    for hyper in HYPERS:
        twin = twin_of(mode, (0, 1, 9, 257, 600), **hyper, rounding_seed=(5 << 40) + 3)
        for dtype in GRADS:
            twin.step(dtype=dtype)


@pytest.mark.parametrize("mode", FEW, ids=mode_name)
@pytest.mark.parametrize("isa", _C.isas())
def test_every_size_under_every_instruction_set(mode, isa):
    _C.set_isa(isa)
    twin = twin_of(mode, momentum=0.9, nesterov=True, weight_decay=0.01)
    twin.step(2, dtype=mode["dtype"])
    twin.step(dtype=FP32)


@pytest.mark.parametrize("mode", FEW, ids=mode_name)
def test_any_number_of_threads(mode):
    """Large enough to be shared; borders between threads fall anywhere, also within a block."""
    torch.set_num_threads(1)
    twin = twin_of(mode, (LARGE, 255, 2 * LARGE, 3), momentum=0.9, weight_decay=0.01)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        twin.step(dtype=mode["dtype"])


@HALF_DTYPES
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "sr"])
@pytest.mark.parametrize("isa", _C.isas())
def test_every_bit_pattern(dtype, stochastic, isa):
    """All 65,536 values as parameter and gradient: subnormal, Inf and NaN too, through every kind of storage."""
    _C.set_isa(isa)
    everything = all_values(dtype)
    for momentum_dtype, master in itertools.product((None, FP32, INT8, FP8), (False, True)):
        twin = Twin(
            [everything], momentum=0.7, lr=0.3, stochastic_rounding=stochastic, momentum_dtype=momentum_dtype,
            master_weights=master,
        )  # fmt: skip
        for shift in (1, 4097):
            twin.params[0].grad = everything.roll(shift)
            twin.step_as_is()


@pytest.mark.parametrize("momentum_dtype", [INT8, FP8, BF16, FP16], ids=dtype_name)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "sr"])
def test_blocks_of_every_size(momentum_dtype, stochastic):
    """Blocks whose values span 80 orders of magnitude, vanish, or overflow in the middle of a training."""
    twin = Twin(
        [torch.randn(256 * 40 + 77)], momentum=0.9, momentum_dtype=momentum_dtype, stochastic_rounding=stochastic
    )
    for step in range(3):
        grad = twin.random_like(twin.params[0])
        for block in range(40):
            grad[256 * block : 256 * block + 256] *= 2.0 ** (6 * (block - 25))
        if step == 1:
            grad[700], grad[256 * 9 + 255], grad[-1] = float("inf"), float("nan"), -float("inf")
        twin.params[0].grad = grad
        twin.step_as_is()
    if momentum_dtype in EIGHT_BITS:
        scale = twin.opt.state[twin.params[0]]["momentum_scale"]
        is_nan = (scale[:, 1] == 0xFF).nonzero().flatten()
        assert is_nan.tolist() == [700 // 32, (256 * 9 + 255) // 32, (256 * 40 + 76) // 32], "in its own block alone"


def test_several_groups_each_with_its_own_mode():
    """Positions count through all groups, and a group's options are its own."""
    twin = Twin([torch.randn(300).to(mode["dtype"]) for mode in FEW], momentum=0.9, rounding_seed=9)
    group = twin.opt.param_groups[0]
    keys = ("momentum_dtype", "master_weights", "stochastic_rounding")
    twin.opt.param_groups[:] = [
        {**group, **{key: mode.get(key, False) for key in keys}, "params": [param]}
        for mode, param in zip(FEW, group["params"], strict=True)
    ]
    twin.formulations *= len(FEW)
    twin.step(4)


@pytest.mark.parametrize("mode", FEW, ids=mode_name)
def test_gradients_that_come_and_go(mode):
    """A late first step; tensors without a gradient keep their state; the step's number goes on for all."""
    twin = twin_of(mode, (300, 9, 513), momentum=0.9)
    for missing in ((), (1,), (0, 2), (0, 1, 2), ()):
        twin.new_grads()
        for index in missing:
            twin.params[index].grad = None
        if len(missing) < 3:
            twin.step_as_is()


@pytest.mark.parametrize("mode", FEW, ids=mode_name)
def test_without_momentum(mode):
    twin_of({**mode, "momentum_dtype": None}, momentum=0).step(3)


def test_seeds_streams_steps_and_tensors_differ():
    """The same values everywhere: whatever distinguishes two roundings must change the random numbers."""

    def rounded(seed=0, steps=1, position=0):
        params = [torch.nn.Parameter(torch.full((4096,), 1.0, dtype=BF16)) for _ in range(3)]
        opt = FusedMomentum(params, lr=1.0, stochastic_rounding=True, rounding_seed=seed)
        for _ in range(steps):
            for param in params:
                param.data.fill_(1.0)
                param.grad = torch.full((4096,), 2.0**-9, dtype=BF16)
            opt.step()
        return params[position].detach().clone()

    base = rounded()
    assert torch.equal(base, rounded())
    for other in (rounded(seed=1), rounded(seed=1 << 40), rounded(steps=2), rounded(position=1), rounded(position=2)):
        agree = (base == other).double().mean()
        assert 0.4 < agree < 0.8, "not independent"

"""Master weights: a bf16 run with split weights is an fp32 run whose parameters are cast for forward, bit for bit."""

import numpy as np
import pytest
import torch
from harness import Pair, assert_same, for_loop
from precision_oracle import flat as flat_values
from precision_oracle import join, order_of
from precision_twin import HYPERS, Twin
from values import BF16, FP16, FP32, INT8, dtype_name

from momentum_ext import _C, FusedMomentum


def truth(opt, param):
    """The fp32 values that split bf16 parameters stand for."""
    order = order_of(param)
    values = join(flat_values(param, order), flat_values(opt.state[param]["param_remainder"], order))
    return torch.from_numpy(values).view(param.shape)


def cast(values):
    """fp32 to bf16 to nearest, ties away from zero: torch's cast but for exact ties."""
    return ((values.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(BF16)


class Two:
    """A model in split bf16 and the same in fp32 that casts; both compute gradients from the same bf16 values."""

    def __init__(self, **options):
        generator = torch.Generator().manual_seed(3)
        start = [torch.randn(shape, generator=generator).to(BF16) for shape in ((33, 65), (65,), (65, 9), (1,))]
        self.split = [torch.nn.Parameter(p.clone()) for p in start]
        self.wide = [torch.nn.Parameter(p.float()) for p in start]
        self.opt = FusedMomentum(self.split, lr=0.03, master_weights=True, **options)
        if {"formulation", "momentum_dtype"} & options.keys():
            self.reference = FusedMomentum(self.wide, lr=0.03, **options)
        else:
            self.reference = for_loop(self.wide, lr=0.03, **options)
        self.data = torch.Generator().manual_seed(4)

    @staticmethod
    def loss(weights, x):
        w1, b1, w2, scale = weights
        return ((torch.tanh(x @ w1 + b1) @ w2) * scale).float().square().mean()

    def step(self, grad_dtype):
        x = torch.randn(16, 33, generator=self.data).to(BF16)
        casts = [cast(p.detach()).requires_grad_() for p in self.wide]
        for params, used in ((self.split, self.split), (self.wide, casts)):
            for p in used:
                p.grad = None
            self.loss(used, x).backward()
            for p, q in zip(params, used, strict=True):
                grad = q.grad.to(grad_dtype)
                p.grad_dtype = None
                p.grad = grad if params is self.split else grad.float()  # torch's buffer is made of its first gradient
        self.opt.step()
        self.reference.step()
        for p, q in zip(self.split, self.wide, strict=True):
            assert_same(truth(self.opt, p), q.detach(), "truth")
            assert_same(p.detach(), cast(q.detach()), "the cast for forward")


@pytest.mark.parametrize("hyper", HYPERS, ids=lambda hyper: hyper.get("formulation", "torch") + f"-{len(hyper)}")
@pytest.mark.parametrize("precision", [{}, {"momentum_dtype": BF16}, {"momentum_dtype": INT8}], ids=str)
@pytest.mark.parametrize("grad_dtype", [BF16, FP32], ids=dtype_name)
def test_split_run_is_an_fp32_run(hyper, precision, grad_dtype):
    """By default torch's own run, momentum and all."""
    two = Two(**hyper, **precision)
    for _ in range(20):
        two.step(grad_dtype)


def test_every_instruction_set_rounds_alike():
    two = Two(momentum=0.9, momentum_dtype=FP32)
    for isa in _C.isas():
        _C.set_isa(isa)
        two.step(BF16)
        two.step(BF16)


@pytest.mark.parametrize("isa", _C.isas())
def test_ties_overflow_and_specials(isa):
    """Values whose upper half rounds up, ties, the largest finite (whose bf16 is Inf), Inf, NaN and subnormals."""
    _C.set_isa(isa)
    patterns = [0x3F808000, 0x3F818000, 0xBF808000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000]
    patterns += [0xFF800000, 0x7FC00000, 0x00000001, 0x80000001, 0x00008000, 0x00007FFF, 0x00000000, 0x80000000]
    wanted = torch.tensor(np.array(patterns, np.uint32).view(np.float32))
    param = torch.nn.Parameter(torch.zeros(len(patterns), dtype=BF16))
    param.grad_dtype = None
    opt = FusedMomentum([param], lr=1.0, master_weights=True)
    param.grad = -wanted  # 0 - 1 * -x is x, but for the sign of zero
    opt.step()
    found = truth(opt, param)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[~found.isnan()], wanted[~wanted.isnan()])
    assert param.detach()[5].isinf() and found[5].isfinite()
    param.grad = torch.zeros_like(wanted)  # and a step that changes nothing keeps every bit
    before = param.detach().clone(), opt.state[param]["param_remainder"].clone()
    opt.step()
    keep = ~found.isnan()
    assert_same(param.detach()[keep], before[0][keep])
    assert_same(opt.state[param]["param_remainder"][keep], before[1][keep])


def test_fp16_master_believes_who_writes_the_parameter():
    twin = Twin([torch.randn(300).to(FP16), torch.randn(9).to(FP16)], momentum=0.9, master_weights=True)
    twin.step(3)
    for param, entry in zip(twin.params, twin.entries, strict=True):
        param.data[::2] = 0.125
        entry.param[::2] = 0.125
    twin.step(2)


def test_fp16_master_is_an_fp32_run():
    start = torch.randn(2049).to(FP16)
    param, wide = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    mine = FusedMomentum([param], lr=1e-3, momentum=0.9, master_weights=True)
    reference = for_loop([wide], lr=1e-3, momentum=0.9)
    for _ in range(50):
        param.grad = torch.randn(2049).to(FP16)
        wide.grad = param.grad.float()
        mine.step()
        reference.step()
        assert_same(mine.state[param]["master_param"], wide.detach())
        assert_same(mine.state[param]["momentum_buffer"], reference.state[wide]["momentum_buffer"])
        assert_same(param.detach(), wide.detach().to(FP16))


@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=dtype_name)
def test_no_effect_on_fp32_and_fp64(dtype):
    own = {"master_weights": True, "stochastic_rounding": True}
    Pair([torch.randn(300, dtype=dtype)], lr=0.1, momentum=0.9, mine=own).step(3)

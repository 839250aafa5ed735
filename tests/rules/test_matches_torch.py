"""In fp32 and fp64, parameters and buffers are bit-identical to torch's for-loop over hundreds of steps."""

import math

import pytest
import torch
from harness import Pair, assert_all_same
from values import EXACT_DTYPES

STEPS, MANY_STEPS = 20, 200
# Three threads' shares in all. No tensor by itself is long enough for torch to split it: its for-loop would start
# and end a parallel region for every operation, which on busy cores takes longer than the whole test.
SHAPES = [(3, 5), (257,), (64, 33), (32_700,), (32_701,), (32_703,)]

# momentum, dampening, nesterov; torch's constructor refuses the last two, but a group can be edited to them.
MOMENTUM = {
    "none": (0, 0, False),
    "none-dampened": (0, 0.3, False),
    "momentum": (0.9, 0, False),
    "dampened": (0.9, 0.3, False),
    "nesterov": (0.9, 0, True),
    "nesterov-dampened": (0.9, 0.3, True),
    "nesterov-without-momentum": (0, 0, True),
}
WEIGHT_DECAY = {"nodecay": 0, "decay": 0.013, "tensordecay": torch.tensor(0.013)}
LR = {"lr": 0.017, "tensorlr": torch.tensor(0.017)}


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("lr", LR)
@pytest.mark.parametrize("weight_decay", WEIGHT_DECAY)
@pytest.mark.parametrize("momentum", MOMENTUM)
@EXACT_DTYPES
def test_trajectory(dtype, momentum, weight_decay, lr, maximize, isa, threads):
    check_trajectory(STEPS, dtype, momentum, weight_decay, lr, maximize)


@pytest.mark.parametrize("momentum", MOMENTUM)
@EXACT_DTYPES
def test_long_trajectory(dtype, momentum, isa):
    torch.set_num_threads(3)
    check_trajectory(MANY_STEPS, dtype, momentum, "decay", "tensorlr", False)


def check_trajectory(steps, dtype, momentum, weight_decay, lr, maximize):
    mu, dampening, nesterov = MOMENTUM[momentum]
    hyper = {"lr": LR[lr], "momentum": mu, "dampening": dampening, "weight_decay": WEIGHT_DECAY[weight_decay]}
    pair = Pair([torch.randn(shape, dtype=dtype) for shape in SHAPES], **hyper, maximize=maximize)
    pair.edit(nesterov=nesterov)
    pair.new_grads()
    pool = torch.randn(sum(p.numel() for p, _ in pair.params) + steps, dtype=dtype)
    for step in range(steps):
        start = step
        for mine, theirs in pair.params:
            values = pool[start : start + mine.numel()].view(mine.shape)
            mine.grad.copy_(values)
            theirs.grad.copy_(values)
            start += mine.numel()
        pair.both(lambda opt: opt.step())
        if step < 3 or step % 50 == 49 or step == steps - 1:
            pair.check()


@EXACT_DTYPES
@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
def test_result_does_not_depend_on_the_thread_count(dtype, nesterov):
    results = []
    for count in (1, 2, 3, 4, 7):
        torch.manual_seed(0)
        torch.set_num_threads(count)
        pair = Pair([torch.randn(n, dtype=dtype) for n in (100003, 5, 65537, 1)], lr=0.1, momentum=0.9)
        pair.edit(nesterov=nesterov)
        pair.step(5)
        results.append([p for p, _ in pair.params])
    for other in results[1:]:
        assert_all_same(other, results[0])


@EXACT_DTYPES
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-42, 3e38])
def test_special_values_wherever_they_stand(dtype, special, isa):
    for where in ("grad", "param", "momentum_buffer"):
        pair = Pair([torch.randn(100, dtype=dtype)], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)
        pair.step()
        pair.new_grads()
        for opt, param in pair.each(0):
            target = {"grad": param.grad, "param": param.data, "momentum_buffer": opt.state[param]["momentum_buffer"]}
            target[where][::3] = special
        pair.step_as_is()
        pair.step(2)


@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_signed_zero(mu, isa):
    """-0.0 comes out where torch's for-loop gives -0.0."""
    pair = Pair([torch.tensor([0.0, -0.0, 0.0, -0.0] * 9)], lr=0.1, momentum=mu)
    for maximize in (False, True):
        pair.edit(maximize=maximize)
        for value in (0.0, -0.0):
            pair.set_grad(0, torch.full((36,), value))
            pair.step_as_is()


AT_THE_EDGES = [{"lr": value, "momentum": 0.9} for value in (0.0, -0.0, math.inf, math.nan, 1e-50)]
AT_THE_EDGES += [{"momentum": value} for value in (1.0, 1e-9, math.nan)]
AT_THE_EDGES += [{"momentum": 0.9, "dampening": value} for value in (1.0, -0.5, 1.5, 1e-12)]
AT_THE_EDGES += [{"momentum": 0.9, "weight_decay": value} for value in (1e-12, math.inf, math.nan)]


@EXACT_DTYPES
@pytest.mark.parametrize("hyper", AT_THE_EDGES, ids=str)
def test_hyperparameters_at_the_edges(dtype, hyper, isa):
    Pair([torch.randn(n, dtype=dtype) for n in (33, 300)], **{"lr": 0.1, **hyper}).step(4)


@pytest.mark.parametrize("edit", [{"lr": -0.1}, {"momentum": -0.5}, {"weight_decay": -0.1}])
def test_values_edited_to_what_the_constructor_refuses(edit, isa):
    pair = Pair([torch.randn(300)], lr=0.1, momentum=0.9, nesterov=True)
    pair.step(2)
    pair.edit(**edit)
    pair.step(3)

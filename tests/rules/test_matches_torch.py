"""In fp32 and fp64, parameters and buffers are bit-identical to torch's for-loop over hundreds of steps."""

import pytest
import torch
from harness import Pair

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_trajectory(dtype, momentum, weight_decay, lr, maximize, isa, threads):
    check_trajectory(STEPS, dtype, momentum, weight_decay, lr, maximize)


@pytest.mark.parametrize("momentum", MOMENTUM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_long_trajectory(dtype, momentum, isa):
    torch.set_num_threads(3)
    check_trajectory(MANY_STEPS, dtype, momentum, "decay", "tensorlr", False)


def check_trajectory(steps, dtype, momentum, weight_decay, lr, maximize):
    mu, dampening, nesterov = MOMENTUM[momentum]
    pair = Pair(
        [torch.randn(shape, dtype=dtype) for shape in SHAPES],
        lr=LR[lr],
        momentum=mu,
        dampening=dampening,
        weight_decay=WEIGHT_DECAY[weight_decay],
        maximize=maximize,
    )
    pair.both(lambda opt: opt.param_groups[0].update(nesterov=nesterov))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
def test_result_does_not_depend_on_the_thread_count(dtype, nesterov):
    results = []
    for count in (1, 2, 3, 4, 7):
        torch.manual_seed(0)
        torch.set_num_threads(count)
        pair = Pair([torch.randn(n, dtype=dtype) for n in (100003, 5, 65537, 1)], lr=0.1, momentum=0.9)
        pair.both(lambda opt: opt.param_groups[0].update(nesterov=nesterov))
        pair.step(5)
        results.append([p for p, _ in pair.params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-42, 3e38])
def test_special_values_wherever_they_stand(dtype, special, isa):
    for where in ("grad", "param", "momentum_buffer"):
        pair = Pair([torch.randn(100, dtype=dtype)], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)
        pair.step()
        pair.new_grads()
        for opt, param in zip(pair.optimizers, pair.params[0], strict=True):
            target = {"grad": param.grad, "param": param.data, "momentum_buffer": opt.state[param]["momentum_buffer"]}
            target[where][::3] = special
        pair.step_as_is()
        pair.step(2)


@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_signed_zero(mu, isa):
    """-0.0 comes out where torch's for-loop gives -0.0."""
    pair = Pair([torch.tensor([0.0, -0.0, 0.0, -0.0] * 9)], lr=0.1, momentum=mu)
    for maximize in (False, True):
        pair.both(lambda opt, maximize=maximize: opt.param_groups[0].update(maximize=maximize))
        for value in (0.0, -0.0):
            pair.set_grad(0, torch.full((36,), value))
            pair.step_as_is()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    "hyper",
    [
        {"lr": 0.0, "momentum": 0.9},
        {"lr": -0.0, "momentum": 0.9},
        {"lr": float("inf"), "momentum": 0.9},
        {"lr": float("nan"), "momentum": 0.9},
        {"lr": 1e-50, "momentum": 0.9},
        {"lr": 0.1, "momentum": 1.0},
        {"lr": 0.1, "momentum": 1e-9},
        {"lr": 0.1, "momentum": float("nan")},
        {"lr": 0.1, "momentum": 0.9, "dampening": 1.0},
        {"lr": 0.1, "momentum": 0.9, "dampening": -0.5},
        {"lr": 0.1, "momentum": 0.9, "dampening": 1.5},
        {"lr": 0.1, "momentum": 0.9, "dampening": 1e-12},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-12},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": float("inf")},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": float("nan")},
    ],
    ids=lambda hyper: "-".join(f"{k}={v}" for k, v in hyper.items()),
)
def test_hyperparameters_at_the_edges(dtype, hyper, isa):
    pair = Pair([torch.randn(n, dtype=dtype) for n in (33, 300)], **hyper)
    pair.step(4)


@pytest.mark.parametrize("edit", [{"lr": -0.1}, {"momentum": -0.5}, {"weight_decay": -0.1}])
def test_values_edited_to_what_the_constructor_refuses(edit, isa):
    pair = Pair([torch.randn(300)], lr=0.1, momentum=0.9, nesterov=True)
    pair.step(2)
    pair.both(lambda opt: opt.param_groups[0].update(edit))
    pair.step(3)

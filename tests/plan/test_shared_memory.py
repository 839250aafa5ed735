"""Parameters that share memory step one after the other, as torch's loop does; averages are taken after all of them."""

import pytest
import torch
from harness import assert_same, clone_params
from torch.optim.swa_utils import get_ema_multi_avg_fn

from momentum_ext import FusedMomentum

N = 12_000


PATTERNS = {
    "the-same": lambda x: [x, x.view(-1)],
    "three-times": lambda x: [x, x[:], x[:]],
    "halves": lambda x: [x[: 2 * len(x) // 3], x[len(x) // 3 :]],
    "nested": lambda x: [x[100:200], x, x[150:152]],
    "chain": lambda x: [x[i * 1000 : i * 1000 + 1500] for i in range(8)],
    "one-element": lambda x: [x[:100], x[99:]],
    "transposed": lambda x: [x.view(100, -1), x.view(100, -1).t()],
    "columns-and-rows": lambda x: [x.view(-1, 100)[:, 3], x.view(-1, 100)[:, 4], x.view(-1, 100)[5]],
    "beside-others": lambda x: [torch.randn(33), x[:5000], torch.randn(N), x[4000:], torch.randn(7)],
}


def train(params, step):
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        step()


def check(pattern, step_of, size=N, **hyper):
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **hyper}
    params = PATTERNS[pattern](torch.randn(size))
    mine, theirs = clone_params(params), clone_params(params)
    opt = FusedMomentum(mine, ema_decay=0.9, **hyper)
    sgd = torch.optim.SGD(theirs, foreach=False, **hyper)
    averages, update = [], get_ema_multi_avg_fn(0.9)

    def loop():
        sgd.step()
        if averages:
            update(averages, [p.detach() for p in theirs], None)
        else:
            averages.extend(p.detach().clone() for p in theirs)

    train(theirs, loop)
    train(mine, step_of(opt))
    for index, (a, b, average) in enumerate(zip(mine, theirs, averages, strict=True)):
        assert_same(a, b, f"params[{index}]")
        assert_same(opt.state[a]["momentum_buffer"], sgd.state[b]["momentum_buffer"], f"buffer of params[{index}]")
        assert_same(opt.state[a]["ema"], average, f"ema of params[{index}]")
    return opt


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("hyper", [{}, {"nesterov": True}], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_as_the_loop(pattern, hyper, threads):
    torch.set_num_threads(threads)
    check(pattern, lambda opt: opt.step, **hyper)


@pytest.mark.parametrize("pattern", ["the-same", "halves", "columns-and-rows"])
def test_of_a_size_that_two_threads_share(pattern):
    torch.set_num_threads(2)
    check(pattern, lambda opt: opt.step, 400_000)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_compiled(pattern):
    check(pattern, lambda opt: torch.compile(opt.step, backend="eager"))


@pytest.mark.parametrize("pattern", ["the-same", "halves"])
def test_swapped_and_back(pattern):
    opt = check(pattern, lambda opt: opt.step)
    params = opt.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    averages = [opt.state[p]["ema"].clone() for p in params]
    with opt.ema_weights():
        pass
    for param, value, average in zip(params, before, averages, strict=True):
        assert_same(param, value)
        assert_same(opt.state[param]["ema"], average)

"""Tensors that share memory step one after the other, as torch's loop does; averages are taken after all of them."""

import pytest
import torch
from harness import Oracle, Pair, Snapshot, assert_alike, assert_all_same, assert_same

from momentum_ext import FusedMomentum

N = 12_000
HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}

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
    "interleaved": lambda x: [x[: len(x) // 2], x[len(x) // 4 :], x[10:50], x[::2]],
}


def train(pattern, size=N, wrap=lambda step: step, **hyper):
    pair = Pair(PATTERNS[pattern](torch.randn(size)), Oracle, **{**HYPER, "ema_decay": 0.9, **hyper})
    steps = wrap(pair.mine.step), pair.theirs.step
    for _ in range(4):
        pair.new_grads()
        for step in steps:
            step()
        pair.check()
    return pair


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("hyper", [{}, {"nesterov": True}, {"momentum": 0, "ema_decay": None}], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_as_the_loop(pattern, hyper, threads):
    torch.set_num_threads(threads)
    train(pattern, **hyper)


@pytest.mark.parametrize("pattern", ["the-same", "halves", "columns-and-rows", "interleaved"])
def test_of_a_size_that_two_threads_share(pattern):
    torch.set_num_threads(2)
    train(pattern, 400_000)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_compiled(pattern):
    train(pattern, wrap=lambda step: torch.compile(step, backend="eager"))


@pytest.mark.parametrize("pattern", ["the-same", "halves"])
def test_swapped_and_back(pattern):
    opt = train(pattern).mine
    before = Snapshot(opt, "versions")
    with opt.ema_weights():
        assert any(before.has_moved)
    before.assert_unchanged()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("size", [33, 70_001])
def test_the_same_parameter_twice_in_one_group(size):
    param = torch.nn.Parameter(torch.randn(size))
    pair = Pair([param, torch.randn(5), param], **HYPER, dampening=0.3)
    assert pair.params[0][0] is pair.params[2][0]
    pair.step(3)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_that_is_there_twice_is_averaged_once():
    param = torch.nn.Parameter(torch.randn(33))
    opt, average = FusedMomentum([param, param], lr=0.1, ema_decay=0.9), None
    for _ in range(3):
        param.grad = torch.randn(33)
        opt.step()
        average = param.detach().clone() if average is None else average.lerp(param.detach(), 1 - 0.9)
    assert_same(opt.state[param]["ema"], average)


def test_the_same_gradient_for_two_parameters():
    pair = Pair([torch.randn(300), torch.randn(300)], **HYPER)
    for _ in range(3):
        grad = torch.randn(300)
        for mine, theirs in pair.params:
            mine.grad = theirs.grad = grad
        pair.step_as_is()


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_gradients_that_are_other_parameters(momentum):
    """Large, so that two threads would meet."""

    def run(kind):
        params = [torch.nn.Parameter(torch.randn(1 << 18)) for _ in range(3)]
        params[0].grad, params[1].grad, params[2].grad = torch.randn(1 << 18), params[2].detach(), params[0].detach()
        opt = kind(params, lr=0.1, momentum=momentum)
        for _ in range(5):
            opt.step()
        return params

    assert_alike(run)


def test_gradient_that_becomes_the_buffer():
    """Between two steps: the plan still has the same tensors."""

    def run(kind):
        param, buffer = torch.nn.Parameter(torch.randn(33)), torch.randn(33)
        opt = kind([param], lr=0.1, momentum=0.9)
        opt.state[param]["momentum_buffer"] = buffer
        for grad in (torch.randn(33), torch.randn(33), buffer):
            param.grad = grad
            opt.step()
        return [param, buffer]

    assert_alike(run)


def test_threads_do_not_change_what_is_shared():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        results.append([mine for mine, _ in train("halves", 400_000).params])
    assert_all_same(*results)

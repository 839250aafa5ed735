"""Parameter groups: hundreds of them, each with its own hyperparameters, dtypes mixed, empty or idle ones between."""

import random

import pytest
import torch
from harness import Oracle, Pair
from values import FLOATS


def hyper(rng):
    """A random but legal set of hyperparameters."""
    momentum = rng.choice([0, 0.5, 0.9, 0.99])
    nesterov = bool(momentum) and rng.random() < 0.4
    lr = rng.choice([0.1, 0.01, 0.3, 1, 0.0])
    return {
        "lr": torch.tensor(float(lr)) if rng.random() < 0.2 else lr,
        "momentum": momentum,
        "dampening": 0 if nesterov else rng.choice([0, 0.1, 0.5]),
        "weight_decay": rng.choice([0, 0.01, 1e-4, torch.tensor(0.02)]),
        "nesterov": nesterov,
        "maximize": rng.random() < 0.3,
    }


@pytest.mark.parametrize("seed", range(3))
def test_hundreds_of_groups_with_different_hyperparameters(seed, isa):
    rng = random.Random(seed)
    groups = []
    for _ in range(465):
        sizes = [rng.choice([1, 5, 16, 33, 64, 300]) for _ in range(rng.choice([1, 1, 1, 2, 5]))]
        groups.append({"params": [torch.randn(size) for size in sizes], **hyper(rng)})
    pair = Pair(groups, lr=0.1)
    pair.step(5)
    for index, group in enumerate(rng.sample(range(465), 100)):
        edit = hyper(random.Random(index))
        pair.both(lambda opt, group=group, edit=edit: opt.param_groups[group].update(edit))
    pair.step(5)


def test_groups_over_several_threads(threads):
    rng = random.Random(7)
    groups = [{"params": [torch.randn(rng.choice([1, 999, 20_000, 32_001]))], **hyper(rng)} for _ in range(30)]
    Pair(groups, lr=0.1).step(3)


def test_mixed_dtypes_in_one_group():
    params = [torch.randn(n).to(FLOATS[i % 4]) for i, n in enumerate([300, 33, 64, 7, 1, 16, 1000, 5, 0, 70_001])]
    Pair(params, Oracle, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True).step(5)


def test_mixed_dtypes_and_hyperparameters():
    rng = random.Random(11)
    groups = [{"params": [torch.randn(33).to(rng.choice(FLOATS)) for _ in range(3)], **hyper(rng)} for _ in range(60)]
    Pair(groups, Oracle, lr=0.1).step(5)


def test_empty_groups_between():
    groups = [{"params": [torch.randn(33)]}, {"params": []}, {"params": [torch.randn(0)]}, {"params": [torch.randn(7)]}]
    Pair(groups, lr=0.1, momentum=0.9).step(3)


def test_groups_without_gradients_between():
    groups = [{"params": [torch.randn(33), torch.randn(7)], "lr": 0.1 / (i + 1)} for i in range(9)]
    pair = Pair(groups, lr=0.1, momentum=0.9, dampening=0.3)
    for step in range(6):
        pair.step(missing=[index for index in range(18) if (index // 2 + step) % 3 == 0])


def test_momentum_in_some_groups_only():
    groups = [{"params": [torch.randn(300)], "momentum": 0.9 * (i % 2)} for i in range(10)]
    pair = Pair(groups, lr=0.1)
    pair.step(4)
    assert len(pair.mine.state) == 5


def test_many_tensors_in_one_group():
    """More tensors than any fixed table would hold."""
    Pair([torch.randn(1 + i % 40) for i in range(5000)], lr=0.1, momentum=0.9, weight_decay=0.01).step(2)

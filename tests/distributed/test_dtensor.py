"""DTensors, the parameters of FSDP2, beside torch's for-loop on plain tensors."""

import gc
import os

import pytest
import torch
from harness import Pair, assert_same, one_process_group, refused
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}


@pytest.fixture
def training():
    """On a group of one process, a plain tensor among them: the pair, and a function that takes a step."""
    with one_process_group():
        mesh = init_device_mesh("cpu", (1,))
        pair = Pair([torch.randn(40, 6), torch.randn(33), torch.randn(7)], **HYPER)
        places = [[Shard(0)], [Replicate()], None]

        def placed(tensor, index):
            return tensor if places[index] is None else distribute_tensor(tensor, mesh, places[index])

        params = pair.mine.param_groups[0]["params"]
        params[:] = [torch.nn.Parameter(placed(param.detach(), index)) for index, param in enumerate(params)]

        def step():
            for index, (mine, theirs) in enumerate(pair.params):
                theirs.grad = pair.random_like(theirs)
                mine.grad = placed(theirs.grad.clone(), index)
            pair.both(lambda opt: opt.step())

        yield pair, step


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def test_one_process(training):
    """Buffers are DTensors as the parameters are."""
    pair, step = training
    for _ in range(4):
        step()
        for mine, theirs in pair.params:
            assert_same(local(mine), theirs)
            buffer = pair.mine.state[mine]["momentum_buffer"]
            assert type(buffer) is type(mine.data)
            assert_same(local(buffer), pair.theirs.state[theirs]["momentum_buffer"])


def test_a_step_that_raises_has_changed_nothing(training):
    """The plain tensor at fault stands last."""
    pair, step = training
    step()
    mine, _ = pair.params[-1]
    pair.mine.state[mine]["momentum_buffer"] = torch.zeros(5)
    with refused(pair.mine, RuntimeError, "expected the shape of its parameter"):
        pair.mine.step()
    pair.mine.state[mine]["momentum_buffer"] = torch.zeros(7)
    step()


def memory_in_use():
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_nothing_grows_with_steps():
    """100,000 steps of 100 DTensors, each with new gradients, clipped in every tenth step."""
    with one_process_group():
        mesh = init_device_mesh("cpu", (1,))
        params = [torch.nn.Parameter(distribute_tensor(torch.randn(16), mesh, [Shard(0)])) for _ in range(100)]
        opt = FusedMomentum(params, ema_decay=0.99, **HYPER)
        seen = []
        for k in range(100_001):
            for param in params:
                param.grad = DTensor(torch.full((16,), 1e-3), param._spec, requires_grad=False)
            if k % 10 == 0:
                opt.clip_grad_norm_(1.0)
            opt.step()
            if k % 20_000 == 0:
                gc.collect()
                seen.append((memory_in_use(), len(gc.get_objects())))
    assert seen[-1][1] <= seen[1][1] + 100, seen
    assert seen[-1][0] <= seen[1][0] + (4 << 20), seen

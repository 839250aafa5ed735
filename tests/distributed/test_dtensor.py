"""DTensors, the parameters of FSDP2, beside torch's for-loop on plain tensors."""

import pytest
import torch
from harness import Pair, assert_same, one_process_group, refused
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

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

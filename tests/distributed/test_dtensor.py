"""DTensors, the parameters of FSDP2, beside torch's for-loop on plain tensors."""

import pytest
import torch
from harness import Pair, assert_same, one_process_group

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
HYPER = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}


def test_one_process():
    """On a group of one process; buffers are DTensors as the parameters are, a plain tensor is among them."""
    with one_process_group():
        train()


def train(steps=4):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    pair = Pair([torch.randn(40, 6), torch.randn(33), torch.randn(7)], **HYPER)
    places = ([Shard(0)], [Replicate()])
    params = pair.mine.param_groups[0]["params"]
    for index, place in enumerate(places):
        params[index] = torch.nn.Parameter(distribute_tensor(params[index].detach(), mesh, place))
    for _ in range(steps):
        for index, theirs in enumerate(pair.theirs.param_groups[0]["params"]):
            theirs.grad = pair.random_like(theirs)
            grad = theirs.grad.clone()
            params[index].grad = distribute_tensor(grad, mesh, places[index]) if index < 2 else grad
        pair.both(lambda opt: opt.step())
        for index, theirs in enumerate(pair.theirs.param_groups[0]["params"]):
            local = params[index].to_local() if index < 2 else params[index]
            assert_same(local, theirs)
            buffer = pair.mine.state[params[index]]["momentum_buffer"]
            assert type(buffer) is type(params[index].data)
            local = buffer.to_local() if index < 2 else buffer
            assert_same(local, pair.theirs.state[theirs]["momentum_buffer"])

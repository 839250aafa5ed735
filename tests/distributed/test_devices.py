"""DTensors on a GPU: NCCL with one rank, and gloo with two ranks that share the device. On the CPU the same runs, too.

What runs here uses no collective but our own, since gloo has few for CUDA tensors.
"""

import pytest
import torch
from harness import assert_same, for_loop
from ranks import Ranks, mesh_of
from test_ranks import HYPER, Twins, part_of
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import momentum_ext
from momentum_ext import FusedMomentum

GROUPS = {"cpu-gloo-2": (2, "gloo", "cpu"), "cuda-nccl-1": (1, "nccl", "cuda"), "cuda-gloo-2": (2, "gloo", "cuda")}
MODES = [
    {"max_grad_norm": 0.5, "ema_decay": 0.9},
    {"dtype": torch.bfloat16, "master_weights": True, "momentum_dtype": "float16"},
    {"momentum_dtype": "int8", "shapes": ((8, 64), (3, 128), (1, 64), (7, 32))},
    {"dtype": torch.bfloat16, "stochastic_rounding": True},
]


@pytest.fixture(
    scope="module",
    params=[pytest.param(each, marks=[pytest.mark.cuda] if "cuda" in each else []) for each in GROUPS],
)
def ranks(request):
    made = Ranks(*GROUPS[request.param])
    yield made
    made.close()


class OnDevice(Twins):
    """Whose shards each rank cuts for itself. The norms of ranks are rounded otherwise than the whole's."""

    def __init__(self, place, other=FusedMomentum, **options):
        super().__init__((torch.distributed.get_world_size(),), [place], other, plain=0, **options)
        self.is_clipped = "max_grad_norm" in options

    def placed(self, tensor):
        mesh, place = self.mesh, self.places[0]
        shard = tensor
        if place.is_shard():
            chunks = tensor.chunk(mesh.size(), place.dim)
            rank = mesh.get_local_rank()
            shard = chunks[rank] if rank < len(chunks) else tensor.narrow(place.dim, 0, 0)
        shape = {"shape": tensor.shape, "stride": tensor.stride()}
        return DTensor.from_local(shard.clone(), mesh, [place], run_check=False, **shape)

    def check(self):
        for mine, theirs in zip(self.mine, self.whole, strict=True):
            found, wanted = mine.to_local().detach(), part_of(theirs.detach(), mine)
            if self.is_clipped:
                torch.testing.assert_close(found, wanted, rtol=2e-6, atol=1e-6)
            else:
                assert_same(found, wanted)


def trained(place, options, other=FusedMomentum):
    twins = OnDevice(place, other, **options)
    for missing in ((), (1,), ()):
        twins.step(missing=missing)


@pytest.mark.parametrize("place", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("options", MODES, ids=str)
def test_bits_of_plain_tensors(ranks, options, place):
    ranks.run(trained, place, options)


def test_bits_of_the_for_loop(ranks):
    ranks.run(trained, Shard(0), {}, for_loop)


def one_rank_overflows(fused):
    """All ranks leave the step out."""
    twins = OnDevice(Shard(0), fused=fused)
    scaler = momentum_ext.GradScaler(torch.get_default_device().type, init_scale=8.0)
    scaler.scale(torch.ones(()))
    before = [param.to_local().detach().clone() for param in twins.mine]
    twins.new_grads()
    if twins.mesh.get_local_rank() == twins.mesh.size() - 1:
        twins.mine[0].grad.to_local()[-1] = torch.inf
    scaler.unscale_(twins.opt)
    twins.opt.clip_grad_norm_(1.0)
    scaler.step(twins.opt)
    scaler.update()
    assert scaler.get_scale() == 4.0
    for param, old in zip(twins.mine, before, strict=True):
        assert_same(param.to_local().detach(), old)


@pytest.mark.parametrize("fused", [None, True])
def test_an_overflow_of_one_rank(ranks, fused):
    ranks.run(one_rank_overflows, fused)


def offloaded():
    """FSDP2's shards lie on the host, its mesh on the device: the norm is reduced by the mesh's backend."""
    mesh = mesh_of(torch.distributed.get_world_size())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    whole = [nn.Parameter(param.detach().cpu()) for param in model.parameters()]
    fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    opt, theirs = FusedMomentum(model.parameters(), **HYPER), FusedMomentum(whole, **HYPER)
    for seed in range(3):
        generator = torch.Generator("cpu").manual_seed(seed)
        for mine, their in zip(model.parameters(), whole, strict=True):
            their.grad = torch.randn(their.shape, generator=generator, device="cpu")
            mine.grad = DTensor(part_of(their.grad, mine).clone(), mine._spec, requires_grad=False)
        norms = [each.clip_grad_norm_(0.1).item() for each in (opt, theirs)]
        torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
        opt.step()
        theirs.step()
    for mine, their in zip(model.parameters(), whole, strict=True):
        assert mine.to_local().device.type == opt.state[mine]["momentum_buffer"].to_local().device.type == "cpu"
        torch.testing.assert_close(mine.to_local().detach(), part_of(their.detach(), mine), rtol=2e-6, atol=1e-6)


def test_shards_on_the_host(ranks):
    ranks.run(offloaded)

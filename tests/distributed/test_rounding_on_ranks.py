"""Stochastic rounding of DTensors: an element's random bits are those of its place in the whole tensor."""

import pytest
import torch
from harness import assert_same, refused
from ranks import mesh_of
from test_ranks import HYPER, Columns, full, part_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from momentum_ext import FusedMomentum
from momentum_ext.dtensor import like

# Rows of shards that begin anywhere in a draw of random bits; the last has more than a tile.
ANYWHERE = ((8, 6), (5, 3), (1, 4), (0, 3), (4, 3, 2), (3, 37, 10), (11, 1003))
AT_RANDOM = {"dtype": torch.bfloat16, "momentum_dtype": "bfloat16", "stochastic_rounding": True, "rounding_seed": 5}


def rounded_at_random(mesh, places):
    twins = Columns(mesh, places, plain=1, shapes=(*ANYWHERE, (7,)), **AT_RANDOM)
    twins.step(3)


@pytest.mark.parametrize("places", [["columns"], [Shard(1)]], ids=str)
def test_rounding_at_random_on_two_ranks(two_ranks, places):
    two_ranks.run(rounded_at_random, (2,), places)


@pytest.mark.parametrize(
    "mesh, places",
    [((4,), ["columns"]), ((2, 2), [Shard(0), "columns"]), ((2, 2), ["columns", "columns"]), ((2, 2), [Shard(0)] * 2)],
    ids=str,
)
def test_rounding_at_random_on_four_ranks(four_ranks, mesh, places):
    four_ranks.run(rounded_at_random, mesh, places)


def rounded_in_fsdp_below_tp():
    """FSDP2 shards what tensor parallelism has sharded, in the same dimension and in the other."""
    mesh = mesh_of(2, 2, names=("dp", "tp"))
    found = []
    for is_parallel in (True, False):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12)).bfloat16()
        if is_parallel:
            parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
            fully_shard(model, mesh=mesh["dp"])
        opt = FusedMomentum(model.parameters(), **HYPER, stochastic_rounding=True)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            for param in model.parameters():
                grad = torch.randn(param.shape, generator=generator).bfloat16()
                param.grad = like(param, part_of(grad, param).contiguous()) if is_parallel else grad
            opt.step()
        found.append([full(param.detach()) for param in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        assert_same(mine, theirs)


def test_rounding_at_random_in_fsdp2_over_tensor_parallelism(four_ranks):
    four_ranks.run(rounded_in_fsdp_below_tp)


def refused_on_every_rank(mesh, places, shape, says, transposed=False):
    """Also on a rank whose own shard would do."""
    value = torch.randn(shape).bfloat16()
    value = value.t().contiguous().t() if transposed else value
    param = nn.Parameter(distribute_tensor(value, mesh_of(*mesh), places))
    opt = FusedMomentum([param], **HYPER, stochastic_rounding=True)
    param.grad = torch.ones_like(param)
    with refused(opt, RuntimeError, rf"params'\]\[0\]: stochastic_rounding needs {says}.*, got .* of \({shape[0]}, "):
        opt.step()


@pytest.mark.parametrize(
    "mesh, places, shape, says, transposed",
    [
        ((2, 2), [Shard(1), Shard(2)], (3, 4, 6), "shards that are runs", False),
        ((2, 2), [Shard(1), Shard(2)], (3, 3, 4), "shards that are runs", False),
        ((4,), [Shard(0)], (5, 3), "a whole tensor whose rows", True),
        ((4,), [_StridedShard(0, split_factor=2)], (8, 3), "shards that are in one piece", False),
    ],
    ids=["runs", "runs of some ranks", "transposed", "strided"],
)
def test_rounding_at_random_refuses_what_it_cannot_place(four_ranks, mesh, places, shape, says, transposed):
    four_ranks.run(refused_on_every_rank, mesh, places, shape, says, transposed)

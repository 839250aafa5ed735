"""What wraps a model or an optimizer for several processes, with torch's SGD and with FusedMomentum: the same bits."""

import copy
import functools
import os
import socket

import pytest
import torch
from harness import assert_all_same, assert_same, for_loop
from ranks import mesh_of
from test_ranks import HYPER, model_of
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.fsdp import CPUOffloadPolicy, StateDictType, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.optim import (
    DistributedOptimizer,
    PostLocalSGDOptimizer,
    ZeroRedundancyOptimizer,
    _apply_optimizer_in_backward,
    _NamedOptimizer,
)
from torch.nn.parallel import DistributedDataParallel

import momentum_ext
from momentum_ext import FusedMomentum

pytestmark = pytest.mark.filterwarnings("ignore")


def batch(k, count=4):
    """Another one on each rank."""
    torch.manual_seed(10 * k + torch.distributed.get_rank())
    return torch.randn(count, 6)


def steps(model, make, count):
    """The parameters after so many steps."""
    optimizer = make(model.parameters(), **HYPER)
    for k in range(count):
        optimizer.zero_grad()
        model(batch(k)).square().mean().backward()
        optimizer.step()
    return model.parameters()


def assert_alike(train, *kinds):
    found = [[tensor.detach().clone() for tensor in train(make)] for make in (for_loop, *(kinds or (FusedMomentum,)))]
    for other in found[1:]:
        assert_all_same(other, found[0])
    assert any(not torch.equal(a, b) for a, b in zip(found[0], model_of().parameters(), strict=False))


# ---- DistributedDataParallel ----------------------------------------------------------------------------------------


def data_parallel(options, hook, clip):
    def train(make):
        model = DistributedDataParallel(model_of(), bucket_cap_mb=1e-4, **options)
        if hook is not None:
            model.register_comm_hook(None, hook)
        optimizer = make(model.parameters(), **HYPER)
        for k in range(5):
            optimizer.zero_grad(set_to_none=k % 2 == 0)
            if not options.get("static_graph"):
                with model.no_sync():
                    model(batch(100 + k)).square().mean().backward()
            model(batch(k)).square().mean().backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        return model.parameters()

    assert_alike(train)


@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
@pytest.mark.parametrize("hook", [None, fp16_compress_hook], ids=["", "fp16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_as_bucket_view": True}, {"gradient_as_bucket_view": True, "static_graph": True}],
    ids=["", "views", "static"],
)
def test_ddp(two_ranks, options, hook, clip):
    two_ranks.run(data_parallel, options, hook, clip)


def joined():
    """Ranks with another number of batches each."""

    def train(make):
        model = DistributedDataParallel(model_of(), gradient_as_bucket_view=True)
        optimizer = make(model.parameters(), **HYPER)
        with Join([model, optimizer] if isinstance(optimizer, ZeroRedundancyOptimizer) else [model]):
            for k in range(3 + 2 * torch.distributed.get_rank()):
                optimizer.zero_grad()
                model(batch(k)).square().mean().backward()
                optimizer.step()
        return model.parameters()

    assert_alike(train)
    shares = [functools.partial(ZeroRedundancyOptimizer, optimizer_class=make) for make in (for_loop, FusedMomentum)]
    assert_all_same(*([param.detach() for param in train(make)] for make in shares))


def test_join(two_ranks):
    two_ranks.run(joined)


def clipped_views():
    """Our clipping knows gradients that are views of buckets, also after they were reduced again."""
    model = DistributedDataParallel(model_of(), gradient_as_bucket_view=True, bucket_cap_mb=1e-4)
    twin = DistributedDataParallel(model_of())
    mine, theirs = FusedMomentum(model.parameters(), **HYPER), for_loop(twin.parameters(), **HYPER)
    for k in range(4):
        for each, optimizer in ((model, mine), (twin, theirs)):
            optimizer.zero_grad(set_to_none=False)
            each(batch(k)).square().mean().backward()
        norm = mine.clip_grad_norm_(0.1)
        expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        mine.step()
        theirs.step()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_clipping_of_bucket_views(two_ranks):
    two_ranks.run(clipped_views)


def overflow(make_scaler):
    """On one rank; DDP's reduction brings it to all, so that all leave the step out."""

    def train(make):
        model = DistributedDataParallel(model_of(), gradient_as_bucket_view=True)
        optimizer = make(model.parameters(), **HYPER)
        scaler = make_scaler("cpu", init_scale=256.0)
        for k in range(4):
            optimizer.zero_grad()
            is_too_large = k == 2 and torch.distributed.get_rank() == 1
            scaler.scale(model(batch(k)).square().mean() * (1e38 if is_too_large else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 128.0
        return model.parameters()

    assert_alike(train, FusedMomentum, functools.partial(FusedMomentum, fused=True))


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, momentum_ext.GradScaler])
def test_ddp_with_a_scaler(two_ranks, scaler):
    two_ranks.run(overflow, scaler)


# ---- ZeroRedundancyOptimizer ----------------------------------------------------------------------------------------


def zero(options, as_views):
    """The wrapper's optimizer holds each rank's share of the parameters; its state is gathered for a checkpoint."""

    def train(make, **more):
        model = DistributedDataParallel(model_of(), gradient_as_bucket_view=True)
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=make, parameters_as_bucket_view=as_views, **HYPER, **more
        )
        for k in range(6):
            optimizer.zero_grad()
            model(batch(k)).square().mean().backward()
            optimizer.step()
            if k == 2:
                optimizer.consolidate_state_dict(to=0)
                state = [copy.deepcopy(optimizer.state_dict()) if torch.distributed.get_rank() == 0 else None]
                torch.distributed.broadcast_object_list(state, 0)
                for group in optimizer.param_groups:
                    group["lr"] = 17.0
                optimizer.load_state_dict(state[0])
            optimizer.param_groups[0]["lr"] *= 0.9
        return list(model.parameters())

    if not options:
        assert_alike(train)
        return
    whole = DistributedDataParallel(model_of())
    plain = FusedMomentum(whole.parameters(), **HYPER, **options)
    for k in range(6):
        plain.zero_grad()
        whole(batch(k)).square().mean().backward()
        plain.step()
        plain.param_groups[0]["lr"] *= 0.9
    for mine, theirs in zip(train(FusedMomentum, **options), whole.parameters(), strict=True):
        assert_same(mine.detach(), theirs.detach())


@pytest.mark.parametrize("as_views", [False, True], ids=["", "views"])
@pytest.mark.parametrize(
    "options", [{}, {"momentum_dtype": "int8"}, {"ema_decay": 0.9, "formulation": "classical"}], ids=str
)
def test_zero_redundancy_optimizer(two_ranks, options, as_views):
    two_ranks.run(zero, options, as_views)


# ---- other wrappers of an optimizer ---------------------------------------------------------------------------------


def averaged_between_steps(model, make):
    averager = PeriodicModelAverager(period=2, warmup_steps=1)
    return PostLocalSGDOptimizer(make(model.parameters(), **HYPER), averager)


def by_name(model, make):
    return _NamedOptimizer(model.named_parameters(), make, **HYPER)


def wrapped(wrapper):
    """State dicts of wrappers, too, which hold more than the optimizer's or name parameters otherwise."""

    def train(make):
        model = model_of()
        optimizer = wrapper(model, make)
        for k in range(6):
            model.zero_grad()
            model(batch(k)).square().mean().backward()
            optimizer.step()
            if k == 2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return model.parameters()

    assert_alike(train)


@pytest.mark.parametrize("wrapper", [averaged_between_steps, by_name])
def test_wrappers_of_an_optimizer(two_ranks, wrapper):
    two_ranks.run(wrapped, wrapper)


def one_optimizer_each():
    """Torch's own step in backward: an optimizer for each parameter."""

    def train(make):
        model = model_of()
        _apply_optimizer_in_backward(make, model.parameters(), HYPER)
        for k in range(4):
            model(batch(k)).square().mean().backward()
        return model.parameters()

    assert_alike(train)


def test_torch_steps_in_backward(two_ranks):
    two_ranks.run(one_optimizer_each)


def remote():
    """DistributedOptimizer: the gradients are none of the parameters' own."""
    from torch.distributed import autograd, rpc

    rank = torch.distributed.get_rank()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store = torch.distributed.distributed_c10d._get_default_store()
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            store.set("rpc", str(free.getsockname()[1]))
    os.environ["MASTER_PORT"] = store.get("rpc").decode()
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2)

    def train(make):
        params = [torch.linspace(-1, 1, size).requires_grad_() for size in (5, 12)]
        references = [rpc.RRef(param) for param in params]
        optimizer = DistributedOptimizer(make, references, **HYPER)
        for _ in range(4):
            with autograd.context() as context:
                loss = sum(reference.to_here().square().sum() for reference in references)
                autograd.backward(context, [loss])
                optimizer.step(context)
        return params

    if rank == 0:
        found = [train(make) for make in (torch.optim.SGD, FusedMomentum)]
        assert_all_same(*([param.detach() for param in params] for params in found))
        assert not torch.equal(found[0][0], torch.linspace(-1, 1, 5))
    rpc.shutdown()


def test_distributed_optimizer(two_ranks):
    two_ranks.run(remote)


# ---- FSDP2 with its shards on the host ------------------------------------------------------------------------------


def offloaded():
    def train(make):
        model = model_of()
        fully_shard(model, mesh=mesh_of(2), offload_policy=CPUOffloadPolicy(pin_memory=False))
        optimizer = make(model.parameters(), **HYPER)
        for k in range(6):
            optimizer.zero_grad()
            model(batch(k)).square().mean().backward()
            if make is for_loop:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            else:
                optimizer.clip_grad_norm_(0.1)
            optimizer.step()
        return [param.full_tensor() for param in model.parameters()]

    for mine, theirs in zip(train(FusedMomentum), train(for_loop), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_shards_that_fsdp2_keeps_on_the_host(two_ranks):
    two_ranks.run(offloaded)


# ---- FSDP1 ----------------------------------------------------------------------------------------------------------


def sharded_by_fsdp1(use_orig_params, options, reload):
    def train(make, reload=reload):
        wrap = functools.partial(FSDP1, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        model = model_of()
        for i in (0, 2):
            model[i] = wrap(model[i])
        model = wrap(model)
        more = options if make is not for_loop else {}
        optimizer = make(model.parameters(), **HYPER, **more)
        for k in range(6):
            optimizer.zero_grad()
            model(batch(k)).square().mean().backward()
            optimizer.step()
            if k == 2 and reload:
                kind = StateDictType.SHARDED_STATE_DICT if reload == "sharded" else StateDictType.FULL_STATE_DICT
                with FSDP1.state_dict_type(model, kind):
                    state = FSDP1.optim_state_dict(model, optimizer)
                    optimizer = make(model.parameters(), **HYPER, **more)
                    optimizer.load_state_dict(FSDP1.optim_state_dict_to_load(model, optimizer, state))
        with FSDP1.summon_full_params(model):
            return [param.detach().clone() for param in model.parameters()]

    if not options:
        assert_alike(train)
        return
    assert_all_same(train(FusedMomentum), train(FusedMomentum, reload=None))


@pytest.mark.parametrize("reload", [None, "sharded", "full"])
@pytest.mark.parametrize("use_orig_params", [False, True], ids=["flat", "orig"])
def test_fsdp1(two_ranks, use_orig_params, reload):
    two_ranks.run(sharded_by_fsdp1, use_orig_params, {}, reload)


@pytest.mark.parametrize(
    "options", [{"ema_decay": 0.9}, {"momentum_dtype": "bfloat16"}, {"momentum_dtype": "int8"}], ids=str
)
@pytest.mark.parametrize("reload", ["sharded", "full"])
@pytest.mark.parametrize("use_orig_params", [False, True], ids=["flat", "orig"])
def test_options_under_fsdp1(two_ranks, use_orig_params, reload, options):
    two_ranks.run(sharded_by_fsdp1, use_orig_params, options, reload)


def fsdp1_norm(use_orig_params):
    """Each rank sees a part of the gradient: with the group the norm is the whole's."""
    model = FSDP1(model_of(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    optimizer = FusedMomentum(model.parameters(), **HYPER)
    model(batch(0)).square().mean().backward()
    norm = optimizer.clip_grad_norm_(0.1, process_group=torch.distributed.group.WORLD)
    expected = model.clip_grad_norm_(1e9)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("use_orig_params", [False, True], ids=["flat", "orig"])
def test_norm_of_fsdp1(two_ranks, use_orig_params):
    two_ranks.run(fsdp1_norm, use_orig_params)


# ---- replicate ------------------------------------------------------------------------------------------------------


def replicated():
    assert_alike(lambda make: steps(replicate(model_of()), make, 4))


def test_replicate(two_ranks):
    two_ranks.run(replicated)

"""DTensors on two and four ranks, beside plain tensors of the whole model: the same bits, whatever the sharding."""

import contextlib
import copy
import math

import pytest
import torch
from harness import Snapshot, assert_same, for_loop, refused
from ranks import mesh_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.utils.flop_counter import FlopCounterMode

import momentum_ext
from momentum_ext import FusedMomentum
from momentum_ext.dtensor import like
from momentum_ext.keys import SCALE_OF

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
# Even, uneven, one element for two ranks, none at all.
SHAPES = ((8, 6), (5, 3), (1, 4), (7,), (0, 3), (4, 3, 2))
ON_TWO = [((2,), places) for places in ([Shard(0)], [Replicate()])]
ON_FOUR = [((2, 2), places) for places in ([Replicate(), Shard(0)], [Shard(0), Shard(0)], [Shard(0), Replicate()])]
ON_FOUR += [((4,), [Shard(0)])]


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(whole, mine):
    """What this rank's shard of it holds; no collective."""
    chunk = mine.__create_chunk_list__()[0]
    for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        whole = whole.narrow(dim, offset, size)
    return whole


def assert_shard(mine, whole, what="tensor"):
    if isinstance(mine, DTensor):
        mine, whole = mine.to_local(), part_of(whole, mine)
    assert_same(mine.detach(), whole.detach(), what)


def placed_state(param, entry):
    """With what is plain, of the local shard, as DTensors: scales, and codes of 4 bits."""
    if not isinstance(param, DTensor):
        return entry
    rows, columns = param.shape[:-1], param.shape[-1]
    plain = {}
    for state, scale in SCALE_OF.items():
        if scale not in entry:
            continue
        plain[scale] = like(param, entry[scale], (*rows, columns // 32, 2))
        if not isinstance(entry[state], DTensor):
            plain[state] = like(param, entry[state], (*rows, columns // 2))
    return {**entry, **plain}


class Twins:
    """A list of parameters, distributed and whole, and an optimizer of each."""

    def __init__(
        self, shape_of_mesh, places, other=FusedMomentum, dtype=torch.float32, plain=1, shapes=SHAPES, **options
    ):
        self.mesh, self.places = mesh_of(*shape_of_mesh), places
        values = [torch.randn(shape).to(dtype) for shape in shapes]
        self.whole = [nn.Parameter(value.clone()) for value in values]
        self.mine = [nn.Parameter(self.placed(value)) for value in values[: len(values) - plain]]
        self.mine += [nn.Parameter(value.clone()) for value in values[len(values) - plain :]]
        self.theirs = other(self.whole, **{**HYPER, **(options if other is FusedMomentum else {})})
        self.opt = FusedMomentum(self.mine, **{**HYPER, **options})

    def placed(self, tensor):
        return distribute_tensor(tensor.clone(), self.mesh, self.places)

    def new_grads(self, missing=(), scale=1.0):
        for i, (mine, theirs) in enumerate(zip(self.mine, self.whole, strict=True)):
            grad = (scale * torch.randn(theirs.shape)).to(theirs.dtype)
            theirs.grad = None if i in missing else grad
            mine.grad = None if i in missing else self.placed(grad) if isinstance(mine, DTensor) else grad.clone()

    def step(self, times=1, missing=()):
        for _ in range(times):
            self.new_grads(missing)
            self.step_as_is()

    def step_as_is(self):
        self.opt.step()
        self.theirs.step()
        self.check()

    def check(self):
        for mine, theirs in zip(self.mine, self.whole, strict=True):
            assert_shard(mine, theirs)
            found, wanted = placed_state(mine, self.opt.state.get(mine, {})), self.theirs.state.get(theirs, {})
            assert set(found) == set(wanted)
            for key, value in wanted.items():
                assert type(found[key]) is type(mine.data), key
                assert_shard(found[key], value, key)
                if isinstance(mine, DTensor):
                    assert (found[key].placements, found[key].device_mesh) == (mine.placements, mine.device_mesh)


def trained(mesh, places, other, options):
    twins = Twins(mesh, places, other, **options)
    twins.step(2, missing=(1, 3))
    twins.step(2)
    for opt in (twins.opt, twins.theirs):
        opt.param_groups[0]["lr"] = 0.03
    twins.step(3)


MODES = [
    {},
    {"ema_decay": 0.9},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "master_weights": True, "ema_decay": 0.9},
    {"dtype": torch.float16, "master_weights": True},
    {"momentum_dtype": "bfloat16", "formulation": "classical"},
    {"max_grad_norm": 1e6, "decoupled_weight_decay": True},
    {"dtype": torch.bfloat16, "stochastic_rounding": True, "ema_decay": 0.9},
    {"momentum_dtype": "float16", "stochastic_rounding": True, "rounding_seed": 3},
    {"dtype": torch.bfloat16, "master_weights": 24},
]


@pytest.mark.parametrize("places", [[Shard(0)], [Replicate()]], ids=str)
@pytest.mark.parametrize("options", MODES, ids=str)
def test_every_mode_has_the_bits_of_plain_tensors(two_ranks, options, places):
    two_ranks.run(trained, (2,), places, FusedMomentum, options)


@pytest.mark.parametrize("mesh, places", ON_TWO, ids=str)
def test_two_ranks_have_the_bits_of_the_for_loop(two_ranks, mesh, places):
    two_ranks.run(trained, mesh, places, for_loop, {})


@pytest.mark.parametrize("mesh, places", ON_FOUR, ids=str)
def test_four_ranks_have_the_bits_of_the_for_loop(four_ranks, mesh, places):
    four_ranks.run(trained, mesh, places, for_loop, {})


# Rows of whole blocks, which no sharding below cuts: the columns of two ranks are 64 of 128, or 32 of 64.
ROWS = ((8, 128), (5, 128), (1, 64), (0, 128), (4, 3, 128))
IN_BLOCKS = [
    {"momentum_dtype": "int8"},
    {"momentum_dtype": "float8_e4m3fn", "dtype": torch.bfloat16},
    {"momentum_dtype": "int4", "dtype": torch.bfloat16, "master_weights": True},
    {"momentum_dtype": "int8", "dtype": torch.bfloat16, "master_weights": True, "ema_decay": 0.9},
    {"momentum_dtype": "int8", "formulation": "classical", "max_grad_norm": 1e6},
    {"momentum_dtype": "int8", "dtype": torch.bfloat16, "stochastic_rounding": True},
]


class Columns(Twins):
    """`places` may say "columns": the last dimension, whatever its number."""

    def placed(self, tensor):
        last = Shard(tensor.dim() - 1)
        places = [last if place == "columns" else place for place in self.places]
        return distribute_tensor(tensor.clone(), self.mesh, places)


def trained_in_blocks(mesh, places, options):
    twins = Columns(mesh, places, plain=1, shapes=(*ROWS, (3, 64)), **options)
    twins.step(2, missing=(1, 3))
    twins.step(2)
    twins.opt.load_state_dict(copy.deepcopy(twins.opt.state_dict()))
    twins.step(2)


@pytest.mark.parametrize("places", [[Shard(0)], [Replicate()], ["columns"]], ids=str)
@pytest.mark.parametrize("options", IN_BLOCKS, ids=str)
def test_blocks_on_two_ranks(two_ranks, options, places):
    two_ranks.run(trained_in_blocks, (2,), places, options)


@pytest.mark.parametrize("places", [[Replicate(), "columns"], [Shard(0), "columns"], [Shard(0), Shard(0)]], ids=str)
@pytest.mark.parametrize("options", IN_BLOCKS[:4], ids=str)
def test_blocks_on_four_ranks(four_ranks, options, places):
    four_ranks.run(trained_in_blocks, (2, 2), places, options)


def trained_locally(options):
    """Wherever the blocks lie: each rank's shards train as plain tensors do."""
    twins = Twins((2,), [Shard(0)], plain=0, **options)
    shards = [nn.Parameter(param.detach().to_local().clone()) for param in twins.mine]
    theirs = FusedMomentum(shards, **{**HYPER, **{k: v for k, v in options.items() if k != "dtype"}})
    for _ in range(3):
        twins.new_grads()
        for shard, param in zip(shards, twins.mine, strict=True):
            shard.grad = param.grad.to_local().clone()
        twins.opt.step()
        theirs.step()
        for shard, param in zip(shards, twins.mine, strict=True):
            assert_same(param.detach().to_local(), shard.detach())
            for key, value in theirs.state[shard].items():
                found = twins.opt.state[param][key]
                assert_same(found.to_local() if isinstance(found, DTensor) else found, value, key)
        twins.opt.load_state_dict(copy.deepcopy(twins.opt.state_dict()))
        theirs.load_state_dict(copy.deepcopy(theirs.state_dict()))


def saved_forms():
    """Of parameters whose columns lie one after the other: a shard of one row or none looks contiguous."""
    mesh, forms = mesh_of(4), []
    for rows, rows_here in ((5, (2, 2, 1, 0)), (8, (2, 2, 2, 2))):
        shard = torch.randn(64, rows_here[mesh.get_rank()]).t()
        param = nn.Parameter(DTensor.from_local(shard, mesh, [Shard(0)], shape=(rows, 64), stride=(1, rows)))
        opt = FusedMomentum([param], lr=0.1, momentum=0.9, momentum_dtype="int8")
        param.grad = torch.ones_like(param)
        opt.step()
        forms.append(isinstance(opt.state_dict()["state"][0]["momentum_buffer"], dict))
    return forms


def test_all_ranks_save_one_form(four_ranks):
    assert four_ranks.run(saved_forms) == [[False, False]] * 4


@pytest.mark.parametrize("options", IN_BLOCKS[:4], ids=str)
def test_shards_whose_blocks_are_their_own(two_ranks, options):
    two_ranks.run(trained_locally, options)


def trained_by_kernels(mesh, places):
    """Torch's own path, and a preparation of what has not changed, would be slow."""
    twins = Twins(mesh, places)
    twins.step(3)
    twins.opt._torch_step = momentum_ext.dtensor.like = None
    try:
        twins.step(2)
    finally:
        momentum_ext.dtensor.like = like


def test_dtensors_go_to_the_kernels(two_ranks):
    two_ranks.run(trained_by_kernels, (2,), [Shard(0)])


# ---- gradients that lie otherwise -----------------------------------------------------------------------------------


def other_placements(param_places, grad_places, clips):
    """Each step's gradient has the same spec object, as torch's cache gives it, and is then not taken for a shard."""
    twins = Twins((2,), param_places)
    specs = {}
    for _ in range(6):
        twins.new_grads()
        for i, (mine, theirs) in enumerate(zip(twins.mine, twins.whole, strict=True)):
            if isinstance(mine, DTensor):
                part = (theirs.grad / 2 if grad_places == [Partial()] else theirs.grad).clone()
                if i not in specs:
                    specs[i] = DTensor.from_local(part, twins.mesh, grad_places, run_check=False)._spec
                mine.grad = DTensor(part, specs[i], requires_grad=False)
        if clips:
            norms = [opt.clip_grad_norm_(1e6).item() for opt in (twins.opt, twins.theirs)]
            torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
        twins.step_as_is()


@pytest.mark.parametrize("clips", [False, True], ids=["", "clip"])
@pytest.mark.parametrize(
    "param_places, grad_places",
    [([Shard(0)], [Replicate()]), ([Shard(0)], [Partial()]), ([Replicate()], [Partial()])],
    ids=str,
)
def test_a_gradient_with_other_placements_is_redistributed(two_ranks, param_places, grad_places, clips):
    two_ranks.run(other_placements, param_places, grad_places, clips)


def sequence_parallel():
    """A norm's gradients are Partial, its parameters Replicate."""
    mesh = mesh_of(2)
    found = []
    for is_parallel in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))
        if is_parallel:
            parallelize_module(model, mesh, {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1))})
        optimizer = FusedMomentum(model.parameters(), **HYPER)
        torch.manual_seed(1)
        for _ in range(6):
            optimizer.zero_grad()
            x = torch.randn(3, 4, 6)
            rank = torch.distributed.get_rank()
            out = model(x.chunk(2, dim=1)[rank].contiguous() if is_parallel else x)
            if is_parallel:
                (out * torch.arange(4.0)[2 * rank : 2 * rank + 2]).sum().backward()
            else:
                (out * torch.arange(4.0)).sum().backward()
            optimizer.step()
        found.append([full(param.detach()) for param in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_sequence_parallel(two_ranks):
    two_ranks.run(sequence_parallel)


def redistributed_beside():
    """Another thread lets go of an unchanged slot's gradient while a redistribution waits."""
    plain = nn.Parameter(torch.randn(1 << 20))
    sharded = nn.Parameter(distribute_tensor(torch.randn(4, 2), mesh_of(2), [Shard(0)]))
    opt = FusedMomentum([plain, sharded], **HYPER)
    for _ in range(3):
        plain.grad = torch.ones_like(plain)
        sharded.grad = distribute_tensor(torch.ones(4, 2), mesh_of(2), [Shard(0)])
        opt.step()
    redistributed = momentum_ext.dtensor.redistributed

    def drop(*arguments):
        plain.grad = None
        junk = [torch.full((1 << 20,), 9.0) for _ in range(4)]  # would get its memory
        del junk
        return redistributed(*arguments)

    plain.grad = torch.ones_like(plain)
    sharded.grad = distribute_tensor(torch.ones(4, 2), mesh_of(2), [Replicate()])
    twin = nn.Parameter(plain.detach().clone())
    other = FusedMomentum([twin], **HYPER)
    other.state[twin]["momentum_buffer"] = opt.state[plain]["momentum_buffer"].clone()
    twin.grad = torch.ones_like(twin)
    momentum_ext.dtensor.redistributed = drop
    try:
        opt.step()
    finally:
        momentum_ext.dtensor.redistributed = redistributed
    other.step()
    assert_same(plain.detach(), twin.detach())


def test_tensors_outlive_what_python_does_meanwhile(two_ranks):
    two_ranks.run(redistributed_beside)


class Norms:
    """Parameters of which every rank has a replica, as sequence parallelism has them, and one that is sharded."""

    def __init__(self, **options):
        self.mesh = mesh_of(torch.distributed.get_world_size())
        self.params = [nn.Parameter(distribute_tensor(torch.ones(3), self.mesh, [Replicate()])) for _ in range(3)]
        self.params.append(nn.Parameter(distribute_tensor(torch.ones(8), self.mesh, [Shard(0)])))
        self.opt = FusedMomentum(self.params, lr=0.125, momentum=0.5, **options)

    def new_grads(self, rank_without=None, missing=()):
        """Each rank's part of the gradient is 1; those missing are so on that rank alone."""
        for i, param in enumerate(self.params):
            placements = [Partial()] if i < 3 else param.placements
            local = torch.ones_like(param.to_local())
            lacks = i in missing and torch.distributed.get_rank() == rank_without
            param.grad = None if lacks else DTensor.from_local(local, self.mesh, placements)

    def refuse(self, act, name):
        with refused(self.opt, RuntimeError, rf"gradient of {name}: it is .* other ranks have another.* or set it to"):
            act()
        total = torch.ones(())
        torch.distributed.all_reduce(total)  # no rank has taken part in another's collective
        assert total.item() == torch.distributed.get_world_size()


def lacking(how, missing, warm_up):
    """One rank lacks gradients that the others would redistribute."""
    last = torch.distributed.get_world_size() - 1
    norms = Norms(max_grad_norm=1e9 if how == "option" else None)
    for _ in range(warm_up):
        norms.new_grads()
        norms.opt.step()
    for _ in range(2):
        norms.new_grads(last, missing)
        norms.refuse(lambda: norms.opt.clip_grad_norm_(1e9) if how == "clip" else norms.opt.step(), r"\S*\[0\]")
    norms.new_grads()
    norms.opt.step()
    local = norms.params[0].to_local()
    twin = torch.nn.Parameter(torch.ones(3))
    other = torch.optim.SGD([twin], lr=0.125, momentum=0.5)
    for _ in range(warm_up + 1):
        twin.grad = torch.full((3,), last + 1.0)
        other.step()
    assert_same(local, twin.detach())


def one_behind():
    """A rank that has never had such a gradient goes on without the others: its next step must not meet their first."""
    norms, rank = Norms(), torch.distributed.get_rank()
    if rank == 1:
        norms.new_grads(1, (0, 1, 2))
        norms.opt.step()
    norms.new_grads()
    with refused(norms.opt, RuntimeError, "ranks are at different steps.*start again from a checkpoint"):
        norms.opt.step()


def test_steps_of_different_numbers_are_not_mixed(two_ranks):
    two_ranks.run(one_behind)


def lacking_after_a_load():
    """What a rank knows of other ranks' gradients outlives load_state_dict()."""
    norms = Norms()
    norms.new_grads()
    norms.opt.step()
    norms.opt.load_state_dict(copy.deepcopy(norms.opt.state_dict()))
    norms.new_grads(1, (0, 1, 2))
    norms.refuse(norms.opt.step, r"\S*\[0\]")


def test_gradients_that_a_rank_lacks_after_a_load(two_ranks):
    two_ranks.run(lacking_after_a_load)


LACKING = [
    ("step", (0,), 0),  # the others of this rank would meet those of other ranks that are one further
    ("step", (0, 1, 2), 1),  # nothing to redistribute here, and the step before says that others may have
    ("clip", (0, 1, 2), 0),
    ("clip", (0,), 1),
    ("option", (0, 1, 2), 0),
]


@pytest.mark.parametrize("how, missing, warm_up", LACKING)
def test_a_gradient_that_two_ranks_would_redistribute_and_one_lacks(two_ranks, how, missing, warm_up):
    two_ranks.run(lacking, how, missing, warm_up)


@pytest.mark.parametrize("how, missing, warm_up", LACKING)
def test_a_gradient_that_four_ranks_would_redistribute_and_one_lacks(four_ranks, how, missing, warm_up):
    four_ranks.run(lacking, how, missing, warm_up)


def otherwise(how):
    """Each rank has a gradient of other placements or dtype, or one rank's lies as the parameter does."""
    rank = torch.distributed.get_rank()
    norms = Norms()
    norms.new_grads()
    param = norms.params[1]
    if how == "placements" and rank == 1:
        param.grad = DTensor.from_local(torch.ones(1), norms.mesh, [Shard(0)], shape=(3,), stride=(1,))
    if how == "dtype" and rank == 1:
        param.grad_dtype = None
        param.grad = DTensor.from_local(torch.ones(3, dtype=torch.float64), norms.mesh, [Partial()])
    if how == "one rank" and rank == 1:
        param.grad = DTensor.from_local(torch.ones(3), norms.mesh, [Replicate()])
    norms.refuse(norms.opt.step, r"\S*\[1\]")
    norms.refuse(lambda: norms.opt.clip_grad_norm_(1.0), r"\S*\[1\]")


@pytest.mark.parametrize("how", ["placements", "dtype", "one rank"])
def test_gradients_that_ranks_would_redistribute_otherwise(two_ranks, how):
    two_ranks.run(otherwise, how)


def two_meshes():
    """Ranks that differ on one mesh still take part in what the others wait for on the other, larger one."""
    rank = torch.distributed.get_rank()
    pair, whole = mesh_of(2, 2, names=("a", "b"))["b"], mesh_of(4)
    params = [nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()])) for mesh in (pair, whole)]
    opt = FusedMomentum(params, lr=0.125)
    for param in params:
        param.grad = DTensor.from_local(torch.ones(3), param.device_mesh, [Partial()])
    if rank == 3:
        params[0].grad_dtype = None
        params[0].grad = DTensor.from_local(torch.ones(3).double(), pair, [Partial()])
    if rank > 1:
        with refused(opt, RuntimeError, r"'params'\]\[0\]: .* other ranks have another"):
            opt.step()
    else:
        opt.step()
        assert_same(params[1].detach().to_local(), torch.full((3,), 0.5))


def test_ranks_that_differ_on_one_of_two_meshes(four_ranks):
    four_ranks.run(two_meshes)


def collectives():
    """How many a step makes, of three gradients that are redistributed or none; one is for what ranks agree on."""
    counts = []
    for partial in (False, True):
        norms = Norms()
        for _ in range(2):
            norms.new_grads()
            for param in norms.params if not partial else ():
                param.grad = distribute_tensor(torch.ones(param.shape), norms.mesh, param.placements)
            before = torch.distributed.distributed_c10d._get_default_group()._get_sequence_number_for_group()
            norms.opt.step()
            after = torch.distributed.distributed_c10d._get_default_group()._get_sequence_number_for_group()
        counts.append(after - before)
    return counts


def test_a_step_without_other_placements_makes_no_collective(two_ranks):
    assert two_ranks.run(collectives) == [[0, 4]] * 2


def plain_gradient():
    twins = Twins((2,), [Shard(0)])
    twins.step()
    twins.new_grads()
    param = twins.mine[1]
    kept, param.grad = param.grad, torch.zeros(5, 3)
    with refused(twins.opt, RuntimeError, r"gradient of param_groups\[0\]\['params'\]\[1\]: it is a plain Tensor"):
        twins.opt.step()
    param.grad = kept
    twins.step_as_is()


def test_a_plain_gradient_is_refused(two_ranks):
    two_ranks.run(plain_gradient)


def wrong_state():
    twins = Twins((2,), [Shard(0)])
    twins.step()
    twins.new_grads()
    local = twins.mine[1].to_local()
    state = twins.opt.state[twins.mine[1]]
    buffer = state["momentum_buffer"]
    for wrong in (
        torch.zeros(5, 3),
        buffer.to_local(),
        distribute_tensor(torch.zeros(5, 3), twins.mesh, [Replicate()]),
    ):
        state["momentum_buffer"] = wrong
        with refused(
            twins.opt, RuntimeError, r"momentum_buffer of param_groups\[0\]\['params'\]\[1\]: .* its parameter"
        ):
            twins.opt.step()
    state["momentum_buffer"] = buffer
    local.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"params'\]\[1\] on rank \d of .*Shard.* it was freed or resized"):
        twins.opt.step()


def test_state_that_lies_otherwise_is_refused(two_ranks):
    two_ranks.run(wrong_state)


def state_versions():
    """What autograd has saved of the state is seen to change, as with plain tensors."""
    for key in ("momentum_buffer", "ema"):
        param = nn.Parameter(distribute_tensor(torch.ones(6, 2), mesh_of(2), [Shard(0)]))
        opt = FusedMomentum([param], lr=0.1, momentum=0.9, ema_decay=0.9)
        for k in range(4):
            param.grad = distribute_tensor(torch.ones(6, 2), mesh_of(2), [Shard(0)])
            if k:
                weight = distribute_tensor(torch.ones(6, 2), mesh_of(2), [Shard(0)]).requires_grad_()
                loss = (weight * opt.state[param][key]).sum()
            opt.step()
            if k:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()


def test_autograd_sees_writes_to_the_state(two_ranks):
    two_ranks.run(state_versions)


def versions():
    mesh = mesh_of(2)
    found = []
    for make in (FusedMomentum, for_loop):
        param = nn.Parameter(distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)]))
        opt = make([param], lr=0.1)  # one operation
        for _ in range(3):
            param.grad = distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)])
            before = param._version, param.to_local()._version
            opt.step()
            found.append((param._version - before[0], param.to_local()._version - before[1]))
    assert found[:3] == found[3:], found


def test_autograd_sees_the_writes(two_ranks):
    two_ranks.run(versions)


# ---- norms ----------------------------------------------------------------------------------------------------------


def clipped(mesh, places, norm_type, how, dtype):
    """Norms of the shards, of plain tensors beside them, and what the step then does."""
    twins = Twins(mesh, places, dtype=dtype)
    for k in range(3):
        twins.new_grads(missing=(1,) if k else (), scale=10.0)
        grads = [p.grad.double() for p in twins.whole if p.grad is not None]
        expected = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads]), norm_type).item()
        if how == "method":
            norm = twins.opt.clip_grad_norm_(0.5, norm_type)
        else:
            twins.opt.max_grad_norm = 0.5
        twins.opt.step()
        norm = twins.opt.grad_norm if how == "option" else norm
        assert type(norm) is torch.Tensor
        torch.testing.assert_close(norm.item(), expected, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
        everywhere = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, norm.item())
        assert len(set(everywhere)) == 1
        coefficient = 0.5 / (norm.item() + 1e-6)
        for param in twins.whole:
            param.grad = None if param.grad is None else param.grad * coefficient
        twins.theirs.step()
        for mine, theirs in zip(twins.mine, twins.whole, strict=True):
            torch.testing.assert_close(full(mine.detach()), theirs.detach(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    "how, norm_type", [("method", 2.0), ("method", 1.0), ("method", float("inf")), ("option", 2.0)]
)
@pytest.mark.parametrize("mesh, places", ON_TWO, ids=str)
def test_norm_over_two_ranks(two_ranks, mesh, places, how, norm_type):
    two_ranks.run(clipped, mesh, places, norm_type, how, torch.float32)


@pytest.mark.parametrize("mesh, places", ON_FOUR, ids=str)
def test_norm_over_four_ranks(four_ranks, mesh, places):
    four_ranks.run(clipped, mesh, places, 2.0, "method", torch.float64)


def several_meshes():
    """DTensors of three meshes and a plain tensor in one list: each mesh counts its own replicas once."""
    meshes = [mesh_of(4), mesh_of(2, 2), mesh_of(2, 2, names=("a", "b"))["b"]]
    places = [[Shard(0)], [Replicate(), Shard(1)], [Shard(0)], None]
    values = [torch.randn(shape) for shape in ((6, 3), (4, 5), (3, 2), (4,))]
    whole = [nn.Parameter(value.clone()) for value in values]

    def placed(tensor, i):
        return tensor.clone() if places[i] is None else distribute_tensor(tensor.clone(), meshes[i], places[i])

    mine = [nn.Parameter(placed(value, i)) for i, value in enumerate(values)]
    opt, twin = FusedMomentum(mine, **HYPER), FusedMomentum(whole, **HYPER)
    for k in range(3):
        for i, (param, theirs) in enumerate(zip(mine, whole, strict=True)):
            theirs.grad = torch.randn(theirs.shape)
            param.grad = placed(theirs.grad, i)
        if k:
            norms = [optimizer.clip_grad_norm_(1e9).item() for optimizer in (opt, twin)]
            torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
        opt.step()
        twin.step()
        for param, theirs in zip(mine, whole, strict=True):
            assert_same(full(param.detach()), theirs.detach())


def test_several_meshes(four_ranks):
    four_ranks.run(several_meshes)


def extreme(value):
    twins = Twins((2,), [Shard(0)], dtype=torch.float64)
    twins.new_grads(scale=value)
    grads = torch.cat([p.grad.flatten() for p in twins.whole])
    expected = (grads / value).norm().item() * value if 0 < value < float("inf") else grads.norm().item()
    norm = twins.opt.clip_grad_norm_(1.0).item()
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [0.0, 1e-200, 1e200, float("inf")])
def test_norms_at_the_ends_of_the_range(two_ranks, value):
    two_ranks.run(extreme, value)


def only_one_rank(what):
    """One rank has an overflow, freed memory, or no gradients at all."""
    rank = torch.distributed.get_rank()
    twins = Twins((2,), [Shard(0)], plain=0)
    twins.step()
    twins.new_grads()
    shard = twins.mine[0].grad.to_local()
    if what == "nan" and rank == 1:
        shard[0] = float("nan")
    if what == "inf norm of nan" and rank == 1:
        shard[0] = float("nan")
    if what == "freed" and rank == 1:
        shard.untyped_storage().resize_(0)
    if what == "none" and rank == 1:
        for param in twins.mine:
            param.grad = None
    before = Snapshot(twins.opt)
    if what == "none":
        norms = [None, None]
        torch.distributed.all_gather_object(norms, twins.opt.clip_grad_norm_(1.0).item())
        assert norms[0] == norms[1] != 0
        return
    norm_type = float("inf") if what == "inf norm of nan" else 2.0
    match = "non-finite" if "nan" in what else "was freed" if rank == 1 else "another rank"
    with pytest.raises(RuntimeError, match=match):
        twins.opt.clip_grad_norm_(1.0, norm_type, error_if_nonfinite=True)
    if what == "freed" and rank == 1:
        return  # a snapshot cannot look at memory that is not there
    before.assert_unchanged()


@pytest.mark.parametrize("what", ["nan", "inf norm of nan", "freed", "none"])
def test_what_one_rank_finds_is_known_to_all(two_ranks, what):
    two_ranks.run(only_one_rank, what)


def written(how, warm_up):
    """After clipping: through the DTensor, which counts for itself, or through its shard."""
    param = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh_of(2), [Shard(0)]))
    opt = FusedMomentum([param], lr=1.0)
    param.grad = distribute_tensor(torch.full((4, 2), 100.0), mesh_of(2), [Shard(0)])
    for _ in range(warm_up):  # records of the same memory are used again
        opt.clip_grad_norm_(1e9)
        opt.step()
        param.grad.to_local().fill_(100.0)
    with torch.no_grad():
        param.to_local().fill_(1.0)
    opt.clip_grad_norm_(1.0)
    if how == "wrapper":
        param.grad.mul_(100)
    elif how == "shard":
        param.grad.to_local().mul_(100)
    elif how == "backward":
        (param * 1.0).sum().backward()
    elif how == "one rank" and torch.distributed.get_rank() == 1:
        param.grad.to_local().mul_(100)
    if how == "new wrapper":
        param.grad = DTensor(param.grad.to_local(), param._spec, requires_grad=False)
        opt.step()
        expected = torch.full((4, 2), 1 - 100 / (100 * 8**0.5))
        torch.testing.assert_close(full(param.detach()), expected, rtol=1e-5, atol=1e-6)
        return
    match = "was written to after" if how != "one rank" or torch.distributed.get_rank() == 1 else "another rank"
    for act in [lambda: opt.clip_grad_norm_(1.0)] + ([opt.step] if how != "one rank" else []):
        with pytest.raises(RuntimeError, match=match):
            act()
    opt.zero_grad()
    param.grad = distribute_tensor(torch.ones(4, 2), mesh_of(2), [Shard(0)])
    opt.step()
    torch.testing.assert_close(full(param.detach()), torch.zeros(4, 2))


@pytest.mark.parametrize("warm_up", [0, 2])
@pytest.mark.parametrize("how", ["wrapper", "shard", "backward", "one rank", "new wrapper"])
def test_gradients_written_after_clipping(two_ranks, how, warm_up):
    two_ranks.run(written, how, warm_up)


def beside_plain(value):
    """Plain tensors that differ by rank, out of a double's range on one of them."""
    rank = torch.distributed.get_rank()
    plain = nn.Parameter(torch.ones(2, dtype=torch.float64))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, dtype=torch.float64), mesh_of(2), [Shard(0)]))
    opt = FusedMomentum([plain, sharded], lr=1.0)
    plain.grad = torch.full_like(plain, value if rank == 1 else 1.0)
    sharded.grad = distribute_tensor(torch.ones(4, dtype=torch.float64), mesh_of(2), [Shard(0)])
    norm = opt.clip_grad_norm_(1.0).item()
    expected = 6**0.5 if rank == 0 or value == 1.0 else value * 2**0.5
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [1.0, 1e200, float("inf")])
def test_plain_tensors_that_differ_by_rank(two_ranks, value):
    two_ranks.run(beside_plain, value)


def scaled(what):
    """momentum_ext.GradScaler: one rank's overflow is every rank's, and a rank without gradients goes on with it."""
    rank = torch.distributed.get_rank()
    twins = Twins((2,), [Shard(0)], plain=0)
    twins.step()
    scaler = momentum_ext.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    twins.new_grads(scale=4.0)
    for param in twins.whole:
        param.grad /= 4.0
    if what == "overflow" and rank == 1:
        twins.mine[0].grad.to_local()[0] = float("inf")
    if what == "none":
        for param in twins.mine if rank == 1 else ():
            param.grad = None
    scaler.unscale_(twins.opt)
    if what != "none":
        norm = twins.opt.clip_grad_norm_(1e9)
        assert math.isfinite(norm) == (what == "fine")
    before = [full(param.detach()).clone() for param in twins.mine]
    scaler.step(twins.opt)
    scaler.update()
    assert scaler.get_scale() == (2.0 if what == "overflow" else 4.0)
    if what == "fine":
        twins.theirs.step()
        twins.check()
    elif what == "overflow":
        for param, old in zip(twins.mine, before, strict=True):
            assert_same(full(param.detach()), old)


@pytest.mark.parametrize("what", ["fine", "overflow", "none"])
def test_our_scaler(two_ranks, what):
    two_ranks.run(scaled, what)


def unread_by_kernels():
    """A process group is not forgotten where torch's functions would read the gradients."""
    param = nn.Parameter(torch.ones(4, 2))
    opt = FusedMomentum([param], lr=1.0, process_group=torch.distributed.group.WORLD)
    scaler = momentum_ext.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    param.grad = torch.ones(4, 2).to_sparse()
    for act in (lambda: scaler.unscale_(opt), lambda: opt.clip_grad_norm_(1.0)):
        with refused(opt, RuntimeError, "process_group: norms over it need gradients that the kernels read"):
            act()


def test_a_group_for_what_kernels_do_not_read(two_ranks):
    two_ranks.run(unread_by_kernels)


def watched():
    """Where one rank's operators are watched, the others do not wait for it."""
    twins = Twins((2,), [Shard(0)], plain=0)
    twins.new_grads()
    grads = torch.cat([param.grad.flatten() for param in twins.whole])
    mode = FlopCounterMode(display=False)
    with mode if torch.distributed.get_rank() == 0 else contextlib.nullcontext():
        norm = twins.opt.clip_grad_norm_(1.0)
    torch.testing.assert_close(full(norm).item(), grads.norm().item(), rtol=1e-5, atol=0)


def test_a_rank_whose_operators_are_watched(two_ranks):
    two_ranks.run(watched)


def averaged_evaluation(how):
    """FSDP2's root keeps its parameters gathered after a forward without gradients: reshard() lets go of them."""
    found = []
    for evaluates in (False, True):
        model = model_of()
        for layer in (*model[:4], model):
            fully_shard(layer, mesh=mesh_of(2))
        opt = FusedMomentum(model.parameters(), **HYPER, ema_decay=0.9)
        context = getattr(opt, how)
        for k in range(5):
            torch.manual_seed(k)
            x = torch.randn(8, 6)
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
            if evaluates:
                model.reshard()
                with torch.no_grad(), context():
                    model(x)
                    model.reshard()
        found.append([full(param.detach()).clone() for param in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("how", ["ema_weights", "iterate_weights"])
def test_fsdp2_evaluates_other_weights(two_ranks, how):
    two_ranks.run(averaged_evaluation, how)


def iterates(dtype):
    twins = Twins((2,), [Shard(0)], dtype=dtype)
    twins.step(3)
    with twins.opt.iterate_weights(), twins.theirs.iterate_weights():
        for mine, theirs in zip(twins.mine, twins.whole, strict=True):
            assert_same(full(mine.detach()), theirs.detach())
    twins.check()
    twins.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_iterates_have_the_bits_of_plain_tensors(two_ranks, dtype):
    two_ranks.run(iterates, dtype)


def pipeline(how):
    """Each rank has other parameters, all of them plain."""
    rank = torch.distributed.get_rank()
    group = torch.distributed.group.WORLD
    param = nn.Parameter(torch.ones(3 + rank))
    opt = FusedMomentum([param], lr=1.0, process_group=group if how == "option" else None)
    param.grad = torch.full_like(param, 2.0)
    expected = (4.0 * (3 + 4)) ** 0.5
    if how == "scaler":
        opt.process_group = group
        scaler = momentum_ext.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        param.grad = param.grad * 4 if rank == 0 else torch.full_like(param, float("inf"))
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert torch.equal(param, torch.ones_like(param))
        return
    norm = opt.clip_grad_norm_(1.0, process_group=None if how == "option" else group)
    torch.testing.assert_close(norm.item(), expected, rtol=1e-6, atol=0)
    opt.step()
    torch.testing.assert_close(param.detach(), torch.full_like(param, 1 - 2.0 / (expected + 1e-6)))


@pytest.mark.parametrize("how", ["option", "argument", "scaler"])
def test_norm_over_a_process_group(two_ranks, how):
    two_ranks.run(pipeline, how)


def stages(group_of):
    """Two stages, each sharded over two ranks, beside one tensor that all four share: a group has every mesh once."""
    rank = torch.distributed.get_rank()
    whole, mesh = mesh_of(4), mesh_of(2, 2, names=("stage", "shard"))
    places = [(whole, [Shard(0)], 0), (mesh["shard"], [Shard(0)], 1 + rank // 2)]
    values = {k: torch.arange(1.0, 8.0) + k for k in range(3)}
    params = [nn.Parameter(distribute_tensor(values[k], where, place)) for where, place, k in places]
    group = torch.distributed.group.WORLD if group_of == "all" else mesh["stage"].get_group()
    opt = FusedMomentum(params, lr=1.0)
    for param, (where, place, k) in zip(params, places, strict=True):
        param.grad = distribute_tensor(values[k], where, place)
    expected = torch.cat(list(values.values()))
    for norm_type in (2.0, 1.0, math.inf):
        opt.zero_grad(set_to_none=False)
        for param, (where, place, k) in zip(params, places, strict=True):
            param.grad = distribute_tensor(values[k], where, place)
        norm = opt.clip_grad_norm_(1e9, norm_type=norm_type, process_group=group)
        torch.testing.assert_close(norm.item(), expected.norm(norm_type).item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("group_of", ["all", "one rank of each stage"])
def test_a_group_counts_each_mesh_once(four_ranks, group_of):
    four_ranks.run(stages, group_of)


# ---- what trainers make ---------------------------------------------------------------------------------------------


def model_of(seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5, bias=False), nn.Tanh(), nn.Linear(5, 1))


def fully_sharded(mesh, tp, options):
    """FSDP2, alone, over a mesh of replicas, and over tensor parallelism (whose shards are strided)."""
    whole, model = model_of(), model_of()
    if tp:
        mesh_2d = mesh_of(*mesh, names=("dp", "tp"))
        parallelize_module(model, mesh_2d["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh_2d["dp"])
    else:
        names = ("replicate", "shard")[-len(mesh) :]
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh_of(*mesh, names=names))
    opt = FusedMomentum(model.parameters(), **HYPER, **options)
    twin = FusedMomentum(whole.parameters(), **HYPER, **options)
    opt._torch_step = None
    for k in range(4):
        torch.manual_seed(k)
        x = torch.randn(8, 6)  # the same on all ranks, so that the mean of gradients is the gradient
        for each, optimizer in ((model, opt), (whole, twin)):
            optimizer.zero_grad()
            each(x).square().mean().backward()
        norms = [optimizer.clip_grad_norm_(0.1).item() for optimizer in (opt, twin)]
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
        for optimizer in (opt, twin):
            optimizer.step()
        for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(mine.detach().full_tensor(), theirs.detach(), rtol=1e-5, atol=1e-6)
    state = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(state)
    for optimizer in (opt, twin):
        optimizer.step()
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.detach().full_tensor(), theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}], ids=str)
def test_fsdp2(two_ranks, options):
    two_ranks.run(fully_sharded, (2,), False, options)


@pytest.mark.parametrize("tp", [False, True], ids=["hsdp", "tp"])
def test_fsdp2_in_two_dimensions(four_ranks, tp):
    four_ranks.run(fully_sharded, (2, 2), tp, {})

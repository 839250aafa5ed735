"""Checkpoints that go from one number of ranks, or one sharding, to another: ten more steps have the bits of a run that
was not interrupted."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import assert_all_same, for_loop, one_process_group
from precision_oracle import parts_of_value
from ranks import mesh_of
from test_ranks import HYPER, assert_shard, full, placed_state
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from momentum_ext import FusedMomentum

SHAPES = ((8, 6), (5, 3), (1, 4), (7,), (4, 3, 2))
ROWS = ((8, 128), (5, 128), (1, 64), (4, 3, 64))  # of whole blocks of 8 bits, which no sharding below cuts
MODES = {
    "fp32": {},
    "average": {"ema_decay": 0.9},
    "split": {"dtype": torch.bfloat16, "master_weights": True, "ema_decay": 0.5},
    "master": {"dtype": torch.float16, "master_weights": True},
    "bf16 momentum": {"momentum_dtype": "bfloat16", "formulation": "classical"},
    "int8 momentum": {"momentum_dtype": "int8", "shapes": ROWS},
    "int4 momentum": {"momentum_dtype": "int4", "shapes": ROWS},
    "fp8 beside a split": {
        "momentum_dtype": "float8_e4m3fn",
        "dtype": torch.bfloat16,
        "master_weights": True,
        "shapes": ROWS,
    },
    "int8 values": {"momentum_dtype": "int8", "shapes": ROWS, "compact_state_dict": False},
    "int4 values": {"momentum_dtype": "int4", "shapes": ROWS, "compact_state_dict": False},
    "rounding at random": {"dtype": torch.bfloat16, "stochastic_rounding": True, "rounding_seed": 3},
    "24 bits": {"dtype": torch.bfloat16, "master_weights": 24},
}
PLAIN = (None, None)  # no mesh: plain tensors
ONE_RANK = ((1,), [Shard(0)])
TWO_RANKS = ((2,), [Shard(0)])
COLUMNS = ((2,), [Shard(-1)])
REPLICAS = ((2,), [Replicate()])
FOUR_RANKS = ((4,), [Shard(0)])
GRID = ((2, 2), [Replicate(), Shard(0)])
FSDP2 = ((2,), "fully_shard")


def turned(tensor):
    """The same values, column by column; images as channels_last."""
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.t().contiguous().t()


class Training:
    def __init__(self, layout, make=FusedMomentum, dtype=torch.float32, shapes=SHAPES, is_turned=False, **options):
        shape_of_mesh, places = layout
        torch.manual_seed(5)
        self.place = lambda tensor: tensor
        if shape_of_mesh is not None:
            mesh = mesh_of(*shape_of_mesh)
            places = [Shard(0)] if layout == FSDP2 else places
            self.place = lambda tensor: distribute_tensor(
                tensor, mesh, [Shard(each.dim % tensor.dim()) if each.is_shard() else each for each in places]
            )
        self.model = nn.Module()
        for i, shape in enumerate(shapes):
            value = torch.randn(shape).to(dtype)
            value = turned(value) if is_turned else value
            self.model.register_parameter(f"p{i}", nn.Parameter(value if layout == FSDP2 else self.place(value)))
        if layout == FSDP2:
            fully_shard(self.model, mesh=mesh)
        self.opt = make(self.model.parameters(), **{**HYPER, **options})

    def steps(self, begin, end):
        for k in range(begin, end):
            torch.manual_seed(100 + k)
            for param in self.model.parameters():
                param.grad = self.place(torch.randn(param.shape).to(param.dtype))
            self.opt.step()
        return self

    def check(self, mode):
        """Against plain tensors that were never interrupted."""
        wanted = Training(PLAIN, **MODES[mode]).steps(0, 13)
        for mine, theirs in zip(self.model.parameters(), wanted.model.parameters(), strict=True):
            assert_shard(mine, theirs)
            found, expected = placed_state(mine, self.opt.state[mine]), wanted.opt.state[theirs]
            assert set(found) == set(expected)
            for key, value in expected.items():
                assert type(found[key]) is type(mine.data), key
                assert_shard(found[key], value, key)


def save(layout, mode, flatten, folder):
    training = Training(layout, **MODES[mode]).steps(0, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    dcp.save(
        {
            "model": get_model_state_dict(training.model),
            "optimizer": get_optimizer_state_dict(training.model, training.opt, options=options),
        },
        checkpoint_id=folder,
    )


def load(layout, mode, flatten, folder):
    training = Training(layout, **MODES[mode])
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = {
        "model": get_model_state_dict(training.model),
        "optimizer": get_optimizer_state_dict(training.model, training.opt, options=options),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(training.model, state["model"])
    set_optimizer_state_dict(training.model, training.opt, state["optimizer"], options=options)
    training.steps(3, 13).check(mode)


@pytest.fixture
def run(two_ranks, four_ranks):
    """Runs a function on as many ranks as its first argument, a layout, needs."""

    def run(function, layout, *arguments):
        shape_of_mesh = layout[0]
        size = 0 if shape_of_mesh is None else torch.Size(shape_of_mesh).numel()
        if size > 1:
            return (two_ranks if size == 2 else four_ranks).run(function, layout, *arguments)
        if size == 1:
            mesh_of.cache_clear()
            with one_process_group():
                function(layout, *arguments)
            mesh_of.cache_clear()
        else:
            function(layout, *arguments)

    return run


WAYS = [
    (TWO_RANKS, ONE_RANK),
    (ONE_RANK, TWO_RANKS),
    (TWO_RANKS, FOUR_RANKS),
    (GRID, TWO_RANKS),
    (TWO_RANKS, PLAIN),
    (PLAIN, TWO_RANKS),
    (COLUMNS, TWO_RANKS),
    (REPLICAS, COLUMNS),
    (FSDP2, PLAIN),
    (PLAIN, FSDP2),
    (FSDP2, FOUR_RANKS),
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("before, after", WAYS, ids=str)
def test_another_sharding(run, before, after, mode, tmp_path):
    flatten = mode in ("average", "split")
    run(save, before, mode, flatten, str(tmp_path))
    run(load, after, mode, flatten, str(tmp_path))


# ---- placements that cut a block of 8 bits --------------------------------------------------------------------------

COLUMNS_OF_FOUR = ((4,), [Shard(-1)])  # 16 and 32 of the columns
CUT = {"momentum_dtype": "int8", "shapes": ((4, 64), (2, 128))}


def values_of(training):
    """Parameters and what the momentum buffers stand for."""
    state = training.opt.torch_state_dict()["state"]
    params = [full(param.detach()) for param in training.model.parameters()]
    return params, [full(entry["momentum_buffer"]) for entry in state.values()]


def save_cut(layout, compact, folder):
    training = Training(layout, **CUT, compact_state_dict=compact).steps(0, 3)
    state = get_optimizer_state_dict(training.model, training.opt)
    forms = [isinstance(state["state"][f"p{i}"]["momentum_buffer"], dict) for i in range(2)]
    dcp.save({"model": get_model_state_dict(training.model), "optimizer": state}, checkpoint_id=folder)
    return forms, values_of(training)


def load_cut(layout, compact, folder, wanted):
    training = Training(layout, **CUT, compact_state_dict=compact)
    state = {
        "model": get_model_state_dict(training.model),
        "optimizer": get_optimizer_state_dict(training.model, training.opt),
    }
    if compact:
        with pytest.raises(CheckpointException, match=r"Missing key .*: optimizer\.state\.p\d\.momentum_buffer"):
            dcp.load(state, checkpoint_id=folder)
        return
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(training.model, state["model"])
    set_optimizer_state_dict(training.model, training.opt, state["optimizer"])
    for found, expected in zip(values_of(training), wanted, strict=True):
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=float(theirs.abs().max()) / 60)
    training.steps(3, 5)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("before, after", [(COLUMNS_OF_FOUR, PLAIN), (TWO_RANKS, COLUMNS_OF_FOUR)], ids=str)
def test_a_sharding_that_cuts_blocks(run, before, after, compact, tmp_path):
    """It has values where others have codes: a strict planner says so, and compact_state_dict=False is the way."""
    answers = run(save_cut, before, compact, str(tmp_path))
    assert [forms for forms, _ in answers] == [[compact and before is TWO_RANKS, compact]] * len(answers)
    run(load_cut, after, compact, str(tmp_path), answers[0][1])


# ---- 8 bits of parameters that do not lie row by row ----------------------------------------------------------------

TURNED = {"momentum_dtype": "int8", "shapes": ((8, 128), (64, 32), (4, 32, 3, 64))}


def save_turned(layout, folder):
    training = Training(layout, **TURNED, is_turned=True).steps(0, 3)
    state = get_optimizer_state_dict(training.model, training.opt)
    assert not any(isinstance(entry["momentum_buffer"], dict) for entry in state["state"].values())
    dcp.save({"model": get_model_state_dict(training.model), "optimizer": state}, checkpoint_id=folder)
    saved = copy.deepcopy(values_of(training))
    return saved, values_of(training.steps(3, 13))


def load_turned(layout, is_turned, folder, saved, wanted, is_exact):
    training = Training(layout, **TURNED, is_turned=is_turned, compact_state_dict=False)
    state = {
        "model": get_model_state_dict(training.model),
        "optimizer": get_optimizer_state_dict(training.model, training.opt),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(training.model, state["model"])
    set_optimizer_state_dict(training.model, training.opt, state["optimizer"])
    params, buffers = values_of(training)
    assert_all_same(params, saved[0])
    for mine, theirs in zip(buffers, saved[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=float(theirs.abs().max()) / 60)
    if is_exact:
        for mine, theirs in zip(values_of(training.steps(3, 13)), wanted, strict=True):
            assert_all_same(mine, theirs)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "before, after, is_turned",
    [
        (PLAIN, PLAIN, True),
        (PLAIN, PLAIN, False),
        (TWO_RANKS, TWO_RANKS, True),
        (TWO_RANKS, PLAIN, True),
        (PLAIN, FOUR_RANKS, False),
        (COLUMNS, TWO_RANKS, True),
    ],
    ids=str,
)
def test_parameters_that_do_not_lie_row_by_row(run, before, after, is_turned, tmp_path):
    """Blocks lie along memory: their values are saved, and go where blocks lie otherwise with one more rounding."""
    saved, wanted = run(save_turned, before, str(tmp_path))[0] if before[0] else save_turned(before, str(tmp_path))
    run(load_turned, after, is_turned, str(tmp_path), saved, wanted, before == after and is_turned)


# ---- whole state dicts ----------------------------------------------------------------------------------------------


def whole(mode):
    """Gathered on rank 0, on the CPU, and from there to all ranks again."""
    training = Training(TWO_RANKS, **MODES[mode]).steps(0, 3)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(training.model, training.opt, options=options)
    weights = get_model_state_dict(training.model, options=options)
    if torch.distributed.get_rank() == 0:
        values = [value for entry in state["state"].values() for value in entry.values()]
        assert all(type(each) is torch.Tensor for value in values for each in parts_of_value(value))
    other = Training(COLUMNS, **MODES[mode])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other.model, weights, options=options)
    set_optimizer_state_dict(other.model, other.opt, state, options=options)
    other.steps(3, 13).check(mode)


@pytest.mark.parametrize("mode", MODES)
def test_whole_state_dicts(two_ranks, mode):
    two_ranks.run(whole, mode)


def to_torch_and_back(back):
    """By DCP's flattened form, from torch's SGD to ours, or from ours to it."""
    kinds = [for_loop, FusedMomentum]
    first, second = reversed(kinds) if back else kinds
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved, loaded = Training(TWO_RANKS, first).steps(0, 3), Training(TWO_RANKS, second)
    state = get_optimizer_state_dict(saved.model, saved.opt, options=options)
    assert state.keys() == get_optimizer_state_dict(loaded.model, loaded.opt, options=options).keys()
    set_model_state_dict(loaded.model, get_model_state_dict(saved.model))
    set_optimizer_state_dict(loaded.model, loaded.opt, state, options=options)
    loaded.steps(3, 13).check("fp32")


@pytest.mark.parametrize("back", [False, True], ids=["from torch", "to torch"])
def test_torchs_sgd(two_ranks, back):
    two_ranks.run(to_torch_and_back, back)

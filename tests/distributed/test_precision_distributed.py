"""Checkpoints of every mode by way of torch.distributed, of plain tensors and of DTensors: no dtype, no bit is lost."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import assert_same_training, one_process_group
from precision_oracle import parts_of_value
from precision_twin import FEW, MODES, mode_name, options_of_mode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from values import through_file

from momentum_ext import FusedMomentum

# What gloo and NCCL both move.
MOVED = {torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int32, torch.int64}
SHAPES = ((40, 9), (5, 64), (300,), (1,))  # blocks of 8 bits that are parts of rows, or not
OPTIONS = {"momentum": 0.9, "weight_decay": 0.01, "rounding_seed": 77, "formulation": "classical", "ema_decay": 0.75}
CASES = [(mode, on_dtensors) for mode in MODES for on_dtensors in (False, True)]


def case_name(value):
    return mode_name(value) if isinstance(value, dict) else "dtensor" if value else "plain"


@pytest.fixture(scope="module")
def mesh():
    with one_process_group():
        yield init_device_mesh("cpu", (1,))


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Training:
    """A model of these values and its optimizer."""

    def __init__(self, values, mode, mesh):
        self.place = (lambda tensor: tensor) if mesh is None else (lambda tensor: distribute_tensor(tensor, mesh))
        self.model = torch.nn.Module()
        for index, value in enumerate(values):
            self.model.register_parameter(f"p{index}", torch.nn.Parameter(self.place(value.clone())))
        self.params = list(self.model.parameters())
        self.opt = FusedMomentum(self.params, lr=0.1, **OPTIONS, **options_of_mode(mode))

    @classmethod
    def of(cls, mode, mesh):
        """After two steps."""
        training = cls([torch.randn(shape).to(mode["dtype"]) for shape in SHAPES], mode, mesh)
        for seed in range(2):
            training.step(seed)
        return training

    def step(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for param in self.params:
            param.grad = self.place(torch.randn(param.shape, generator=generator).to(param.dtype))
        self.opt.step()

    def another(self, mode, mesh):
        return Training([local(param).detach() for param in self.params], mode, mesh)

    def check_same(self, other):
        """Two trainings hold the same, and go on alike."""
        for seed in (None, 9):
            if seed:
                self.step(seed)
                other.step(seed)
            assert_same_training(self.opt, other.opt)


def check_values(state_dict):
    """All of it is of kinds that every checkpoint format and backend carries."""
    for group in state_dict["param_groups"]:
        for name, value in group.items():
            assert name == "params" or value is None or type(value) in (bool, int, float, str), name
    for entry in state_dict["state"].values():
        for name, value in entry.items():
            for each in parts_of_value(value):
                assert local(each).dtype in MOVED, name


@pytest.mark.parametrize("mode, on_dtensors", CASES, ids=case_name)
def test_every_mode_travels(mode, on_dtensors, mesh):
    """By state_dict() alone, and whole, on the CPU, through a file, broadcast from rank 0."""
    mesh = mesh if on_dtensors else None
    saved = Training.of(mode, mesh)
    state_dict = saved.opt.state_dict()
    check_values(state_dict)
    loaded, broadcast = (saved.another(mode, mesh) for _ in range(2))
    loaded.opt.load_state_dict(copy.deepcopy(state_dict))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_optimizer_state_dict(saved.model, saved.opt, options=options)
    check_values(whole)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(broadcast.model, broadcast.opt, through_file(whole), options=options)
    assert broadcast.opt.param_groups[0].keys() == saved.opt.param_groups[0].keys()
    broadcast.check_same(loaded)
    saved.step(9)
    saved.check_same(loaded)


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("mode", FEW, ids=mode_name)
def test_saved_by_dcp(mode, flatten, mesh, tmp_path):
    """A strict planner finds every key in a fresh optimizer, whose state is made by a step of lr 0."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = Training.of(mode, None)
    loaded = saved.another(mode, None)
    dcp.save({"o": get_optimizer_state_dict(saved.model, saved.opt, options=options)}, checkpoint_id=tmp_path)
    state_dict = {"o": get_optimizer_state_dict(loaded.model, loaded.opt, options=options)}
    dcp.load(state_dict, checkpoint_id=tmp_path)
    set_optimizer_state_dict(loaded.model, loaded.opt, state_dict["o"], options=options)
    by_hand = saved.another(mode, None)
    by_hand.opt.load_state_dict(copy.deepcopy(saved.opt.state_dict()))
    loaded.check_same(by_hand)
    saved.step(9)
    saved.check_same(loaded)

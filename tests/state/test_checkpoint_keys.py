"""state_dict() of an optimizer without our options has SGD's keys alone; those of ours are there with their options.

And a look leaves no trace: torch.distributed.checkpoint makes a fresh optimizer's state by a step with lr 0.
"""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import Snapshot, assert_all_same, assert_same, assert_same_training, for_loop
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Option, the parameters' dtype, and the keys of ours in each group.
OPTIONS = {
    "none": ({}, FP32, []),
    "nesterov": ({"nesterov": True}, FP32, []),
    "fused": ({"fused": True}, FP32, []),
    "classical": ({"formulation": "classical"}, FP32, ["formulation", "buffer_formulation"]),
    "ema-formulation": ({"formulation": "ema"}, FP32, ["formulation", "buffer_formulation"]),
    "torch-formulation": ({"formulation": "torch"}, FP32, []),
    "decoupled": ({"decoupled_weight_decay": True}, FP32, ["decoupled_weight_decay"]),
    "max_grad_norm": ({"max_grad_norm": 1.0}, FP32, []),
    "ema": ({"ema_decay": 0.9}, FP32, ["ema_step"]),
    "ema-warmup": ({"ema_decay": 0.9, "ema_warmup": True}, FP32, ["ema_step"]),
    "bf16-momentum": ({"momentum_dtype": BF16}, FP32, ["momentum_dtype"]),
    "int8-momentum": ({"momentum_dtype": torch.int8}, FP32, ["momentum_dtype"]),
    "int4-momentum": ({"momentum_dtype": "int4"}, FP32, ["momentum_dtype"]),
    "fp8-momentum": ({"momentum_dtype": "float8_e4m3fn"}, FP32, ["momentum_dtype"]),
    "bf16-master": ({"master_weights": True}, BF16, ["master_weights"]),
    "fp16-master": ({"master_weights": True}, FP16, ["master_weights"]),
    "random": ({"stochastic_rounding": True}, BF16, ["stochastic_rounding", "rounding_step"]),
    "random-from-a-seed": (
        {"stochastic_rounding": True, "rounding_seed": 3},
        BF16,
        ["stochastic_rounding", "rounding_seed", "rounding_step"],
    ),
    "a-seed-alone": ({"rounding_seed": 3}, FP32, []),
}
SGDS = [name for name, (_, _, keys) in OPTIONS.items() if not keys]


def model(dtype=FP32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(19, 33), torch.nn.Linear(33, 3)).to(dtype)


def make(option, dtype=None, **extra):
    hyper, usual, _ = OPTIONS[option]
    net = model(dtype or usual)
    return net, FusedMomentum(net.parameters(), **HYPER, **hyper, **extra)


def make_sgd(dtype=FP32, **hyper):
    net = model(dtype)
    return net, for_loop(net.parameters(), **HYPER, **hyper)


def train(net, opt, steps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in net.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        opt.step()


def assert_same_ends(one, other):
    assert_same_training(one[1], other[1])


# -------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("option", OPTIONS)
def test_keys_of_groups(option):
    """From construction on: of the live groups, of state dicts, of a group that is added, and of a copy."""
    net, opt = make(option)
    expected = [*make_sgd()[1].param_groups[0], *OPTIONS[option][2]]
    extra = torch.nn.Parameter(torch.zeros(3, dtype=OPTIONS[option][1]))
    for act in (lambda: None, lambda: train(net, opt), lambda: opt.add_param_group({"params": [extra]})):
        act()
        for each in (opt, copy.deepcopy(opt)):
            for group in [*each.param_groups, *each.state_dict()["param_groups"]]:
                assert sorted(group) == sorted(expected)
                values = [group[key] for key in OPTIONS[option][2]]
                assert all(isinstance(value, (str, bool, int)) for value in values), (
                    "all checkpoint formats carry these"
                )


@pytest.mark.parametrize("option", SGDS)
def test_a_state_dict_is_sgds(option):
    """Its keys in their order, and what they hold."""
    hyper = {"nesterov": True} if option == "nesterov" else {}
    mine, theirs = make(option), make_sgd(**hyper)
    for steps in (0, 2):
        for net, opt in (mine, theirs):
            train(net, opt, steps)
        has, should = (opt.state_dict() for _, opt in (mine, theirs))
        for a, b in zip(has["param_groups"], should["param_groups"], strict=True):
            assert list(a) == list(b)
        assert {k: list(v) for k, v in has["state"].items()} == {k: list(v) for k, v in should["state"].items()}


# ----------------------------------------------------------------------------------------- distributed checkpoints


@pytest.fixture(params=[False, True], ids=["nested", "flattened"])
def dcp_options(request):
    return StateDictOptions(flatten_optimizer_state_dict=request.param)


def through_dcp(source, target, options, folder):
    """Saved from one, loaded into another by a strict planner."""
    dcp.save({"optim": get_optimizer_state_dict(*source, options=options)}, checkpoint_id=folder, no_dist=True)
    state = {"optim": get_optimizer_state_dict(*target, options=options)}
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=False), no_dist=True)
    set_optimizer_state_dict(*target, state["optim"], options=options)
    target[0].load_state_dict(source[0].state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("option", SGDS)
@pytest.mark.parametrize("to_ours", [True, False], ids=["sgd-to-ours", "ours-to-sgd"])
def test_dcp_to_and_from_sgd(to_ours, option, dcp_options, tmp_path):
    hyper = {"nesterov": True} if option == "nesterov" else {}
    ends = [make_sgd(**hyper), make(option)]
    source, target = ends if to_ours else ends[::-1]
    train(*source)
    through_dcp(source, target, dcp_options, tmp_path)
    for _, opt in ends:
        opt.max_grad_norm = None
    for net, opt in ends:
        train(net, opt, 2, seed=1)
    assert_same_ends(*ends)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("option", OPTIONS)
def test_dcp_of_each_option(option, dcp_options, tmp_path):
    source, target = make(option), make(option)
    train(*source)
    through_dcp(source, target, dcp_options, tmp_path)
    for net, opt in (source, target):
        train(net, opt, 2, seed=1)
    assert_same_ends(source, target)


# -------------------------------------------------------------------------------------------- who only looks: lr 0


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_a_look_before_the_first_step(option, lr, dcp_options):
    """SGD's own state is SGD's, nothing counts, and training goes on as if nobody had looked."""
    looked, twin, sgd = make(option), make(option), make_sgd(OPTIONS[option][1])
    for _, opt in (looked, twin, sgd):
        opt.param_groups[0].update(lr=lr, weight_decay=0)  # else SGD's buffer starts from it
    groups, rng = copy.deepcopy(looked[1].param_groups), torch.get_rng_state()
    for each in (looked, sgd):
        get_optimizer_state_dict(*each, options=dcp_options)
    for key, value in looked[1].param_groups[0].items():
        assert key == "params" or (type(value), value) == (type(groups[0][key]), groups[0][key]), key
    assert torch.equal(rng, torch.get_rng_state()) and looked[1].grad_norm is None
    for a, b, c in zip(*(net.parameters() for net, _ in (looked, twin, sgd)), strict=True):
        assert_same(a, b)
        state = looked[1].state[a]
        assert set(state) >= set(sgd[1].state[c]) == {"momentum_buffer"}
        assert not state["momentum_buffer"].float().any()
        if option in SGDS:
            assert_same(state["momentum_buffer"], sgd[1].state[c]["momentum_buffer"])
            assert len(state) == 1
        if "ema" in state:
            assert_same(state["ema"], a)
    for net, opt in (looked, twin):
        train(net, opt)
    assert_same_ends(looked, twin)
    assert looked[1].state_dict()["param_groups"] == twin[1].state_dict()["param_groups"]


ZEROS = [0, 0.0, torch.tensor(0.0), torch.tensor([0.0])]


@pytest.mark.parametrize("zero", ZEROS, ids=repr)
@pytest.mark.parametrize("option", ["ema", "ema-warmup", "random", "bf16-master", "max_grad_norm", "int8-momentum"])
def test_lr_0_in_every_group_is_no_training(option, zero):
    """The buffers are SGD's; averages, counts, the norm and parameters stay."""
    net, opt = make(option, max_grad_norm=2.0) if option == "ema" else make(option)
    train(net, opt)
    before = copy.deepcopy(opt.state_dict()["param_groups"])
    averages = [opt.state[p]["ema"].clone() for p in net.parameters() if "ema" in opt.state[p]]
    values, norm = [p.detach().clone() for p in net.parameters()], opt.grad_norm
    opt.param_groups[0]["lr"] = zero
    train(net, opt, 2, seed=1)
    opt.param_groups[0]["lr"] = 0.1
    assert opt.state_dict()["param_groups"] == before and opt.grad_norm is norm
    assert_all_same(net.parameters(), values)
    assert_all_same([opt.state[p]["ema"] for p in net.parameters() if "ema" in opt.state[p]], averages)


@pytest.mark.parametrize("zero", ZEROS, ids=repr)
def test_lr_0_in_one_of_two_groups_is_training(zero):
    net = model()
    groups = [{"params": list(layer.parameters())} for layer in net]
    opt = FusedMomentum(groups, **HYPER, ema_decay=0.9, max_grad_norm=2.0)
    train(net, opt)
    averages = [opt.state[p]["ema"].clone() for p in net.parameters()]
    opt.param_groups[0]["lr"], opt.grad_norm = zero, None
    train(net, opt, 1, seed=1)
    assert opt.grad_norm is not None
    assert [group["ema_step"] for group in opt.state_dict()["param_groups"]] == [4, 4]
    for param, average in zip(net.parameters(), averages, strict=True):
        assert_same(opt.state[param]["ema"], average.lerp(param.detach(), 1 - 0.9))


@pytest.mark.parametrize("zero", ZEROS, ids=repr)
@pytest.mark.parametrize("hyper", [{}, {"nesterov": True}, {"dampening": 0.3}, {"weight_decay": 0}], ids=str)
def test_lr_0_of_sgds_own_state(hyper, zero):
    """Before the first step and in the middle of training."""
    hyper = {**HYPER, **hyper}
    runs = [(net, kind(net.parameters(), **hyper)) for kind, net in ((FusedMomentum, model()), (for_loop, model()))]
    for lr in (zero, 0.1, zero, 0.1):
        for net, opt in runs:
            opt.param_groups[0]["lr"] = lr
            train(net, opt, 2)
        assert_same_ends(*runs)


def test_a_look_in_mid_training_changes_nothing(dcp_options):
    for option in OPTIONS:
        net, opt = make(option)
        train(net, opt)
        opt.state_dict()  # counts that live elsewhere go into the groups
        before = Snapshot(opt)
        get_optimizer_state_dict(net, opt, options=dcp_options)
        before.assert_unchanged()

"""State travels to and from torch.optim.SGD, through files, copies and pickles; the trajectory goes on unchanged."""

import copy
import io
import pickle

import pytest
import torch
from harness import Oracle, Pair, assert_same, clone_params, in_layout

from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}
SHAPES = [(300,), (33, 5), (), (0,), (4, 3, 5, 5)]


def pair_in_training(steps=5, **hyper):
    pair = Pair([torch.randn(shape) for shape in SHAPES], **(hyper or HYPER))
    pair.step(steps)
    return pair


def through_torch_save(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS = {
    "direct": lambda state: state,
    "deepcopy": copy.deepcopy,
    "torch.save": through_torch_save,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}


@pytest.mark.parametrize("way", WAYS)
def test_from_torch_to_ours_in_mid_training(way):
    """torch trains, we take over from its state dict, and go where it goes."""
    pair = pair_in_training()
    fresh = FusedMomentum(clone_params([theirs for _, theirs in pair.params]), lr=99.0)
    fresh.load_state_dict(WAYS[way](pair.theirs.state_dict()))
    pair.mine = fresh
    assert fresh.param_groups[0]["lr"] == 0.1
    pair.check()
    pair.theirs.load_state_dict(copy.deepcopy(pair.theirs.state_dict()))  # "direct" shares the buffers
    pair.step(10)


@pytest.mark.parametrize("way", WAYS)
def test_from_ours_to_torch_in_mid_training(way):
    pair = pair_in_training()
    fresh = torch.optim.SGD(clone_params([mine for mine, _ in pair.params]), lr=99.0)
    fresh.load_state_dict(WAYS[way](pair.mine.state_dict()))
    pair.theirs = fresh
    pair.check()
    pair.mine.load_state_dict(copy.deepcopy(pair.mine.state_dict()))
    fresh.param_groups[0].update(foreach=False, fused=False)
    pair.step(10)


def test_back_and_forth_every_few_steps():
    pair = pair_in_training()
    for _ in range(6):
        mine, theirs = (copy.deepcopy(opt.state_dict()) for opt in pair.optimizers)
        pair.mine.load_state_dict(theirs)
        pair.theirs.load_state_dict(mine)
        pair.both(lambda opt: opt.param_groups[0].update(foreach=False, fused=False))
        pair.step(3)


def test_state_dict_has_torchs_form():
    pair = pair_in_training()
    mine, theirs = (opt.state_dict() for opt in pair.optimizers)
    assert list(mine) == list(theirs)
    assert list(mine["state"]) == list(theirs["state"])
    for index in theirs["state"]:
        assert list(mine["state"][index]) == list(theirs["state"][index])
        assert_same(mine["state"][index]["momentum_buffer"], theirs["state"][index]["momentum_buffer"])
    skip = {"foreach", "fused"}
    for has, should in zip(mine["param_groups"], theirs["param_groups"], strict=True):
        assert list(has) == list(should)
        assert {k: v for k, v in has.items() if k not in skip} == {k: v for k, v in should.items() if k not in skip}


def test_state_dict_before_the_first_step():
    pair = Pair([torch.randn(300)], **HYPER)
    assert pair.mine.state_dict()["state"] == {}
    pair.mine.load_state_dict(pair.theirs.state_dict())
    pair.step(3)


@pytest.mark.parametrize("source", ["torch-default", "torch-foreach", "torch-fused", "torch-for-loop"])
def test_states_of_torchs_other_implementations(source):
    """Whatever torch.optim.SGD was told to use, its checkpoint goes on here as the for-loop does."""
    pair = pair_in_training()
    options = {
        "torch-default": {},
        "torch-foreach": {"foreach": True},
        "torch-fused": {"fused": True},
        "torch-for-loop": {"foreach": False, "fused": False},
    }[source]
    state = copy.deepcopy(pair.theirs.state_dict())
    for group in state["param_groups"]:
        group.update({"foreach": None, "fused": None, **options})
    pair.mine.load_state_dict(state)
    pair.step(5)


def test_old_checkpoint_with_none_buffers():
    """Old versions of torch stored None for parameters that had not stepped, and buffers for momentum == 0."""
    pair = pair_in_training()
    for opt in pair.optimizers:
        state = copy.deepcopy(opt.state_dict())
        state["state"][0]["momentum_buffer"] = None
        state["state"][2] = {"momentum_buffer": None}
        opt.load_state_dict(state)
    pair.step(5)


def test_old_checkpoint_without_newer_keys():
    """Group keys that torch's __setstate__ fills in are filled in here."""
    pair = pair_in_training()
    for opt in pair.optimizers:
        state = copy.deepcopy(opt.state_dict())
        for key in ("nesterov", "maximize", "foreach", "differentiable", "fused"):
            del state["param_groups"][0][key]
        opt.load_state_dict(state)
    assert {"nesterov", "maximize", "foreach", "differentiable", "fused"} <= set(pair.mine.param_groups[0])
    pair.step(5)


def test_checkpoint_with_part_of_the_state():
    pair = pair_in_training()
    for opt in pair.optimizers:
        state = copy.deepcopy(opt.state_dict())
        del state["state"][1], state["state"][4]
        opt.load_state_dict(state)
    pair.step(5)


def test_checkpoint_of_another_dtype():
    """torch casts a loaded buffer to its parameter's dtype; here the next step does."""
    pair = pair_in_training()
    for opt in pair.optimizers:
        state = copy.deepcopy(opt.state_dict())
        for entry in state["state"].values():
            entry["momentum_buffer"] = entry["momentum_buffer"].double()
        opt.load_state_dict(state)
    pair.step(5)
    assert pair.mine.state[pair.params[0][0]]["momentum_buffer"].dtype is torch.float32


@pytest.mark.parametrize("layout", ["permuted", "column", "offset"])
def test_checkpoint_with_buffers_in_another_layout(layout):
    pair = pair_in_training()
    for opt in pair.optimizers:
        state = copy.deepcopy(opt.state_dict())
        for index in (1, 4):
            entry = state["state"][index]
            entry["momentum_buffer"] = in_layout(entry["momentum_buffer"], layout)
        opt.load_state_dict(state)
    pair.step(5)


@pytest.mark.parametrize("kind", ["groups", "size"])
def test_checkpoint_that_does_not_fit(kind):
    """torch's own error, and nothing has changed."""
    pair = pair_in_training()
    state = copy.deepcopy(pair.mine.state_dict())
    says = "different number of parameter groups" if kind == "groups" else "doesn't match the size"
    if kind == "groups":
        state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))
    else:
        state["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match=says):
        pair.mine.load_state_dict(state)
    pair.check()
    pair.step(3)


def test_loading_while_the_old_buffers_are_held_elsewhere():
    """After loading, the step writes the loaded buffers, not those of before."""
    pair = pair_in_training()
    old = [pair.mine.state[p]["momentum_buffer"] for p, _ in pair.params]
    kept = [b.clone() for b in old]
    pair.both(lambda opt: opt.load_state_dict(copy.deepcopy(opt.state_dict())))
    pair.step(3)
    for buffer, before in zip(old, kept, strict=True):
        assert_same(buffer, before)


def test_named_parameters():
    model = torch.nn.Linear(19, 5)
    opt = FusedMomentum(model.named_parameters(), **HYPER)
    for param in model.parameters():
        param.grad = torch.randn(param.shape)
    opt.step()
    state = opt.state_dict()
    assert state["param_groups"][0]["param_names"] == ["weight", "bias"]
    other = torch.optim.SGD(copy.deepcopy(model).named_parameters(), **HYPER)
    other.load_state_dict(state)
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]


# ---------------------------------------------------------------------------------------------- deepcopy and pickle


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copy_of_the_optimizer_with_its_parameters(way):
    """The copy goes on by itself, and leaves the original alone."""
    pair = pair_in_training()
    params = [[p[side] for p in pair.params] for side in (0, 1)]
    copies = []
    for opt, held in zip(pair.optimizers, params, strict=True):
        both = (held, opt)
        copies.append(copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both)))
    original = Pair([torch.zeros(1)])
    original.mine, original.theirs = pair.optimizers
    pair.mine, pair.theirs = (opt for _, opt in copies)
    assert isinstance(pair.mine, FusedMomentum) and pair.mine is not original.mine
    pair.step(5)
    original.check()
    original.step(3)
    pair.check()
    pair.step(3)
    assert pair.params[0][0] is copies[0][0][0]


def test_pickle_before_the_first_step():
    pair = Pair([torch.randn(300)], **HYPER)
    pair.mine, pair.theirs = (pickle.loads(pickle.dumps(opt)) for opt in pair.optimizers)
    pair.step(3)


def test_torch_save_of_the_whole_optimizer():
    pair = pair_in_training()
    loaded = []
    for opt in pair.optimizers:
        file = io.BytesIO()
        torch.save(opt, file)
        file.seek(0)
        loaded.append(torch.load(file, weights_only=False))
    pair.mine, pair.theirs = loaded
    pair.step(5)


def test_setstate_with_a_state_dict_of_torch():
    """Optimizer.__setstate__ is how torch's own tools hand state over."""
    pair = pair_in_training()
    for opt in pair.optimizers:
        opt.__setstate__(copy.copy(opt.__getstate__()))
    pair.step(3)


def test_shallow_copy_shares_its_state():
    """copy.copy(opt) steps the same parameters with the same buffers, as torch's does."""
    pair = pair_in_training()
    twins = [copy.copy(opt) for opt in pair.optimizers]
    for _ in range(3):
        pair.step()
        pair.new_grads()
        for twin in twins:
            twin.step()
        pair.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_through_a_file(dtype):
    pair = Pair([torch.randn(n).to(dtype) for n in (33, 300)], Oracle, **HYPER)
    pair.step(3)
    pair.both(lambda opt: opt.load_state_dict(through_torch_save(opt.state_dict())))
    pair.step(3)

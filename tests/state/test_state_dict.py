"""State travels to and from torch.optim.SGD, through files, copies and pickles; the trajectory goes on unchanged."""

import copy

import pytest
import torch
from harness import Oracle, Pair, assert_all_same, params_of, refused
from values import BF16, COPIES, FP16, FP64, clone_params, dtype_name, in_layout, through_file

from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}
SHAPES = [(300,), (33, 5), (), (0,), (4, 3, 5, 5)]


def pair_in_training(steps=5, **hyper):
    pair = Pair([torch.randn(shape) for shape in SHAPES], **(hyper or HYPER))
    pair.step(steps)
    return pair


WAYS = {"direct": lambda state: state, "torch.save": through_file, **COPIES}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("to_ours", [True, False], ids=["to-ours", "to-torch"])
def test_from_one_to_the_other_in_mid_training(to_ours, way):
    """One trains, the other takes over from its state dict, and goes where it goes."""
    pair = pair_in_training()
    source = pair.theirs if to_ours else pair.mine
    fresh = (FusedMomentum if to_ours else torch.optim.SGD)(clone_params(params_of(source)), lr=99.0)
    fresh.load_state_dict(WAYS[way](source.state_dict()))
    assert fresh.param_groups[0]["lr"] == 0.1
    source.load_state_dict(copy.deepcopy(source.state_dict()))  # "direct" shares the buffers
    pair.mine, pair.theirs = (fresh, source) if to_ours else (source, fresh)
    pair.theirs.param_groups[0].update(foreach=False, fused=False)
    pair.check()
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
        assert list(mine["state"][index]) == list(theirs["state"][index]) == ["momentum_buffer"]
    skip = {"foreach", "fused"}
    for has, should in zip(mine["param_groups"], theirs["param_groups"], strict=True):
        assert list(has) == list(should)
        assert {k: v for k, v in has.items() if k not in skip} == {k: v for k, v in should.items() if k not in skip}


def test_state_dict_before_the_first_step():
    pair = Pair([torch.randn(300)], **HYPER)
    assert pair.mine.state_dict()["state"] == {}
    pair.mine.load_state_dict(pair.theirs.state_dict())
    pair.step(3)


IMPLEMENTATIONS = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "for-loop": {"foreach": False},
}


def without_newer_keys(state):
    """Torch's __setstate__ fills them in."""
    for key in ("nesterov", "maximize", "foreach", "differentiable", "fused"):
        del state["param_groups"][0][key]


def with_none_buffers(state):
    """Old versions of torch stored None for parameters that had not stepped, and buffers for momentum == 0."""
    state["state"][0]["momentum_buffer"] = None
    state["state"][2] = {"momentum_buffer": None}


def each_buffer(change):
    def edit(state):
        for index in (1, 4):
            entry = state["state"][index]
            entry["momentum_buffer"] = change(entry["momentum_buffer"])

    return edit


CHECKPOINTS = {
    # Whatever torch.optim.SGD was told to use, its checkpoint goes on here as the for-loop does.
    **{f"of torch's {name}": lambda state, options=options: state["param_groups"][0].update(
        {"foreach": None, "fused": None, **options}) for name, options in IMPLEMENTATIONS.items()},
    "with None for buffers": with_none_buffers,
    "without newer keys": without_newer_keys,
    "of a part": lambda state: (state["state"].pop(1), state["state"].pop(4)),
    # Torch casts a loaded buffer to its parameter's dtype; here the next step does.
    "of another dtype": each_buffer(torch.Tensor.double),
    **{f"in layout {name}": each_buffer(lambda buffer, name=name: in_layout(buffer, name)) for name in (
        "permuted", "column", "offset")},
}  # fmt: skip


@pytest.mark.parametrize("edited", CHECKPOINTS)
def test_checkpoints(edited):
    pair = pair_in_training()
    for opt in pair.optimizers:
        state = copy.deepcopy(opt.state_dict())
        CHECKPOINTS[edited](state)
        opt.load_state_dict(state)
    pair.theirs.param_groups[0].update(foreach=False, fused=False)
    assert set(pair.theirs.param_groups[0]) <= set(pair.mine.param_groups[0])
    pair.step(5)
    assert {entry["momentum_buffer"].dtype for entry in pair.mine.state.values()} == {torch.float32}


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
    with refused(pair.mine, ValueError, says):
        pair.mine.load_state_dict(state)
    pair.step(3)


def test_loading_while_the_old_buffers_are_held_elsewhere():
    """After loading, the step writes the loaded buffers, not those of before."""
    pair = pair_in_training()
    old = [pair.mine.state[p]["momentum_buffer"] for p, _ in pair.params]
    kept = [b.clone() for b in old]
    pair.both(lambda opt: opt.load_state_dict(copy.deepcopy(opt.state_dict())))
    pair.step(3)
    assert_all_same(old, kept)


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


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copy_of_the_optimizer_with_its_parameters(way, steps):
    """The copy goes on by itself, and leaves the original alone."""
    ways = {**COPIES, "torch.save": lambda value: through_file(value, weights_only=False)}
    original = pair_in_training(steps)
    copies = [ways[way]((params_of(opt), opt)) for opt in original.optimizers]
    pair = Pair.of(*(opt for _, opt in copies))
    assert isinstance(pair.mine, FusedMomentum) and pair.mine is not original.mine
    pair.step(5)
    original.check()
    original.step(3)
    pair.check()
    pair.step(3)
    assert pair.params[0][0] is copies[0][0][0]


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


@pytest.mark.parametrize("dtype", [BF16, FP16, FP64], ids=dtype_name)
def test_other_dtypes_through_a_file(dtype):
    pair = Pair([torch.randn(n).to(dtype) for n in (33, 300)], Oracle, **HYPER)
    pair.step(3)
    pair.both(lambda opt: opt.load_state_dict(through_file(opt.state_dict())))
    pair.step(3)

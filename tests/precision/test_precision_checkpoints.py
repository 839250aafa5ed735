"""A resumed training has the bits of one that was not interrupted, through every way to keep an optimizer."""

import copy

import pytest
import torch
from harness import Snapshot, assert_same, for_loop, refused
from precision_oracle import Options, buffer_values, oracle_convert
from precision_twin import FEW, give_grads, mode_name, optimizer_of, options_of_mode, plain_pickle_takes_fp8, twin_of
from values import BF16, COPIES, FP8, FP16, FP32, INT8, clone_params, dtype_name, through_file

from momentum_ext import FusedMomentum


def needs_pickle(way, mode):
    if way == "pickle" and mode["momentum_dtype"] is FP8 and not plain_pickle_takes_fp8():
        pytest.skip("this torch cannot pickle fp8 tensors")


MODES = pytest.mark.parametrize("mode", FEW, ids=mode_name)
SIZES = (300, 9, 0, 1025)


def twin_in_training(mode, steps=3, **hyper):
    twin = twin_of(mode, SIZES, **{"momentum": 0.9, "weight_decay": 0.01, "rounding_seed": 77, **hyper})
    twin.step(steps)
    return twin


def through_dcp(state, directory):
    """torch.distributed.checkpoint in one process, into a state dict that has the form and other values."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"optimizer": state}, checkpoint_id=directory, no_dist=True)
    blank = copy.deepcopy(state)
    for entry in blank["state"].values():
        for tensor in entry.values():
            tensor.view(torch.uint8).fill_(0x55) if tensor.numel() else None
    dcp.load({"optimizer": blank}, checkpoint_id=directory, no_dist=True)
    return blank


WAYS = {
    **{name: lambda state, _, copied=copied: copied(state) for name, copied in COPIES.items()},
    "torch.save": lambda state, _: through_file(state),
    "dcp": through_dcp,
}


def go_on(twin, state, mode, **options):
    """The twin's optimizer and parameters replaced by new ones that load the state."""
    params = clone_params(twin.params)
    twin.load(state, FusedMomentum(params, lr=99.0, **{**options_of_mode(mode), **options}))


@MODES
@pytest.mark.parametrize("way", WAYS)
def test_resume_from_a_state_dict(mode, way, tmp_path):
    needs_pickle(way, mode)
    twin = twin_in_training(mode)
    go_on(twin, WAYS[way](twin.opt.state_dict(), tmp_path), mode, rounding_seed=77)
    twin.step(3)


@MODES
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_resume_from_a_copy_of_the_optimizer(mode, way):
    needs_pickle(way, mode)
    twin = twin_in_training(mode)
    copies = {**COPIES, "torch.save": lambda value: through_file(value, weights_only=False)}
    twin.move_to(copies[way](twin.opt))
    twin.step(3)


@MODES
def test_state_dict_keeps_dtypes_and_values(mode):
    twin = twin_in_training(mode)
    state = twin.opt.state_dict()
    fresh = FusedMomentum(clone_params(twin.params), lr=0.1, momentum=0.9, **options_of_mode(mode))
    fresh.load_state_dict(copy.deepcopy(state))
    again = fresh.state_dict()
    for index, entry in state["state"].items():
        assert set(entry) == set(again["state"][index])
        for name in entry:
            found = again["state"][index][name]
            assert found.dtype is entry[name].dtype and found.stride() == entry[name].stride()
            assert_same(found, entry[name], name)
    if mode.get("stochastic_rounding"):
        assert state["param_groups"][0]["rounding_step"] == 3


@MODES
@pytest.mark.parametrize("formulation", ["torch", "classical"])
def test_from_torchs_sgd_and_back(mode, formulation):
    """A plain SGD state loads, converted; torch_state_dict() is one, with what the buffers stand for."""
    params = [torch.nn.Parameter(torch.randn(size).to(mode["dtype"])) for size in SIZES]
    theirs = for_loop(params, lr=0.1, momentum=0.9)
    for _ in range(3):
        give_grads(theirs)
        theirs.step()
    held = clone_params(params)
    mine = FusedMomentum(held, lr=0.1, momentum=0.9, **options_of_mode(mode))
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    mine.param_groups[0]["formulation"] = formulation
    give_grads(mine)
    mine.step()
    mine.param_groups[0]["formulation"] = "torch"
    state = mine.torch_state_dict()
    torch_again = torch.optim.SGD(clone_params(held), lr=9.0)
    torch_again.load_state_dict(copy.deepcopy(state))
    assert torch_again.param_groups[0]["lr"] == 0.1 and torch_again.param_groups[0]["momentum"] == 0.9
    for index, param in enumerate(held):
        assert set(state["state"][index]) == {"momentum_buffer"}
        options = Options(momentum_dtype=mode["momentum_dtype"], master_weights=mode.get("master_weights", False))
        converted = oracle_convert(mine.state[param], param, options, formulation)
        wide = torch.from_numpy(buffer_values(converted, param))
        exported = state["state"][index]["momentum_buffer"]
        assert exported.dtype not in (INT8, FP8)
        assert_same(exported.float(), wide, "exported buffer")
    before = Snapshot(torch_again)
    give_grads(torch_again)
    torch_again.step()
    assert before.has_moved == [size > 0 for size in SIZES]


@pytest.mark.parametrize("target", FEW, ids=mode_name)
@pytest.mark.parametrize("source", [None, FP32, FP16, INT8, FP8], ids=dtype_name)
def test_options_stay_those_of_the_optimizer_that_loads(target, source):
    """The checkpoint of another mode is converted to this one's, as an edit of the options would."""
    saved = {**target, "momentum_dtype": source, "master_weights": not target.get("master_weights", False)}
    if target.get("master_weights") == 24:  # the other kind of master, and its steps are counted
        saved |= {"master_weights": True, "stochastic_rounding": True}
    twin = twin_in_training(saved)
    go_on(twin, through_file(twin.opt.state_dict()), target, rounding_seed=77)
    found = twin.opt.param_groups[0].get("momentum_dtype")
    assert found == (target["momentum_dtype"] and dtype_name(target["momentum_dtype"]))
    twin.step(2)


def test_the_checkpoints_tensors_are_not_written():
    """A state dict that was loaded stays what it was, whatever is trained with it afterwards."""
    for mode in FEW:
        twin = twin_in_training(mode)
        state = copy.deepcopy(twin.opt.state_dict())
        kept = copy.deepcopy(state)
        go_on(twin, copy.deepcopy(state), mode, rounding_seed=77)
        twin.step(2)
        for index, entry in kept["state"].items():
            for name in entry:
                assert_same(state["state"][index][name], entry[name], name)


def without(key):
    return lambda group, entry: (entry if key in entry else group).pop(key)


def cut(key):
    return lambda group, entry: entry.update({key: entry[key][1:].clone()})


def of_8_bits(damage):
    return lambda group, entry: damage(group, entry["momentum_buffer"])


@pytest.mark.parametrize(
    "dtype, options, damage, name",
    [
        (FP32, {"momentum_dtype": INT8}, of_8_bits(without("scale")), "momentum_scale"),
        (BF16, {"momentum_dtype": FP8}, of_8_bits(without("scale")), "momentum_scale"),
        (FP32, {}, cut("momentum_buffer"), "momentum_buffer"),
        (FP32, {"momentum_dtype": INT8}, of_8_bits(cut("codes")), "momentum_buffer"),
        (BF16, {"momentum_dtype": FP8}, of_8_bits(cut("codes")), "momentum_buffer"),
        (BF16, {"master_weights": True}, cut("param_remainder"), "param_remainder"),
        (FP16, {"master_weights": True}, cut("master_param"), "master_param"),
        (FP32, {"ema_decay": 0.9}, cut("ema"), "ema"),
        (FP32, {"ema_decay": 0.9}, without("ema_step"), "ema_step"),
    ],
)
@pytest.mark.parametrize("loads_into", ["same options", "none", "no momentum"])
def test_incomplete_state_is_refused(dtype, options, damage, name, loads_into):
    """By name, whatever the optimizer that loads it wants; it then is as it was."""
    opts = []
    for kept in (options, options if loads_into == "same options" else {}):
        params = [torch.nn.Parameter(torch.randn(30, 64).to(dtype)) for _ in range(2)]
        opts.append(optimizer_of(*params, steps=1, **kept))
    state = copy.deepcopy(opts[0].state_dict())
    damage(state["param_groups"][0], state["state"][1])
    state["param_groups"][0]["momentum"] *= loads_into != "no momentum"
    if name == "ema_step":
        state["state"][0].pop("ema")
    place = r"param_groups\[0\]\['params'\]\[1\]"
    with refused(opts[1], ValueError, f'{place}.*"{name}"'):
        opts[1].load_state_dict(state)

"""Weights in fp32, out of an optimizer with masters and into one."""

import copy

import pytest
import torch
from harness import assert_all_same, assert_same, one_process_group, refused
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from values import BF16, FP16, FP32

from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}


class Model(nn.Module):
    """Layers of all kinds, a tied weight, buffers, and a parameter that is not the optimizer's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.one = nn.Linear(5, 5)
        self.other = nn.Linear(5, 5)
        self.other.weight = self.one.weight
        self.columns = nn.Parameter(torch.randn(6, 7).t())
        self.apart = nn.Parameter(torch.randn(8, 9)[:, ::2])
        self.exact = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.randn(2))

    def trained(self):
        return [param for param in self.parameters() if param is not self.frozen]


def make(dtype, optimizer=FusedMomentum, **options):
    """A model of 16-bit parameters and an optimizer that keeps masters of them."""
    torch.manual_seed(3)
    model = Model()
    for param in model.parameters():
        if param.dtype == FP32:
            param.data = param.data.to(dtype)
    return model, optimizer(model.trained(), **HYPER, master_weights=True, **options)


def step(model, opt, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.trained():
        param.grad = torch.randn(param.shape, generator=generator).to(torch.float16).to(param.dtype)
    opt.step()


def assert_same_dicts(found, wanted):
    assert list(found) == list(wanted)
    assert_all_same(found.values(), wanted.values())


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_weights_of_an_fp32_run(dtype):
    """Gradients that all dtypes can hold: the masters are those of a training in fp32, to the bit."""
    model, opt = make(dtype)
    twin = Model()
    twin.load_state_dict(opt.fp32_state_dict(model))
    theirs = FusedMomentum(twin.trained(), **HYPER)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        for mine, other in zip(model.trained(), twin.trained(), strict=True):
            grad = torch.randint(-8, 9, mine.shape, generator=generator) / 4
            mine.grad, other.grad = grad.to(mine.dtype), grad.to(other.dtype)
        opt.step()
        theirs.step()
        found = opt.fp32_state_dict(model)
        assert_same_dicts(found, twin.state_dict())
        assert not torch.equal(found["one.bias"], model.one.bias.float())  # which is rounded
    assert found["frozen"].dtype == FP32 and found["exact"].dtype == torch.float64
    assert found["norm.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("started", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("options", [{}, {"momentum_dtype": "int8"}, {"stochastic_rounding": True}], ids=str)
def test_out_and_in(dtype, options, started):
    """Masters that came in are those that went out; momentum by load_state_dict, and the trainings go on alike."""
    saved, opt = make(dtype, **options)
    for seed in range(3):
        step(saved, opt, seed)
    weights = copy.deepcopy(opt.fp32_state_dict(saved))
    model, mine = make(dtype, **options)
    if started:
        step(model, mine, 7)
    mine.load_state_dict(copy.deepcopy(opt.state_dict()))
    for entry in mine.state.values():  # they come from the weights
        for key in ("param_remainder", "master_param"):
            entry.pop(key, None)
    mine.load_fp32_state_dict(model, weights)
    for seed in (10, 11, None):
        assert_same_dicts(mine.fp32_state_dict(model), opt.fp32_state_dict(saved))
        assert_all_same(model.parameters(), saved.parameters())
        if seed:
            step(saved, opt, seed)
            step(model, mine, seed)


def test_before_the_first_step():
    """The first step starts from the masters that were loaded."""
    model, opt = make(BF16)
    weights = {name: value + 1e-3 if name == "one.bias" else value for name, value in Model().state_dict().items()}
    opt.load_fp32_state_dict(model, weights)
    assert_same(opt.fp32_state_dict(model)["one.bias"], weights["one.bias"])
    model.one.bias.grad = torch.zeros_like(model.one.bias)
    opt.param_groups[0]["weight_decay"] = 0.0
    opt.step()
    assert_same(opt.fp32_state_dict(model)["one.bias"], weights["one.bias"])


def test_special_values():
    model, opt = make(BF16)
    weights = Model().state_dict()
    weights["one.bias"] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 3.4e38])
    opt.load_fp32_state_dict(model, weights)
    assert_same(opt.fp32_state_dict(model)["one.bias"], weights["one.bias"])


def test_parameters_without_a_master():
    """They are widened, and rounded to nearest; one that the option is taken from starts from what it is."""
    model, opt = make(BF16)
    step(model, opt, 0)
    opt.param_groups[0]["master_weights"] = False
    widened = {name: each.float() if each.dtype == BF16 else each for name, each in model.state_dict().items()}
    assert_same_dicts(opt.fp32_state_dict(model), widened)
    weights = Model().state_dict()
    opt.load_fp32_state_dict(model, weights)
    for name in ("one.bias", "columns", "frozen"):
        assert_same(model.get_parameter(name).detach(), weights[name].bfloat16())
    step(model, opt, 1)


def test_wrappers():
    model, opt = make(BF16)
    step(model, opt, 0)
    wanted = opt.fp32_state_dict(model)
    with one_process_group():
        replica = nn.parallel.DistributedDataParallel(model)
        assert_same_dicts(opt.fp32_state_dict(replica), wanted)
        opt.load_fp32_state_dict(replica, wanted)
    assert_same_dicts(opt.fp32_state_dict(torch.compile(model)), wanted)


def test_dtensors():
    with one_process_group():
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Linear(4, 6).bfloat16()
        fully_shard(model, mesh=mesh)
        opt = FusedMomentum(model.parameters(), **HYPER, master_weights=True)
        for _ in range(2):
            for param in model.parameters():
                param.grad = torch.ones_like(param) / 3
            opt.step()
        found = opt.fp32_state_dict(model)
        before = {name: each.full_tensor().clone() for name, each in found.items()}
        assert {each.placements for each in found.values()} == {model.weight.placements}
        assert not torch.equal(before["weight"], model.weight.full_tensor().float())
        other = nn.Linear(4, 6).bfloat16()
        fully_shard(other, mesh=mesh)
        mine = FusedMomentum(other.parameters(), **HYPER, master_weights=True)
        mine.load_fp32_state_dict(other, found)
        assert_same_dicts({name: each.full_tensor() for name, each in mine.fp32_state_dict(other).items()}, before)
        with refused(mine, RuntimeError, "weight: expected a DTensor of .*Shard.*, got a plain Tensor"):
            mine.load_fp32_state_dict(other, before)


def test_wrappers_inside_the_model():
    """Activation checkpointing, whose state dict has other names than the parameters."""
    torch.manual_seed(1)
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 6)), nn.Linear(6, 2)).bfloat16()
    opt = FusedMomentum(model.parameters(), **HYPER, master_weights=True)
    for param in model.parameters():
        param.grad = torch.ones_like(param) / 3
    opt.step()
    weights = copy.deepcopy(opt.fp32_state_dict(model))
    assert list(weights) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert all(not torch.equal(each, each.bfloat16().float()) for each in weights.values())
    moved = {name: each + 1e-3 for name, each in weights.items()}
    opt.load_fp32_state_dict(model, moved)
    assert_same_dicts(opt.fp32_state_dict(model), moved)


def test_hooks_that_rename():
    model = nn.Linear(4, 6).bfloat16()

    def rename(found, new_name):
        for name in list(found):
            found[new_name(name)] = found.pop(name)

    model.register_state_dict_post_hook(lambda module, found, *_: rename(found, "x.{}".format))
    model.register_load_state_dict_pre_hook(lambda module, found, *_: rename(found, lambda name: name[2:]))
    opt = FusedMomentum(model.parameters(), **HYPER, master_weights=True)
    weights = {f"x.{name}": torch.randn(each.shape) for name, each in model.named_parameters()}
    opt.load_fp32_state_dict(model, weights)
    assert_same_dicts(opt.fp32_state_dict(model), weights)
    assert_same(model.bias.detach(), weights["x.bias"].bfloat16())


def test_a_state_dict_without_the_parameters_themselves():
    """Whoever copies there would have a master of other values than the parameter's."""
    model = nn.Linear(4, 6).bfloat16()
    weights = {name: torch.ones(each.shape) for name, each in model.named_parameters()}
    model.register_state_dict_post_hook(
        lambda module, found, *_: found.update({name: each.clone() for name, each in found.items()})
    )
    opt = FusedMomentum(model.parameters(), **HYPER, master_weights=True)
    with refused(opt, RuntimeError, "does not hold its parameter weight itself"):
        opt.load_fp32_state_dict(model, weights)
    with pytest.raises(RuntimeError, match=r"fp32_state_dict\(\): the model's state_dict"):
        opt.fp32_state_dict(model)


class Counting(nn.Linear):
    count = torch.zeros(2)

    def get_extra_state(self):
        return self.count

    def set_extra_state(self, count):
        self.count = count


def test_extra_state():
    model = Counting(4, 6).bfloat16()
    opt = FusedMomentum(model.parameters(), **HYPER, master_weights=True)
    model.count = torch.ones(2)
    weights = copy.deepcopy(opt.fp32_state_dict(model))
    model.count = torch.zeros(2)
    opt.load_fp32_state_dict(model, weights)
    assert_same(model.count, torch.ones(2))


def test_tied_weights_stay_tied():
    model, opt = make(BF16)
    found = opt.fp32_state_dict(model)
    assert found["one.weight"] is found["other.weight"]


def test_no_master_stays_from_before():
    """Loaded without the option, and then with it: the old remainder would be added to the new weights."""
    model, opt = make(BF16)
    step(model, opt, 0)
    opt.param_groups[0]["master_weights"] = False
    opt.load_fp32_state_dict(model, {name: torch.ones_like(each) for name, each in Model().state_dict().items()})
    opt.param_groups[0]["master_weights"] = True
    assert_same(opt.fp32_state_dict(model)["one.bias"], torch.ones(5))


def test_another_model():
    model, opt = make(BF16)
    with pytest.raises(ValueError, match="model: none of its parameters is this optimizer's"):
        opt.fp32_state_dict(copy.deepcopy(model))
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got NoneType"):
        opt.fp32_state_dict(None)
    with refused(opt, TypeError, "state_dict: expected a dict, got list"):
        opt.load_fp32_state_dict(model, [])


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda weights: weights.pop("one.bias"), "missing: one.bias"),
        (lambda weights: weights.update(extra=torch.ones(1)), "unexpected: extra"),
        (lambda weights: weights.update({"conv.bias": torch.ones(5)}), r"conv.bias: expected shape \(4,\), got \(5,\)"),
        (lambda weights: weights.update({"columns": 3.0}), "columns: expected a tensor, got float"),
        (lambda weights: weights.update({"frozen": torch.ones(2).to_sparse()}), "frozen: expected a dense tensor"),
        (lambda weights: weights.update({"exact": torch.ones(3, device="meta")}), "exact: .* on meta"),
        (lambda weights: weights.update({"conv.bias": torch.ones(4) * 1j}), "conv.bias: .*complex64"),
    ],
)
def test_what_does_not_fit_is_refused(edit, message):
    model, opt = make(BF16)
    step(model, opt, 0)
    weights = {name: value + 1 for name, value in Model().state_dict().items()}
    edit(weights)
    before = copy.deepcopy(model.state_dict())
    with refused(opt, RuntimeError, f"nothing was loaded.*{message}"):
        opt.load_fp32_state_dict(model, weights)
    assert_same_dicts(model.state_dict(), before)


def test_not_while_weights_are_held():
    model, opt = make(BF16, ema_decay=0.5)
    step(model, opt, 0)
    weights = opt.fp32_state_dict(model)
    with opt.ema_weights():
        with pytest.raises(RuntimeError, match="ema_weights"):
            opt.fp32_state_dict(model)
        with pytest.raises(RuntimeError, match="ema_weights"):
            opt.load_fp32_state_dict(model, weights)

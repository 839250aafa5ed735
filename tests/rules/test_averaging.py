"""ema_decay: the average of the weights that torch.optim.swa_utils.AveragedModel keeps, from inside the step."""

import copy
import io
import math
import pickle

import pytest
import torch
from harness import LAYOUTS, Snapshot, assert_same, clone_params, in_layout, matching_isas
from torch.optim.swa_utils import get_ema_multi_avg_fn

import momentum_ext
from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
SIZES = (0, 1, 7, 33, 255, 256, 257, 2047, 2048, 2049, 40_001)


class Averaged:
    """FusedMomentum with ema_decay, and torch's for-loop with torch's averaging function after each step."""

    def __init__(self, tensors, decay=0.9, **hyper):
        hyper = {**HYPER, **hyper}
        self.mine, self.theirs = clone_params(tensors), clone_params(tensors)
        self.opt = FusedMomentum(self.mine, ema_decay=decay, **hyper)
        self.sgd = torch.optim.SGD(self.theirs, foreach=False, **hyper)
        self.averages = None
        self.update = get_ema_multi_avg_fn(decay)

    def step(self, missing=()):
        for index, (a, b) in enumerate(zip(self.mine, self.theirs, strict=True)):
            a.grad = None if index in missing else torch.randn(a.shape).to(a.dtype)
            b.grad = None if a.grad is None else a.grad.clone()
        self.opt.step()
        self.sgd.step()
        if self.averages is None:
            self.averages = [p.detach().clone() for p in self.theirs]
        else:
            self.update(self.averages, [p.detach() for p in self.theirs], None)
        self.check()

    def check(self):
        for index, (a, b, average) in enumerate(zip(self.mine, self.theirs, self.averages, strict=True)):
            assert_same(a, b, f"params[{index}]")
            assert_same(self.average_of(a), average, f"ema of params[{index}]")

    def average_of(self, param):
        return self.opt.state[param]["ema"] if param in self.opt.state else param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9, 0.9998])
def test_averaged_model(dtype, momentum, decay):
    pair = Averaged([torch.randn(n, dtype=dtype) for n in SIZES], decay, momentum=momentum)
    for _ in range(25):
        pair.step()
    assert all("ema" in pair.opt.state[param] for param in pair.mine)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_instruction_sets(threads):
    before, isa = torch.get_num_threads(), momentum_ext._C.isa()
    try:
        torch.set_num_threads(threads)
        for name in matching_isas():
            momentum_ext._C.set_isa(name)
            pair = Averaged([torch.randn(n) for n in (*SIZES, 300_003)])
            for _ in range(5):
                pair.step()
    finally:
        torch.set_num_threads(before)
        momentum_ext._C.set_isa(isa)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    pair = Averaged([in_layout(torch.randn(17, 23), layout), torch.randn(5)])
    for _ in range(5):
        pair.step()


def test_gradients_that_come_late_and_go():
    pair = Averaged([torch.randn(n) for n in (33, 257, 5)])
    for missing in ((1,), (1,), (0, 1), (), (), (0,), (0, 1, 2), (2,), ()):
        pair.step(missing)


def test_sixteen_bits_are_rounded_once():
    for dtype in (torch.bfloat16, torch.float16):
        param = torch.nn.Parameter(torch.randn(1003).to(dtype))
        opt = FusedMomentum([param], lr=0.1, ema_decay=0.75)
        for step in range(6):
            param.grad = torch.randn(1003).to(dtype)
            before = opt.state[param]["ema"].clone() if step else None
            opt.step()
            expected = param.detach() if before is None else before.lerp(param.detach(), 0.25)
            assert_same(opt.state[param]["ema"], expected)


def test_tensors_on_torchs_path():
    dense = torch.randn(50, 3)
    params = clone_params([dense, torch.randn(7)])
    opt = FusedMomentum(params, lr=0.1, ema_decay=0.9)
    average = None
    for _ in range(4):
        params[0].grad = torch.randn(50, 3).to_sparse(1)
        params[1].grad = torch.randn(7)
        opt.step()
        average = params[0].detach().clone() if average is None else average.lerp(params[0].detach(), 1 - 0.9)
        assert_same(opt.state[params[0]]["ema"], average)


def test_first_step_of_tensors_on_both_paths():
    params = clone_params([torch.randn(()), torch.randn(33)])
    opt = FusedMomentum(params, lr=0.1, momentum=0.9, ema_decay=0.3)
    for _ in range(2):
        params[0].grad, params[1].grad = torch.randn(()), torch.randn(33).to_sparse()
        opt.step()
        for param in params:
            assert set(opt.state[param]) == {"momentum_buffer", "ema"}


def test_a_step_that_torch_refuses_starts_no_average():
    params = clone_params([torch.randn(9), torch.randn(33)])
    opt = FusedMomentum(params, lr=0.1, weight_decay=0.1, ema_decay=0.3)
    params[0].grad, params[1].grad = torch.randn(9), torch.randn(33).to_sparse()
    before = Snapshot(opt)
    with pytest.raises(RuntimeError, match="add"):
        opt.step()
    before.assert_unchanged()
    assert len(opt.state) == 0


def test_overflow_leaves_the_average():
    pair = Averaged([torch.randn(33), torch.randn(257)])
    pair.opt.found_inf = torch.ones(())
    for param in pair.mine:
        param.grad = torch.full(param.shape, math.inf)
    before = Snapshot(pair.opt)
    pair.opt.step()
    before.assert_unchanged()
    assert len(pair.opt.state) == 0
    pair.opt.found_inf = torch.zeros(())
    for _ in range(3):
        pair.step()


def test_warm_up():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = FusedMomentum([param], lr=0.1, ema_decay=0.9, ema_warmup=True)
    average = None
    for count in range(200):
        param.grad = torch.randn(3, dtype=torch.float64)
        opt.step()
        decay = min(0.9, (1 + count) / (10 + count))
        value = param.detach().clone()
        average = value if average is None else decay * average + (1 - decay) * value
        torch.testing.assert_close(opt.state[param]["ema"], average, rtol=1e-12, atol=1e-12)


def test_swapped_in_and_out():
    pair = Averaged([torch.randn(33), in_layout(torch.randn(5, 7), "column"), torch.randn(9)])
    for _ in range(3):
        pair.step(missing=(2,))
    addresses = [p.data_ptr() for p in pair.mine]
    values = [p.detach().clone() for p in pair.mine]
    with pytest.raises(KeyError, match="comes back"), pair.opt.ema_weights():
        for param, average in zip(pair.mine, pair.averages, strict=True):
            assert_same(param, average)
        assert [p.data_ptr() for p in pair.mine] == addresses
        for refused in (pair.opt.step, pair.opt.state_dict, lambda: pickle.dumps(pair.opt)):
            with pytest.raises(RuntimeError, match="ema_weights"):
                refused()
        with pytest.raises(RuntimeError, match="ema_weights"), pair.opt.ema_weights():
            pass
        raise KeyError("comes back on an error too")
    for param, value in zip(pair.mine, values, strict=True):
        assert_same(param, value)
    pair.check()
    pair.step()


def test_without_ema_decay():
    opt = FusedMomentum([torch.nn.Parameter(torch.ones(3))], **HYPER)
    with pytest.raises(RuntimeError, match="ema_decay"), opt.ema_weights():
        pass


@pytest.mark.parametrize(
    "bad", [{"ema_decay": 1.0}, {"ema_decay": -0.1}, {"ema_decay": math.nan}, {"ema_warmup": True}]
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="ema_"):
        FusedMomentum([torch.nn.Parameter(torch.ones(3))], **HYPER, **bad)


def through_torch_save(pair):
    file = io.BytesIO()
    torch.save(pair.opt.state_dict(), file)
    file.seek(0)
    fresh = FusedMomentum(pair.mine, ema_decay=0.9, **HYPER)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize("copied", ["torch.save", "deepcopy", "pickle"])
def test_goes_on_from_a_checkpoint(copied):
    pair = Averaged([torch.randn(33), torch.randn(257)])
    for _ in range(3):
        pair.step()
    if copied == "torch.save":
        pair.opt = through_torch_save(pair)
    else:
        pair.opt = copy.deepcopy(pair.opt) if copied == "deepcopy" else pickle.loads(pickle.dumps(pair.opt))
        pair.mine = pair.opt.param_groups[0]["params"]
    for _ in range(3):
        pair.step()


def test_a_state_of_another_shape_is_refused():
    pair = Averaged([torch.randn(33), torch.randn(257)])
    pair.step()
    pair.opt.state[pair.mine[1]]["ema"] = torch.zeros(3)
    before = Snapshot(pair.opt)
    with pytest.raises(RuntimeError, match=r"ema of param_groups\[0\]\['params'\]\[1\]"):
        pair.opt.step()
    before.assert_unchanged()


def test_deleted_averages_start_again():
    pair = Averaged([torch.randn(33), torch.randn(257)])
    pair.step()
    before = pair.mine[1].detach().clone()
    del pair.opt.state[pair.mine[1]]["ema"]
    pair.mine[1].grad = torch.randn(257)
    pair.opt.step()
    assert_same(pair.opt.state[pair.mine[1]]["ema"], before.lerp(pair.mine[1].detach(), 1 - 0.9))


def test_version_counters():
    pair = Averaged([torch.randn(33)])
    pair.step()
    average = pair.opt.state[pair.mine[0]]["ema"]
    version = average._version
    pair.step()
    assert average._version > version


class Stubborn(dict):
    """A state that takes no average."""

    def __setitem__(self, key, value):
        if key == "ema":
            raise MemoryError("no room for an average")
        super().__setitem__(key, value)


def test_an_average_that_cannot_be_made_leaves_no_momentum_buffer():
    param = torch.nn.Parameter(torch.randn(33))
    opt = FusedMomentum([param], ema_decay=0.9, **HYPER)
    opt.state[param] = Stubborn()
    param.grad = torch.randn(33)
    before = param.detach().clone()
    with pytest.raises(MemoryError, match="no room for an average"):
        opt.step()
    assert_same(param, before)
    assert not opt.state[param]


@pytest.mark.parametrize("change", [torch.nn.Module.bfloat16, torch.nn.Module.double], ids=["bf16", "fp64"])
def test_an_average_of_another_dtype_is_refused_before_anything_is_written(change):
    module = torch.nn.Linear(33, 5)
    opt = FusedMomentum(module.parameters(), ema_decay=0.9, lr=0.1)
    for _ in range(2):
        for param in module.parameters():
            param.grad = torch.ones_like(param)
        opt.step()
    change(module)
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    before = Snapshot(opt)
    with pytest.raises(RuntimeError, match="dtype"):
        opt.step()
    before.assert_unchanged()
    with pytest.raises(RuntimeError, match="delete it"), opt.ema_weights():
        pass
    before.assert_unchanged()


def test_a_swap_that_fails_half_way_is_undone():
    pair = Averaged([torch.randn(33), torch.randn(9)])
    pair.step()
    frozen = torch.zeros(1).expand(9)  # several elements in one place: nothing can be written to it
    pair.opt.state[pair.mine[1]]["ema"] = frozen
    before = [p.detach().clone() for p in pair.mine]
    with pytest.raises(RuntimeError, match="single memory location"), pair.opt.ema_weights():
        pass
    for param, value in zip(pair.mine, before, strict=True):
        assert_same(param, value)


def test_no_state_is_loaded_while_swapped():
    pair = Averaged([torch.randn(33)])
    pair.step()
    state = pair.opt.state_dict()
    with pair.opt.ema_weights(), pytest.raises(RuntimeError, match="ema_weights"):
        pair.opt.load_state_dict(state)
    pair.check()


def test_averaging_ends_when_told():
    pair = Averaged([torch.randn(33)])
    pair.step()
    average = pair.opt.state[pair.mine[0]]["ema"].clone()
    pair.opt.ema_decay = None
    pair.mine[0].grad = torch.randn(33)
    pair.opt.step()
    assert_same(pair.opt.state[pair.mine[0]]["ema"], average)


def test_a_parameter_repeated_in_its_group_is_averaged_once():
    param = torch.nn.Parameter(torch.randn(33))
    with pytest.warns(UserWarning, match="duplicate"):
        opt = FusedMomentum([param, param], lr=0.1, ema_decay=0.9)
    average = None
    for _ in range(3):
        param.grad = torch.randn(33)
        opt.step()
        average = param.detach().clone() if average is None else average.lerp(param.detach(), 1 - 0.9)
    assert_same(opt.state[param]["ema"], average)


def test_swapped_parameters_that_share_memory_come_back():
    weight = torch.randn(33)
    params = [torch.nn.Parameter(weight), torch.nn.Parameter(weight)]
    opt = FusedMomentum(params, lr=0.1, ema_decay=0.9)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(33)
        opt.step()
    before = weight.clone()
    averages = [opt.state[p]["ema"].clone() for p in params]
    with opt.ema_weights():
        assert not torch.equal(weight, before)
    assert_same(weight, before)
    for param, average in zip(params, averages, strict=True):
        assert_same(opt.state[param]["ema"], average)


@pytest.mark.parametrize("edit", ["delete", "reverse"])
def test_groups_that_come_and_go_do_not_restart_the_averages(edit):
    params = clone_params([torch.randn(9), torch.randn(33)])
    opt = FusedMomentum([{"params": [p]} for p in params], lr=0.1, ema_decay=0.9)
    for step in range(5):
        for param in params:
            param.grad = torch.randn(param.shape)
        if step == 3:
            before = opt.state[params[1]]["ema"].clone()
            opt.param_groups.reverse() if edit == "reverse" else opt.param_groups.pop(0)
            opt.step()
            assert_same(opt.state[params[1]]["ema"], before.lerp(params[1].detach(), 1 - 0.9))
        else:
            opt.step()
    if edit == "delete":
        del opt.state[params[0]]  # torch's state_dict() knows no state without a group
    assert all(group["ema_step"] == 5 for group in opt.state_dict()["param_groups"])


def copied_attributes(opt):
    """An object of the same class with the optimizer's attributes."""
    wrapper = object.__new__(type(opt))
    wrapper.__dict__.update(opt.__dict__)
    return wrapper


def subclassed(opt):
    """As Lightning's and Fabric's wrappers: its attributes, and its step()."""

    class Wrapper:
        def __init__(self):
            self.__dict__ = {key: value for key, value in opt.__dict__.items() if key != "step"}
            self.__class__ = type("Wrapped", (Wrapper, type(opt)), {})

        def step(self, closure=None):
            return opt.step(closure)

    return Wrapper()


class Forwards:
    """As accelerate's."""

    def __init__(self, opt):
        self.opt = opt

    def __getattr__(self, name):
        return getattr(self.opt, name)


@pytest.mark.parametrize("context", ["ema_weights", "iterate_weights"])
@pytest.mark.parametrize("wrap", [copied_attributes, subclassed, Forwards], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("when", ["before", "inside"])
def test_a_step_inside_is_refused_by_every_wrapper(context, wrap, when):
    """Whoever enters, and whenever the wrapper was made; and before a closure can write gradients."""
    param = torch.nn.Parameter(torch.randn(9))
    opt = FusedMomentum([param], lr=0.1, momentum=0.9, nesterov=True, ema_decay=0.9)
    param.grad = torch.randn(9)
    opt.step()
    state, wrapper = opt.state_dict(), wrap(opt)
    for holder in (opt, wrapper):
        with getattr(holder, context)():
            others = (opt, wrapper) if when == "before" else (wrap(opt),)
            before = param.detach().clone()
            for each in others:
                for refused in (
                    lambda each=each: each.step(lambda: pytest.fail("the closure must not run")),
                    each.state_dict,
                    lambda each=each: each.load_state_dict(state),
                    lambda each=each: each.ema_weights().__enter__(),
                    lambda each=each: each.iterate_weights().__enter__(),
                    lambda: copy.deepcopy(opt),
                    lambda: pickle.dumps(opt),
                ):
                    with pytest.raises(RuntimeError, match=rf"leave {context}\(\) first"):
                        refused()
            assert_same(param, before)
        wrapper.step()


def test_no_groups():
    opt = FusedMomentum([torch.nn.Parameter(torch.ones(3))], lr=0.1, ema_decay=0.9)
    opt.param_groups.clear()
    opt.step()
    assert not opt.state

"""ema_decay: the average of the weights that torch.optim.swa_utils.AveragedModel keeps, from inside the step."""

import copy
import math

import pytest
import torch
from harness import Oracle, Pair, Snapshot, assert_all_same, assert_same, params_of, refused
from torch.optim.swa_utils import get_ema_multi_avg_fn
from values import EACH_COPY, EXACT_DTYPES, HALF_DTYPES, LAYOUTS, clone_params, in_layout, through_file

from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
SIZES = (0, 1, 7, 33, 255, 256, 257, 2047, 2048, 2049, 40_001)


def pair_of(*tensors, ema_decay=0.9, dtype=torch.float32, **hyper):
    """Tensors or sizes; the oracle lets torch's for-loop step and then averages as torch does."""
    tensors = [t if isinstance(t, torch.Tensor) else torch.randn(t, dtype=dtype) for t in tensors]
    return Pair(tensors, Oracle, **{**HYPER, "ema_decay": ema_decay, **hyper})


def average_of(pair, index):
    param = pair.params[index][0]
    return pair.mine.state[param]["ema"]


@EXACT_DTYPES
@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9, 0.9998])
def test_averaged_model(dtype, momentum, decay):
    """torch's own function for it, beside the oracle's lerp."""
    pair = pair_of(*SIZES, ema_decay=decay, dtype=dtype, momentum=momentum)
    update, averages = get_ema_multi_avg_fn(decay), []
    for _ in range(25):
        pair.step()
        params = [theirs.detach() for _, theirs in pair.params]
        update(averages, params, None) if averages else averages.extend(p.clone() for p in params)
    assert_all_same([pair.mine.state[mine]["ema"] for mine, _ in pair.params], averages, "ema")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads_and_instruction_sets(count, isa):
    torch.set_num_threads(count)
    pair_of(*SIZES, 300_003).step(5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    pair_of(in_layout(torch.randn(17, 23), layout), 5).step(5)


def test_gradients_that_come_late_and_go():
    """Who has not had one has not moved: its value is its average."""
    pair = pair_of(33, 257, 5)
    for missing in ((1,), (1,), (0, 1), (), (), (0,), (0, 1, 2), (2,), ()):
        pair.step(missing=missing)


@HALF_DTYPES
def test_sixteen_bits_are_rounded_once(dtype):
    pair_of(1003, ema_decay=0.75, dtype=dtype, momentum=0).step(6)


def test_tensors_on_torchs_path():
    """Sparse gradients beside dense ones, from the first step on."""
    params = clone_params([torch.randn(50, 3), torch.randn(7), torch.randn(())])
    opt = FusedMomentum(params, lr=0.1, momentum=0.9, ema_decay=0.9)
    averages = None
    for _ in range(4):
        params[0].grad = torch.randn(50, 3).to_sparse(1)
        params[1].grad, params[2].grad = torch.randn(7), torch.randn(())
        opt.step()
        now = [param.detach().clone() for param in params]
        averages = now if averages is None else [a.lerp(b, 1 - 0.9) for a, b in zip(averages, now, strict=True)]
        assert_all_same([opt.state[param]["ema"] for param in params], averages, "ema")
        assert all(set(opt.state[param]) == {"momentum_buffer", "ema"} for param in params)


def test_a_step_that_torch_refuses_starts_no_average():
    params = clone_params([torch.randn(9), torch.randn(33)])
    opt = FusedMomentum(params, lr=0.1, weight_decay=0.1, ema_decay=0.3)
    params[0].grad, params[1].grad = torch.randn(9), torch.randn(33).to_sparse()
    with refused(opt, RuntimeError, "add"):
        opt.step()
    assert len(opt.state) == 0


def test_overflow_leaves_the_average():
    pair = pair_of(33, 257)
    pair.new_grads(scale=math.inf)
    for overflows, times in ((True, 1), (False, 3), (True, 2), (False, 2)):
        pair.both(lambda opt, overflows=overflows: setattr(opt, "found_inf", torch.tensor(float(overflows))))
        for _ in range(times):
            before = Snapshot(pair.mine, "grads")
            pair.step()
            if overflows:
                before.assert_unchanged()


def test_warm_up():
    """By TensorFlow's formula, written out."""
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
    """In place, also where one has no average; what is refused inside: test_lookahead.py."""
    pair = pair_of(33, in_layout(torch.randn(5, 7), "column"), 9)
    pair.step(3, missing=(2,))
    before = Snapshot(pair.mine, "versions")
    with pytest.raises(KeyError, match="comes back"), pair.mine.ema_weights():
        assert before.has_moved == [True, True, False]
        for (mine, _), average in zip(pair.params, pair.theirs.averages.values(), strict=True):
            assert_same(mine, average)
        raise KeyError("comes back on an error too")
    before.assert_unchanged()
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


def test_goes_on_from_a_checkpoint():
    pair = pair_of(33, 257)
    pair.step(3)
    fresh = FusedMomentum([mine for mine, _ in pair.params], ema_decay=0.9, **HYPER)
    fresh.load_state_dict(through_file(pair.mine.state_dict()))
    pair.mine = fresh
    pair.step(3)


@EACH_COPY
def test_goes_on_in_a_copy(copied):
    pair = pair_of(33, 257)
    pair.step(3)
    pair.mine = copied(pair.mine)
    pair.step(3)


def test_deleted_averages_start_again_and_versions_count():
    pair = pair_of(33, 257)
    pair.step(2)
    average, value = average_of(pair, 0), pair.params[1][0].detach().clone()
    version = average._version
    del pair.mine.state[pair.params[1][0]]["ema"]
    pair.theirs.averages[pair.params[1][1]] = value
    pair.step(2)
    assert average._version > version


class Stubborn(dict):
    """A state that takes no average."""

    def __setitem__(self, key, value):
        if key == "ema":
            raise MemoryError("no room for an average")
        super().__setitem__(key, value)


def test_an_average_that_cannot_be_made_leaves_no_momentum_buffer():
    pair = pair_of(33)
    (param,) = params_of(pair.mine)
    pair.mine.state[param] = Stubborn()
    pair.new_grads()
    with refused(pair.mine, MemoryError, "no room for an average"):
        pair.mine.step()
    assert not pair.mine.state[param]


@pytest.mark.parametrize("change", [torch.nn.Module.bfloat16, torch.nn.Module.double], ids=["bf16", "fp64"])
def test_an_average_of_another_dtype_is_refused_before_anything_is_written(change):
    module = torch.nn.Linear(33, 5)
    opt = FusedMomentum(module.parameters(), ema_decay=0.9, lr=0.1)
    for act in (None, None, change):
        if act is not None:
            act(module)
        for param in module.parameters():
            param.grad = torch.ones_like(param)
        if act is None:
            opt.step()
    with refused(opt, RuntimeError, "dtype"):
        opt.step()
    with refused(opt, RuntimeError, "delete it"), opt.ema_weights():
        pass


def test_a_state_of_another_shape_is_refused():
    pair = pair_of(33, 257)
    pair.step()
    pair.mine.state[pair.params[1][0]]["ema"] = torch.zeros(3)
    with refused(pair.mine, RuntimeError, r"ema of param_groups\[0\]\['params'\]\[1\]"):
        pair.mine.step()


def test_an_average_whose_elements_share_one_place_is_refused():
    pair = pair_of(33, 9)
    pair.step()
    pair.new_grads()
    pair.mine.state[pair.params[1][0]]["ema"] = torch.zeros(1).expand(9)
    with refused(pair.mine, RuntimeError, r"ema of param_groups\[0\]\['params'\]\[1\]: several of its elements"):
        pair.mine.step()


def test_a_swap_that_fails_half_way_is_undone():
    pair = pair_of(33, 9)
    pair.step()
    frozen = torch.zeros(1).expand(9)  # several elements in one place: nothing can be written to it
    pair.mine.state[pair.params[1][0]]["ema"] = frozen
    with refused(pair.mine, RuntimeError, "single memory location", "versions"), pair.mine.ema_weights():
        pass


def test_averaging_ends_when_told():
    pair = pair_of(33)
    pair.step()
    average = average_of(pair, 0)
    kept = average.clone()
    pair.mine.ema_decay = pair.theirs.ema_decay = None
    pair.step()
    assert_same(average, kept)


@pytest.mark.parametrize("edit", ["delete", "reverse"])
def test_groups_that_come_and_go_do_not_restart_the_averages(edit):
    pair = Pair([{"params": [torch.randn(n)]} for n in (9, 33)], Oracle, lr=0.1, ema_decay=0.9)
    pair.step(3)
    gone = params_of(pair.mine)[0]
    pair.both(lambda opt: opt.param_groups.reverse() if edit == "reverse" else opt.param_groups.pop(0))
    pair.step(2)
    if edit == "delete":
        del pair.mine.state[gone]  # torch's state_dict() knows no state without a group
    assert all(group["ema_step"] == 5 for group in pair.mine.state_dict()["param_groups"])


def test_no_groups():
    opt = FusedMomentum([torch.nn.Parameter(torch.ones(3))], lr=0.1, ema_decay=0.9)
    opt.param_groups.clear()
    opt.step()
    assert not opt.state
    copy.deepcopy(opt).step()

"""Whatever a user does between two steps takes effect on the next one: a stale plan is a silent wrong result."""

import copy
import itertools
import pickle
from collections import OrderedDict, defaultdict

import pytest
import torch
from harness import Oracle, Pair, assert_all_same, assert_same, for_loop, params_of, refused
from values import BF16, EACH_COPY, FP16, FP32, FP64, clone_exact, dtype_name, in_layout

from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}
SHAPES = [(300,), (33, 5), (7,), (4, 3, 5, 5), (40, 40)]
SQUARE = 4


@pytest.fixture(params=["small", "large", "strided"])
def pair(request):
    """A training with a warm plan: on the calling thread alone, over several, and with parameters full of gaps."""
    shapes = SHAPES if request.param == "small" else [*SHAPES, (32_001,), (107, 300), (20_001,)]
    torch.set_num_threads(2)
    layout = "column" if request.param == "strided" else "contiguous"
    warm = Pair([in_layout(torch.randn(shape), layout) for shape in shapes], **HYPER)
    warm.step(4)
    return warm


def warm_pair(*shapes, oracle=for_loop, **hyper):
    pair = Pair([torch.randn(shape) for shape in shapes], oracle, **(hyper or HYPER))
    for params in pair.params:
        for param in params:
            param.grad_dtype = None
    pair.step(3)
    return pair


def held_as(tensor, values):
    """`values` in new memory, in the layout of `tensor`: only the address tells them apart."""
    return clone_exact(tensor).copy_(values)


# ------------------------------------------------------------------------------- one thing done, then a few steps


def one(act, index=1):
    """`act(optimizer, parameter, values)` on both sides, the values as random and as large as the parameter."""

    def run(pair):
        values = torch.randn(pair.params[index][0].shape)
        for opt, param in pair.each(index):
            with torch.no_grad():
                act(opt, param, values.clone())

    return run


def all_of(act):
    """`act(optimizer, its first group, values)` on both sides."""

    def run(pair):
        values = torch.randn(12, 70)
        pair.both(lambda opt: act(opt, opt.param_groups[0], values.clone()))

    return run


def set_data(tensor, data):
    tensor.data = data


def set_buffer(opt, param, buffer):
    opt.state[param]["momentum_buffer"] = buffer


def reallocate(opt, param, values):
    """What sharding wrappers do: resize the storage to nothing after use, and back."""
    storage = param.data.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    param.data.copy_(values)


def swap_tensors(opt, param, values):
    """The same Python object holds another tensor."""
    param.grad = None
    with torch.enable_grad():
        torch.utils.swap_tensors(param, torch.nn.Parameter(values))


def data_of_another_shape(opt, param, values):
    param.grad = None
    param.data = torch.linspace(-1, 1, 840).view(12, 70)
    opt.state.pop(param)


def another_parameter(opt, param, values):
    """It may well sit at the same address, in Python and in memory."""
    params = opt.param_groups[0]["params"]
    opt.state.pop(params[1])
    params[1] = None
    params[1] = torch.nn.Parameter(values)


def split_groups(opt, group, values):
    opt.param_groups = [{**group, "params": group["params"][i::2], "lr": 0.1 / (i + 1)} for i in range(2)]


def load_own(opt, group, values):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def copied_state(kind):
    """The copy is the state from now on: what happens to the former one means nothing."""

    def act(opt, group, values):
        former = opt.state
        opt.state = kind({p: dict(entry) for p, entry in former.items()})
        former.clear()
        set_buffer(opt, group["params"][1], torch.linspace(-1, 1, 165).view(33, 5))

    return all_of(act)


def new_parameter(values):
    return torch.nn.Parameter(values)


EDITS = [
    {"lr": 0.05},
    {"lr": torch.tensor(0.05)},
    {"lr": torch.tensor([0.05], dtype=torch.float64)},
    {"momentum": 0.5},
    {"momentum": 0},
    {"dampening": 0.7},
    {"dampening": 0},
    {"weight_decay": 0.3},
    {"weight_decay": 0},
    {"weight_decay": torch.tensor(0.3)},
    {"nesterov": True},
    {"nesterov": True, "dampening": 0},
    {"maximize": True},
    {"lr": 0.05, "momentum": 0.8, "dampening": 0.1, "weight_decay": 0.2, "nesterov": True, "maximize": True},
    {"initial_lr": 0.3, "name": "head", "capturable": False},  # schedulers and users keep their own things there
]
ACTIONS = {
    "nothing": lambda pair: None,
    # gradients
    "gradient set to None": lambda pair: pair.set_grad(1, None),
    "all gradients set to None": lambda pair: [pair.set_grad(i, None) for i in range(len(pair.params))],
    "gradient replaced": one(lambda opt, p, v: setattr(p, "grad", v)),
    "gradient changed in place": one(lambda opt, p, v: p.grad.mul_(-3).add_(1)),
    "gradient data replaced": one(lambda opt, p, v: set_data(p.grad, v)),
    "gradient data in another layout": one(lambda opt, p, v: set_data(p.grad, in_layout(v, "permuted"))),
    "gradient transposed in place": one(lambda opt, p, v: p.grad.t_(), SQUARE),  # same address, other strides
    "gradient becomes expanded": lambda pair: pair.set_grad(1, torch.randn(1, 5).expand(33, 5)),
    "zero_grad to None": all_of(lambda opt, group, v: opt.zero_grad(set_to_none=True)),
    "zero_grad": all_of(lambda opt, group, v: opt.zero_grad(set_to_none=False)),
    # parameters
    "changed in place": one(lambda opt, p, v: p.mul_(0.5).add_(1)),
    "data replaced": one(lambda opt, p, v: set_data(p, held_as(p, v))),
    **{f"data {name}": one(lambda opt, p, v, name=name: set_data(p, in_layout(v, name))) for name in (
        "permuted", "column", "contiguous", "offset")},
    "data of another shape": one(data_of_another_shape, 0),
    "another storage": one(lambda opt, p, v: p.set_(held_as(p, v))),
    "transposed in place": one(lambda opt, p, v: p.t_(), SQUARE),
    "freed and reallocated": one(reallocate),
    "swap_tensors": one(swap_tensors),
    # hyperparameters
    **{f"edit {edit}": lambda pair, edit=edit: pair.edit(**edit) for edit in EDITS},
    "foreach": lambda pair: pair.mine.param_groups[0].update(foreach=True),
    "new group dict": all_of(lambda opt, group, v: opt.param_groups.__setitem__(0, {**group, "lr": 0.03})),
    "new list of groups": all_of(split_groups),
    "defaults edited": all_of(lambda opt, group, v: opt.defaults.update(lr=77.0, momentum=0.1)),
    # groups
    "group added": all_of(lambda opt, group, v: opt.add_param_group({"params": [new_parameter(v)], "lr": 0.03})),
    "parameter appended": all_of(lambda opt, group, v: group["params"].append(new_parameter(v))),
    "parameter dropped": all_of(lambda opt, group, v: group["params"].pop()),
    "parameter replaced": one(lambda opt, p, v: opt.param_groups[0]["params"].__setitem__(1, new_parameter(v))),
    "parameter dies, another comes": one(another_parameter),
    "list reversed": all_of(lambda opt, group, v: group["params"].reverse()),
    "list replaced": all_of(lambda opt, group, v: group.update(params=list(group["params"][1:]))),
    "a tuple": all_of(lambda opt, group, v: group.update(params=tuple(group["params"]))),
    # state
    "load_state_dict": all_of(load_own),
    "entry replaced": one(
        lambda opt, p, v: opt.state.update({p: {"momentum_buffer": held_as(opt.state[p]["momentum_buffer"], v)}})
    ),
    "entry emptied": one(lambda opt, p, v: opt.state.update({p: {}})),
    "entry deleted": one(lambda opt, p, v: opt.state.pop(p)),
    "entry as an OrderedDict": one(lambda opt, p, v: opt.state.update({p: OrderedDict(opt.state[p])})),
    "buffer deleted": one(lambda opt, p, v: opt.state[p].pop("momentum_buffer")),
    "buffer set to None": one(lambda opt, p, v: set_buffer(opt, p, None)),
    "buffer replaced": one(set_buffer),
    "buffer replaced in its layout": one(
        lambda opt, p, v: set_buffer(opt, p, held_as(opt.state[p]["momentum_buffer"], v))
    ),
    "buffer strided": one(lambda opt, p, v: set_buffer(opt, p, in_layout(v, "column"))),
    "buffer changed in place": one(lambda opt, p, v: opt.state[p]["momentum_buffer"].zero_()),
    "buffer data replaced": one(lambda opt, p, v: set_data(opt.state[p]["momentum_buffer"], v)),
    "buffer data permuted": one(
        lambda opt, p, v: set_data(opt.state[p]["momentum_buffer"], in_layout(v, "permuted"))
    ),
    "buffer transposed": one(lambda opt, p, v: opt.state[p]["momentum_buffer"].t_(), SQUARE),
    "state cleared": all_of(lambda opt, group, v: opt.state.clear()),
    "new defaultdict": all_of(lambda opt, group, v: setattr(opt, "state", defaultdict(dict))),
    "state as a dict": copied_state(dict),
    "state as an OrderedDict": copied_state(OrderedDict),
    "state as a defaultdict": copied_state(lambda entries: defaultdict(dict, entries)),
}  # fmt: skip


@pytest.mark.parametrize("action", ACTIONS)
def test_takes_effect(pair, action):
    """In the next step, whatever gradients are left by then, and in those with new ones after it."""
    ACTIONS[action](pair)
    pair.step_as_is()
    pair.step(2)


IN_A_ROW = ["buffer strided", "data column", "buffer replaced in its layout", "entry deleted", "parameter appended"]


@pytest.mark.parametrize("first, then", list(itertools.permutations(IN_A_ROW, 2)))
def test_take_effect_one_after_the_other(pair, first, then):
    for action in (first, then):
        ACTIONS[action](pair)
        pair.step()


FORMER = {
    "data replaced": lambda opt, p: p.data,
    "buffer replaced": lambda opt, p: opt.state[p]["momentum_buffer"],
    "parameter replaced": lambda opt, p: p,
    "load_state_dict": lambda opt, p: opt.state[p]["momentum_buffer"],
}


@pytest.mark.parametrize("action", FORMER)
def test_what_was_replaced_is_not_written(pair, action):
    former = FORMER[action](pair.mine, pair.params[1][0])
    kept = clone_exact(former)
    ACTIONS[action](pair)
    pair.step(3)
    assert_same(former, kept)


def test_what_left_its_group_is_not_written():
    pair = Pair([{"params": [torch.randn(300), torch.randn(7)]}, {"params": [torch.randn(33, 5)], "lr": 0.03}], **HYPER)
    pair.step(3)
    leave_group = lambda opt: opt.param_groups[0]["params"].pop()  # noqa: E731
    for index, leave in ((1, leave_group), (0, lambda opt: opt.param_groups.pop(0))):
        gone = params_of(pair.mine)[index]
        before = clone_exact(gone)
        pair.both(leave)
        pair.step(3)
        assert_same(gone, before)


def test_zero_gradients_are_not_absent_ones(pair):
    """Momentum goes on."""
    before = [clone_exact(mine) for mine, _ in pair.params]
    ACTIONS["zero_grad"](pair)
    pair.step_as_is()
    assert not any(torch.equal(mine.detach(), b) for b, (mine, _) in zip(before, pair.params, strict=True))


def test_gradient_set_where_there_was_none():
    pair = Pair([torch.randn(shape) for shape in SHAPES], **HYPER)
    for index, shape in ((0, (300,)), (2, (7,))):
        pair.set_grad(index, torch.randn(shape))
        for _ in range(3):
            pair.step_as_is()


def test_gradient_reallocated_at_the_same_address_with_another_layout_and_dtype():
    pair = warm_pair((40, 40), oracle=Oracle)
    storages = [torch.randn(1600) for _ in range(2)]
    for dtype, strides in ((FP32, (40, 1)), (FP32, (1, 40)), (BF16, (40, 1)), (FP16, (1, 40)), (FP32, (40, 1))):
        for storage, (_, param) in zip(storages, pair.each(0), strict=True):
            param.grad = None
            storage.view(dtype)[:1600].copy_(torch.linspace(-1, 1, 1600))
            param.grad = storage.view(dtype).as_strided((40, 40), strides)
        pair.step_as_is()


def test_parameter_and_gradient_reallocated_at_the_same_address_with_another_shape():
    """The parameter keeps its address and loses elements; those beyond must not move any more."""
    pair = warm_pair((1600,), lr=0.1, weight_decay=0.01)
    wholes = [param.data for _, param in pair.each(0)]
    for shape in ((900,), (30, 30), (1600,), (40, 40)):
        count = torch.Size(shape).numel()
        for whole, (_, param) in zip(wholes, pair.each(0), strict=True):
            param.grad = None
            param.data = whole[:count].view(shape)
        before = wholes[0].clone()
        pair.step(2)
        assert_same(*wholes)
        assert_same(wholes[0][count:], before[count:])


@pytest.mark.parametrize("layout", ["contiguous", "column"])
@pytest.mark.parametrize("what", ["param", "grad", "momentum_buffer"])
@pytest.mark.parametrize("shape", [(30, 30), (800,)])
def test_shape_changed_at_the_same_address(what, layout, shape):
    """One of the three gets another shape, the others keep theirs: an error before any write, as from torch."""
    pair = Pair([torch.randn(300), in_layout(torch.randn(900), layout)], **HYPER)
    pair.step(3)
    for opt, param in pair.each(1):
        tensor = {"param": param, "grad": param.grad, "momentum_buffer": opt.state[param]["momentum_buffer"]}[what]
        step = tensor.stride(0)
        strides = (30 * step, step) if len(shape) == 2 else (step,)
        tensor.data = tensor.detach().as_strided(shape, strides, tensor.storage_offset())
    with refused(pair.mine, RuntimeError, r"\['params'\]\[1\]: expected the shape of its parameter"):
        pair.mine.step()
    with pytest.raises(RuntimeError, match="size"):
        pair.theirs.step()


def test_gradients_accumulated_by_autograd():
    """zero_grad, backward twice, step: gradients live and die as in a real loop."""
    pair = Pair([torch.randn(33, 5), torch.randn(5)], **HYPER)
    for step in range(6):
        data = torch.randn(8, 33)
        for opt, (weight, bias) in zip(pair.optimizers, zip(*pair.params, strict=True), strict=True):
            opt.zero_grad(set_to_none=bool(step % 2))
            for _ in range(2):
                (data @ weight + bias).square().mean().backward()
            opt.step()
        pair.check()


@pytest.mark.parametrize("dtype", [FP64, BF16, FP16], ids=dtype_name)
def test_parameter_data_of_another_dtype(dtype):
    pair = warm_pair((300,), (33, 5), oracle=Oracle)
    for opt, param in pair.each(0):
        param.grad = None
        param.data = param.data.to(dtype)
        opt.state.pop(param)
    pair.step(3)


def pair_of_modules(make):
    def side(kind):
        torch.manual_seed(0)
        modules.append(make())
        return kind(modules[-1].parameters(), **HYPER)

    modules = []
    pair = Pair.of(*(side(kind) for kind in (FusedMomentum, Oracle)))
    pair.step(3)
    return pair, modules


@pytest.mark.parametrize("dtype", [FP64, BF16], ids=dtype_name)
def test_module_to_another_dtype(dtype):
    """module.to() changes the data of parameters and gradients; the next step converts the buffers as loading would."""
    pair, modules = pair_of_modules(lambda: torch.nn.Sequential(torch.nn.Linear(19, 70), torch.nn.Linear(70, 3)))
    for to in (dtype, FP32):
        for module in modules:
            module.to(to)
        for state in pair.theirs.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].to(to)
        pair.step_as_is()
        pair.step(3)
        assert {pair.mine.state[p]["momentum_buffer"].dtype for p, _ in pair.params} == {to}


def test_module_to_another_memory_format():
    pair, modules = pair_of_modules(lambda: torch.nn.Conv2d(3, 8, 3))
    for module in modules:
        module.to(memory_format=torch.channels_last)
    pair.step_as_is()
    pair.step(3)


def test_buffer_data_of_another_dtype():
    pair = warm_pair(*SHAPES, oracle=Oracle)
    for opt, param in pair.each(1):
        buffer = opt.state[param]["momentum_buffer"]
        buffer.data = buffer.data.double() if opt is pair.mine else buffer.data.double().float()
    pair.step(3)


@pytest.mark.parametrize("with_grad", [True, False], ids=["gradient-there", "gradient-gone"])
def test_requires_grad_flips(pair, with_grad):
    """torch.optim.SGD looks at .grad alone."""
    for _, param in pair.each(1):
        param.requires_grad_(False)
        if not with_grad:
            param.grad = None
    pair.step_as_is()
    for _, param in pair.each(1):
        param.requires_grad_(True)
    pair.step(2)


def test_every_step_another_learning_rate(pair):
    for step in range(10):
        pair.edit(lr=0.1 / (step + 1))
        pair.step()


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_tensor_hyperparameter_changed_in_place(key):
    pair = warm_pair(*SHAPES, **{**HYPER, key: torch.tensor(0.1)})
    for value in (0.03, 0.0, 0.2):
        pair.both(lambda opt, value=value: opt.param_groups[0][key].fill_(value))
        pair.step(2)


@pytest.mark.parametrize("stays", [False, True], ids=["moved", "in both"])
def test_parameter_moved_to_another_group(stays):
    """The constructor refuses one that is in two groups, an edit doesn't: both apply, one after the other."""
    pair = Pair([{"params": [torch.randn(300), torch.randn(7)]}, {"params": [torch.randn(33, 5)], "lr": 0.03}], **HYPER)
    pair.step(3)
    for opt in pair.optimizers:
        here, there = (group["params"] for group in opt.param_groups)
        there.append(here[0] if stays else here.pop(0))
    pair.step(3)


def test_empty_ordered_dict_as_a_parameters_state(pair):
    """What the step puts there must be found by everything that reads the dict."""
    for opt, param in pair.each(1):
        opt.state[param] = OrderedDict()
    pair.step(2)
    entry = pair.mine.state[pair.params[1][0]]
    assert list(entry) == [*entry.keys()] == ["momentum_buffer"]
    assert [*copy.deepcopy(pair.mine.state_dict())["state"][1]] == ["momentum_buffer"]
    assert list(pickle.loads(pickle.dumps(entry))) == ["momentum_buffer"]


def test_extra_keys_in_the_state(pair):
    for opt, param in pair.each(1):
        opt.state[param]["note"] = "mine"
        opt.state["global"] = {"count": 3}
    pair.step(2)
    assert pair.mine.state[pair.params[1][0]]["note"] == "mine"
    assert pair.mine.state["global"] == {"count": 3}


@pytest.mark.parametrize("whole", [False, True], ids=["buffers", "entries"])
def test_states_of_two_parameters_swapped(whole):
    pair = warm_pair((300,), (300,))
    for opt in pair.optimizers:
        first, second = params_of(opt)
        one, other = opt.state[first], opt.state[second]
        if whole:
            opt.state[first], opt.state[second] = other, one
        else:
            one["momentum_buffer"], other["momentum_buffer"] = other["momentum_buffer"], one["momentum_buffer"]
    pair.step(3)


def test_buffer_given_before_the_first_step():
    pair = Pair([torch.randn(300), torch.randn(7)], **HYPER)
    one(set_buffer, 0)(pair)
    pair.step(3)


# ----------------------------------------------------------------------------------------------------- whole copies


@EACH_COPY
def test_copied_optimizer_steps_its_own_parameters(pair, copied):
    """A plan that came along with the copy would still point at the original."""
    originals = params_of(pair.mine)
    before = [clone_exact(p) for p in originals]
    pair.mine, pair.theirs = map(copied, pair.optimizers)
    pair.step(3)
    assert_all_same(originals, before)


def test_two_optimizers_take_turns_on_the_same_parameters(pair):
    others = [
        kind(params_of(opt), lr=0.03, momentum=0.5)
        for kind, opt in zip((FusedMomentum, for_loop), pair.optimizers, strict=True)
    ]
    for _ in range(3):
        pair.step()
        for opt in others:
            opt.step()
        pair.check()


def test_number_of_threads_changed(pair):
    for count in (1, 4, 2, 1, 3):
        torch.set_num_threads(count)
        pair.step(2)

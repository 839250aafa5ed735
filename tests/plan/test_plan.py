"""Whatever a user does between two steps takes effect on the next one: a stale plan is a silent wrong result."""

import copy
import pickle
from collections import OrderedDict, defaultdict

import pytest
import torch
from harness import Oracle, Pair, Snapshot, assert_same, clone_exact, in_layout

from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}
SHAPES = [(300,), (33, 5), (7,), (4, 3, 5, 5)]


@pytest.fixture(params=["small", "large", "strided"])
def pair(request):
    """A training with a warm plan: on the calling thread alone, over several, and with parameters full of gaps."""
    shapes = SHAPES if request.param == "small" else [*SHAPES, (32_001,), (107, 300), (20_001,)]
    torch.set_num_threads(2)
    layout = "column" if request.param == "strided" else "contiguous"
    warm = Pair([in_layout(torch.randn(shape), layout) for shape in shapes], **HYPER)
    warm.step(4)
    return warm


def held_as(tensor, values):
    """`values` in new memory, in the layout of `tensor`: only the address tells them apart."""
    return clone_exact(tensor).copy_(values)


def each(pair, index):
    """(optimizer, its parameter) on both sides."""
    return list(zip(pair.optimizers, pair.params[index], strict=True))


# --------------------------------------------------------------------------------------------------------- gradients


def test_gradient_set_to_none(pair):
    pair.new_grads()
    pair.set_grad(1, None)
    pair.step_as_is()
    pair.step(2)


def test_all_gradients_set_to_none(pair):
    for index in range(len(pair.params)):
        pair.set_grad(index, None)
    pair.step_as_is()
    pair.step(2)


def test_gradient_set_where_there_was_none():
    pair = Pair([torch.randn(shape) for shape in SHAPES], **HYPER)
    pair.set_grad(0, torch.randn(300))
    for _ in range(3):
        pair.step_as_is()
    pair.set_grad(2, torch.randn(7))
    for _ in range(3):
        pair.step_as_is()


def test_gradient_replaced(pair):
    pair.set_grad(1, torch.randn(33, 5))
    pair.step_as_is()


def test_gradient_changed_in_place(pair):
    for _, param in each(pair, 1):
        param.grad.mul_(-3).add_(1)
    pair.step_as_is()


def test_gradient_data_replaced(pair):
    values = torch.randn(33, 5)
    for _, param in each(pair, 1):
        param.grad.data = values.clone()
    pair.step_as_is()


def test_gradient_data_replaced_by_another_layout(pair):
    values = torch.randn(33, 5)
    for _, param in each(pair, 1):
        param.grad.data = in_layout(values, "permuted")
    pair.step_as_is()


def test_gradient_transposed_in_place(pair):
    """Same tensor, same address, other strides."""
    square = Pair([torch.randn(40, 40)], **HYPER)
    square.step(3)
    for _, param in each(square, 0):
        param.grad.t_()
    square.step_as_is()


def test_gradient_reallocated_at_the_same_address_with_another_layout():
    pair = Pair([torch.randn(40, 40)], **HYPER)
    pair.step(3)
    storages = [torch.randn(1600) for _ in range(2)]
    storages[1].copy_(storages[0])
    for strides in ((40, 1), (1, 40), (40, 1)):
        for storage, (_, param) in zip(storages, each(pair, 0), strict=True):
            param.grad = None
            param.grad = storage.as_strided((40, 40), strides)
        pair.step_as_is()


def test_gradient_reallocated_at_the_same_address_with_another_dtype():
    pair = Pair([torch.randn(40, 40)], Oracle, **HYPER)
    for _, param in each(pair, 0):
        param.grad_dtype = None
    pair.step(3)
    storages = [torch.randn(1600) for _ in range(2)]
    storages[1].copy_(storages[0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
        for storage, (_, param) in zip(storages, each(pair, 0), strict=True):
            param.grad = None
            if dtype is not torch.float32:
                storage.view(dtype)[:1600].copy_(torch.linspace(-1, 1, 1600))
            param.grad = storage.view(dtype)[:1600].view(40, 40)
        pair.step_as_is()
        for storage in storages:
            storage.copy_(torch.linspace(-1, 1, 1600))


def test_parameter_and_gradient_reallocated_at_the_same_address_with_another_shape():
    """The parameter keeps its address and loses elements; those beyond must not move any more."""
    pair = Pair([torch.randn(1600)], lr=0.1, weight_decay=0.01)
    pair.step(3)
    wholes = [param.data for _, param in each(pair, 0)]
    for shape in ((900,), (30, 30), (1600,), (40, 40)):
        count = torch.Size(shape).numel()
        for whole, (_, param) in zip(wholes, each(pair, 0), strict=True):
            param.grad = None
            param.data = whole[:count].view(shape)
        before = wholes[0].clone()
        pair.step(2)
        assert_same(wholes[0], wholes[1])
        assert_same(wholes[0][count:], before[count:])


@pytest.mark.parametrize("layout", ["contiguous", "column"])
@pytest.mark.parametrize("what", ["param", "grad", "momentum_buffer"])
def test_shape_changed_at_the_same_address(what, layout):
    """One of the three gets another shape, the others keep theirs: an error before any write, as from torch."""
    for shape in ((30, 30), (800,)):
        pair = Pair([torch.randn(300), in_layout(torch.randn(900), layout)], **HYPER)
        pair.step(3)
        for opt, param in each(pair, 1):
            tensor = {"param": param, "grad": param.grad, "momentum_buffer": opt.state[param]["momentum_buffer"]}[what]
            step = tensor.stride(0)
            strides = (30 * step, step) if len(shape) == 2 else (step,)
            tensor.data = tensor.detach().as_strided(shape, strides, tensor.storage_offset())
        before = Snapshot(pair.mine)
        with pytest.raises(RuntimeError, match=r"\['params'\]\[1\]: expected the shape of its parameter"):
            pair.mine.step()
        with pytest.raises(RuntimeError, match="size"):
            pair.theirs.step()
        before.assert_unchanged()


def test_gradient_becomes_expanded(pair):
    pair.set_grad(1, torch.randn(1, 5).expand(33, 5))
    pair.step_as_is()


def test_zero_grad_to_none(pair):
    pair.both(lambda opt: opt.zero_grad(set_to_none=True))
    pair.step_as_is()
    pair.step(2)


def test_zero_grad_to_zero(pair):
    """A gradient of zeros is not an absent one: momentum goes on."""
    before = [clone_exact(mine) for mine, _ in pair.params]
    pair.both(lambda opt: opt.zero_grad(set_to_none=False))
    pair.step_as_is()
    assert not any(torch.equal(mine.detach(), b) for b, (mine, _) in zip(before, pair.params, strict=True))
    pair.step(2)


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


# -------------------------------------------------------------------------------------------------------- parameters


def test_parameter_changed_in_place(pair):
    for _, param in each(pair, 0):
        with torch.no_grad():
            param.mul_(0.5).add_(1)
    pair.step(2)


def test_parameter_data_replaced(pair):
    old = pair.params[1][0].data
    kept = old.clone()
    values = torch.randn(33, 5)
    for _, param in each(pair, 1):
        param.data = held_as(param, values)
    pair.step(2)
    assert_same(old, kept, "the former data")


def test_parameter_data_replaced_by_another_layout(pair):
    values = torch.randn(33, 5)
    for layout in ("permuted", "column", "contiguous", "offset"):
        for _, param in each(pair, 1):
            param.data = in_layout(values, layout)
        pair.step(2)


def test_parameter_data_of_another_shape():
    pair = Pair([torch.randn(300), torch.randn(33, 5)], **HYPER)
    pair.step(3)
    values = torch.randn(12, 70)
    for opt, param in each(pair, 0):
        param.grad = None
        param.data = values.clone()
        opt.state.pop(param)
    pair.step(3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_parameter_data_of_another_dtype(dtype):
    pair = Pair([torch.randn(300), torch.randn(33, 5)], Oracle, **HYPER)
    pair.step(3)
    for opt, param in each(pair, 0):
        param.grad = None
        param.data = param.data.to(dtype)
        opt.state.pop(param)
    pair.step(3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_module_to_another_dtype(dtype):
    """module.to() changes the data of parameters and gradients; the next step converts the buffers as loading would."""
    models, opts = [], []
    for kind in (FusedMomentum, Oracle):
        torch.manual_seed(0)
        models.append(torch.nn.Sequential(torch.nn.Linear(19, 70), torch.nn.Linear(70, 3)))
        opts.append(kind(models[-1].parameters(), **HYPER))
    pair = Pair([torch.zeros(1)])
    pair.mine, pair.theirs = opts
    pair.step(3)
    for to in (dtype, torch.float32):
        for model in models:
            model.to(to)
        for state in pair.theirs.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].to(to)
        pair.step_as_is()
        pair.step(3)
        assert {pair.mine.state[p]["momentum_buffer"].dtype for p, _ in pair.params} == {to}


def test_module_to_another_memory_format():
    models, opts = [], []
    for kind in (FusedMomentum, Oracle):
        torch.manual_seed(0)
        models.append(torch.nn.Conv2d(3, 8, 3))
        opts.append(kind(models[-1].parameters(), **HYPER))
    pair = Pair([torch.zeros(1)])
    pair.mine, pair.theirs = opts
    pair.step(3)
    for model in models:
        model.to(memory_format=torch.channels_last)
    pair.step_as_is()
    pair.step(3)


def test_parameter_set_to_another_storage(pair):
    values = torch.randn(33, 5)
    for _, param in each(pair, 1):
        with torch.no_grad():
            param.set_(held_as(param, values))
    pair.step(2)


def test_parameter_transposed_in_place():
    pair = Pair([torch.randn(40, 40)], **HYPER)
    pair.step(3)
    for _, param in each(pair, 0):
        with torch.no_grad():
            param.t_()
    pair.step(3)


def test_storage_freed_and_reallocated(pair):
    """What sharding wrappers do: resize the storage to nothing after use, and back."""
    values = torch.randn(33, 5)
    for _, param in each(pair, 1):
        storage = param.data.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        param.data.copy_(values)
    pair.step(2)


def test_swap_tensors(pair):
    """torch.utils.swap_tensors: the same Python object holds another tensor."""
    values = torch.randn(33, 5)
    for _, param in each(pair, 1):
        param.grad = None
        torch.utils.swap_tensors(param, torch.nn.Parameter(values.clone()))
    pair.step(2)


@pytest.mark.parametrize("with_grad", [True, False], ids=["gradient-there", "gradient-gone"])
def test_requires_grad_flips(pair, with_grad):
    """torch.optim.SGD looks at .grad alone."""
    for _, param in each(pair, 1):
        param.requires_grad_(False)
        if not with_grad:
            param.grad = None
    pair.step_as_is()
    for _, param in each(pair, 1):
        param.requires_grad_(True)
    pair.step(2)


# --------------------------------------------------------------------------------------------------- hyperparameters


@pytest.mark.parametrize(
    "edit",
    [
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
        {"foreach": True},
        {"lr": 0.05, "momentum": 0.8, "dampening": 0.1, "weight_decay": 0.2, "nesterov": True, "maximize": True},
    ],
    ids=lambda edit: "-".join(f"{k}={v}" for k, v in edit.items()),
)
def test_hyperparameter_edited(pair, edit):
    pair.mine.param_groups[0].update(copy.deepcopy(edit))
    pair.theirs.param_groups[0].update(copy.deepcopy({k: v for k, v in edit.items() if k != "foreach"}))
    pair.step(3)


def test_every_step_another_learning_rate(pair):
    for step in range(10):
        pair.both(lambda opt, step=step: opt.param_groups[0].update(lr=0.1 / (step + 1)))
        pair.step()


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_tensor_hyperparameter_changed_in_place(key):
    pair = Pair([torch.randn(shape) for shape in SHAPES], **{**HYPER, key: torch.tensor(0.1)})
    pair.step(3)
    for value in (0.03, 0.0, 0.2):
        pair.both(lambda opt, value=value: opt.param_groups[0][key].fill_(value))
        pair.step(2)


def test_group_replaced_by_a_new_dict(pair):
    pair.both(lambda opt: opt.param_groups.__setitem__(0, {**opt.param_groups[0], "lr": 0.03}))
    pair.step(2)


def test_param_groups_replaced_by_a_new_list(pair):
    for opt in pair.optimizers:
        group = opt.param_groups[0]
        opt.param_groups = [{**group, "params": group["params"][i::2], "lr": 0.1 / (i + 1)} for i in range(2)]
    pair.step(2)


def test_extra_keys_in_groups(pair):
    """Schedulers and users keep their own things there."""
    pair.both(lambda opt: opt.param_groups[0].update(initial_lr=0.3, name="head", capturable=False))
    pair.step(2)


def test_defaults_edited_change_nothing(pair):
    pair.both(lambda opt: opt.defaults.update(lr=77.0, momentum=0.1))
    pair.step(2)


# ------------------------------------------------------------------------------------------------------------ groups


def test_add_param_group(pair):
    values = torch.randn(12, 70)
    pair.both(lambda opt: opt.add_param_group({"params": [torch.nn.Parameter(values.clone())], "lr": 0.03}))
    pair.step(3)


def test_group_removed():
    pair = Pair([{"params": [torch.randn(300)]}, {"params": [torch.randn(33, 5)], "lr": 0.03}], **HYPER)
    pair.step(3)
    gone = pair.params[0][0]
    before = gone.detach().clone()
    pair.both(lambda opt: opt.param_groups.pop(0))
    pair.step(3)
    assert_same(gone, before)


def test_params_list_appended_in_place(pair):
    values = torch.randn(12, 70)
    pair.both(lambda opt: opt.param_groups[0]["params"].append(torch.nn.Parameter(values.clone())))
    pair.step(3)


def test_params_list_shortened_in_place(pair):
    gone = pair.params[-1][0]
    before = gone.detach().clone()
    pair.both(lambda opt: opt.param_groups[0]["params"].pop())
    pair.step(3)
    assert_same(gone, before)


def test_params_list_element_replaced(pair):
    """Same length, another parameter at one place, as some wrappers that flatten parameters do it."""
    gone = pair.params[1][0]
    before, values = gone.detach().clone(), torch.randn(33, 5)
    pair.both(lambda opt: opt.param_groups[0]["params"].__setitem__(1, torch.nn.Parameter(values.clone())))
    pair.step(3)
    assert_same(gone, before)


def test_params_list_reordered(pair):
    pair.both(lambda opt: opt.param_groups[0]["params"].reverse())
    pair.step(3)


def test_params_list_replaced(pair):
    pair.both(lambda opt: opt.param_groups[0].update(params=list(opt.param_groups[0]["params"][1:])))
    pair.step(3)


def test_params_as_a_tuple(pair):
    pair.both(lambda opt: opt.param_groups[0].update(params=tuple(opt.param_groups[0]["params"])))
    pair.step(3)


def test_parameter_moved_to_another_group():
    pair = Pair([{"params": [torch.randn(300), torch.randn(7)]}, {"params": [torch.randn(33, 5)], "lr": 0.03}], **HYPER)
    pair.step(3)
    pair.both(lambda opt: opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop(0)))
    pair.step(3)


def test_the_same_parameter_in_two_groups():
    """The constructor refuses it, an edit doesn't: both groups apply, one after the other."""
    pair = Pair([{"params": [torch.randn(300), torch.randn(7)]}, {"params": [torch.randn(33, 5)], "lr": 0.03}], **HYPER)
    pair.step(3)
    pair.both(lambda opt: opt.param_groups[1]["params"].append(opt.param_groups[0]["params"][0]))
    pair.step(3)


def test_parameter_dies_and_another_takes_its_place(pair):
    """The new one may well sit at the same address, in Python and in memory."""
    for _ in range(5):
        values = torch.randn(33, 5)
        for opt in pair.optimizers:
            params = opt.param_groups[0]["params"]
            opt.state.pop(params[1])
            params[1] = None
            params[1] = torch.nn.Parameter(values.clone())
        pair.step(2)


# ------------------------------------------------------------------------------------------------------------- state


def test_load_state_dict(pair):
    early = [copy.deepcopy(opt.state_dict()) for opt in pair.optimizers]
    pair.step(3)
    for opt, state in zip(pair.optimizers, early, strict=True):
        opt.load_state_dict(state)
    pair.step(3)


def test_state_of_a_parameter_replaced(pair):
    values = torch.randn(33, 5)
    for opt, param in each(pair, 1):
        opt.state[param] = {"momentum_buffer": held_as(opt.state[param]["momentum_buffer"], values)}
    pair.step(2)


def test_state_of_a_parameter_emptied(pair):
    for opt, param in each(pair, 1):
        opt.state[param] = {}
    pair.step(2)


def test_state_of_a_parameter_deleted(pair):
    for opt, param in each(pair, 1):
        del opt.state[param]
    pair.step(2)


def test_buffer_deleted(pair):
    for opt, param in each(pair, 1):
        del opt.state[param]["momentum_buffer"]
    pair.step(2)


def test_buffer_set_to_none(pair):
    for opt, param in each(pair, 1):
        opt.state[param]["momentum_buffer"] = None
    pair.step(2)


def test_buffer_replaced(pair):
    old = pair.mine.state[pair.params[1][0]]["momentum_buffer"]
    kept, values = old.clone(), torch.randn(33, 5)
    for opt, param in each(pair, 1):
        opt.state[param]["momentum_buffer"] = values.clone()
    pair.step(2)
    assert_same(old, kept, "the former buffer")


def test_buffer_changed_in_place(pair):
    for opt, param in each(pair, 1):
        opt.state[param]["momentum_buffer"].zero_()
    pair.step(2)


def test_buffer_data_replaced(pair):
    values = torch.randn(33, 5)
    for opt, param in each(pair, 1):
        opt.state[param]["momentum_buffer"].data = values.clone()
    pair.step(2)


def test_buffer_transposed_in_place():
    pair = Pair([torch.randn(40, 40)], **HYPER)
    pair.step(3)
    for opt, param in each(pair, 0):
        opt.state[param]["momentum_buffer"].t_()
    pair.step(3)


def test_buffer_replaced_in_the_same_strided_layout():
    pair = Pair([in_layout(torch.randn(33, 5), "column")], **HYPER)
    for opt, param in each(pair, 0):
        opt.state[param]["momentum_buffer"] = in_layout(torch.linspace(-1, 1, 165).view(33, 5), "column")
    pair.step(3)
    for opt, param in each(pair, 0):
        buffer = opt.state[param]["momentum_buffer"]
        opt.state[param]["momentum_buffer"] = held_as(buffer, torch.linspace(1, 3, 165).view(33, 5))
    pair.step(3)


def test_buffer_data_replaced_by_another_layout(pair):
    values = torch.randn(33, 5)
    for opt, param in each(pair, 1):
        opt.state[param]["momentum_buffer"].data = in_layout(values, "permuted")
    pair.step(2)


def test_buffer_data_of_another_dtype():
    pair = Pair([torch.randn(shape) for shape in SHAPES], Oracle, **HYPER)
    pair.step(3)
    for opt, param in each(pair, 1):
        buffer = opt.state[param]["momentum_buffer"]
        buffer.data = buffer.data.double() if opt is pair.mine else buffer.data.double().float()
    pair.step(3)


def test_state_cleared(pair):
    pair.both(lambda opt: opt.state.clear())
    pair.step(2)


def test_state_replaced_by_an_empty_defaultdict(pair):
    pair.both(lambda opt: setattr(opt, "state", defaultdict(dict)))
    pair.step(2)


def defaultdict_of(entries):
    return defaultdict(dict, entries)


@pytest.mark.parametrize("kind", [dict, OrderedDict, defaultdict_of], ids=lambda kind: kind.__name__)
def test_state_replaced_by_a_copy(pair, kind):
    """The copy is the state from now on: what happens to the former one means nothing."""
    for opt, values in ((opt, torch.linspace(-1, 1, 165).view(33, 5)) for opt in pair.optimizers):
        former = opt.state
        opt.state = kind({p: dict(entry) for p, entry in former.items()})
        former.clear()
        opt.state[opt.param_groups[0]["params"][1]]["momentum_buffer"] = values
    pair.step(2)


def test_entries_of_a_parameters_state_as_an_ordered_dict(pair):
    for opt, param in each(pair, 1):
        opt.state[param] = OrderedDict(opt.state[param])
    pair.step(2)


def test_empty_ordered_dict_as_a_parameters_state(pair):
    """What the step puts there must be found by everything that reads the dict."""
    for opt, param in each(pair, 1):
        opt.state[param] = OrderedDict()
    pair.step(2)
    entry = pair.mine.state[pair.params[1][0]]
    assert list(entry) == [*entry.keys()] == ["momentum_buffer"]
    assert [*copy.deepcopy(pair.mine.state_dict())["state"][1]] == ["momentum_buffer"]
    assert list(pickle.loads(pickle.dumps(entry))) == ["momentum_buffer"]


def test_extra_keys_in_the_state(pair):
    for opt, param in each(pair, 1):
        opt.state[param]["note"] = "mine"
        opt.state["global"] = {"count": 3}
    pair.step(2)
    assert pair.mine.state[pair.params[1][0]]["note"] == "mine"
    assert pair.mine.state["global"] == {"count": 3}


def test_buffers_of_two_parameters_swapped():
    pair = Pair([torch.randn(300), torch.randn(300)], **HYPER)
    pair.step(3)
    for opt in pair.optimizers:
        first, second = (opt.state[p] for p in opt.param_groups[0]["params"])
        first["momentum_buffer"], second["momentum_buffer"] = second["momentum_buffer"], first["momentum_buffer"]
    pair.step(3)


def test_whole_states_of_two_parameters_swapped():
    pair = Pair([torch.randn(300), torch.randn(300)], **HYPER)
    pair.step(3)
    for opt in pair.optimizers:
        first, second = opt.param_groups[0]["params"]
        opt.state[first], opt.state[second] = opt.state[second], opt.state[first]
    pair.step(3)


def test_buffer_given_before_the_first_step():
    pair = Pair([torch.randn(300), torch.randn(7)], **HYPER)
    values = torch.randn(300)
    for opt, param in each(pair, 0):
        opt.state[param]["momentum_buffer"] = values.clone()
    pair.step(3)


# ----------------------------------------------------------------------------------------------------- whole copies


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copied_optimizer_steps_its_own_parameters(pair, way):
    """A plan that came along with the copy would still point at the original."""
    originals = [p for p, _ in pair.params]
    before = [clone_exact(p) for p in originals]
    pair.mine, pair.theirs = (
        copy.deepcopy(opt) if way == "deepcopy" else pickle.loads(pickle.dumps(opt)) for opt in pair.optimizers
    )
    pair.step(3)
    for param, value in zip(originals, before, strict=True):
        assert_same(param, value, "the original's parameter")


def test_two_optimizers_take_turns_on_the_same_parameters(pair):
    others = [
        kind(opt.param_groups[0]["params"], lr=0.03, momentum=0.5, foreach=False)
        for kind, opt in zip((FusedMomentum, torch.optim.SGD), pair.optimizers, strict=True)
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


def test_nothing_changed(pair):
    pair.step(20)

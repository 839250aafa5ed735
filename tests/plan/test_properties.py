"""Sequences of what users do between steps, made up by hypothesis, compared with torch's for-loop bit for bit.

Each sequence is a training of its own: some groups of some shapes, layouts and dtypes, then a dozen actions, with
steps in between. 16-bit and mixed dtypes are compared with the for-loop on widened copies, rounded once (`Oracle`).
"""

import copy
from collections import defaultdict

import pytest
import torch
from harness import Oracle, Pair, Snapshot, assert_same, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from sequences import NEW, SEQUENCES, run_sequences
from trainings import ExactTraining, LowPrecisionTraining
from values import COPIES, LAYOUTS, clone_exact, in_layout, matching_isas, storage_of, through_pickle, without_repeats

from momentum_ext import _C

STEPS = 14

LENGTHS = (0, 1, 7, 16, 33, 65, 257, 1030, 32_001, 20_011)
SHAPES = [(), *((n,) for n in LENGTHS), (5, 9), (0, 3), (3, 4, 6), (2, 3, 4, 5)]
GRAD_LAYOUTS = [*LAYOUTS, "expanded", "neg"]
CHOICES = {
    "lr": [0.1, 0.01, 0.3, 1, 0.0, ("tensor", 0.05), ("tensor", 0.2)],
    "momentum": [0.9, 0.9, 0.5, 0, 1],
    "dampening": [0, 0, 0.3, 1],
    "weight_decay": [0, 0, 0.01, 0.2, ("tensor", 0.03)],
    "nesterov": [False, True],
    "maximize": [False, True],
}
HYPER = st.fixed_dictionaries({key: st.sampled_from(values) for key, values in CHOICES.items()})
EDIT = st.sampled_from(list(CHOICES)).flatmap(lambda key: st.tuples(st.just(key), st.sampled_from(CHOICES[key])))
INDEX = st.integers(0, 99)  # taken modulo whatever there is
SUBSET = st.integers(0, (1 << 16) - 1)  # bit i: parameter i takes part
SOME = st.one_of(st.just((1 << 16) - 1), SUBSET)
SIZE = st.sampled_from([1.0, 1.0, 1e-3, 1e3, 0.0, "special"])
SPECIAL = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-42, 3e38, 1.0]


def value(choice):
    """A hyperparameter; tensors are made anew, since they are changed in place."""
    return torch.tensor(choice[1]) if isinstance(choice, tuple) else choice


class Training(RuleBasedStateMachine):
    dtypes = (torch.float32,)
    grad_dtypes = None  # the parameter's
    sequences = 0

    def __init__(self):
        super().__init__()
        type(self).sequences += 1
        self.pair = None

    # ---- what a training is made of

    def new_param(self, shape, layout, dtype):
        values = torch.randn(shape, generator=self.pair.generator).to(self.dtypes[dtype % len(self.dtypes)])
        return in_layout(values, layout)

    def add(self, shapes, layout, dtype, hyper):
        params = [self.new_param(shape, layout, dtype + i) for i, shape in enumerate(shapes)]
        for opt in self.pair.optimizers:
            opt.add_param_group({"params": [torch.nn.Parameter(clone_exact(p)) for p in params]})
            opt.param_groups[-1].update({key: value(choice) for key, choice in hyper.items()})

    shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4)
    group = st.tuples(shapes, st.sampled_from(LAYOUTS), INDEX, HYPER)

    @initialize(groups=st.lists(group, min_size=1, max_size=3), seed=st.integers(0, 1 << 30), threads=st.integers(1, 3))
    def begin(self, groups, seed, threads):
        torch.set_num_threads(threads)
        self.pair = Pair([torch.zeros(1)], Oracle, seed=seed, lr=0.1)
        for opt in self.pair.optimizers:
            opt.param_groups.clear()
        for group in groups:
            self.add(*group)
        self.gradients((1 << 16) - 1, "contiguous", 1.0, True, 0)
        self.pair.step_as_is()

    def one(self, index):
        """[(optimizer, parameter)] for both sides, or [] where there is no parameter left."""
        params = self.pair.params
        return list(zip(self.pair.optimizers, params[index % len(params)], strict=True)) if params else []

    def values_like(self, param, size, dtype=None):
        values = torch.randn(param.shape, generator=self.pair.generator)
        if size == "special":
            at = torch.randint(len(SPECIAL), param.shape, generator=self.pair.generator)
            values = torch.where(values > 1, torch.tensor(SPECIAL)[at], values)
        else:
            values = values * size
        return values.to(dtype or param.dtype)

    def gradients(self, subset, layout, size, fresh, dtype):
        for index, params in enumerate(self.pair.params):
            if not subset >> (index % 16) & 1:
                continue
            kind = None if self.grad_dtypes is None else self.grad_dtypes[(dtype + index) % len(self.grad_dtypes)]
            values = self.values_like(params[0], size, kind)
            if layout == "expanded" and values.dim() and values.numel():
                values = values[:1].expand(values.shape)
            elif layout == "neg":
                values = torch._neg_view(values)
            elif layout != "expanded":
                values = in_layout(values, layout)
            in_place = not fresh and all(self.writable(p.grad) and p.grad.dtype == values.dtype for p in params)
            for param, held in zip(params, (values, without_repeats(values)), strict=True):
                if kind is not None:
                    param.grad_dtype = None
                if in_place:
                    param.grad.copy_(held)
                else:
                    param.grad = clone_exact(held)

    @staticmethod
    def writable(grad):
        return grad is not None and 0 not in grad.stride()

    def proceed(self, steps):
        """Steps on both sides; gradients stay what they are, everything else stays the same."""
        for _ in range(steps):
            grads = [(mine.grad, clone_exact(mine.grad)) for mine, _ in self.pair.params if mine.grad is not None]
            self.pair.both(lambda opt: opt.step())
            self.pair.check()
            for grad, before in grads:
                assert_same(grad, before, "gradient")

    # ---- gradients

    @rule(
        subset=SOME,
        layout=st.sampled_from(GRAD_LAYOUTS),
        size=SIZE,
        fresh=st.booleans(),
        dtype=INDEX,
        steps=st.integers(1, 3),
    )
    def train(self, subset, layout, size, fresh, dtype, steps):
        self.gradients(subset, layout, size, fresh, dtype)
        self.proceed(steps)

    @rule(subset=SUBSET, layout=st.sampled_from(GRAD_LAYOUTS), dtype=INDEX)
    def set_gradients(self, subset, layout, dtype):
        self.gradients(subset, layout, 1.0, True, dtype)

    @rule(subset=SUBSET, steps=st.integers(0, 1))
    def free_gradients(self, subset, steps):
        for index, params in enumerate(self.pair.params):
            if subset >> (index % 16) & 1:
                for param in params:
                    param.grad = None
        self.proceed(steps)

    @rule(to_none=st.booleans(), steps=st.integers(0, 1))
    def zero_grad(self, to_none, steps):
        for params in self.pair.params:
            if params[0].grad is not None and not self.writable(params[0].grad):
                for param in params:
                    param.grad = None
        self.pair.both(lambda opt: opt.zero_grad(set_to_none=to_none))
        self.proceed(steps)

    @rule(index=INDEX, layout=st.sampled_from(LAYOUTS))
    def replace_gradient_data(self, index, layout):
        for _, param in self.one(index):
            if param.grad is not None and not param.grad.is_neg():
                grad = param.grad
                grad.data = in_layout(grad.detach() * -2, layout)
        self.proceed(1)

    # ---- groups

    @rule(index=INDEX, edits=st.lists(EDIT, min_size=1, max_size=3), steps=st.integers(0, 2))
    def edit_group(self, index, edits, steps):
        for opt in self.pair.optimizers:
            if opt.param_groups:
                group = opt.param_groups[index % len(opt.param_groups)]
                group.update({key: value(choice) for key, choice in edits})
        self.proceed(steps)

    @rule(index=INDEX, lr=st.sampled_from([0.02, 0.4, 0.0]))
    def edit_tensor_lr_in_place(self, index, lr):
        for opt in self.pair.optimizers:
            for group in opt.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(lr)
        self.proceed(1)

    @rule(group=group)
    def add_group(self, group):
        if len(self.pair.mine.param_groups) < 5:
            self.add(*group)
        self.gradients(SOME_LATE, "contiguous", 1.0, True, 0)
        self.proceed(1)

    @rule(index=INDEX, action=st.sampled_from(["pop group", "pop param", "reverse", "rotate", "move", "new list"]))
    def rearrange(self, index, action):
        for opt in self.pair.optimizers:
            groups = opt.param_groups
            group = groups[index % len(groups)]
            params = group["params"]
            if action == "pop group" and len(groups) > 1:
                groups.pop(index % len(groups))
            elif action == "pop param" and len(params) > 1:
                params.pop(index % len(params))
            elif action == "reverse":
                params.reverse()
            elif action == "rotate":
                groups.append(groups.pop(0))
            elif action == "move" and len(params) > 1:
                groups[0]["params"].append(params.pop())
            elif action == "new list":
                group["params"] = list(params)
                opt.param_groups = list(groups)
        self.proceed(1)

    # ---- state

    @rule(way=st.sampled_from(["own", "crossed", "deepcopied", "pickled"]), steps=st.integers(0, 2))
    def load_state(self, way, steps):
        for opt in self.pair.optimizers:  # torch can't save the state of a parameter that is in no group any more
            here = {id(p) for group in opt.param_groups for p in group["params"]}
            for param in [p for p in opt.state if id(p) not in here]:
                del opt.state[param]
        states = [copy.deepcopy(opt.state_dict()) for opt in self.pair.optimizers]
        if way == "crossed":
            states.reverse()
        elif way == "pickled":
            states = [through_pickle(state) for state in states]
        for opt, state in zip(self.pair.optimizers, states, strict=True):
            opt.load_state_dict(state)
        self.proceed(steps)

    @rule(
        index=INDEX,
        action=st.sampled_from(["pop", "empty", "none", "clear", "new", "copy", "values", "layout", "data"]),
        layout=st.sampled_from(LAYOUTS),
    )
    def edit_state(self, index, action, layout):
        for opt, param in self.one(index):
            buffer = opt.state[param].get("momentum_buffer") if param in opt.state else None
            if action == "pop":
                opt.state.pop(param, None)
            elif action == "empty" and param in opt.state:
                opt.state[param] = {}
            elif action == "none" and param in opt.state:
                opt.state[param]["momentum_buffer"] = None
            elif action == "clear":
                opt.state.clear()
            elif action == "new":
                opt.state = defaultdict(dict)
            elif action == "copy":
                opt.state = defaultdict(dict, {p: dict(entry) for p, entry in opt.state.items()})
            elif action == "values":
                opt.state[param]["momentum_buffer"] = torch.full_like(param, 0.5).detach()
            elif action == "layout" and buffer is not None:
                opt.state[param]["momentum_buffer"] = in_layout(buffer, layout)
            elif action == "data" and buffer is not None:
                buffer.data = in_layout(buffer * 2, layout)
        self.proceed(1)

    # ---- parameters

    @rule(index=INDEX, layout=st.sampled_from(LAYOUTS), keep_grad=st.booleans())
    def replace_data(self, index, layout, keep_grad):
        for _, param in self.one(index):
            if not keep_grad:
                param.grad = None
            param.data = in_layout(param.detach() * 0.5, layout)
        self.proceed(1)

    @rule(index=INDEX, shape=st.sampled_from(SHAPES), layout=st.sampled_from(LAYOUTS))
    def replace_data_by_another_shape(self, index, shape, layout):
        values = None
        for opt, param in self.one(index):
            values = self.values_like(torch.empty(shape), 1.0, param.dtype) if values is None else values
            param.grad = None
            opt.state.pop(param, None)
            param.data = in_layout(values, layout)
        self.gradients(SOME_LATE, "contiguous", 1.0, True, 0)
        self.proceed(1)

    @rule(index=INDEX)
    def flip_requires_grad(self, index):
        for _, param in self.one(index):
            param.requires_grad_(not param.requires_grad)
        self.proceed(1)

    @rule(index=INDEX)
    def change_in_place(self, index):
        for _, param in self.one(index):
            with torch.no_grad():
                param.mul_(0.5)
        self.proceed(1)

    # ---- mixed-precision training

    @rule(subset=SUBSET)
    def overflow(self, subset):
        """found_inf: nothing at all changes, also where a tensor would have had its first step."""
        self.gradients(subset, "contiguous", "special", True, 0)
        before = Snapshot(self.pair.mine)
        self.pair.mine.found_inf = torch.tensor(1.0)
        self.pair.mine.step()
        del self.pair.mine.found_inf
        before.assert_unchanged()
        self.gradients(subset, "contiguous", 1.0, True, 0)

    @rule(scale=st.sampled_from([2.0, 3.0, 65536.0, 1000.1]), subset=SOME)
    def scaled_step(self, scale, subset):
        self.gradients(subset, "contiguous", 100.0, True, 0)
        for opt in self.pair.optimizers:
            opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(0.0)
        self.proceed(1)
        for opt in self.pair.optimizers:
            del opt.grad_scale, opt.found_inf

    # ---- errors

    @rule(what=st.sampled_from(["lr", "expanded", "buffer"]))
    def failing_step(self, what):
        """The last parameter or its group is at fault; nothing changes, and afterwards all goes on."""
        opt, (group, param) = self.pair.mine, (self.pair.mine.param_groups[-1], None)
        self.gradients((1 << 16) - 1, "contiguous", 1.0, True, 0)
        param = group["params"][-1]
        if param.numel() < 2 or group["momentum"] == 0:
            return
        kept = group["lr"], param.data, opt.state.get(param)
        says = {"lr": "'str'", "expanded": "share one place", "buffer": "expected the shape of its parameter"}[what]
        if what == "lr":
            group["lr"] = "fast"
        elif what == "expanded":
            param.data = param.detach().reshape(-1)[:1].expand(param.shape)
        else:
            opt.state[param] = {"momentum_buffer": torch.zeros(param.numel() + 1, 2)}
        with refused(opt, (RuntimeError, TypeError), says):
            opt.step()
        group["lr"], param.data = kept[:2]
        if what == "buffer":
            opt.state.pop(param) if kept[2] is None else opt.state.update({param: kept[2]})
        self.pair.check()
        self.proceed(1)

    # ---- the optimizer and the process

    @rule(way=st.sampled_from(list(COPIES.values())))
    def copy_optimizer(self, way):
        """The copies train on; gradients don't come along, as with torch."""
        self.pair.mine, self.pair.theirs = (way(opt) for opt in self.pair.optimizers)
        self.pair.check()
        self.gradients((1 << 16) - 1, "contiguous", 1.0, True, 0)
        self.proceed(1)

    @rule(count=st.integers(1, 4))
    def set_num_threads(self, count):
        torch.set_num_threads(count)
        self.proceed(1)

    @rule(index=INDEX)
    def set_isa(self, index):
        names = matching_isas()
        _C.set_isa(names[index % len(names)])
        self.proceed(1)


SOME_LATE = 0b1011_0110_1101_1011  # most parameters get a new gradient, some keep what they have


class Fp32(Training):
    pass


class Fp64(Training):
    dtypes = (torch.float64,)


class LowPrecision(Training):
    dtypes = (torch.bfloat16, torch.float16)


class MixedDtypes(Training):
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    grad_dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

    @rule(index=INDEX, dtype=INDEX)
    def convert(self, index, dtype):
        """As module.to(dtype): the parameter changes, its buffer keeps its dtype."""
        for _, param in self.one(index):
            param.grad = None
            param.data = param.data.to(self.dtypes[dtype % 4])
        self.gradients((1 << 16) - 1, "contiguous", 1.0, True, dtype)
        self.proceed(1)

    @rule(index=INDEX, dtype=INDEX)
    def convert_buffer(self, index, dtype):
        for opt, param in self.one(index):
            entry = opt.state.get(param, {})
            if entry.get("momentum_buffer") is not None:
                entry["momentum_buffer"] = entry["momentum_buffer"].to(self.dtypes[dtype % 4])
        self.proceed(1)


@pytest.mark.parametrize("kind", [Fp32, Fp64, LowPrecision, MixedDtypes])
@SEQUENCES
def test_sequences_of_user_actions(sequences, kind):
    kind.sequences = 0
    run_sequences(kind, sequences // 4, STEPS, sequences == NEW)
    assert kind.sequences >= sequences // 4


@pytest.mark.parametrize("kind", [ExactTraining, LowPrecisionTraining])
@SEQUENCES
def test_sequences_with_every_option(sequences, kind):
    """Half of them each; at least as many new ones in a soak as are asked for."""
    run_sequences(kind, sequences // 2, 12, sequences == NEW)


# ---------------------------------------------------------------------------------------------- any strided view at all


@st.composite
def strided_view(draw, shape):
    """Strides for `shape`: any order of dimensions, any gaps, any offset; never overlapping."""
    order = draw(st.permutations(range(len(shape))))
    strides, span = [0] * len(shape), 1
    for dim in order:
        span *= draw(st.sampled_from([1, 1, 1, 2, 3]))
        strides[dim] = span
        span *= max(1, shape[dim])
    return strides, draw(st.integers(0, 3)), span


@st.composite
def three_views(draw):
    shape = draw(st.lists(st.integers(1, 9), max_size=4).map(tuple))
    return shape, [draw(strided_view(shape)) for _ in range(3)]


def place(values, view):
    strides, offset, span = view
    base = torch.full((offset + span + 1,), 7.0, dtype=values.dtype)
    return base.as_strided(values.shape, strides, offset).copy_(values)


@settings(max_examples=500)
@given(three_views(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), st.booleans())
def test_any_strides_of_parameter_gradient_and_buffer(views, dtype, nesterov):
    shape, (param_view, grad_view, buffer_view) = views
    values = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).to(dtype)
    pair = Pair([place(values, param_view)], Oracle, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
    for opt, param in zip(pair.optimizers, pair.params[0], strict=True):
        opt.state[param]["momentum_buffer"] = place(-values, buffer_view)
    for _ in range(2):
        pair.set_grad(0, place(pair.random_like(values), grad_view))
        pair.step_as_is()
    mine, theirs = pair.params[0]
    buffers = [opt.state[p]["momentum_buffer"] for opt, p in zip(pair.optimizers, (mine, theirs), strict=True)]
    for a, b in ((mine.detach(), theirs.detach()), buffers):
        assert_same(storage_of(a), storage_of(b), "the storage around the tensor")


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=40),
    HYPER,
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(1, 4),
    st.sampled_from([1, 1, 1, 137]),
)
def test_any_sizes_and_hyperparameters(sizes, hyper, dtype, threads, factor):
    """Lists of any lengths, a few of them long enough for several threads."""
    torch.set_num_threads(threads)
    pair = Pair([torch.randn(size * factor, dtype=dtype) for size in sizes], lr=0.1)
    pair.both(lambda opt: opt.param_groups[0].update({key: value(choice) for key, choice in hyper.items()}))
    pair.step(3)

"""Random trainings with every option at once, each step of them compared with model.py.

Between any two actions there may be any other: edits of options with momentum 0 and not, steps that are refused or
fail, copies, pickles, reloads, gradients that come, go, are replaced or written, clips, scalers, averages, iterates.
"""

import contextlib
import copy
import pickle

import pytest
import torch
from harness import Snapshot, assert_same, refused
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from model import Memory, Model, Raises, assert_near, clip_coefficient
from values import BF16, COPIES, FP16, FP32, FP64, through_pickle

from momentum_ext import FusedMomentum, GradScaler

SHAPES = [(), (0,), (1,), (3,), (17,), (2, 3), (300,)]
CHOICES = {
    "lr": [0.1, 0.1, 0.03, 1, 0.0, ("tensor", 0.05)],
    "momentum": [0.9, 0.9, 0.5, 0],
    "dampening": [0, 0, 0, 0.3],
    "weight_decay": [0, 0, 0.1, ("tensor", 0.03)],
    "nesterov": [False, True],
    "maximize": [False, True],
    "formulation": ["torch", "torch", "classical", "classical", "ema"],
    "decoupled_weight_decay": [False, True],
    "momentum_dtype": [None],
    "master_weights": [False, True],
    "stochastic_rounding": [False, True],
}
COUNTS = ("ema_step", "rounding_step")
LOW_CHOICES = {
    **CHOICES,
    "momentum_dtype": [None, None, "float32", "bfloat16", torch.float16, "int8", torch.float8_e4m3fn, "int4"],
}
ATTRIBUTES = {"max_grad_norm": [None, None, 0.5, 100.0], "ema_decay": [None, 0.5, 0.75], "ema_warmup": [False, True]}
INDEX = st.integers(0, 99)  # taken modulo whatever there is
SOME = st.one_of(st.just(0xFFFF), st.integers(1, 0xFFFF))  # bit i: parameter i takes part
SIZE = st.sampled_from([1.0, 1.0, 1.0, 100.0, 1e-3, 0.0, "inf"])
MAX_NORM = st.sampled_from([0.5, 0.5, 5.0, 1e9])
ATTRIBUTE = st.sampled_from(list(ATTRIBUTES)).flatmap(
    lambda name: st.tuples(st.just(name), st.sampled_from(ATTRIBUTES[name]))
)


def options(choices):
    return st.fixed_dictionaries({key: st.sampled_from(values) for key, values in choices.items()})


def edits(choices):
    one = st.sampled_from(list(choices)).flatmap(lambda key: st.tuples(st.just(key), st.sampled_from(choices[key])))
    return st.lists(one, min_size=1, max_size=3)


def value(choice):
    """A hyperparameter; tensors are made anew."""
    return torch.tensor(choice[1], dtype=FP64) if isinstance(choice, tuple) else choice


class Refused(Exception):
    pass


class Refuses(dict):
    """A dict that takes no new value."""

    def __setitem__(self, key, value):
        raise Refused("no room")


def raises(*_, **__):
    raise Refused("by a hook")


class ExactTraining(RuleBasedStateMachine):
    """In fp64 or in fp32: to the bit, where no factor has its own rounding."""

    dtypes = ((FP64,), (FP32,))  # one of these for a sequence, its dtypes by turns
    choices = CHOICES

    # ---- what a training is made of

    @initialize(data=st.data(), dtypes=INDEX, seed=st.integers(0, 1 << 30), fused=st.booleans())
    def begin(self, data, dtypes, seed, fused):
        self.kinds = self.dtypes[dtypes % len(self.dtypes)]
        self.generator = torch.Generator().manual_seed(seed)
        self.away = {}  # gradients that went, with their memory
        groups = data.draw(st.lists(st.tuples(self.shapes, options(self.choices)), min_size=1, max_size=2))
        attributes = data.draw(options(ATTRIBUTES))
        attributes["ema_warmup"] &= attributes["ema_decay"] is not None
        groups = [self.new_group(*group) for group in groups]
        self.opt = FusedMomentum(groups, lr=0.1, fused=fused or None, **attributes)
        self.model = Model(self.opt)
        self.new_gradients(0xFFFF, 1.0)

    shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3)

    def new_group(self, shapes, hyper):
        params = [
            torch.nn.Parameter(self.random(shape, self.kinds[i % len(self.kinds)])) for i, shape in enumerate(shapes)
        ]
        group = {"params": params, **{key: value(choice) for key, choice in hyper.items()}}
        if group["formulation"] != "torch":
            group["dampening"] = 0
        return group

    def random(self, shape, dtype, size=1.0):
        values = torch.randn(shape, generator=self.generator)
        if size == "inf":
            return torch.where(values > 0.5, torch.inf, values).to(dtype)
        return (values * size).to(dtype)

    @property
    def params(self):
        return self.model.params

    @property
    def norm_tolerance(self):
        """Torch's own norms are computed in the gradients' dtypes."""
        return max({FP64: 1e-12, FP32: 1e-6}.get(param.dtype, 0.03) for param in self.params)

    def chosen(self, subset):
        return [(p, self.model.weights[p]) for i, p in enumerate(self.params) if subset >> i % 16 & 1]

    def new_gradients(self, subset, size):
        for param, weight in self.chosen(subset):
            param.grad, weight.memory = self.random(param.shape, param.dtype, size), Memory()

    # ---- doing it on both sides

    def refused(self, action, error, *but):
        with refused(self.opt, error.kind, error.says, *but):
            action()
        self.model.check_nothing_moved()

    def step(self):
        grads = [(p.grad, p.grad.clone()) for p in self.params if p.grad is not None]
        try:
            self.model.step(self.opt.step)
        except Raises as error:
            self.refused(self.opt.step, error)
        for grad, before in grads:
            assert_same(grad, before, "gradient")

    def would_step(self):
        try:
            self.model.factors()
            self.model.check_conversions()
        except Raises:
            return False
        return True

    # ---- gradients

    @rule(subset=SOME, size=SIZE, steps=st.integers(0, 2))
    def train(self, subset, size, steps):
        self.new_gradients(subset, size)
        for _ in range(steps):
            self.step()

    @rule(subset=SOME, how=st.sampled_from(["write", "view", "detach", "data", "copy", "go", "come back"]))
    def touch_gradients(self, subset, how):
        for param, weight in self.chosen(subset):
            grad = param.grad
            if how == "come back" and param in self.away:
                param.grad, weight.memory = self.away.pop(param)
            elif grad is None:
                continue
            elif how == "write":
                grad.add_(self.random(grad.shape, grad.dtype))
                weight.memory.written = True
            elif how == "view":
                param.grad = grad.view(-1).view(grad.shape)
            elif how == "detach":
                param.grad = grad.detach()
            elif how == "data":
                param.grad = grad.data
            elif how == "copy":
                param.grad, weight.memory = grad.clone(), Memory()
            elif how == "go":
                self.away[param] = grad, weight.memory
                param.grad = None

    @rule(to_none=st.booleans(), by_model=st.booleans())
    def zero_grad(self, to_none, by_model):
        if not by_model:
            self.opt.zero_grad(set_to_none=to_none)
            self.model.end_coefficients()
            return
        for param in self.params:
            if to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()
                self.model.weights[param].memory.written = True

    @rule()
    def take_a_step(self):
        self.step()

    @rule()
    def step_with_lr_zero(self):
        """As torch.distributed.checkpoint takes one."""
        kept = [group["lr"] for group in self.opt.param_groups]
        for group in self.opt.param_groups:
            group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], torch.Tensor) else 0.0
        self.step()
        for group, lr in zip(self.opt.param_groups, kept, strict=True):
            group["lr"] = lr

    # ---- groups and options

    @rule(data=st.data(), index=INDEX, steps=st.integers(0, 1))
    def edit(self, data, index, steps):
        group = self.opt.param_groups[index % len(self.opt.param_groups)]
        group.update({key: value(choice) for key, choice in data.draw(edits(self.choices))})
        for _ in range(steps):
            self.step()

    @rule(attribute=ATTRIBUTE)
    def edit_attribute(self, attribute):
        setattr(self.opt, *attribute)

    @rule(data=st.data(), comes_with_grad=st.booleans())
    def add_group(self, data, comes_with_grad):
        if len(self.opt.param_groups) < 3:
            self.opt.add_param_group(self.new_group(*data.draw(st.tuples(self.shapes, options(self.choices)))))
            self.model.add_weights()
            if comes_with_grad:
                self.new_gradients(0xFF80, 1.0)

    @rule(index=INDEX, to=INDEX)
    def move_parameter(self, index, to):
        groups = self.opt.param_groups
        here, there = groups[index % len(groups)], groups[to % len(groups)]
        if here["params"]:
            there["params"].append(here["params"].pop())

    # ---- clipping and scaling

    @rule(
        max_norm=MAX_NORM,
        norm_type=st.sampled_from([2.0, 2.0, 2.0, 1.0, float("inf")]),
        strict=st.booleans(),
        absent=st.one_of(st.none(), st.integers(0, 0xFFFF)),
        steps=st.integers(0, 1),
    )
    def clip(self, max_norm, norm_type, strict, absent, steps):
        """Once, or again while some gradients are absent."""
        self.clip_once(max_norm, norm_type, strict)
        if absent is not None:
            self.touch_gradients(subset=absent, how="go")
            self.clip_once(max_norm / 2, norm_type, strict)
            self.touch_gradients(subset=absent, how="come back")
        for _ in range(steps):
            self.step()

    def clip_once(self, max_norm, norm_type=2.0, strict=False):
        try:
            norm = self.model.clip(max_norm, norm_type, strict)
        except Raises as error:
            self.refused(lambda: self.opt.clip_grad_norm_(max_norm, norm_type, strict), error)
            return
        found = self.opt.clip_grad_norm_(max_norm, norm_type, strict)
        assert_near(found, torch.tensor(norm), found.dtype, 1e-6, "norm")

    @rule(max_norm=MAX_NORM)
    def clip_by_another_norm(self, max_norm):
        """By torch's functions, which write what waits and the new coefficient into the gradients."""
        grads = [p.grad.clone() for p in self.params if p.grad is not None]
        try:
            factors = self.model.factors()
        except Raises as error:
            self.refused(lambda: self.opt.clip_grad_norm_(max_norm, 3.0), error)
            return
        norm = self.model.norm(factors, 3.0)
        self.opt.clip_grad_norm_(max_norm, 3.0)
        for (weight, factor), grad in zip(factors.items(), grads, strict=True):
            wanted = grad * factor * clip_coefficient(norm, max_norm)
            assert_near(weight.param.grad, wanted, grad.dtype, self.norm_tolerance, "gradient")
        self.model.end_present()

    @property
    def can_unscale(self):
        grads = [p.grad for p in self.params if p.grad is not None]
        return grads and all(grad.dtype is not FP16 for grad in grads)

    @precondition(lambda self: self.can_unscale)
    @rule(
        kind=st.sampled_from([GradScaler, GradScaler, torch.amp.GradScaler]),
        unscales=st.booleans(),
        max_norm=st.one_of(st.none(), MAX_NORM),
        between=st.sampled_from(["nothing", "nothing", "replace", "write", "view", "go", "refused step"]),
        updates=st.booleans(),
        subset=SOME,
    )
    def scale(self, kind, unscales, max_norm, between, updates, subset):
        """The gradients that are there count as scaled."""
        scaler, inv_scale, found_inf = kind("cpu", init_scale=16.0), 1 / 16, False
        scaler.scale(torch.ones(()))
        is_ours, is_fused = kind is GradScaler, self.opt.defaults["fused"]
        if unscales or not (is_ours or is_fused):
            found_inf = self.unscale(scaler, is_ours)
            if found_inf is None:
                return
            inv_scale = 1.0
        if max_norm is not None:
            self.clip_once(max_norm)
        if between == "replace":
            self.new_gradients(subset, 1.0)
        elif between == "refused step":
            if self.opt.ema_decay is not None:
                self.refuse_inside(self.opt.ema_weights)
        elif between != "nothing":
            self.touch_gradients(subset=subset, how=between)
        if not any(p.grad is not None for p in self.params):
            return
        try:
            if inv_scale != 1.0:  # the scaler has not looked yet
                found_inf = self.look_for_infs(is_ours)
            if found_inf and not is_ours and not is_fused:
                scaler.step(self.opt)
                self.model.check_nothing_moved()
            else:
                self.model.step(lambda: scaler.step(self.opt), inv_scale, found_inf)
        except Raises as error:
            self.refused(lambda: scaler.step(self.opt), error, "versions")
            updates = updates and "unscale_" not in error.says
        if updates:
            scaler.update()
            if is_ours:
                self.model.outlive_scaler()

    def unscale(self, scaler, is_ours):
        """Whether there was an inf; None: it was refused."""
        if not is_ours:
            found_inf = self.look_for_infs(False)
            scaler.unscale_(self.opt)
            return found_inf
        try:
            found_inf = self.model.unscale(1 / 16)
        except Raises as error:
            self.refused(lambda: scaler.unscale_(self.opt), error)
            return None
        scaler.unscale_(self.opt)
        return found_inf

    def look_for_infs(self, is_ours):
        """torch's scaler writes to gradients unseen, as if what waits had been written there before."""
        if is_ours:
            return self.model.unscale(1.0)
        return any(not p.grad.isfinite().all() for p in self.params if p.grad is not None)

    # ---- other weights in the parameters' place

    @rule(what=st.sampled_from(["iterate_weights", "ema_weights"]))
    def other_weights(self, what):
        self.model.check_nothing_moved()
        if what == "ema_weights" and self.opt.ema_decay is None:
            with (
                pytest.raises(RuntimeError, match="needs an optimizer that was made with ema_decay"),
                self.opt.ema_weights(),
            ):
                pass
            return
        try:
            self.model.check_moved(all_groups=what == "iterate_weights")
        except Raises as error:
            if what == "iterate_weights":
                self.refused(self.opt.iterate_weights().__enter__, error)
                return
        if what == "iterate_weights":
            wanted = [self.iterate(group, param) for group in self.opt.param_groups for param in group["params"]]
        else:
            averages = [self.model.weights[param].average for param in self.params]
            wanted = [
                param.detach().clone() if each is None else each
                for each, param in zip(averages, self.params, strict=True)
            ]
        self.refuse_inside(getattr(self.opt, what), wanted)

    def iterate(self, group, param):
        weight = self.model.weights[param]
        if weight.buffer is None or not group["nesterov"]:
            return param.detach().clone()
        is_classical = self.model.formulation_of(weight) == "classical"
        distance = group["momentum"] * (1.0 if is_classical else float(group["lr"]))
        if distance == 0:  # nothing moves, also where the buffer is infinite
            return param.detach().clone()
        wide = torch.promote_types(param.dtype, FP32)
        return param.detach().to(wide).add(weight.buffer.to(wide), alpha=distance)

    def refuse_inside(self, context, wanted=()):
        before = Snapshot(self.opt, "versions")
        with context():
            for param, values in zip(self.params, wanted, strict=bool(wanted)):
                was_moved = self.model.was_moved(self.model.weights[param])
                bits = param.dtype in (FP32, FP64) and values.dtype is param.dtype and not was_moved
                assert_near(param.detach(), values, param.dtype, 0.0 if bits else 1e-6, "parameter inside")
            inside = Snapshot(self.opt)
            for action in (
                self.opt.step,
                self.opt.state_dict,
                lambda: copy.deepcopy(self.opt),
                lambda: pickle.dumps(self.opt),
                lambda: self.opt.load_state_dict({"state": {}, "param_groups": []}),
                lambda: self.opt.step(raises),
            ):
                with pytest.raises(RuntimeError, match=r"leave (iterate|ema)_weights\(\) first"):
                    action()
            with pytest.raises(RuntimeError, match="first"), self.opt.iterate_weights():
                pass
            inside.assert_unchanged()
        before.assert_unchanged()
        self.model.check_nothing_moved()

    # ---- copies and checkpoints

    @contextlib.contextmanager
    def only_looks(self):
        """Nothing changes, but the counts that a checkpoint has are brought up to date in the groups."""

        def groups():
            return [{k: v for k, v in group.items() if k not in COUNTS} for group in self.opt.param_groups]

        before, kept = Snapshot(self.opt, "groups"), groups()
        yield
        before.assert_unchanged()
        assert all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(kept, groups(), strict=True))

    @rule(way=st.sampled_from(list(COPIES.values())), subset=SOME)
    def copied(self, way, subset):
        if not self.can_pickle:
            way = copy.deepcopy
        try:
            self.model.check_moved(all_groups=True)
        except Raises as error:
            self.refused(lambda: way(self.opt), error, "groups")
            return
        with self.only_looks():
            copied = way(self.opt)
        self.opt = copied
        self.model.move_to(copied)
        self.away = {}
        self.model.check_nothing_moved()
        self.new_gradients(subset, 1.0)

    @property
    def can_pickle(self):
        """torch 2.13 has no plain pickle of fp8 tensors."""
        return all(torch.float8_e4m3fn not in weight.formats.values() for weight in self.model.weights.values())

    def state_dict(self):
        """What it must be, and the live state as before; None where it must raise."""
        try:
            self.model.check_conversions()
            self.model.check_moved(all_groups=False)
        except Raises as error:
            self.refused(self.opt.state_dict, error, "groups")
            return None
        with self.only_looks():
            state_dict = self.opt.state_dict()
        self.model.check_state_dict(state_dict)
        return copy.deepcopy(state_dict)

    @rule(into=st.sampled_from(["nothing", "itself", "itself", "fresh", "fresh"]), pickled=st.booleans())
    def checkpoint(self, into, pickled):
        state_dict = self.state_dict()
        if state_dict is None or into == "nothing":
            self.model.check_nothing_moved()
            return
        if pickled and self.can_pickle:
            state_dict = through_pickle(state_dict)
        if into == "fresh":
            self.begin_anew()
        self.opt.load_state_dict(state_dict)
        self.model.load(state_dict)

    def begin_anew(self):
        """An optimizer with these options for the same parameters and gradients."""
        old = self.opt
        groups = [{**group, "params": list(group["params"]), "lr": 99.0} for group in old.param_groups]
        for group in groups:
            for key in ("buffer_formulation", *COUNTS):
                group.pop(key, None)
        self.opt = self.model.opt = FusedMomentum(groups, lr=0.1, fused=old.defaults["fused"])
        for name in ATTRIBUTES:
            setattr(self.opt, name, getattr(old, name))
        self.model.end_coefficients()
        self.away = {}

    # ---- steps that fail

    def victim(self):
        """The last parameter that has a gradient with something in it, and its group."""
        found = [(g, p) for g in self.opt.param_groups for p in g["params"] if p.grad is not None and p.numel()]
        return found[-1] if found else (None, None)

    def fails(self, match, kind=RuntimeError):
        with refused(self.opt, kind, match):
            self.opt.step()

    @rule(
        what=st.sampled_from(
            ["param", "grad", "momentum_buffer", "momentum_scale", "param_remainder", "master_param", "ema"]
        )
    )
    def step_without_memory(self, what):
        group, param = self.victim()
        entry = self.opt.state.get(param, {})
        tensor = {"param": param, "grad": getattr(param, "grad", None), **entry}.get(what)
        if tensor is None or not self.would_step():
            return
        is_used = {"ema": self.opt.ema_decay is not None, "momentum_buffer": group["momentum"] != 0}
        is_used["momentum_scale"] = is_used["momentum_buffer"]
        is_used["param_remainder"] = is_used["master_param"] = group.get("master_weights", False)
        if not is_used.get(what, True):
            return
        storage = tensor.untyped_storage()
        kept, size = storage.clone(), storage.nbytes()
        storage.resize_(0)
        self.fails({"param": r"param_groups\[", "grad": "gradient of"}.get(what, what) + ".* bytes")
        storage.resize_(size)
        storage.copy_(kept)
        self.model.check_nothing_moved()

    @rule(how=st.sampled_from(["shape", "hook", "closure", "state", "entries"]), then=st.booleans())
    def step_that_fails(self, how, then):
        _, param = self.victim()
        if param is None or not self.would_step():
            return
        if how == "shape":
            grad = param.grad
            param.grad = grad.clone()
            param.grad.data = torch.zeros(param.numel() + 1, dtype=grad.dtype)
            self.fails(r"param_groups\[")
            param.grad = grad
        elif how == "hook":
            handle = self.opt.register_step_pre_hook(raises)
            self.fails("by a hook", Refused)
            handle.remove()
        elif how == "closure":
            with refused(self.opt, Refused, "by a hook"):
                self.opt.step(raises)
        else:
            self.step_with_full_state(how == "entries")
        self.model.check_nothing_moved()
        if then:
            self.step()

    def step_with_full_state(self, entries):
        """A dict that takes nothing: the step that needs to put something there is undone."""
        state = self.opt.state
        plain = dict(state.items())
        if entries:
            state.update({param: Refuses(entry) for param, entry in state.items()})
        else:
            self.opt.state = Refuses(state)
        before = Snapshot(self.opt)
        try:
            self.model.step(self.opt.step)
        except Refused:
            before.assert_unchanged()
        for param, entry in self.opt.state.items():
            state[param] = dict(entry) if param in plain and entries else entry
        self.opt.state = state


class LowPrecisionTraining(ExactTraining):
    """Plain and low-precision state in every dtype: what each step stores, in which dtype, how nearly."""

    dtypes = ((BF16,), (BF16, FP32), (FP16, FP32), (FP16, BF16, FP32), (FP64, FP32))
    choices = LOW_CHOICES

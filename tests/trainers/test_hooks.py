"""What the ecosystem hangs on an optimizer: schedulers, closures, hooks, the profiler, subclasses, version counters."""

import functools
import warnings

import pytest
import torch
from harness import Pair, Snapshot, assert_alike, assert_same, for_loop, params_of, refused
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel

from momentum_ext import FusedAdamW, FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}

# -------------------------------------------------------------------------------------------------------- schedulers

SCHEDULERS = {
    "OneCycleLR": lambda opt: OneCycleLR(opt, max_lr=0.5, total_steps=20),
    "OneCycleLR-three-phase": lambda opt: OneCycleLR(opt, max_lr=0.5, total_steps=20, three_phase=True),
    "CyclicLR": lambda opt: CyclicLR(opt, base_lr=0.01, max_lr=0.5, step_size_up=4),
    "CyclicLR-triangular2": lambda opt: CyclicLR(
        opt, 0.01, 0.5, step_size_up=3, mode="triangular2", cycle_momentum=True
    ),
    "StepLR": lambda opt: StepLR(opt, 3),
    "ExponentialLR": lambda opt: ExponentialLR(opt, 0.8),
    "LambdaLR": lambda opt: LambdaLR(opt, lambda step: 1 / (step + 1)),
    "CosineAnnealingLR": lambda opt: CosineAnnealingLR(opt, 10),
    "CosineAnnealingWarmRestarts": lambda opt: CosineAnnealingWarmRestarts(opt, 4),
    "PolynomialLR": lambda opt: PolynomialLR(opt, 10),
    "SequentialLR": lambda opt: SequentialLR(opt, [LinearLR(opt, 0.1, 1.0, 5), ConstantLR(opt, 0.5, 5)], [5]),
    "ChainedScheduler": lambda opt: ChainedScheduler([ConstantLR(opt, 0.5, 3), ExponentialLR(opt, 0.9)]),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["lr", "tensorlr"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name, tensor_lr):
    """One that cycles momentum does so: other momenta in a group mean another trajectory."""
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    pair = Pair([torch.randn(300), torch.randn(33, 5)], **{**HYPER, "lr": lr})
    momenta = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler that can't see that step() was called warns
        schedulers = [SCHEDULERS[name](opt) for opt in pair.optimizers]
        for _ in range(19):
            pair.step()
            momenta.add(pair.mine.param_groups[0]["momentum"])
            warnings.simplefilter("ignore", UserWarning if name == "SequentialLR" else BytesWarning)
            for scheduler in schedulers:
                scheduler.step()
    mine, theirs = (opt.param_groups[0] for opt in pair.optimizers)
    assert float(mine["lr"]) == float(theirs["lr"])
    assert mine["momentum"] == theirs["momentum"]
    assert len(momenta) > 5 or not name.startswith("OneCycleLR")


def test_reduce_on_plateau():
    pair = Pair([torch.randn(300)], **HYPER)
    schedulers = [ReduceLROnPlateau(opt, patience=1) for opt in pair.optimizers]
    for _ in range(8):
        pair.step()
        for scheduler in schedulers:
            scheduler.step(1.0)
    assert pair.mine.param_groups[0]["lr"] < 0.1


def test_scheduler_before_step_warns_as_with_torch():
    for kind in (FusedMomentum, torch.optim.SGD):
        param = torch.nn.Parameter(torch.randn(3))
        scheduler = StepLR(kind([param], lr=0.1), 3)
        with pytest.warns(UserWarning, match="before `optimizer.step"):
            scheduler.step()


def test_averaged_model():
    """torch.optim.swa_utils around the optimizer."""

    def run(kind):
        model = torch.nn.Linear(19, 5)
        average = AveragedModel(model)
        opt = kind(model.parameters(), **HYPER)
        scheduler = SWALR(opt, swa_lr=0.01, anneal_epochs=3)
        for _ in range(6):
            opt.zero_grad()
            model(torch.randn(8, 19)).square().mean().backward()
            opt.step()
            scheduler.step()
            average.update_parameters(model)
        return average.parameters()

    assert_alike(run)


# ---------------------------------------------------------------------------------------------------------- closures


def test_closure():
    """Called once, with gradients enabled, before anything is read; its value is returned."""

    def run(kind):
        model = torch.nn.Linear(19, 5)
        opt, losses, calls = kind(model.parameters(), **HYPER), [], []

        def closure():
            calls.append(torch.is_grad_enabled())
            opt.zero_grad()
            loss = model(torch.randn(8, 19)).square().mean()
            loss.backward()
            return loss

        for grad_enabled in (True, False, True):
            with torch.set_grad_enabled(grad_enabled):
                losses.append(opt.step(closure) if grad_enabled else opt.step(closure=closure))
                assert torch.is_grad_enabled() == grad_enabled
        assert calls == [True] * 3
        return [*model.parameters(), *losses]

    assert_alike(run)


def test_closure_may_edit_groups_and_state():
    pair = Pair([torch.randn(300), torch.randn(7)], **HYPER)
    pair.step(2)
    pair.new_grads()

    def edit(opt):
        opt.param_groups[0].update(lr=0.02, momentum=0.5)
        opt.state[opt.param_groups[0]["params"][0]]["momentum_buffer"].zero_()
        opt.param_groups[0]["params"][1].grad = None
        return 3

    pair.both(lambda opt: opt.step(lambda: edit(opt)))
    pair.check()
    pair.step(2)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_step_in_any_grad_mode(context):
    pair = Pair([torch.randn(300)], **HYPER)
    pair.new_grads()
    with context():
        pair.both(lambda opt: opt.step())
    pair.check()


def test_no_graph_is_recorded():
    pair = Pair([torch.randn(300)], **HYPER)
    pair.step(2)
    param = pair.params[0][0]
    assert param.is_leaf and param.grad_fn is None
    buffer = pair.mine.state[param]["momentum_buffer"]
    assert not buffer.requires_grad and buffer.grad_fn is None


# ------------------------------------------------------------------------------------------------------------- hooks


def with_gradient(kind=FusedMomentum):
    param = torch.nn.Parameter(torch.randn(33))
    param.grad = torch.randn(33)
    return kind([param], **HYPER)


@pytest.fixture
def one():
    return with_gradient()


def counting(opt):
    """The kinds of hooks that ran, in order."""
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    return calls


def test_step_hooks_in_torchs_order(one):
    events = []
    note = lambda what: lambda opt, args, kwargs: events.append((what, opt is one))  # noqa: E731
    handles = [
        one.register_step_pre_hook(note("pre")),
        one.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        one.step()
    finally:
        for handle in handles:
            handle.remove()
    assert events == [("global pre", True), ("pre", True), ("post", True), ("global post", True)]
    one.step()
    assert len(events) == 4


@pytest.mark.parametrize("kind", ["pre", "post", "global pre", "global post"])
def test_each_kind_of_hook_alone(one, kind):
    register = {
        "pre": one.register_step_pre_hook,
        "post": one.register_step_post_hook,
        "global pre": register_optimizer_step_pre_hook,
        "global post": register_optimizer_step_post_hook,
    }[kind]
    calls = []
    handle = register(lambda opt, args, kwargs: calls.append(opt is one))
    try:
        one.step()
        one.step()
    finally:
        handle.remove()
    one.step()
    assert calls == [True, True]


def test_hooks_see_the_parameters_before_and_after(one):
    param, seen = params_of(one)[0], []
    one.register_step_pre_hook(lambda *_: seen.append(param.detach().clone()))
    one.register_step_post_hook(lambda *_: seen.append(param.detach().clone()))
    start = param.detach().clone()
    one.step()
    assert_same(seen[0], start)
    assert_same(seen[1], param)
    assert not torch.equal(seen[0], seen[1])


def test_pre_hook_edits_take_effect_in_the_same_step():
    """As a clipping hook does: gradients and hyperparameters."""
    pair = Pair([torch.randn(300), torch.randn(7)], **HYPER)

    def clip(opt, args, kwargs):
        torch.nn.utils.clip_grad_value_(opt.param_groups[0]["params"], 0.1)
        opt.param_groups[0]["lr"] *= 0.5

    pair.both(lambda opt: opt.register_step_pre_hook(clip))
    pair.step(4)


def test_pre_hook_may_change_the_arguments(one):
    one.register_step_pre_hook(lambda opt, args, kwargs: ((*args, lambda: 5.0), {}))
    assert one.step() == 5.0


def test_pre_hook_may_take_the_arguments_away(one):
    one.register_step_pre_hook(lambda opt, args, kwargs: ((args[0],), {}))
    assert one.step(lambda: 1 / 0) is None


def test_hooks_get_torchs_arguments():
    seen = []
    closure = lambda: None  # noqa: E731
    for kind in (FusedMomentum, torch.optim.SGD):
        opt = kind([torch.nn.Parameter(torch.randn(3))], lr=0.1)
        got = []
        opt.register_step_pre_hook(lambda opt, args, kwargs, got=got: got.append((len(args), args[1:], kwargs)))
        opt.register_step_post_hook(lambda opt, args, kwargs, got=got: got.append((len(args), args[1:], kwargs)))
        opt.step()
        opt.step(closure)
        opt.step(closure=closure)
        seen.append(got)
    assert seen[0] == seen[1]


def test_pre_hook_that_returns_nonsense(one):
    one.register_step_pre_hook(lambda opt, args, kwargs: "nonsense")
    with refused(one, RuntimeError, "got nonsense"):
        one.step()


def test_hook_that_removes_itself_and_hook_added_later(one):
    calls = []
    one.step()
    handle = one.register_step_post_hook(lambda opt, args, kwargs: calls.append("once") or handle.remove())
    one.step()
    one.step()
    assert calls == ["once"]
    one.register_step_post_hook(lambda opt, args, kwargs: calls.append("later"))
    one.step()
    assert calls == ["once", "later"]


def test_state_dict_hooks(one):
    events = []
    one.register_state_dict_pre_hook(lambda opt: events.append("save pre"))
    one.register_state_dict_post_hook(lambda opt, state: {**state, "extra": 5})
    one.register_load_state_dict_pre_hook(lambda opt, state: events.append(state.pop("extra")))
    one.register_load_state_dict_post_hook(lambda opt: events.append("load post"))
    one.step()
    one.load_state_dict(one.state_dict())
    assert events == ["save pre", 5, "load post"]
    one.step()


class Own(FusedMomentum):
    def step(self, closure=None):
        return super().step(closure)


class Renamed(FusedMomentum):
    pass


def timed(step):
    @functools.wraps(step)
    def wrapper(self, *args, **kwargs):
        return step(self, *args, **kwargs)

    return wrapper


@pytest.mark.parametrize("how", ["overridden", "renamed", "wrapped class method", "wrapped bound method"])
def test_hooks_run_once_whoever_wraps_the_step(how, monkeypatch):
    """Schedulers, accelerate and others wrap the bound method."""
    if how == "wrapped class method":
        monkeypatch.setattr(FusedMomentum, "step", timed(FusedMomentum.step))
    opt = with_gradient({"overridden": Own, "renamed": Renamed}.get(how, FusedMomentum))
    if how == "wrapped bound method":
        inner = opt.step
        opt.step = lambda *args, **kwargs: inner(*args, **kwargs)
    calls, before = counting(opt), Snapshot(opt)
    opt.step()
    assert calls == ["pre", "post"]
    assert all(before.has_moved)


def test_torchs_sgd_is_left_alone(one):
    """Our step must not leak into torch.optim.SGD, nor its hooks into ours."""
    calls = counting(one)
    with_gradient(for_loop).step()
    assert calls == []
    assert torch.optim.SGD.step is not FusedMomentum.step


# ---------------------------------------------------------------------------------------------------------- profiler


def test_profiler_range(one):
    one.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one.step()
        one.zero_grad()
    names = [event.name for event in profile.events()]
    assert names.count("Optimizer.step#FusedMomentum.step") == 1
    assert "Optimizer.zero_grad#FusedMomentum.zero_grad" in names
    params_of(one)[0].grad = torch.randn(33)
    one.step()


def test_legacy_profiler_range(one):
    with torch.autograd.profiler.profile() as profile:
        one.step()
    assert "Optimizer.step#FusedMomentum.step" in [event.name for event in profile.function_events]


def test_profiler_with_stack_and_memory(one):
    """Python tracing hooks into the optimizer's step code to list its parameters."""
    with torch.profiler.profile(with_stack=True, profile_memory=True, record_shapes=True) as profile:
        one.step()
    assert any("Optimizer.step#FusedMomentum.step" in event.name for event in profile.events())


@pytest.mark.parametrize(
    "hyper, first, later",  # bytes for each element
    [
        ({"momentum": 0.0}, 12, 12),
        ({"momentum": 0.9}, 16, 20),
        ({"momentum": 0.9, "ema_decay": 0.9}, 24, 28),
    ],
    ids=str,
)
def test_profiler_range_with_bytes(hyper, first, later):
    """One range for each step says what the step must move; hooks run once beside it."""
    params = [torch.nn.Parameter(torch.randn(n)) for n in (33, 1000)]
    idle = torch.nn.Parameter(torch.randn(7))  # has no gradient: nothing to move
    opt, calls = FusedMomentum([*params, idle], lr=0.1, **hyper), []
    opt.register_step_post_hook(lambda *args: calls.append(1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            opt.step()
    events = [event for event in profile.events() if event.name.startswith("FusedMomentum.step")]
    expected = [first * 1033, later * 1033, later * 1033]
    assert [event.name for event in events] == [f"FusedMomentum.step: {n} bytes" for n in expected]
    assert all(event.cpu_time > 0 for event in events)
    assert len(calls) == 3
    assert {row.key: row.count for row in profile.key_averages()}[events[-1].name] == (3 if first == later else 2)


def test_profiler_range_of_16_bit():
    param = torch.nn.Parameter(torch.randn(33).bfloat16())
    param.grad = torch.randn(33).bfloat16()
    opt = FusedMomentum([param], lr=0.1, momentum=0.9)
    opt.step()
    with torch.profiler.profile() as profile:
        opt.step()
    assert "FusedMomentum.step: 330 bytes" in [event.name for event in profile.events()]


def test_profiler_range_of_adamw_in_8_bits():
    """Parameter, gradient, 8 more bits of the parameter, two states of a byte, each with two bytes for 32 elements."""
    param = torch.nn.Parameter(torch.randn(64).bfloat16())
    param.grad = torch.randn(64).bfloat16()
    opt = FusedAdamW([param], lr=0.1, state_dtype="int8", master_weights=24)
    with torch.profiler.profile() as profile:
        opt.step()
    bytes_moved = 64 * (2 * 2 + 2 + 2 * 1 + 2 * 2) + 2 * 2 * (64 // 32) * 2
    assert f"FusedAdamW.step: {bytes_moved} bytes" in [event.name for event in profile.events()]


def test_results_under_the_profiler():
    pair = Pair([torch.randn(300), torch.randn(33, 5)], **HYPER)
    with torch.profiler.profile():
        pair.step(3)
    pair.step(3)


# --------------------------------------------------------------------------------------------------- version counters


@pytest.mark.parametrize("kind", [FusedMomentum, for_loop])
@pytest.mark.parametrize("of", ["parameter", "buffer"])
def test_backward_through_what_was_stepped_raises(of, kind):
    opt = with_gradient(kind)
    opt.step()
    (param,) = params_of(opt)
    held = param if of == "parameter" else opt.state[param]["momentum_buffer"]
    loss = (torch.randn(33, requires_grad=True) * held).square().sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("shape", [(33,), (300, 300), (5, 7)], ids=str)
def test_version_counters_go_up_with_each_step(shape):
    """Also for views: whoever saved the base learns of it."""
    base = torch.randn(shape)
    params = [
        torch.nn.Parameter(base.clone()),
        torch.nn.Parameter(base.to(torch.bfloat16)),
        torch.nn.Parameter(base[::2]),
    ]
    idle = torch.nn.Parameter(base.clone())
    opt = FusedMomentum([*params, idle], **HYPER)
    for step in range(4):
        buffers = [opt.state[p]["momentum_buffer"] for p in params] if step else []
        versions = [t._version for t in params + buffers]
        still = idle._version
        for param in params:
            param.grad = torch.randn(param.shape).to(param.dtype)
        opt.step()
        assert all(t._version > v for t, v in zip(params + buffers, versions, strict=True))
        assert idle._version == still

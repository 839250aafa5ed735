"""What the ecosystem hangs on an optimizer: schedulers, closures, hooks, the profiler, subclasses, version counters."""

import functools
import warnings

import pytest
import torch
from harness import Pair, assert_same
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

from momentum_ext import FusedMomentum

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
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    pair = Pair([torch.randn(300), torch.randn(33, 5)], **{**HYPER, "lr": lr})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler that can't see that step() was called warns
        schedulers = [SCHEDULERS[name](opt) for opt in pair.optimizers]
        for _ in range(19):
            pair.step()
            warnings.simplefilter("ignore", UserWarning if name == "SequentialLR" else BytesWarning)
            for scheduler in schedulers:
                scheduler.step()
    mine, theirs = (opt.param_groups[0] for opt in pair.optimizers)
    assert float(mine["lr"]) == float(theirs["lr"])
    assert mine["momentum"] == theirs["momentum"]


def test_scheduler_that_cycles_momentum_does_cycle_it():
    """The buffers show it: another momentum in a group means another trajectory."""
    pair = Pair([torch.randn(300)], **HYPER)
    schedulers = [OneCycleLR(opt, max_lr=0.5, total_steps=20) for opt in pair.optimizers]
    seen = set()
    for _ in range(19):
        pair.step()
        seen.add(pair.mine.param_groups[0]["momentum"])
        for scheduler in schedulers:
            scheduler.step()
    assert len(seen) > 10


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
    from torch.optim.swa_utils import SWALR, AveragedModel

    results = []
    for kind in (FusedMomentum, torch.optim.SGD):
        torch.manual_seed(0)
        model = torch.nn.Linear(19, 5)
        average = AveragedModel(model)
        opt = kind(model.parameters(), **HYPER, foreach=False)
        scheduler = SWALR(opt, swa_lr=0.01, anneal_epochs=3)
        for _ in range(6):
            opt.zero_grad()
            model(torch.randn(8, 19)).square().mean().backward()
            opt.step()
            scheduler.step()
            average.update_parameters(model)
        results.append(list(average.parameters()))
    for mine, theirs in zip(*results, strict=True):
        assert_same(mine, theirs)


# ---------------------------------------------------------------------------------------------------------- closures


def test_closure():
    """Called once, with gradients enabled, before anything is read; its value is returned."""
    results = []
    for kind in (FusedMomentum, torch.optim.SGD):
        torch.manual_seed(0)
        model = torch.nn.Linear(19, 5)
        opt, losses, calls = kind(model.parameters(), **HYPER, foreach=False), [], []

        def closure(model=model, opt=opt, calls=calls):
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
        results.append([*model.parameters(), *losses])
    for mine, theirs in zip(*results, strict=True):
        assert_same(mine, theirs)


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


@pytest.fixture
def one():
    param = torch.nn.Parameter(torch.randn(33))
    param.grad = torch.randn(33)
    return FusedMomentum([param], **HYPER)


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
    param, seen = one.param_groups[0]["params"][0], []
    one.register_step_pre_hook(lambda opt, args, kwargs: seen.append(param.detach().clone()))
    one.register_step_post_hook(lambda opt, args, kwargs: seen.append(param.detach().clone()))
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
    before = one.param_groups[0]["params"][0].detach().clone()
    with pytest.raises(RuntimeError, match="got nonsense"):
        one.step()
    assert_same(one.param_groups[0]["params"][0], before)


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


def test_subclass_that_overrides_step_runs_hooks_once(one):
    class Own(FusedMomentum):
        def step(self, closure=None):
            calls.append("step")
            return super().step(closure)

    calls = []
    param = torch.nn.Parameter(torch.randn(33))
    param.grad = torch.randn(33)
    opt = Own([param], **HYPER)
    opt.register_step_pre_hook(lambda opt, args, kwargs: calls.append("pre"))
    opt.register_step_post_hook(lambda opt, args, kwargs: calls.append("post"))
    before = param.detach().clone()
    opt.step()
    assert calls == ["pre", "step", "post"]
    assert not torch.equal(param, before)


def test_subclass_without_its_own_step(one):
    class Renamed(FusedMomentum):
        pass

    calls = []
    param = torch.nn.Parameter(torch.randn(33))
    param.grad = torch.randn(33)
    opt = Renamed([param], **HYPER)
    opt.register_step_pre_hook(lambda opt, args, kwargs: calls.append("pre"))
    opt.register_step_post_hook(lambda opt, args, kwargs: calls.append("post"))
    opt.step()
    assert calls == ["pre", "post"]


def test_step_replaced_on_the_instance(one):
    """What schedulers, accelerate and others do: they wrap the bound method."""
    calls, inner = [], one.step
    one.step = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    before = one.param_groups[0]["params"][0].detach().clone()
    one.step()
    assert calls == [1] and not torch.equal(one.param_groups[0]["params"][0], before)


def test_torchs_sgd_is_left_alone(one):
    """Our step must not leak into torch.optim.SGD, nor its hooks into ours."""
    calls = []
    one.register_step_pre_hook(lambda opt, args, kwargs: calls.append("ours"))
    param = torch.nn.Parameter(torch.randn(33))
    param.grad = torch.randn(33)
    torch.optim.SGD([param], lr=0.1).step()
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
    one.param_groups[0]["params"][0].grad = torch.randn(33)
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


def test_results_under_the_profiler():
    pair = Pair([torch.randn(300), torch.randn(33, 5)], **HYPER)
    with torch.profiler.profile():
        pair.step(3)
    pair.step(3)


# --------------------------------------------------------------------------------------------------- version counters


def test_backward_through_a_parameter_that_was_stepped_raises():
    for kind in (FusedMomentum, torch.optim.SGD):
        param = torch.nn.Parameter(torch.randn(33))
        opt = kind([param], **HYPER)
        loss = param.square().sum()
        param.grad = torch.randn(33)
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_backward_through_a_buffer_that_was_stepped_raises():
    for kind in (FusedMomentum, torch.optim.SGD):
        param = torch.nn.Parameter(torch.randn(33))
        opt = kind([param], **HYPER)
        param.grad = torch.randn(33)
        opt.step()
        factor = torch.randn(33, requires_grad=True)
        loss = (factor * opt.state[param]["momentum_buffer"]).sum()
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


def test_wrapper_around_the_class_method_keeps_the_hooks(monkeypatch):
    original = FusedMomentum.step

    @functools.wraps(original)
    def timed(self, *args, **kwargs):
        calls.append("timed")
        return original(self, *args, **kwargs)

    calls = []
    monkeypatch.setattr(FusedMomentum, "step", timed)
    param = torch.nn.Parameter(torch.randn(33))
    param.grad = torch.randn(33)
    opt = FusedMomentum([param], **HYPER)
    opt.register_step_pre_hook(lambda opt, args, kwargs: calls.append("pre"))
    opt.step()
    assert calls == ["timed", "pre"]

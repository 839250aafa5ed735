"""torch.compile: the step in a graph gives the bits of the eager step, from few graphs; operators pass opcheck."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import assert_all_same, assert_same, assert_same_training, counts_of, is_clipping, params_of
from torch._dynamo.testing import CompileCounterWithBackend
from values import BF16, FP16, FP64, dtype_name

from momentum_ext import FusedMomentum

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
NEW_TORCH = VERSION >= (2, 13)
graphs_zero_grad = pytest.mark.skipif(not NEW_TORCH, reason="zero_grad() in a graph needs torch 2.13")
# The backward pass in the graph too: torch's own switch, off by default. Torch that lacks it breaks the graph there.
TRACES_BACKWARD = hasattr(torch._dynamo.config, "trace_autograd_ops")
BACKWARD = torch._dynamo.config.patch(trace_autograd_ops=True) if TRACES_BACKWARD else lambda test: test


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(19, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5)).to(dtype)


def inputs(step, dtype=torch.float32):
    return torch.randn(8, 19, generator=torch.Generator().manual_seed(step)).to(dtype)


def backward(net, opt, step, dtype=torch.float32):
    opt.zero_grad()
    net(inputs(step, dtype)).float().square().mean().backward()


class Twins:
    """The same training with an optimizer whose step may be compiled, and with one whose step is not."""

    def __init__(self, make, dtype=torch.float32):
        (self.net, self.opt), (self.theirs, self.eager) = ((net, make(net)) for net in (model(dtype), model(dtype)))
        self.dtype, self.steps = dtype, 0

    @property
    def sides(self):
        return (self.net, self.opt), (self.theirs, self.eager)

    def train(self, step, times=1):
        for _ in range(times):
            for (net, opt), run in zip(self.sides, (step, self.eager.step), strict=True):
                backward(net, opt, self.steps, self.dtype)
                run()
            self.steps += 1

    def edit(self, **changes):
        for _, opt in self.sides:
            opt.param_groups[0].update(changes)

    def check(self):
        assert_same_training(self.opt, self.eager)


def everything(**hyper):
    return lambda net: FusedMomentum(net.parameters(), **{"lr": 0.1, "momentum": 0.9, **hyper})


def two_groups(net):
    first, _, last = net
    groups = [
        {"params": list(first.parameters()), "lr": 0.05, "nesterov": True, "formulation": "classical"},
        {"params": list(last.parameters()), "weight_decay": 0.1, "decoupled_weight_decay": True, "momentum": 0.0},
    ]
    return FusedMomentum(groups, lr=0.2, momentum=0.9)


CASES = {
    "momentum": everything(),
    "sgd": everything(momentum=0.0),
    "nesterov": everything(nesterov=True),
    "dampening": everything(dampening=0.3),
    "decay": everything(weight_decay=0.1),
    "decoupled": everything(weight_decay=0.1, decoupled_weight_decay=True),
    "maximize": everything(maximize=True, lr=1e-3),
    "classical": everything(formulation="classical", nesterov=True),
    "ema": everything(formulation="ema", weight_decay=0.01),
    "groups": two_groups,
    "average": everything(ema_decay=0.9),
    "average-warmup": everything(ema_decay=0.99, ema_warmup=True, momentum=0.0),
    "clip": everything(max_grad_norm=0.05),
    "all": everything(max_grad_norm=0.05, ema_decay=0.9, nesterov=True, weight_decay=0.1),
    "tensors": lambda net: everything(lr=torch.tensor(0.1), weight_decay=torch.tensor(0.01))(net),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_step(name):
    """torch.compile(optimizer.step): the graphs are that of the first step and that of all others."""
    twins = Twins(CASES[name])
    counter = CompileCounterWithBackend("aot_eager")
    twins.train(torch.compile(twins.opt.step, fullgraph=True, backend=counter), 5)
    twins.check()
    assert counter.frame_count == (1 if name == "sgd" else 2)
    if twins.opt.max_grad_norm is not None:
        assert_same(twins.opt.grad_norm, twins.eager.grad_norm)


@pytest.mark.parametrize("name", ["momentum", "sgd", "groups", "average", "clip", "all", "tensors"])
@BACKWARD
def test_compiled_training_step(name):
    """zero_grad, forward, backward and step in one graph, bit for bit with the same graph around an eager step."""
    twins = Twins(CASES[name])
    net, opt = twins.net, twins.opt
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=TRACES_BACKWARD, backend=counter)
    def whole(x):
        (opt if NEW_TORCH else net).zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        opt.step()
        return loss.detach()

    frames, losses = [], []
    for i in range(7):
        losses.append(whole(inputs(i)))
        frames.append(counter.frame_count)
    for i in range(7):
        backward(twins.theirs, twins.eager, i)
        twins.eager.step()
    twins.check()
    assert frames[4:] == [frames[4]] * 3, "later steps compile nothing"
    assert frames[4] == 2 or VERSION < (2, 11)  # there some of the first steps compile once more
    assert losses[-1] < losses[0] or opt.param_groups[0]["maximize"]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP64], ids=dtype_name)
def test_dtypes(dtype):
    twins = Twins(everything(weight_decay=0.01, nesterov=True, ema_decay=0.9, max_grad_norm=0.05), dtype)
    twins.train(torch.compile(twins.opt.step, fullgraph=True, backend="aot_eager"), 4)
    twins.check()


@BACKWARD
def test_inductor():
    """The default backend: everything in one graph, which inductor may reorder and reuse memory in."""
    twins = Twins(CASES["all"])
    (net, opt), (theirs, eager) = twins.sides

    @torch.compile(fullgraph=TRACES_BACKWARD)
    def whole(x):
        net(x).square().mean().backward()
        norm = opt.clip_grad_norm_(0.5)
        opt.step()
        (opt if NEW_TORCH else net).zero_grad()
        return norm

    for i in range(4):
        norm = whole(inputs(i))
        assert all(param.grad is None for param in net.parameters())
        backward(theirs, eager, i)
        assert torch.allclose(norm, eager.clip_grad_norm_(0.5))  # inductor's gradients are rounded differently
        eager.step()
    for mine, other in zip(net.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


def test_inductor_step():
    """Inductor around the eager backward's gradients: the same bits."""
    twins = Twins(CASES["all"])
    twins.train(torch.compile(twins.opt.step, fullgraph=True), 4)
    twins.check()


def test_lr_as_a_tensor_does_not_recompile():
    twins = Twins(CASES["tensors"])
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(twins.opt.step, fullgraph=True, backend=counter)
    for _ in range(6):
        twins.train(step)
        for _, each in twins.sides:
            each.param_groups[0]["lr"].mul_(0.5)
            each.param_groups[0]["weight_decay"].add_(0.01)
    twins.check()
    assert counter.frame_count == 2


def test_lr_as_a_number_takes_effect():
    """By another graph, as torch's optimizers do."""
    twins = Twins(CASES["momentum"])
    step = torch.compile(twins.opt.step, fullgraph=True, backend="eager")
    for i in range(4):
        twins.train(step)
        twins.edit(lr=0.1 / (i + 2))
    twins.check()


def test_gradients_that_come_and_go():
    twins = Twins(CASES["all"])
    step = torch.compile(twins.opt.step, fullgraph=True, backend="eager")
    for i, missing in enumerate([(0, 1), (1,), (), (0, 3), (0, 1, 2, 3), ()]):
        for (network, each), run in zip(twins.sides, (step, twins.eager.step), strict=True):
            backward(network, each, i)
            for m in missing:
                params_of(each)[m].grad = None
            run()
    twins.check()


@pytest.mark.parametrize("name", ["all", "groups", "average-warmup"])
def test_eager_and_compiled_steps_alternate(name):
    twins = Twins(CASES[name])
    step = torch.compile(twins.opt.step, fullgraph=True, backend="eager")
    for i in range(8):
        twins.train(twins.opt.step if i % 3 == 0 else step)
    twins.check()
    mine, other = twins.opt.state_dict(), twins.eager.state_dict()
    assert mine["param_groups"] == other["param_groups"]
    loaded = CASES[name](model())
    loaded.load_state_dict(copy.deepcopy(mine))
    assert counts_of(loaded)[0] == counts_of(twins.eager)[0] == (0 if name == "groups" else 8)


@pytest.mark.parametrize("compiled", ["both", "clip", "step"])
def test_clip_in_one_graph_and_step_in_another(compiled):
    twins = Twins(CASES["momentum"])
    opt = twins.opt
    clip = torch.compile(lambda: opt.clip_grad_norm_(0.01, error_if_nonfinite=True), backend="eager")
    step = torch.compile(opt.step, backend="eager")
    for i in range(3):
        for side in twins.sides:
            backward(*side, i)
        norm = clip() if compiled != "step" else opt.clip_grad_norm_(0.01)
        assert_same(norm, twins.eager.clip_grad_norm_(0.01))
        (step if compiled != "clip" else opt.step)()
        twins.eager.step()
    twins.check()


@graphs_zero_grad
def test_clipping_twice_and_dropping_it():
    twins = Twins(CASES["momentum"])

    def run(opt):
        opt.clip_grad_norm_(0.5, 1.0)
        norm = opt.clip_grad_norm_(0.01)
        opt.step()
        return norm

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for i in range(3):
        norms = []
        for (network, each), step in zip(twins.sides, (compiled, run), strict=True):
            backward(network, each, i)
            norms.append(step(each))
        assert_same(*norms)
    twins.check()

    @torch.compile(fullgraph=True, backend="eager")
    def drop():
        twins.opt.clip_grad_norm_(1e-6)
        twins.opt.zero_grad()

    backward(twins.net, twins.opt, 0)
    drop()
    assert not is_clipping(twins.opt)
    assert all(param.grad is None for param in twins.net.parameters())


@graphs_zero_grad
def test_zero_grad_that_keeps_the_memory():
    twins = Twins(CASES["momentum"])
    twins.train(twins.opt.step)
    before = [param.grad for param in twins.net.parameters()]
    torch.compile(lambda: twins.opt.zero_grad(set_to_none=False), fullgraph=True, backend="eager")()
    for param, grad in zip(twins.net.parameters(), before, strict=True):
        assert param.grad is grad and not grad.any()


# ----------------------------------------------------------------------------- where no graph can be made of the step


def hook(opt):
    calls = []
    opt.register_step_post_hook(lambda *args: calls.append(1))
    return calls


def with_scaler(opt):
    opt.found_inf = torch.tensor(1.0)


def with_new_formulation(opt):
    opt.param_groups[0]["formulation"] = "classical"


def repeat(opt):
    opt.param_groups[0]["params"].append(opt.param_groups[0]["params"][0])


LEFT_TO_EAGER = {
    "hooks": hook,
    "GradScaler": with_scaler,
    "formulation": with_new_formulation,
    "listed twice": repeat,
    "number": lambda opt: opt.param_groups[0].update(dampening=torch.tensor(0.0)),
    "momentum_dtype": lambda opt: opt.param_groups[0].update(stochastic_rounding=True),
    "clip inside": lambda opt: opt.clip_grad_norm_(0.01),
}


@pytest.mark.parametrize("why", LEFT_TO_EAGER)
def test_eager_step_between_two_graphs(why):
    twins = Twins(everything())
    twins.train(twins.opt.step, 2)
    for compiled, side in zip((True, False), twins.sides, strict=True):
        backward(*side, 5)
        LEFT_TO_EAGER[why](side[1])

        def whole(x, opt=side[1]):
            x = x + 1
            opt.step()
            return x * 2

        if compiled:
            with pytest.raises(torch._dynamo.exc.Unsupported, match=why):
                torch.compile(whole, fullgraph=True, backend="eager")(torch.ones(3))
            torch._dynamo.reset()
            whole = torch.compile(whole, backend="eager")
        assert_same(whole(torch.ones(3)), torch.full((3,), 4.0))
    twins.check()


class Own(FusedMomentum):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", [FusedMomentum, Own])
def test_hooks_run_once_for_each_step(kind):
    """Also of a subclass with its own step."""
    twins = Twins(lambda net: kind(net.parameters(), lr=0.1, momentum=0.9))
    calls = hook(twins.opt)
    twins.train(torch.compile(twins.opt.step, backend="eager"), 3)
    twins.check()
    assert len(calls) == 3


def test_closure():
    net = model()
    opt = CASES["momentum"](net)

    def closure():
        opt.zero_grad()
        loss = net(inputs(0)).square().mean()
        loss.backward()
        return loss

    first = float(opt.step(closure).detach())
    assert torch.compile(opt.step, backend="eager")(closure) < first


def test_states_in_which_step_raises():
    twins = Twins(everything(nesterov=True, ema_decay=0.9))
    twins.train(twins.opt.step, 2)
    step = torch.compile(twins.opt.step, backend="eager")
    for context in ("ema_weights", "iterate_weights"):
        with getattr(twins.opt, context)(), pytest.raises(RuntimeError, match=rf"leave {context}\(\)"):
            step()
    step()


def test_formulation_is_converted_after_compiled_steps_alone():
    """The plan has seen no step, yet knows what the buffers are."""
    twins = Twins(CASES["momentum"])
    step = torch.compile(twins.opt.step, backend="eager")
    twins.train(step, 2)
    twins.edit(formulation="classical")
    twins.train(step, 2)
    twins.check()


# ----------------------------------------------------------------------------------------------------- the operators


def step_arguments(dtype=torch.float32, layout=None, **changes):
    generator = torch.Generator().manual_seed(0)
    make = lambda: [torch.randn(s, generator=generator).to(dtype) for s in ((7, 5), (33,), ())]  # noqa: E731
    names = {
        "params": make(),
        "grads": make(),
        "momentum_buffers": make()[:2],
        "averages": make()[:1],
        "averaged": [1],
        "is_new_average": [False],
        "is_first_step": [False, True, False],
        "group_sizes": [2, 1],
        "lr": [0.1, 0.2],
        "lr_tensors": [None, torch.tensor(0.3)],
        "momentum": [0.9, 0.0],
        "dampening": [0.0, 0.0],
        "weight_decay": [0.01, 0.0],
        "weight_decay_tensors": [None, None],
        "nesterov": [True, False],
        "maximize": [False, False],
        "decoupled_weight_decay": [False, False],
        "formulations": ["torch", "torch"],
        "grad_factor": torch.tensor(0.5, dtype=torch.float64),
        "average_weight": torch.tensor(0.25, dtype=torch.float64),
    }
    names["averages"] = [torch.randn(33, generator=generator).to(dtype)]
    names.update(changes)
    return tuple(names.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_opcheck_step(dtype):
    torch.library.opcheck(torch.ops.momentum_ext.step.default, step_arguments(dtype))


def test_opcheck_the_others():
    _, grads, *_ = step_arguments()
    weight, count = torch.tensor(0.5, dtype=torch.float64), torch.tensor(3)
    torch.library.opcheck(torch.ops.momentum_ext.clip.default, (grads, 0.1, 2.0, False, weight))
    torch.library.opcheck(torch.ops.momentum_ext.clip.default, ([g.bfloat16() for g in grads], 0.1, 3.0, True))
    torch.library.opcheck(torch.ops.momentum_ext.average.default, (grads, [g.clone() for g in grads], weight))
    torch.library.opcheck(torch.ops.momentum_ext.average_weight.default, (count, 0.9, True))


WRONG = {
    "grads[1]: expected the shape": {"grads": [torch.zeros(7, 5), torch.zeros(3), torch.zeros(())]},
    "params[1]: several of its elements": {
        "params": [torch.zeros(7, 5), torch.zeros(1).expand(33), torch.zeros(())],
        "averages": [],
        "averaged": [],
        "is_new_average": [],
    },
    "momentum_buffers[0]: expected the shape": {"momentum_buffers": [torch.zeros(5, 7), torch.zeros(33)]},
    "momentum_buffers[1]: expected a tensor": {"momentum_buffers": [torch.zeros(7, 5)]},
    "averages[1]: expected the dtype": {"averages": [torch.zeros(33, dtype=torch.float64)]},
    "group_sizes: expected the 3 parameters": {"group_sizes": [2, 2]},
    "formulation": {"formulations": ["torch", "classic"]},
}


@pytest.mark.parametrize("message", WRONG)
def test_operator_checks_before_it_writes(message):
    arguments = step_arguments(**WRONG[message])
    before = copy.deepcopy(arguments)
    with pytest.raises((RuntimeError, ValueError), match=message.replace("[", r"\[").replace("]", r"\]")):
        torch.ops.momentum_ext.step(*arguments)
    for now, then in zip(arguments, before, strict=True):
        for a, b in zip(now, then, strict=True) if isinstance(now, list) else ():
            if isinstance(a, torch.Tensor):
                assert_same(a, b)


@pytest.mark.parametrize("kind", ["permuted", "shared", "own gradient", "negated", "double gradient"])
def test_operator_takes_what_the_step_takes(kind):
    """Layouts, tensors that share memory, lazy negation, mixed dtypes: as the eager step."""
    results = []
    for operator in (True, False):
        generator = torch.Generator().manual_seed(0)
        param = torch.randn(12, 10, generator=generator)
        other = torch.randn(12, 10, generator=generator)
        grads = [torch.randn(12, 10, generator=generator) for _ in range(2)]
        if kind == "permuted":
            param = param.t().contiguous().t()
        if kind == "shared":
            other = param[:, :]
        if kind == "own gradient":
            grads[0] = param
        if kind == "negated":
            grads[0] = torch._neg_view(grads[0])
        if kind == "double gradient":
            grads[1] = grads[1].double()
        params, buffers = [param, other], [torch.ones_like(param), torch.ones_like(other)]
        if operator:
            arguments = step_arguments(
                params=params,
                grads=grads,
                momentum_buffers=buffers,
                averages=[],
                averaged=[],
                is_new_average=[],
                is_first_step=[False, False],
                group_sizes=[2],
                lr_tensors=[None],
                grad_factor=None,
            )
            torch.ops.momentum_ext.step(*arguments)
        else:
            leaves = [p.requires_grad_() for p in params] if kind != "shared" else params
            opt = FusedMomentum(leaves, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
            for p, g, b in zip(params, grads, buffers, strict=True):
                p.grad = g.detach() if g.dtype == p.dtype else None
                if p.grad is None:
                    p.grad_dtype = None
                    p.grad = g
                opt.state[p]["momentum_buffer"] = b
            opt.step()
        results.append([*params, *buffers])
    assert_all_same(*results)


def test_versions_are_bumped():
    arguments = step_arguments()
    params, grads, buffers, averages, *_ = arguments
    before = [t._version for t in [*params, *buffers, *averages, *grads]]
    torch.ops.momentum_ext.step(*arguments)
    after = [t._version for t in [*params, *buffers, *averages, *grads]]
    assert [a - b for a, b in zip(after, before, strict=True)] == [1] * 6 + [0] * 3


def test_nothing_is_traced_without_a_compiler():
    """Eager steps call no operator."""
    twins = Twins(CASES["all"])
    with torch.profiler.profile() as profile:
        twins.train(twins.opt.step, 2)
    assert not [event.name for event in profile.events() if event.name.startswith("momentum_ext::")]


def test_scheduler_around_a_compiled_function():
    """It wraps optimizer.step in Python that Dynamo may refuse; the result is the same."""
    twins = Twins(CASES["tensors"])
    step = torch.compile(lambda: twins.opt.step(), backend="eager")
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for _, each in twins.sides]
    for _ in range(5):
        twins.train(step)
        for scheduler in schedulers:
            scheduler.step()
    twins.check()
    assert float(twins.opt.param_groups[0]["lr"]) == pytest.approx(0.1 * 0.5**5)


def test_a_failed_step_keeps_the_compiled_clipping():
    twins = Twins(CASES["momentum"])
    for side in twins.sides:
        backward(*side, 0)
    torch.compile(lambda: twins.opt.clip_grad_norm_(0.01), backend="eager")()
    twins.eager.clip_grad_norm_(0.01)
    for _, optimizer in twins.sides:
        optimizer.max_grad_norm = 10.0
        lr, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], "wrong"
        with pytest.raises((TypeError, ValueError, RuntimeError), match="'str'"):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    twins.check()

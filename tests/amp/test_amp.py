"""Mixed-precision training: the scale and the overflow check are read in the step; gradients are never written."""

import copy
import math

import pytest
import torch
from harness import Oracle, Pair, Snapshot, assert_all_same, assert_same, for_loop, params_of
from values import FLOAT_DTYPES, clone_exact, through_pickle

import momentum_ext
from momentum_ext import FusedMomentum

HYPER = {"lr": 0.05, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}
SCALES = [1.0, 3.0, 65536.0, 1000.1, 2.0**-10, 1e20]


# The scaler, and what `fused` is: who unscales, and whether step() is called after an overflow.
WAYS = {
    "torchs-unscales": (torch.amp.GradScaler, None),
    "step-unscales": (torch.amp.GradScaler, True),
    "ours": (momentum_ext.GradScaler, None),
    "ours-fused": (momentum_ext.GradScaler, True),
}


class Trainings:
    """The same small network twice, each with its optimizer and its GradScaler on the CPU."""

    def __init__(self, init_scale=1024.0, count=1, way="torchs-unscales", **scaler):
        torch.manual_seed(0)
        self.models, self.opts, self.scalers = [], [], []
        scaler_kind, fused = WAYS[way]
        for kind in (FusedMomentum, for_loop):
            is_ours = kind is FusedMomentum
            model = torch.nn.Sequential(torch.nn.Linear(19, 70), torch.nn.Tanh(), torch.nn.Linear(70, 3))
            self.models.append(model)
            parts = [list(model.parameters())] if count == 1 else [list(m.parameters()) for m in (model[0], model[2])]
            self.opts.append([kind(part, **HYPER, fused=fused) for part in parts])
            used = scaler_kind if is_ours else torch.amp.GradScaler
            self.scalers.append(used("cpu", init_scale=init_scale, **scaler))
        self.models[1].load_state_dict(self.models[0].state_dict())

    def iterate(self, procedure, overflow=False):
        """One iteration by `procedure(model, optimizers, scaler, loss)` on each side, then the comparison."""
        data = torch.randn(8, 19)
        if overflow:
            data[0, 0] = math.inf
        for model, opts, scaler in zip(self.models, self.opts, self.scalers, strict=True):
            procedure(model, opts, scaler, lambda model=model: model(data).square().mean())
        self.check()

    def check(self):
        for mine, theirs in zip(*self.opts, strict=True):
            Pair.of(mine, theirs).check()
        assert self.scalers[0].get_scale() == self.scalers[1].get_scale()


def backward(model, opts, scaler, loss):
    scaler.scale(loss()).backward()


def clipped(model, opts, scaler, loss):
    backward(model, opts, scaler, loss)
    for opt in opts:
        scaler.unscale_(opt)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def accumulated(model, opts, scaler, loss):
    for _ in range(3):
        scaler.scale(loss() / 3).backward()


def penalized(model, opts, scaler, loss):
    """The gradient penalty of torch's AMP examples: gradients of scaled gradients."""
    value = loss()
    params = list(model.parameters())
    grads = torch.autograd.grad(scaler.scale(value), params, create_graph=True)
    inverse = 1.0 / scaler.get_scale()
    norm = sum((g * inverse).square().sum() for g in grads).sqrt()
    scaler.scale(value + norm).backward()


def autocast(model, opts, scaler, loss):
    with torch.autocast("cpu", torch.bfloat16):
        value = loss()
    scaler.scale(value.float()).backward()


def iteration(gradients):
    def procedure(model, opts, scaler, loss):
        for opt in opts:
            opt.zero_grad()
        gradients(model, opts, scaler, loss)
        for opt in opts:
            scaler.step(opt)
        scaler.update()

    return procedure


plain = iteration(backward)
PROCEDURES = {each.__name__: iteration(each) for each in (backward, clipped, accumulated, penalized, autocast)}
# torch's clipping beside our scaler would write to gradients that are still scaled: its docstring names the method
EACH_WAY = pytest.mark.parametrize(
    "way, procedure", [(way, name) for way in WAYS for name in PROCEDURES if name != "clipped" or "ours" not in way]
)


@pytest.mark.parametrize("init_scale", [3.0, 1000.1])
@pytest.mark.parametrize("count", [1, 2], ids=["one-optimizer", "two-optimizers"])
@EACH_WAY
def test_grad_scaler(way, procedure, count, init_scale):
    trainings = Trainings(init_scale, count, way, growth_interval=3)
    for _ in range(8):
        trainings.iterate(PROCEDURES[procedure])


@pytest.mark.parametrize("at", [{0}, {0, 1, 2}, {4}, {0, 5}], ids=str)
@EACH_WAY
def test_overflow(way, procedure, at):
    trainings = Trainings(1024.0, 1, way, growth_interval=100)
    for step in range(8):
        trainings.iterate(PROCEDURES[procedure], overflow=step in at)
        assert not step or max(at) == step or trainings.opts[0][0].state or at >= set(range(step + 1))
    assert trainings.scalers[0].get_scale() == 1024.0 * 0.5 ** len(at)


@pytest.mark.parametrize("way", WAYS)
def test_overflow_on_step_1_leaves_no_trace(way):
    trainings = Trainings(1024.0, 1, way)
    (mine,) = trainings.opts[0]
    before = Snapshot(mine, "grads")
    trainings.iterate(plain, overflow=True)
    before.assert_unchanged()
    assert not mine.state
    for _ in range(3):
        trainings.iterate(plain)


def test_disabled_scaler():
    trainings = Trainings(1024.0, enabled=False)
    for _ in range(3):
        trainings.iterate(plain)


@pytest.mark.parametrize("way", WAYS)
def test_the_scalers_attributes_are_gone_after_its_step(way):
    trainings = Trainings(1024.0, 1, way)
    (mine,) = trainings.opts[0]
    before = set(vars(mine))
    trainings.iterate(plain)
    assert set(vars(mine)) == before
    for params in zip(*(m.parameters() for m in trainings.models), strict=True):
        grad = torch.randn(params[0].shape)
        for param in params:
            param.grad = grad.clone()
    for (opt,) in trainings.opts:
        opt.step()
    trainings.check()


def test_no_warning_and_no_deprecated_argument(recwarn):
    trainings = Trainings(1024.0)
    trainings.iterate(plain)
    assert not [str(w.message) for w in recwarn if issubclass(w.category, (FutureWarning, DeprecationWarning))]


@pytest.mark.parametrize("way", ["step-unscales", "ours", "ours-fused"])
def test_own_scale_times_the_scalers(way):
    """A grad_scale that the user has set is multiplied with the scaler's, as torch documents it."""
    trainings = Trainings(1024.0, 1, way)
    for model, opts, scaler in zip(trainings.models, trainings.opts, trainings.scalers, strict=True):
        torch.manual_seed(1)
        (opt,), data = opts, torch.randn(8, 19)
        opt.zero_grad()
        own = 3.0 if isinstance(opt, FusedMomentum) else 1.0
        scaler.scale(model(data).square().mean() * own).backward()
        if own != 1.0:
            opt.grad_scale = torch.tensor(own)
        scaler.step(opt)
        scaler.update()
    for mine, theirs in zip(*(m.parameters() for m in trainings.models), strict=True):
        torch.testing.assert_close(mine, theirs)


# ------------------------------------------------------------------------------------ what trainers do with a scaler


def test_what_lies_between_unscale_and_step_sees_what_sgd_shows():
    """Hooks, and clipping by torch's function, under torch's scaler; and an overflow does not call step()."""
    trainings = Trainings(1000.1)
    seen, calls = ([], []), ([], [])
    for k, (opt,) in enumerate(trainings.opts):
        opt.register_step_pre_hook(lambda opt, *_, k=k: seen[k].append([p.grad.clone() for p in params_of(opt)]))
        step = opt.step  # as accelerate's schedulers watch for it
        opt.step = lambda *args, k=k, step=step: (calls[k].append(1), step(*args))[1]
    for overflow in (True, False, False, True, False):
        trainings.iterate(PROCEDURES["clipped"], overflow)
    assert len(calls[0]) == len(calls[1]) == len(seen[0]) == 3
    for mine, theirs in zip(*seen, strict=True):
        assert_all_same(mine, theirs)


def test_our_scaler_calls_step_after_an_overflow_too():
    trainings = Trainings(1024.0, 1, "ours")
    (opt,) = trainings.opts[0]
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append(1))
    for overflow in (True, False):
        trainings.iterate(plain, overflow)
    assert len(calls) == 2


@pytest.mark.parametrize("copied", [lambda opt: opt, copy.deepcopy, through_pickle])
@pytest.mark.parametrize("fused", [None, False, True])
def test_step_supports_amp_scaling_where_torchs_does(fused, copied):
    """And a copy behaves as what it was copied from."""
    opts = [kind([torch.nn.Parameter(torch.ones(3))], lr=0.1, fused=fused) for kind in (FusedMomentum, torch.optim.SGD)]
    assert hasattr(copied(opts[0]), "_step_supports_amp_scaling") == hasattr(opts[1], "_step_supports_amp_scaling")
    momentum_ext.GradScaler("cpu", enabled=False).step(opts[0])
    assert hasattr(opts[0], "_step_supports_amp_scaling") == (fused is True)


DEFAULTS = {
    "float64": (torch.set_default_dtype, torch.float64, torch.float32),
    "float16": (torch.set_default_dtype, torch.float16, torch.float32),
    "meta": (torch.set_default_device, "meta", None),
}


@pytest.mark.parametrize("way", ["ours", "ours-fused"])
@pytest.mark.parametrize("default", DEFAULTS)
def test_default_dtype_and_device_have_no_effect(default, way):
    set_default, changed, usual = DEFAULTS[default]
    trainings = Trainings(1000.1, 1, way)

    def procedure(model, opts, scaler, loss):
        value = loss()
        set_default(changed)
        try:
            plain(model, opts, scaler, lambda: value)
        finally:
            set_default(usual)

    for overflow in (True, False, False):
        trainings.iterate(procedure, overflow)


# ---------------------------------------------------------------------------------- the attributes, set by hand


@FLOAT_DTYPES
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("scale", SCALES)
def test_scale_is_divided_out_in_one_rounding(scale, maximize, dtype, isa):
    """g * float32(1 / scale) and on from there; in 16-bit the unscaled gradient is not rounded in between."""
    hyper = {**HYPER, "maximize": maximize}
    pair = Pair([torch.randn(n).to(dtype) for n in (1, 7, 33, 300, 5003)], Oracle, **hyper)
    pair.both(lambda opt: setattr(opt, "grad_scale", torch.tensor(scale)))
    pair.step(4)


@pytest.mark.parametrize(
    "hyper", [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}, {**HYPER, "dampening": 0, "nesterov": True}]
)
def test_scale_matches_unscaling_first(hyper, isa):
    """Bit for bit what torch's for-loop does with gradients that GradScaler has unscaled."""
    pair = Pair([torch.randn(n) for n in (7, 300, 32_001, 32_003, 5_001)], **hyper)
    scale = 1000.1
    inverse = torch.tensor(scale).double().reciprocal().float()
    pair.mine.grad_scale = torch.tensor(scale)
    for _ in range(4):
        pair.new_grads()
        for _, theirs in pair.params:
            theirs.grad.mul_(inverse)
        pair.step_as_is()


@pytest.mark.parametrize(
    "value",
    [3.0, 3, torch.tensor(3.0), torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.float64), torch.tensor([[3.0]])],
    ids=repr,
)
def test_kinds_of_grad_scale(value):
    pair = Pair([torch.randn(300)], Oracle, **HYPER)
    pair.both(lambda opt: setattr(opt, "grad_scale", value))
    pair.step(3)
    pair.both(lambda opt: setattr(opt, "grad_scale", None))
    pair.step(3)
    pair.both(lambda opt: delattr(opt, "grad_scale"))
    pair.step(3)


@pytest.mark.parametrize(
    "kind", [float, int, bool, torch.tensor, lambda v: torch.tensor([v]), lambda v: torch.tensor(v).double()]
)
def test_kinds_of_found_inf(kind):
    pair = Pair([torch.randn(300), torch.randn(33)], **HYPER)
    for step, found in enumerate((1.0, 0.0, 1.0, 0.0)):
        pair.new_grads()
        pair.mine.found_inf = kind(found)
        before = Snapshot(pair.mine)
        pair.mine.step()
        if found:
            before.assert_unchanged()
            assert bool(pair.mine.state) == (step > 0)
        else:
            pair.theirs.step()
        pair.check()
    pair.mine.found_inf = None
    pair.step()
    del pair.mine.found_inf
    pair.step()


def test_found_inf_counts_several():
    """GradScaler sums over devices, so any number but zero is an overflow."""
    pair = Pair([torch.randn(300)], **HYPER)
    pair.new_grads()
    before = Snapshot(pair.mine)
    for value in (2.0, 7, torch.tensor(0.5), math.nan, math.inf):
        pair.mine.found_inf = value
        pair.mine.step()
        before.assert_unchanged()


def test_scale_and_overflow_are_read_at_each_step():
    """A tensor that is changed in place, as GradScaler does it."""
    pair = Pair([torch.randn(300)], Oracle, **HYPER)
    scale, found = torch.tensor(2.0), torch.tensor(0.0)
    pair.both(lambda opt: (setattr(opt, "grad_scale", scale), setattr(opt, "found_inf", found)))
    for step in range(8):
        scale.fill_(2.0 + step)
        found.fill_(float(step in (0, 3, 4)))
        pair.step()


def test_overflow_still_calls_the_closure():
    pair = Pair([torch.randn(300)], **HYPER)
    pair.new_grads()
    pair.mine.found_inf = 1.0
    calls = []
    assert pair.mine.step(lambda: calls.append(1) or 5.0) == 5.0
    assert calls == [1]


# --------------------------------------------------------------------------------------- gradients are never written


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize(
    "hyper",
    [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {**HYPER, "dampening": 0, "nesterov": True, "maximize": True, "foreach": True},
        {**HYPER, "dampening": 0, "nesterov": True, "weight_decay": 0, "fused": True},
    ],
    ids=lambda hyper: "-".join(hyper),
)
@FLOAT_DTYPES
def test_gradients_are_never_written(dtype, hyper, scaled):
    params = [torch.nn.Parameter(torch.randn(n, 3).to(dtype)) for n in (1, 33, 300)]
    params += [torch.nn.Parameter(torch.randn(300, 5).to(dtype)[:, 2])]
    opt = FusedMomentum(params, **hyper)
    if scaled:
        opt.grad_scale = torch.tensor(1000.1)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape).to(dtype)
        grads = [param.grad for param in params]
        before = [clone_exact(grad) for grad in grads]
        versions = [grad._version for grad in grads]
        opt.step()
        assert [param.grad is grad for param, grad in zip(params, grads, strict=True)] == [True] * len(params)
        assert [grad._version for grad in grads] == versions
        for grad, kept in zip(grads, before, strict=True):
            assert_same(grad, kept, "gradient")


# ----------------------------------------------------------------------------------------- beyond the fused path


def test_sparse_gradients_with_a_scaler():
    """An embedding with sparse gradients goes torch's way, unscaled and skipped like the rest."""
    models, opts = [], []
    for kind in (FusedMomentum, for_loop):
        torch.manual_seed(0)
        models.append(torch.nn.Embedding(20, 5, sparse=True))
        opts.append(kind(models[-1].parameters(), lr=0.1))
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in models]
    for step in range(6):
        index, factor = torch.randint(20, (8,)), math.inf if step in (0, 3) else 1.0
        for model, opt, scaler in zip(models, opts, scalers, strict=True):
            plain(model, [opt], scaler, lambda m=model, i=index, f=factor: (m(i) * f).square().sum())
        torch.testing.assert_close(models[0].weight, models[1].weight)
        assert scalers[0].get_scale() == scalers[1].get_scale()


def test_complex_parameters_with_a_scale():
    params = [torch.nn.Parameter(torch.randn(33, dtype=torch.complex64))]
    pair = Pair([torch.view_as_real(params[0].detach())], Oracle, **HYPER)
    mine = FusedMomentum(params, **HYPER)
    mine.grad_scale = pair.theirs.grad_scale = torch.tensor(1000.1)
    for _ in range(3):
        params[0].grad = torch.randn(33, dtype=torch.complex64)
        twin = pair.params[0][1]
        twin.grad = torch.view_as_real(params[0].grad).clone()
        mine.step()
        pair.theirs.step()
        assert_same(torch.view_as_real(params[0].detach()), twin)

"""Formulations torch, classical and ema, and decoupled weight decay: the formulas, the conversions, the errors."""

import contextlib
import copy
import io
import itertools
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from harness import LAYOUTS, Snapshot, assert_same, clone_exact, clone_params, in_layout

from momentum_ext import FusedMomentum

FORMULATIONS = ["torch", "classical", "ema"]
# Three threads' shares in all, so that tensors are divided; sizes around vector and tile edges.
SHAPES = [(3, 5), (), (257,), (64, 33), (15,), (0,), (32_700,), (32_701,), (32_703,)]
SMALL = [(3, 5), (), (257,), (64, 33), (1003,)]
COMBINATIONS = [
    {"momentum": mu, "nesterov": nesterov, "weight_decay": decay, "decoupled_weight_decay": decoupled, "maximize": up}
    for mu, nesterov, (decay, decoupled), up in itertools.product(
        (0, 0.9), (False, True), ((0, False), (0.013, False), (0.013, True)), (False, True)
    )
    if mu or not nesterov
]
PLAIN = {"momentum": 0.9, "nesterov": False, "weight_decay": 0, "decoupled_weight_decay": False, "maximize": False}
NESTEROV = {**PLAIN, "nesterov": True}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
FORMULATION = pytest.mark.parametrize("formulation", FORMULATIONS)


def ids(hyper):
    parts = [k for k in ("nesterov", "maximize") if hyper[k]]
    parts += ["momentum"] if hyper["momentum"] else []
    parts += [("decoupled" if hyper["decoupled_weight_decay"] else "decay")] if hyper["weight_decay"] else []
    return "-".join(parts) or "plain"


HYPER = pytest.mark.parametrize("hyper", COMBINATIONS, ids=ids)


class ForLoop:
    """The formulations as the field writes them, one tensor after the other, in torch's own operators."""

    def __init__(
        self, params, formulation="torch", *, momentum, nesterov, weight_decay, decoupled_weight_decay, maximize
    ):
        self.params, self.formulation, self.mu, self.nesterov = list(params), formulation, momentum, nesterov
        self.weight_decay, self.decoupled, self.maximize = weight_decay, decoupled_weight_decay, maximize
        self.velocity = {}

    @torch.no_grad()
    def step(self, lr):
        mu = self.mu
        for p in self.params:
            if p.grad is None:
                continue
            g = -p.grad if self.maximize else p.grad
            if self.weight_decay and self.decoupled:
                p.mul_(1 - lr * self.weight_decay)
            elif self.weight_decay:
                g = g.add(p, alpha=self.weight_decay)
            if mu == 0:
                p.sub_(g, alpha=lr)
            elif self.formulation == "torch":
                if p in self.velocity:
                    v = self.velocity[p].mul_(mu).add_(g)
                else:
                    v = self.velocity[p] = g.clone()
                p.sub_(g.add(v, alpha=mu) if self.nesterov else v, alpha=lr)
            elif self.formulation == "classical":
                v = self.velocity.setdefault(p, torch.zeros_like(p))
                v.mul_(mu).add_(g, alpha=lr)
                p.sub_(g.mul(lr).add_(v, alpha=mu) if self.nesterov else v)
            else:
                v = self.velocity.setdefault(p, torch.zeros_like(p))
                v.mul_(mu).add_(g, alpha=1 - mu)
                p.sub_(g.mul(1 - mu).add_(v, alpha=mu) if self.nesterov else v, alpha=lr)


def schedule(step):
    """A learning rate that rises, falls, and stays for a while."""
    return 0.1 * [0.25, 0.5, 1.0, 1.0, 0.3, 0.3, 0.01, 2.0][step % 8]


def nonzero(like, generator=None):
    real = torch.view_as_real(torch.empty_like(like)) if like.is_complex() else like
    wide = torch.float64 if real.dtype is torch.float64 else torch.float32
    values = torch.randn(real.shape, dtype=wide, generator=generator)
    values = torch.where(values == 0, torch.ones_like(values), values).to(real.dtype)
    return torch.view_as_complex(values) if like.is_complex() else values


class Run:
    """FusedMomentum and the for-loop side by side, on exact copies and the same gradients."""

    def __init__(self, values, formulation, hyper, **options):
        mine, theirs = clone_params(values), clone_params(values)
        self.mine = FusedMomentum(mine, lr=99.0, formulation=formulation, **hyper, **options)
        self.theirs = ForLoop(theirs, formulation, **hyper)
        self.pairs = list(zip(mine, theirs, strict=True))

    def new_grads(self):
        for mine, theirs in self.pairs:
            mine.grad = nonzero(mine)
            theirs.grad = mine.grad.clone()

    def step(self, lr, mine_lr=None):
        self.mine.param_groups[0]["lr"] = lr if mine_lr is None else mine_lr
        self.mine.step()
        self.theirs.step(lr)

    def check(self):
        for index, (mine, theirs) in enumerate(self.pairs):
            assert_same(mine, theirs, f"params[{index}]")
            assert (mine in self.mine.state) == (theirs in self.theirs.velocity)
            if theirs in self.theirs.velocity:
                assert list(self.mine.state[mine]) == ["momentum_buffer"]
                buffer = self.mine.state[mine]["momentum_buffer"]
                assert_same(buffer, self.theirs.velocity[theirs], f"momentum_buffer of params[{index}]")


# ------------------------------------------------------------------------------------------------------ the formulas


@HYPER
@FORMULATION
@DTYPES
def test_bits_of_the_for_loop_over_a_schedule(dtype, formulation, hyper, isa, threads):
    run = Run([torch.randn(shape, dtype=dtype) for shape in SHAPES], formulation, hyper)
    for step in range(10):
        run.new_grads()
        run.step(schedule(step))
        run.check()


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=["fp32-lr", "fp64-lr"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
@pytest.mark.parametrize("hyper", [PLAIN, {**NESTEROV, "weight_decay": 0.01, "decoupled_weight_decay": True}], ids=ids)
@FORMULATION
@DTYPES
def test_tensor_lr_that_is_written_in_place(dtype, formulation, hyper, shape, lr_dtype):
    """As a scheduler does with a tensor: the same object, another value."""
    run = Run([torch.randn(shape, dtype=dtype) for shape in SMALL], formulation, hyper)
    lr = torch.zeros(shape, dtype=lr_dtype)
    for step in range(8):
        lr.fill_(schedule(step))
        run.new_grads()
        run.step(float(lr), lr)
        run.check()


@pytest.mark.parametrize("hyper", [PLAIN, {**NESTEROV, "weight_decay": 0.01}], ids=ids)
@FORMULATION
@DTYPES
def test_late_and_missing_gradients(dtype, formulation, hyper, isa):
    """A tensor's first step is its own: the buffer starts when its first gradient appears."""
    run = Run([torch.randn(shape, dtype=dtype) for shape in SMALL], formulation, hyper)
    for step in range(12):
        run.new_grads()
        for index, pair in enumerate(run.pairs):
            if step < index or (step + index) % 5 == 0:
                for param in pair:
                    param.grad = None
        run.step(schedule(step))
        run.check()


@pytest.mark.parametrize("grad_layout", ["contiguous", "permuted", "column"])
@pytest.mark.parametrize("layout", LAYOUTS)
@FORMULATION
@DTYPES
def test_layouts(dtype, formulation, layout, grad_layout, isa):
    hyper = {**NESTEROV, "weight_decay": 0.01, "decoupled_weight_decay": True}
    values = [in_layout(torch.randn(shape, dtype=dtype), layout) for shape in [(3, 5), (17, 31), (4, 3, 5, 7), (300,)]]
    run = Run(values, formulation, hyper)
    for step in range(5):
        for mine, theirs in run.pairs:
            grad = in_layout(nonzero(mine), grad_layout)
            mine.grad, theirs.grad = clone_exact(grad), clone_exact(grad)
        run.step(schedule(step))
        run.check()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=["c64", "c128"])
@pytest.mark.parametrize("hyper", [PLAIN, {**NESTEROV, "weight_decay": 0.01}], ids=ids)
@FORMULATION
def test_complex_is_its_real_view(dtype, formulation, hyper):
    values = [torch.randn(shape, dtype=dtype) for shape in SMALL]
    real = [torch.view_as_real(v).clone() for v in values]
    run = Run(real, formulation, hyper)
    params = clone_params(values)
    opt = FusedMomentum(params, lr=99.0, formulation=formulation, **hyper)
    for step in range(6):
        run.new_grads()
        for param, (mine, _) in zip(params, run.pairs, strict=True):
            param.grad = torch.view_as_complex(mine.grad).clone()
        opt.param_groups[0]["lr"] = schedule(step)
        opt.step()
        run.step(schedule(step))
        run.check()
        for param, (mine, _) in zip(params, run.pairs, strict=True):
            assert_same(torch.view_as_real(param.detach()), mine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("hyper", [c for c in COMBINATIONS if not c["maximize"]], ids=ids)
@FORMULATION
def test_16_bit_is_one_rounding_from_exact_and_no_worse_than_the_for_loop(formulation, hyper, dtype, isa):
    """Each step starts in the same 16-bit state three times: ours, the for-loop's, and the for-loop's in fp64."""
    float_error = 2e-6  # what float arithmetic itself is off by, on values of this size
    run = Run([torch.randn(5003).to(dtype)], formulation, hyper)
    mine, theirs = run.pairs[0]
    better = 0
    for step in range(8):
        exact = torch.nn.Parameter(mine.detach().double())
        reference = ForLoop([exact], formulation, **hyper)
        theirs.data.copy_(mine.detach())
        if mine in run.mine.state:
            buffer = run.mine.state[mine]["momentum_buffer"]
            run.theirs.velocity[theirs] = buffer.clone()
            reference.velocity[exact] = buffer.double()
        run.new_grads()
        exact.grad = mine.grad.double()
        run.step(schedule(step))
        reference.step(schedule(step))
        checks = [(mine, theirs, exact)]
        if hyper["momentum"]:
            velocities = run.theirs.velocity[theirs], reference.velocity[exact]
            checks.append((run.mine.state[mine]["momentum_buffer"], *velocities))
        for ours, loops, value in checks:
            # In the subnormal range the distance between two values is fixed, hence `tiny`.
            half_ulp = (value.detach().abs() * torch.finfo(dtype).eps / 2).clamp(min=torch.finfo(dtype).tiny)
            our_error = (ours.detach().double() - value.detach()).abs()
            loop_error = (loops.detach().double() - value.detach()).abs()
            assert (our_error <= half_ulp + float_error).all(), "more than one rounding"
            assert (our_error <= loop_error + float_error).all(), "worse than the for-loop"
            better += (our_error < loop_error - float_error).sum().item()
    assert better > 0 or hyper == {**PLAIN, "momentum": 0}


@FORMULATION
@pytest.mark.parametrize("decoupled", [False, True], ids=["decay", "decoupled"])
@DTYPES
def test_without_momentum_all_are_gradient_descent_and_make_no_state(dtype, formulation, decoupled, isa):
    values = [torch.randn(shape, dtype=dtype) for shape in SMALL]
    mine, theirs = clone_params(values), clone_params(values)
    decay = {"weight_decay": 0.0 if decoupled else 0.01}
    ours = FusedMomentum(mine, lr=0.1, **decay, formulation=formulation, decoupled_weight_decay=decoupled)
    torchs = torch.optim.SGD(theirs, lr=0.1, **decay, foreach=False)
    for _ in range(4):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = nonzero(a)
            b.grad = a.grad.clone()
        ours.step()
        torchs.step()
        for a, b in zip(mine, theirs, strict=True):
            assert_same(a, b)
    assert len(ours.state) == 0 and ours.state_dict()["state"] == {}


# ------------------------------------------------------------------------------------- how they are related (fp64)


def trajectory(formulation, lrs, grads, **hyper):
    """Parameters and buffers after each step, from zero, in fp64."""
    param = torch.nn.Parameter(torch.zeros(33, dtype=torch.float64))
    opt = FusedMomentum([param], lr=99.0, momentum=0.9, formulation=formulation, **hyper)
    out = []
    for lr, grad in zip(lrs, grads, strict=True):
        opt.param_groups[0]["lr"] = lr
        param.grad = grad.clone()
        opt.step()
        out.append((param.detach().clone(), opt.state[param]["momentum_buffer"].clone()))
    return out


STEPS = 60
CONSTANT = [0.1] * STEPS
FALLING = [0.1 if step < 30 else 0.01 for step in range(STEPS)]
# Sums of 60 numbers of size 1 in fp64, in another order: a few hundred roundings of 1e-16.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def gradients():
    return [nonzero(torch.empty(33, dtype=torch.float64)) for _ in range(STEPS)]


@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
def test_torch_and_classical_take_the_same_steps_while_lr_is_constant(nesterov):
    grads = gradients()
    torchs = trajectory("torch", CONSTANT, grads, nesterov=nesterov)
    classical = trajectory("classical", CONSTANT, grads, nesterov=nesterov)
    for (p, b), (q, v) in zip(torchs, classical, strict=True):
        torch.testing.assert_close(q, p, **CLOSE)
        torch.testing.assert_close(v, 0.1 * b, **CLOSE)


@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
def test_under_a_schedule_they_are_the_sums_of_the_docstring(nesterov):
    """v_t = sum mu^(t-s) lr_s g_s;  lr_t b_t = sum mu^(t-s) lr_t g_s."""
    grads, mu = gradients(), 0.9
    torchs = trajectory("torch", FALLING, grads, nesterov=nesterov)
    classical = trajectory("classical", FALLING, grads, nesterov=nesterov)
    p = torch.zeros(33, dtype=torch.float64)
    q = torch.zeros(33, dtype=torch.float64)
    for t, lr in enumerate(FALLING):
        v = sum(mu ** (t - s) * FALLING[s] * grads[s] for s in range(t + 1))
        lr_b = sum(mu ** (t - s) * lr * grads[s] for s in range(t + 1))
        q = q - (mu * v + lr * grads[t] if nesterov else v)
        p = p - (mu * lr_b + lr * grads[t] if nesterov else lr_b)
        torch.testing.assert_close(classical[t][1], v, **CLOSE)
        torch.testing.assert_close(lr * torchs[t][1], lr_b, **CLOSE)
        torch.testing.assert_close(classical[t][0], q, **CLOSE)
        torch.testing.assert_close(torchs[t][0], p, **CLOSE)
    # They agree until the rate falls, and are then far from each other.
    torch.testing.assert_close(classical[29][0], torchs[29][0], **CLOSE)
    assert (classical[-1][0] - torchs[-1][0]).abs().max() > 0.1


def test_classical_keeps_its_speed_when_the_rate_falls():
    """With a gradient of 1: the step after the fall is still mu times the old one; torch's is a tenth at once."""
    grads = [torch.ones(33, dtype=torch.float64)] * STEPS
    old = 0.1 * (1 - 0.9**30) / (1 - 0.9)
    for formulation, expected in (("classical", 0.9 * old + 0.01), ("torch", (0.9 * old + 0.1) / 10)):
        points = trajectory(formulation, FALLING, grads)
        assert (points[28][0] - points[29][0])[0].item() == pytest.approx(old, rel=1e-12)
        assert (points[29][0] - points[30][0])[0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("lrs", [CONSTANT, FALLING], ids=["constant", "falling"])
@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
def test_ema_is_torch_with_a_smaller_lr(lrs, nesterov):
    """p as torch's with (1 - mu) lr, the buffer (1 - mu) times torch's: no bias correction."""
    grads = gradients()
    ema = trajectory("ema", lrs, grads, nesterov=nesterov)
    torchs = trajectory("torch", [(1 - 0.9) * lr for lr in lrs], grads, nesterov=nesterov)
    for (p, b), (q, v) in zip(torchs, ema, strict=True):
        torch.testing.assert_close(q, p, **CLOSE)
        torch.testing.assert_close(v, (1 - 0.9) * b, **CLOSE)


# --------------------------------------------------------------------------------------------- an independent text

KERAS = """
import json, sys
import numpy as np
import keras
case = json.load(sys.stdin)
variable = keras.Variable(np.array(case["start"]), dtype="float64")
opt = keras.optimizers.SGD(learning_rate=99.0, momentum=case["momentum"], nesterov=case["nesterov"])
points = []
for step, grad in enumerate(case["grads"]):
    opt.learning_rate = case["lrs"][step]
    opt.apply([keras.ops.convert_to_tensor(np.array(grad), dtype="float64")], [variable])
    points.append(keras.ops.convert_to_numpy(variable).tolist())
assert keras.backend.backend() == "torch"
print(json.dumps(points))
"""


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
def test_classical_is_that_of_keras_over_a_schedule(nesterov, tmp_path):
    """Keras keeps its learning rate in fp32: powers of two, so that both have the same one."""
    lrs = [0.125, 0.125, 0.25, 0.5, 0.5, 0.0625, 0.0625, 0.03125, 0.125, 0.001953125] * 3
    start = torch.randn(33, dtype=torch.float64)
    grads = [nonzero(start) for _ in lrs]
    case = {"lrs": lrs, "start": start.tolist(), "grads": [g.tolist() for g in grads]}
    case |= {"momentum": 0.9, "nesterov": nesterov}
    environment = {**os.environ, "KERAS_BACKEND": "torch", "KERAS_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KERAS],
        input=json.dumps(case),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    points = torch.tensor(json.loads(done.stdout), dtype=torch.float64)

    def ours(formulation):
        param = torch.nn.Parameter(start.clone())
        opt = FusedMomentum([param], momentum=0.9, nesterov=nesterov, formulation=formulation)
        out = []
        for lr, grad in zip(lrs, grads, strict=True):
            opt.param_groups[0]["lr"] = lr
            param.grad = grad.clone()
            opt.step()
            out.append(param.detach().clone())
        return torch.stack(out)

    torch.testing.assert_close(ours("classical"), points, **CLOSE)
    for other in ("torch", "ema"):  # the comparison tells them apart
        assert (ours(other) - points).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------- torch's own path


def close(dtype):
    # torch's path multiplies the gradient by lr or 1 - mu first: one more rounding for each step.
    return {"rtol": 20 * torch.finfo(dtype).eps, "atol": 20 * torch.finfo(dtype).eps}


@HYPER
@FORMULATION
@DTYPES
def test_torchs_path_agrees_with_the_kernels(dtype, formulation, hyper):
    """An lr of a type that the kernels do not read sends the whole group there."""
    run = Run([torch.randn(shape, dtype=dtype) for shape in SMALL], formulation, hyper)
    for step in range(8):
        lr = float(np.float32(schedule(step)))
        run.new_grads()
        run.step(lr, np.float32(lr))
        for mine, theirs in run.pairs:
            torch.testing.assert_close(mine, theirs, **close(dtype))
            assert (mine in run.mine.state) == bool(hyper["momentum"])
            if hyper["momentum"]:
                buffer = run.mine.state[mine]["momentum_buffer"]
                torch.testing.assert_close(buffer, run.theirs.velocity[theirs], **close(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("lr", [torch.tensor(0.05), torch.tensor([0.05])], ids=["0-dim", "1-dim"])
@FORMULATION
def test_tensor_lr_on_torchs_path(formulation, lr, dtype):
    """A tensor of one element is a number there too: it broadcasts nothing and promotes no dtype."""

    class Own(torch.Tensor):
        pass

    values = [torch.randn(shape).to(dtype) for shape in [(), (1,), (33,), (5, 3)]]
    own = [torch.nn.Parameter(v.clone().as_subclass(Own)) for v in values]
    plain = [torch.nn.Parameter(v.clone()) for v in values]
    hyper = {"momentum": 0.9, "weight_decay": 0.01, "decoupled_weight_decay": True, "formulation": formulation}
    opts = [FusedMomentum(params, lr=lr, **hyper) for params in (own, plain)]
    for _ in range(3):
        for a, b in zip(own, plain, strict=True):
            b.grad = nonzero(b)
            a.grad = b.grad.clone()
        for opt in opts:
            opt.step()
        for a, b in zip(own, plain, strict=True):
            buffers = opts[0].state[a]["momentum_buffer"], opts[1].state[b]["momentum_buffer"]
            assert a.shape == b.shape and buffers[0].shape == b.shape and buffers[0].dtype == b.dtype
            # 16-bit: torch's own path rounds after each of its four operations.
            torch.testing.assert_close(a.detach().as_subclass(torch.Tensor), b.detach(), **close(dtype))
            torch.testing.assert_close(buffers[0].as_subclass(torch.Tensor), buffers[1], **close(dtype))


@pytest.mark.parametrize("decoupled", [False, True], ids=["nodecay", "decoupled"])
@pytest.mark.parametrize("mu", [0, 0.9])
@FORMULATION
def test_sparse_gradients_give_what_dense_ones_give(formulation, mu, decoupled):
    """Rows without a gradient go on with their velocity, as in torch. Beside a dense parameter in the same group."""
    values = [torch.randn(20, 5), torch.randn(33)]
    sparse, dense = clone_params(values), clone_params(values)
    hyper = {"momentum": mu, "formulation": formulation, "decoupled_weight_decay": decoupled}
    hyper["weight_decay"] = 0.01 if decoupled else 0
    opts = [FusedMomentum(params, **hyper) for params in (sparse, dense)]
    for step in range(6):
        rows = nonzero(torch.empty(20, 5)) * (torch.arange(20) % 3 == step % 3)[:, None]
        dense[0].grad, dense[1].grad = rows, nonzero(dense[1])
        sparse[0].grad, sparse[1].grad = rows.to_sparse(1), dense[1].grad.clone()
        for opt in opts:
            opt.param_groups[0]["lr"] = schedule(step)
            opt.step()
        assert_same(sparse[1], dense[1])
        torch.testing.assert_close(sparse[0], dense[0], **close(torch.float32))
        if mu:
            buffers = [
                opt.state[params[0]]["momentum_buffer"] for opt, params in zip(opts, (sparse, dense), strict=True)
            ]
            assert buffers[0].is_sparse
            torch.testing.assert_close(buffers[0].to_dense(), buffers[1], **close(torch.float32))


# -------------------------------------------------------------------------------------------------- several groups


@DTYPES
def test_a_formulation_for_each_group(dtype, isa, threads):
    """The constructor's is the default; a group's own comes first. One step updates them all."""
    hypers = [
        ("ema", {**PLAIN, "weight_decay": 0.01, "decoupled_weight_decay": True}),
        ("classical", NESTEROV),
        ("torch", {**PLAIN, "weight_decay": 0.02}),
        ("classical", {**PLAIN, "momentum": 0}),
    ]
    values = [[torch.randn(shape, dtype=dtype) for shape in SHAPES] for _ in hypers]
    mine, theirs = ([clone_params(group) for group in values] for _ in range(2))
    groups = [{"params": mine[0], **hypers[0][1]}]
    groups += [{"params": p, "formulation": f, **h} for p, (f, h) in zip(mine[1:], hypers[1:], strict=True)]
    opt = FusedMomentum(groups[:3], formulation="ema")
    opt.add_param_group(groups[3])
    assert [g.get("formulation", "torch") for g in opt.param_groups] == [f for f, _ in hypers]
    loops = [ForLoop(p, f, **h) for p, (f, h) in zip(theirs, hypers, strict=True)]
    for step in range(6):
        for a, b in zip(itertools.chain(*mine), itertools.chain(*theirs), strict=True):
            a.grad = nonzero(a)
            b.grad = a.grad.clone()
        for g, (group, loop) in enumerate(zip(opt.param_groups, loops, strict=True)):
            group["lr"] = schedule(step + g)
            loop.step(schedule(step + g))
        opt.step()
        for a, b in zip(itertools.chain(*mine), itertools.chain(*theirs), strict=True):
            assert_same(a, b)


def test_defaults_reach_groups_that_are_added_later():
    opt = FusedMomentum([torch.nn.Parameter(torch.ones(3))], formulation="ema", decoupled_weight_decay=True)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    for again in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        again.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        for group in again.param_groups:
            assert (group["formulation"], group["decoupled_weight_decay"]) == ("ema", True)


# ---------------------------------------------------------------------------------------------------------- errors

BAD_GROUPS = {
    "unknown": ({"formulation": "polyak"}, "polyak.*'torch', 'classical' or 'ema'"),
    "upper-case": ({"formulation": "EMA"}, "EMA"),
    "none": ({"formulation": None}, "None"),
    "classical-dampened": ({"formulation": "classical", "momentum": 0.9, "dampening": 0.1}, "dampening.*classical"),
    "ema-dampened": ({"formulation": "ema", "momentum": 0.9, "dampening": 0.1}, "dampening.*ema"),
}


@pytest.mark.parametrize("bad", BAD_GROUPS)
def test_refused_when_a_group_is_made(bad):
    """Nothing is added."""
    hyper, message = BAD_GROUPS[bad]
    with pytest.raises(ValueError, match=message):
        FusedMomentum([torch.nn.Parameter(torch.ones(3))], **hyper)
    run = Run([torch.randn(33)], "torch", NESTEROV)
    groups = list(run.mine.param_groups)
    with pytest.raises(ValueError, match=message):
        run.mine.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "nesterov": False, **hyper})
    assert run.mine.param_groups == groups and run.mine.param_groups[0] is groups[0]
    run.new_grads()
    run.step(0.1)
    run.check()


@pytest.mark.parametrize("bad", ["unknown", "upper-case", "none", "number", "surrogate", "dampened"])
def test_refused_by_the_step_before_anything_is_written(bad):
    """The bad group is the last of three; the others have gradients too."""
    edit, message = {
        "unknown": ({"formulation": "polyak"}, r"param_groups\[2\]\['formulation'\].*polyak"),
        "upper-case": ({"formulation": "Torch"}, r"param_groups\[2\]\['formulation'\].*Torch"),
        "none": ({"formulation": None}, r"param_groups\[2\]\['formulation'\].*None"),
        "number": ({"formulation": 1}, r"param_groups\[2\]\['formulation'\].*1"),
        "surrogate": ({"formulation": "\udc80"}, r"param_groups\[2\]\['formulation'\]"),
        "dampened": ({"dampening": 0.5}, r"param_groups\[2\]\['dampening'\].*classical.*0\.5"),
    }[bad]
    params = [torch.nn.Parameter(torch.randn(33)) for _ in range(3)]
    opt = FusedMomentum([{"params": [p]} for p in params], lr=0.1, momentum=0.9, formulation="classical")
    for _ in range(2):
        for p in params:
            p.grad = nonzero(p)
        opt.step()
    good = dict(opt.param_groups[2])
    opt.param_groups[2].update(edit)
    before = Snapshot(opt)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            opt.step()
        before.assert_unchanged()
    opt.param_groups[2].update(good)
    opt.step()
    assert not any(torch.equal(p, value) for p, value in zip(before.params, before.values, strict=True))


# ----------------------------------------------------------------------------------------------------- conversions

EACH_WAY = pytest.mark.parametrize(
    ("old", "new"), [("torch", "classical"), ("classical", "torch")], ids=["to-classical", "to-torch"]
)
LR = 0.05


def in_training(formulation, steps=3, dtype=torch.float64, shapes=SMALL, lr=LR, **hyper):
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    opt = FusedMomentum(params, lr=lr, **{"momentum": 0.9, **hyper}, formulation=formulation)
    step(opt, steps)
    return opt


def step(opt, times=1, grads=None):
    for _ in range(times):
        for i, param in enumerate(dict.fromkeys(p for group in opt.param_groups for p in group["params"])):
            param.grad = nonzero(param) if grads is None else grads[i].clone()
        opt.step()


def buffers_of(opt):
    """By parameter, copied."""
    return {p: opt.state[p]["momentum_buffer"].clone() for p in opt.state}


def converted(buffer, new, lr=LR):
    """The one rounding of a conversion is this multiplication or division."""
    return buffer * lr if new == "classical" else buffer / lr


def use(opt, formulation):
    for group in opt.param_groups:
        group["formulation"] = formulation


@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
@pytest.mark.parametrize("path", ["kernels", "torch"])
@DTYPES
def test_changing_back_and_forth_goes_on_where_torch_goes(dtype, nesterov, path):
    torch.manual_seed(7)
    opt = in_training("torch", 0, dtype, nesterov=nesterov, lr=LR if path == "kernels" else np.float64(LR))
    twin = torch.optim.SGD(
        clone_params(opt.param_groups[0]["params"]), lr=LR, momentum=0.9, nesterov=nesterov, foreach=False
    )
    for formulation in ("torch", "classical", "torch", "torch", "classical", "classical", "torch"):
        use(opt, formulation)
        for _ in range(3):
            step(opt)
            for mine, theirs in zip(opt.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
                theirs.grad = mine.grad.clone()
            twin.step()
        scale = LR if formulation == "classical" else 1.0
        for mine, theirs in zip(opt.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
            # 21 steps and 4 conversions of one rounding each, on values of size 10.
            close = {"rtol": 50 * torch.finfo(dtype).eps, "atol": 50 * torch.finfo(dtype).eps}
            torch.testing.assert_close(mine, theirs, **close)
            buffers = opt.state[mine]["momentum_buffer"], scale * twin.state[theirs]["momentum_buffer"]
            torch.testing.assert_close(*buffers, **close)


@EACH_WAY
@DTYPES
def test_an_edit_takes_effect_in_the_next_step(dtype, old, new):
    """At the learning rate of that step, to the bit: the buffer is converted, then the step is the new formula's."""
    opt = in_training(old, dtype=dtype)
    before = {p: (clone_exact(p), b) for p, b in buffers_of(opt).items()}
    use(opt, new)
    opt.param_groups[0]["lr"] = 0.02
    step(opt)
    for param, (value, buffer) in before.items():
        loop = ForLoop([value], new, **PLAIN)
        loop.velocity[value] = converted(buffer, new, 0.02)
        value.grad = param.grad
        loop.step(0.02)
        assert_same(param, value)
        assert_same(opt.state[param]["momentum_buffer"], loop.velocity[value])


def save(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


LEAVES = {
    "state_dict": lambda opt: opt.state_dict()["state"],
    "saved": lambda opt: save(opt.state_dict())["state"],
}


@pytest.mark.parametrize("leave", LEAVES)
@EACH_WAY
def test_an_edit_takes_effect_in_what_leaves_the_optimizer(old, new, leave):
    """Without a step in between, and only once."""
    opt = in_training(old)
    expected = [converted(b, new) for b in buffers_of(opt).values()]
    objects = [opt.state[p]["momentum_buffer"] for p in opt.state]
    use(opt, new)
    for _ in range(2):
        state = LEAVES[leave](opt)
        for index, buffer in enumerate(expected):
            assert_same(state[index]["momentum_buffer"], buffer)
    assert all(opt.state[p]["momentum_buffer"] is b for p, b in zip(opt.state, objects, strict=True))
    twins = copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))
    grads = [nonzero(p) for p in opt.state]
    for each in (opt, *twins):
        step(each, grads=grads)
    for twin in twins:
        for mine, theirs in zip(opt.state, twin.state, strict=True):
            assert_same(mine, theirs)
            assert_same(opt.state[mine]["momentum_buffer"], twin.state[theirs]["momentum_buffer"])


@EACH_WAY
def test_an_edit_that_is_taken_back_before_the_step_changes_nothing(old, new):
    opt = in_training(old)
    before = Snapshot(opt, "groups")
    use(opt, new)
    use(opt, old)
    assert opt.state_dict()["param_groups"][0].get("formulation", "torch") == old
    before.assert_unchanged()


@EACH_WAY
def test_parameters_without_gradients_are_converted_too(old, new):
    """They come back steps later, in the same units as the rest."""
    opt = in_training(old)
    idle = opt.param_groups[0]["params"][1:3]
    expected = [converted(opt.state[p]["momentum_buffer"], new) for p in idle]
    values = [clone_exact(p) for p in idle]
    use(opt, new)
    for lr in (LR, 0.7):  # converted in the first of these steps, once
        opt.param_groups[0]["lr"] = lr
        for p in opt.param_groups[0]["params"]:
            p.grad = None if any(p is q for q in idle) else nonzero(p)
        opt.step()
    for p, value, buffer in zip(idle, values, expected, strict=True):
        assert_same(p, value)
        assert_same(opt.state[p]["momentum_buffer"], buffer)


@pytest.mark.parametrize("leave", ["step", "state_dict"])
@EACH_WAY
def test_a_parameter_that_is_in_two_groups_is_converted_once(old, new, leave):
    opt = in_training(old, shapes=[(33,), (17,)])
    opt.param_groups.append({**opt.param_groups[0], "params": opt.param_groups[0]["params"][:1]})
    if leave == "step":
        for p in opt.param_groups[0]["params"]:
            p.grad = None
    expected = {p: converted(b, new) for p, b in buffers_of(opt).items()}
    use(opt, new)
    for _ in range(2):
        if leave == "step":
            opt.step()
        found = (opt.state if leave == "step" else opt.state_dict()["state"]).values()
        for entry, buffer in zip(found, expected.values(), strict=True):
            assert_same(entry["momentum_buffer"], buffer)


@pytest.mark.parametrize("when", ["before", "after"])
@EACH_WAY
def test_lists_and_groups_are_reordered_around_an_edit(old, new, when):
    """The formulation belongs to the buffer, not to a position."""
    opt = in_training(old)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.randn(19, dtype=torch.float64))]})
    step(opt)
    expected = {p: converted(b, new) for p, b in buffers_of(opt).items()}
    if when == "after":
        use(opt, new)
    opt.param_groups.reverse()
    opt.param_groups[1]["params"].reverse()
    opt.param_groups[0]["params"].append(opt.param_groups[1]["params"].pop(0))
    if when == "before":
        use(opt, new)
    for p in opt.state:
        p.grad = None
    opt.step()
    for p, buffer in expected.items():
        assert_same(opt.state[p]["momentum_buffer"], buffer)


@EACH_WAY
def test_a_parameter_that_moves_to_a_group_of_another_formulation(old, new):
    opt = in_training(old)
    opt.add_param_group({"params": [], "formulation": new, "lr": 0.3})
    moved = opt.param_groups[0]["params"].pop(2)
    opt.param_groups[1]["params"].append(moved)
    expected = {p: converted(b, new, 0.3) if p is moved else b for p, b in buffers_of(opt).items()}
    state = opt.state_dict()["state"]
    order = [p for group in opt.param_groups for p in group["params"]]
    for index, p in enumerate(order):
        assert_same(state[index]["momentum_buffer"], expected[p])


@EACH_WAY
def test_a_parameter_that_leaves_and_comes_back(old, new):
    """Out of all groups for a while (frozen, say), its state kept; meanwhile the group changes its formulation."""
    opt = in_training(old)
    away = opt.param_groups[0]["params"].pop(2)
    expected = converted(opt.state[away]["momentum_buffer"], new)
    step(opt)
    use(opt, new)
    step(opt, 2)
    opt.param_groups[0]["params"].append(away)
    away.grad = None
    opt.step()
    assert_same(opt.state[away]["momentum_buffer"], expected)


def test_parameters_that_never_had_a_buffer_follow_any_edit():
    values = [torch.randn(33, dtype=torch.float64), torch.randn(17, dtype=torch.float64)]
    run = Run(values, "ema", PLAIN)
    use(run.mine, "classical")
    run.mine.state_dict()
    use(run.mine, "ema")
    run.new_grads()
    run.step(0.1)
    run.check()


def test_deleting_the_state_makes_every_edit_possible():
    opt = in_training("classical")
    opt.state.clear()
    use(opt, "ema")
    params = opt.param_groups[0]["params"]
    loop = ForLoop(clone_params(params), "ema", **PLAIN)
    for _ in range(2):
        step(opt)
        for p, q in zip(params, loop.params, strict=True):
            q.grad = p.grad.clone()
        loop.step(LR)
    for p, q in zip(params, loop.params, strict=True):
        assert_same(p, q)


IMPOSSIBLE = [("torch", "ema"), ("classical", "ema"), ("ema", "torch"), ("ema", "classical")]
ACTIONS = {
    "step": lambda opt: opt.step(),
    "state_dict": lambda opt: opt.state_dict(),
    "torch_state_dict": lambda opt: opt.torch_state_dict(),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(("old", "new"), IMPOSSIBLE, ids=lambda name: name)
def test_edits_to_and_from_ema_raise_and_write_nothing(old, new, action):
    """The first group could be converted; it is not. After the edit is undone, everything goes on."""
    opt = in_training("torch", 1, shapes=[(33,)], nesterov=True)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.randn(17).double())], "formulation": old})
    step(opt, 2)
    twin = copy.deepcopy(opt)
    opt.param_groups[0]["formulation"] = "classical"
    opt.param_groups[1]["formulation"] = new
    before = Snapshot(opt)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"param_groups\[1\]\['formulation'\].*'{old}' to '{new}'"):
            ACTIONS[action](opt)
        before.assert_unchanged()
    opt.param_groups[0]["formulation"], opt.param_groups[1]["formulation"] = "torch", old
    grads = [nonzero(p) for p in opt.state]
    for each in (opt, twin):
        step(each, 2, grads=grads)
    for mine, theirs in zip(opt.state, twin.state, strict=True):
        assert_same(mine, theirs)
        assert_same(opt.state[mine]["momentum_buffer"], twin.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0)], ids=["int", "float", "tensor"])
@EACH_WAY
def test_a_conversion_at_lr_zero_raises_and_writes_nothing(old, new, zero, action):
    opt = in_training(old, nesterov=True)
    opt.param_groups[0].update(lr=zero, formulation=new)
    expected = {p: converted(b, new) for p, b in buffers_of(opt).items()}
    before = Snapshot(opt)
    with pytest.raises(ValueError, match=r"lr.*is 0"):
        ACTIONS[action](opt)
    before.assert_unchanged()
    opt.param_groups[0]["lr"] = LR
    for entry, buffer in zip(opt.state_dict()["state"].values(), expected.values(), strict=True):
        assert_same(entry["momentum_buffer"], buffer)


# ------------------------------------------------------------------------------------------------------ checkpoints


def torch_sgd_in_training(**hyper):
    params = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in SMALL]
    opt = torch.optim.SGD(params, **{"lr": LR, "momentum": 0.9, **hyper}, foreach=False)
    step(opt, 3)
    return opt


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_from_torch_into_classical_at_the_loaded_lr(twice):
    """The checkpoint itself stays what it was, so that it can be loaded again."""
    source = torch_sgd_in_training()
    params = source.param_groups[0]["params"]
    mine = FusedMomentum(clone_params(params), lr=99.0, formulation="classical")
    checkpoint = copy.deepcopy(source.state_dict())  # which shares the buffers, as torch's does
    kept = copy.deepcopy(checkpoint)
    for _ in range(1 + twice):
        mine.load_state_dict(checkpoint)
    for index, entry in kept["state"].items():
        assert_same(checkpoint["state"][index]["momentum_buffer"], entry["momentum_buffer"])
        assert_same(mine.state_dict()["state"][index]["momentum_buffer"], entry["momentum_buffer"] * LR)
    assert mine.param_groups[0]["formulation"] == "classical" and mine.param_groups[0]["lr"] == LR
    for _ in range(5):
        grads = [nonzero(p) for p in params]
        for each in (source, mine):
            step(each, grads=grads)
    for p, q in zip(params, mine.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


def test_from_classical_into_torch():
    """Into this class; and torch.optim.SGD itself gets the velocity, which it cannot know to be one."""
    source = in_training("classical")
    checkpoint = copy.deepcopy(source.state_dict())
    kept = copy.deepcopy(checkpoint)
    mine = FusedMomentum(clone_params(source.param_groups[0]["params"]), lr=99.0)
    mine.load_state_dict(checkpoint)
    for index, entry in kept["state"].items():
        assert_same(checkpoint["state"][index]["momentum_buffer"], entry["momentum_buffer"])
        assert_same(mine.state_dict()["state"][index]["momentum_buffer"], entry["momentum_buffer"] / LR)
    assert "formulation" not in mine.param_groups[0]
    for _ in range(5):
        grads = [nonzero(p) for p in mine.param_groups[0]["params"]]
        for each in (source, mine):
            step(each, grads=grads)
    for p, q in zip(source.param_groups[0]["params"], mine.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


@pytest.mark.parametrize(("formulation", "nesterov"), [("classical", False), ("classical", True), ("ema", False)])
def test_torch_goes_on_from_torch_state_dict(formulation, nesterov):
    source = in_training(formulation, nesterov=nesterov)
    params = clone_params(source.param_groups[0]["params"])
    sgd = torch.optim.SGD(params, lr=99.0, foreach=False)
    sgd.load_state_dict(copy.deepcopy(source.torch_state_dict()))
    for _ in range(3):
        grads = [nonzero(p) for p in params]
        for each in (source, sgd):
            step(each, grads=grads)
    for p, q in zip(source.param_groups[0]["params"], params, strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


@pytest.mark.parametrize(
    ("formulation", "hyper", "edit", "match"),
    [
        ("torch", {"decoupled_weight_decay": True, "weight_decay": 0.1}, {}, r"param_groups\[0\] has decoupled"),
        ("ema", {"nesterov": True}, {}, r"param_groups\[0\] is Nesterov in the ema"),
        ("classical", {}, {"lr": 0.0}, "divided by the lr, which is 0"),
    ],
)
def test_what_torch_state_dict_refuses(formulation, hyper, edit, match):
    opt = in_training(formulation, **hyper)
    opt.param_groups[0].update(edit)
    with pytest.raises(ValueError, match=match):
        opt.torch_state_dict()


@FORMULATION
def test_a_checkpoint_of_the_same_formulation_goes_on_to_the_bit(formulation):
    source = in_training(formulation, nesterov=True)
    mine = FusedMomentum(clone_params(source.param_groups[0]["params"]), formulation=formulation)
    mine.load_state_dict(save(source.state_dict()))
    grads = [nonzero(p) for p in source.param_groups[0]["params"]]
    for each in (source, mine):
        step(each, 3, grads=grads)
    for p, q in zip(source.param_groups[0]["params"], mine.param_groups[0]["params"], strict=True):
        assert_same(p, q)
        assert_same(source.state[p]["momentum_buffer"], mine.state[q]["momentum_buffer"])


LOADED = [*IMPOSSIBLE, ("SGD", "ema")]


@pytest.mark.parametrize(("old", "new"), [*LOADED, ("torch", "zero-lr")], ids=lambda name: name)
def test_a_checkpoint_that_cannot_be_converted_leaves_the_optimizer_as_it_was(old, new):
    source = torch_sgd_in_training(lr=0.7) if old == "SGD" else in_training(old, lr=0.7)
    if new == "zero-lr":
        source.param_groups[0]["lr"] = 0.0
        new = "classical"
    mine = in_training(new, nesterov=True)
    twin = copy.deepcopy(mine)
    groups, state = mine.param_groups, mine.state
    content = [dict(group) for group in groups]
    before = Snapshot(mine)
    with pytest.raises(ValueError, match=f"to '{new}'"):
        mine.load_state_dict(source.state_dict())
    assert mine.param_groups is groups and mine.state is state
    assert [dict(group) for group in groups] == content
    before.assert_unchanged()
    grads = [nonzero(p) for p in mine.state]
    for each in (mine, twin):
        step(each, 3, grads=grads)
    for p, q in zip(mine.state, twin.state, strict=True):
        assert_same(p, q)
    use(mine, "classical" if new == "torch" else "torch")  # the plan still knows what the buffers are in
    with pytest.raises(ValueError, match="changed from 'ema' to 'torch'") if new == "ema" else contextlib.nullcontext():
        mine.state_dict()


def test_decoupled_weight_decay_is_kept_or_loaded():
    """Kept when the checkpoint has no such key (torch's, or one of a training without), loaded when it has."""
    for own, loaded in itertools.product((False, True), repeat=2):
        mine = in_training("torch", 0, decoupled_weight_decay=own, weight_decay=0.1)
        sgd = torch_sgd_in_training(weight_decay=0.1)
        mine.load_state_dict(copy.deepcopy(sgd.state_dict()))
        assert mine.param_groups[0].get("decoupled_weight_decay", False) is own
        assert_steps_with_decay(mine, own)
        mine.load_state_dict(in_training("torch", decoupled_weight_decay=loaded, weight_decay=0.1).state_dict())
        assert mine.param_groups[0].get("decoupled_weight_decay", False) is (own or loaded)
        assert_steps_with_decay(mine, own or loaded)


def assert_steps_with_decay(opt, decoupled):
    params = opt.param_groups[0]["params"]
    loop = ForLoop(clone_params(params), **{**PLAIN, "weight_decay": 0.1, "decoupled_weight_decay": decoupled})
    loop.velocity = {q: opt.state[p]["momentum_buffer"].clone() for p, q in zip(params, loop.params, strict=True)}
    step(opt)
    for p, q in zip(params, loop.params, strict=True):
        q.grad = p.grad.clone()
    loop.step(LR)
    for p, q in zip(params, loop.params, strict=True):
        assert_same(p, q)

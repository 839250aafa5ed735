"""Formulations torch, classical and ema, and decoupled weight decay: the formulas, the conversions, the errors."""

import copy
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from harness import (
    Oracle,
    Pair,
    Snapshot,
    assert_all_same,
    assert_same,
    assert_same_training,
    for_loop,
    params_of,
    refused,
    run_program,
)
from values import (
    COPIES,
    EXACT_DTYPES,
    HALF_DTYPES,
    LAYOUTS,
    clone_exact,
    clone_params,
    in_layout,
    nonzero,
    through_file,
)

from momentum_ext import FusedMomentum
from momentum_ext.reference import update

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
DECOUPLED = {**NESTEROV, "weight_decay": 0.01, "decoupled_weight_decay": True}
FORMULATION = pytest.mark.parametrize("formulation", FORMULATIONS)


def ids(hyper):
    parts = [k for k in ("nesterov", "maximize") if hyper[k]]
    parts += ["momentum"] if hyper["momentum"] else []
    parts += [("decoupled" if hyper["decoupled_weight_decay"] else "decay")] if hyper["weight_decay"] else []
    return "-".join(parts) or "plain"


HYPER = pytest.mark.parametrize("hyper", COMBINATIONS, ids=ids)


def schedule(step):
    """A learning rate that rises, falls, and stays for a while."""
    return 0.1 * [0.25, 0.5, 1.0, 1.0, 0.3, 0.3, 0.01, 2.0][step % 8]


def pair_of(shapes, formulation, hyper, dtype=torch.float32, layout="contiguous"):
    values = [in_layout(torch.randn(shape, dtype=dtype), layout) for shape in shapes]
    return Pair(values, Oracle, lr=99.0, formulation=formulation, **hyper)


# ------------------------------------------------------------------------------------------------------ the formulas


@HYPER
@FORMULATION
@EXACT_DTYPES
def test_bits_of_the_for_loop_over_a_schedule(dtype, formulation, hyper, isa, threads):
    pair = pair_of(SHAPES, formulation, hyper, dtype)
    for step in range(10):
        pair.edit(lr=schedule(step))
        pair.step()


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=["fp32-lr", "fp64-lr"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
@pytest.mark.parametrize("hyper", [PLAIN, {**DECOUPLED, "nesterov": True}], ids=ids)
@FORMULATION
@EXACT_DTYPES
def test_tensor_lr_that_is_written_in_place(dtype, formulation, hyper, shape, lr_dtype):
    """As a scheduler does with a tensor: the same object, another value."""
    pair = pair_of(SMALL, formulation, hyper, dtype)
    pair.mine.param_groups[0]["lr"] = lr = torch.zeros(shape, dtype=lr_dtype)
    for step in range(8):
        lr.fill_(schedule(step))
        pair.theirs.param_groups[0]["lr"] = float(lr)
        pair.step()


@pytest.mark.parametrize("hyper", [PLAIN, {**NESTEROV, "weight_decay": 0.01}], ids=ids)
@FORMULATION
@EXACT_DTYPES
def test_late_and_missing_gradients(dtype, formulation, hyper, isa):
    """A tensor's first step is its own: the buffer starts when its first gradient appears."""
    pair = pair_of(SMALL, formulation, hyper, dtype)
    for step in range(12):
        pair.edit(lr=schedule(step))
        pair.step(missing=[index for index in range(len(SMALL)) if step < index or (step + index) % 5 == 0])


@pytest.mark.parametrize("grad_layout", ["contiguous", "permuted", "column"])
@pytest.mark.parametrize("layout", LAYOUTS)
@FORMULATION
@EXACT_DTYPES
def test_layouts(dtype, formulation, layout, grad_layout, isa):
    pair = pair_of([(3, 5), (17, 31), (4, 3, 5, 7), (300,)], formulation, DECOUPLED, dtype, layout)
    for step in range(5):
        for index, (param, _) in enumerate(pair.params):
            pair.set_grad(index, in_layout(pair.random_like(param), grad_layout))
        pair.edit(lr=schedule(step))
        pair.step_as_is()


@EXACT_DTYPES
@pytest.mark.parametrize("hyper", [PLAIN, {**NESTEROV, "weight_decay": 0.01}], ids=ids)
@FORMULATION
def test_complex_is_its_real_view(dtype, formulation, hyper):
    pair = pair_of([(*shape, 2) for shape in SMALL], formulation, hyper, dtype)
    params = [torch.nn.Parameter(torch.view_as_complex(p.detach()).clone()) for p, _ in pair.params]
    opt = FusedMomentum(params, lr=99.0, formulation=formulation, **hyper)
    for step in range(6):
        pair.edit(lr=schedule(step))
        pair.step()
        opt.param_groups[0]["lr"] = schedule(step)
        for param, (mine, _) in zip(params, pair.params, strict=True):
            param.grad = torch.view_as_complex(mine.grad).clone()
        opt.step()
        assert_all_same([torch.view_as_real(p.detach()) for p in params], [mine for mine, _ in pair.params])


@HALF_DTYPES
@pytest.mark.parametrize("hyper", [c for c in COMBINATIONS if not c["maximize"]], ids=ids)
@FORMULATION
def test_16_bit_is_one_rounding_from_exact_and_no_worse_than_the_for_loop(formulation, hyper, dtype, isa):
    """Each step starts in the same 16-bit state three times: ours, the rule's operators in 16 bits, and in fp64."""
    float_error = 2e-6  # what float arithmetic itself is off by, on values of this size
    param = torch.nn.Parameter(torch.randn(5003).to(dtype))
    opt = FusedMomentum([param], lr=99.0, formulation=formulation, **hyper)
    better = 0
    for step in range(8):
        opt.param_groups[0]["lr"] = schedule(step)
        param.grad = nonzero(param)
        start = [param.detach(), param.grad, opt.state.get(param, {}).get("momentum_buffer")]
        options = {**hyper, "lr": schedule(step), "formulation": formulation}
        loop = update(*(t if t is None else t.clone() for t in start), **options)
        exact = update(*(t if t is None else t.double() for t in start), **options)
        opt.step()
        found = param, opt.state.get(param, {}).get("momentum_buffer")
        for ours, loops, value in zip(found, loop, exact, strict=True):
            if value is None:
                assert ours is None
                continue
            # In the subnormal range the distance between two values is fixed, hence `tiny`.
            half_ulp = (value.abs() * torch.finfo(dtype).eps / 2).clamp(min=torch.finfo(dtype).tiny)
            our_error, loop_error = ((t.detach().double() - value).abs() for t in (ours, loops))
            assert (our_error <= half_ulp + float_error).all(), "more than one rounding"
            assert (our_error <= loop_error + float_error).all(), "worse than the for-loop"
            better += (our_error < loop_error - float_error).sum().item()
    assert better > 0 or hyper == {**PLAIN, "momentum": 0}


@FORMULATION
@pytest.mark.parametrize("decoupled", [False, True], ids=["decay", "decoupled"])
@EXACT_DTYPES
def test_without_momentum_all_are_gradient_descent_and_make_no_state(dtype, formulation, decoupled, isa):
    """Torch's own; without weight decay it is the same whether coupled or not."""
    own = {"formulation": formulation, "decoupled_weight_decay": decoupled}
    values = [torch.randn(shape, dtype=dtype) for shape in SMALL]
    pair = Pair(values, lr=0.1, weight_decay=0.0 if decoupled else 0.01, mine=own)
    pair.step(4)
    assert len(pair.mine.state) == 0 and pair.mine.state_dict()["state"] == {}


# ------------------------------------------------------------------------------------- how they are related (fp64)


def trajectory(formulation, lrs, grads, start=None, **hyper):
    """Parameters and buffers after each step, from zero, in fp64."""
    param = torch.nn.Parameter(torch.zeros(33, dtype=torch.float64) if start is None else start.clone())
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
EITHER = pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])


def gradients():
    return [nonzero((33,), torch.float64) for _ in range(STEPS)]


@EITHER
def test_torch_and_classical_take_the_same_steps_while_lr_is_constant(nesterov):
    grads = gradients()
    torchs = trajectory("torch", CONSTANT, grads, nesterov=nesterov)
    classical = trajectory("classical", CONSTANT, grads, nesterov=nesterov)
    for (p, b), (q, v) in zip(torchs, classical, strict=True):
        torch.testing.assert_close(q, p, **CLOSE)
        torch.testing.assert_close(v, 0.1 * b, **CLOSE)


@EITHER
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
@EITHER
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
@EITHER
def test_classical_is_that_of_keras_over_a_schedule(nesterov, tmp_path):
    """Keras keeps its learning rate in fp32: powers of two, so that both have the same one."""
    lrs = [0.125, 0.125, 0.25, 0.5, 0.5, 0.0625, 0.0625, 0.03125, 0.125, 0.001953125] * 3
    start = torch.randn(33, dtype=torch.float64)
    grads = [nonzero(start) for _ in lrs]
    case = {"lrs": lrs, "start": start.tolist(), "grads": [g.tolist() for g in grads]}
    case |= {"momentum": 0.9, "nesterov": nesterov}
    environment = {"KERAS_BACKEND": "torch", "KERAS_HOME": str(tmp_path)}
    done = run_program(sys.executable, "-W", "ignore", "-c", KERAS, input=json.dumps(case), env=environment)
    assert done.returncode == 0, done.stderr
    points = torch.tensor(json.loads(done.stdout), dtype=torch.float64)
    ours = {}
    for each in FORMULATIONS:
        ours[each] = torch.stack([p for p, _ in trajectory(each, lrs, grads, start, nesterov=nesterov)])
    torch.testing.assert_close(ours["classical"], points, **CLOSE)
    for other in ("torch", "ema"):  # the comparison tells them apart
        assert (ours[other] - points).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------- torch's own path


def close(dtype):
    # torch's path multiplies the gradient by lr or 1 - mu first: one more rounding for each step.
    return {"rtol": 20 * torch.finfo(dtype).eps, "atol": 20 * torch.finfo(dtype).eps}


@HYPER
@FORMULATION
@EXACT_DTYPES
def test_torchs_path_agrees_with_the_kernels(dtype, formulation, hyper):
    """An lr of a type that the kernels do not read sends the whole group there."""
    pair = pair_of(SMALL, formulation, hyper, dtype)
    for step in range(8):
        lr = np.float32(schedule(step))
        pair.mine.param_groups[0]["lr"], pair.theirs.param_groups[0]["lr"] = lr, float(lr)
        pair.new_grads()
        pair.both(lambda opt: opt.step())
        pair.check_close(**close(dtype))


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("lr", [torch.tensor(0.05), torch.tensor([0.05])], ids=["0-dim", "1-dim"])
@FORMULATION
def test_tensor_lr_on_torchs_path(formulation, lr, dtype):
    """A tensor of one element is a number there too: it broadcasts nothing and promotes no dtype."""
    pair = pair_of([(), (1,), (33,), (5, 3)], formulation, {**DECOUPLED, "nesterov": False}, dtype)
    own = pair.mine.param_groups[0]["params"]
    pair.theirs = FusedMomentum(clone_params(own), **{**DECOUPLED, "nesterov": False}, formulation=formulation)
    own[:] = [param.detach().as_subclass(Own).requires_grad_() for param in own]
    pair.edit(lr=lr)
    for _ in range(3):
        pair.new_grads()
        pair.both(lambda opt: opt.step())
        for a, b in pair.params:
            found, wanted = pair.mine.state[a]["momentum_buffer"], pair.theirs.state[b]["momentum_buffer"]
            assert a.shape == b.shape and found.shape == b.shape and found.dtype == b.dtype
            # 16-bit: torch's own path rounds after each of its four operations.
            torch.testing.assert_close(a.detach().as_subclass(torch.Tensor), b.detach(), **close(dtype))
            torch.testing.assert_close(found.as_subclass(torch.Tensor), wanted, **close(dtype))


@pytest.mark.parametrize("decoupled", [False, True], ids=["nodecay", "decoupled"])
@pytest.mark.parametrize("mu", [0, 0.9])
@FORMULATION
def test_sparse_gradients_give_what_dense_ones_give(formulation, mu, decoupled):
    """Rows without a gradient go on with their velocity, as in torch. Beside a dense parameter in the same group."""
    hyper = {"momentum": mu, "decoupled_weight_decay": decoupled, "weight_decay": 0.01 if decoupled else 0}
    pair = pair_of([(20, 5), (33,)], formulation, hyper)
    for step in range(6):
        pair.new_grads()
        rows = nonzero((20, 5)) * (torch.arange(20) % 3 == step % 3)[:, None]
        pair.params[0][0].grad, pair.params[0][1].grad = rows.to_sparse(1), rows
        pair.edit(lr=schedule(step))
        pair.both(lambda opt: opt.step())
        assert_same(*pair.params[1])
        torch.testing.assert_close(*pair.params[0], **close(torch.float32))
        if mu:
            buffers = [opt.state[param]["momentum_buffer"] for opt, param in pair.each(0)]
            assert buffers[0].is_sparse
            torch.testing.assert_close(buffers[0].to_dense(), buffers[1], **close(torch.float32))


# -------------------------------------------------------------------------------------------------- several groups


@EXACT_DTYPES
def test_a_formulation_for_each_group(dtype, isa, threads):
    """The constructor's is the default; a group's own comes first. One step updates them all."""
    hypers = [
        {**DECOUPLED, "nesterov": False},
        {**NESTEROV, "formulation": "classical"},
        {**PLAIN, "weight_decay": 0.02, "formulation": "torch"},
    ]
    groups = [{"params": [torch.randn(shape, dtype=dtype) for shape in SHAPES], **hyper} for hyper in hypers]
    pair = Pair(groups, Oracle, formulation="ema")
    late = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    for opt in pair.optimizers:
        opt.add_param_group({"params": clone_params(late), **PLAIN, "momentum": 0, "formulation": "classical"})
    assert [g.get("formulation", "torch") for g in pair.mine.param_groups] == ["ema", "classical", "torch", "classical"]
    for step in range(6):
        for opt in pair.optimizers:
            for g, group in enumerate(opt.param_groups):
                group["lr"] = schedule(step + g)
        pair.step()


def test_defaults_reach_groups_that_are_added_later():
    opt = FusedMomentum([torch.nn.Parameter(torch.ones(3))], formulation="ema", decoupled_weight_decay=True)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    for again in (opt, *(copied(opt) for copied in COPIES.values())):
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
    pair = pair_of([(33,)], "torch", NESTEROV)
    pair.edit(lr=0.1)
    groups = list(pair.mine.param_groups)
    with pytest.raises(ValueError, match=message):
        pair.mine.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "nesterov": False, **hyper})
    assert pair.mine.param_groups == groups and pair.mine.param_groups[0] is groups[0]
    pair.step()


BAD_EDITS = {
    "unknown": ({"formulation": "polyak"}, r"param_groups\[2\]\['formulation'\].*polyak"),
    "upper-case": ({"formulation": "Torch"}, r"param_groups\[2\]\['formulation'\].*Torch"),
    "none": ({"formulation": None}, r"param_groups\[2\]\['formulation'\].*None"),
    "number": ({"formulation": 1}, r"param_groups\[2\]\['formulation'\].*1"),
    "surrogate": ({"formulation": "\udc80"}, r"param_groups\[2\]\['formulation'\]"),
    "dampened": ({"dampening": 0.5}, r"param_groups\[2\]\['dampening'\].*classical.*0\.5"),
}


@pytest.mark.parametrize("bad", BAD_EDITS)
def test_refused_by_the_step_before_anything_is_written(bad):
    """The bad group is the last of three; the others have gradients too."""
    edit, message = BAD_EDITS[bad]
    groups = [{"params": [torch.randn(33)]} for _ in range(3)]
    pair = Pair(groups, Oracle, lr=0.1, momentum=0.9, formulation="classical")
    pair.step(2)
    pair.new_grads()
    good = dict(pair.mine.param_groups[2])
    pair.mine.param_groups[2].update(edit)
    for _ in range(2):
        with refused(pair.mine, ValueError, message):
            pair.mine.step()
    pair.mine.param_groups[2].update(good)
    pair.step_as_is()


# ----------------------------------------------------------------------------------------------------- conversions

EACH_WAY = pytest.mark.parametrize(
    ("old", "new"), [("torch", "classical"), ("classical", "torch")], ids=["to-classical", "to-torch"]
)
LR = 0.05


def in_training(formulation, steps=3, dtype=torch.float64, shapes=SMALL, **hyper):
    """In a formulation, or of torch's own for-loop."""
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    hyper = {"lr": LR, "momentum": 0.9, **hyper}
    opt = for_loop(params, **hyper) if formulation == "SGD" else FusedMomentum(params, **hyper, formulation=formulation)
    step(opt, steps)
    return opt


def step(opt, times=1, grads=None):
    for _ in range(times):
        for i, param in enumerate(dict.fromkeys(params_of(opt))):
            param.grad = nonzero(param) if grads is None else grads[i].clone()
        opt.step()


def go_on(*opts, times=3):
    """With the same gradients."""
    for _ in range(times):
        grads = [nonzero(param) for param in dict.fromkeys(params_of(opts[0]))]
        for opt in opts:
            step(opt, grads=grads)


def assert_close_params(one, other):
    for p, q in zip(params_of(one), params_of(other), strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


def converted(buffer, new, lr=LR):
    """The one rounding of a conversion is this multiplication or division."""
    return buffer * lr if new == "classical" else buffer / lr


def conversions_of(opt, new, lr=LR, only=None):
    """By parameter, what their buffers are to become."""
    buffers = {param: entry["momentum_buffer"].clone() for param, entry in opt.state.items()}
    return {p: converted(b, new, lr) if only is None or p is only else b for p, b in buffers.items()}


def assert_buffers(opt, expected):
    """Those of the optimizer, by parameter, or of its state dict, in the order of its groups."""
    if isinstance(opt, dict):
        expected = expected.values() if isinstance(expected, dict) else expected
        found = [opt["state"][index]["momentum_buffer"] for index in sorted(opt["state"])]
        assert_all_same(found, expected, "saved buffers")
    else:
        assert_all_same([opt.state[param]["momentum_buffer"] for param in expected], expected.values(), "buffers")


def use(opt, formulation):
    for group in opt.param_groups:
        group["formulation"] = formulation


@EITHER
@pytest.mark.parametrize("path", ["kernels", "torch"])
@EXACT_DTYPES
def test_changing_back_and_forth_goes_on_where_torch_goes(dtype, nesterov, path):
    pair = Pair([torch.randn(shape, dtype=dtype) for shape in SMALL], lr=LR, momentum=0.9, nesterov=nesterov)
    pair.mine.param_groups[0]["lr"] = LR if path == "kernels" else np.float64(LR)
    for formulation in ("torch", "classical", "torch", "torch", "classical", "classical", "torch"):
        use(pair.mine, formulation)
        for _ in range(3):
            pair.new_grads()
            pair.both(lambda opt: opt.step())
        scale = LR if formulation == "classical" else 1.0
        for mine, theirs in pair.params:
            # 21 steps and 4 conversions of one rounding each, on values of size 10.
            close = {"rtol": 50 * torch.finfo(dtype).eps, "atol": 50 * torch.finfo(dtype).eps}
            torch.testing.assert_close(mine, theirs, **close)
            wanted = scale * pair.theirs.state[theirs]["momentum_buffer"]
            torch.testing.assert_close(pair.mine.state[mine]["momentum_buffer"], wanted, **close)


@EACH_WAY
@EXACT_DTYPES
def test_an_edit_takes_effect_in_the_next_step(dtype, old, new):
    """At the learning rate of that step, to the bit: the buffer is converted, then the step is the new formula's."""
    opt = in_training(old, dtype=dtype)
    before = {p: (clone_exact(p), b) for p, b in conversions_of(opt, new, 0.02).items()}
    use(opt, new)
    opt.param_groups[0]["lr"] = 0.02
    step(opt)
    for param, (value, buffer) in before.items():
        value, buffer = update(value, param.grad, buffer, lr=0.02, momentum=0.9, formulation=new)
        assert_same(param, value)
        assert_same(opt.state[param]["momentum_buffer"], buffer)


@pytest.mark.parametrize("leave", [lambda state: state, through_file], ids=["state_dict", "saved"])
@EACH_WAY
def test_an_edit_takes_effect_in_what_leaves_the_optimizer(old, new, leave):
    """Without a step in between, and only once."""
    opt = in_training(old)
    expected = conversions_of(opt, new)
    objects = [opt.state[p]["momentum_buffer"] for p in opt.state]
    use(opt, new)
    for _ in range(2):
        assert_buffers(leave(opt.state_dict()), expected)
    assert all(opt.state[p]["momentum_buffer"] is b for p, b in zip(opt.state, objects, strict=True))
    twins = [copied(opt) for copied in COPIES.values()]
    go_on(opt, *twins, times=1)
    for twin in twins:
        assert_same_training(opt, twin)


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
    idle = params_of(opt)[1:3]
    expected = {p: b for p, b in conversions_of(opt, new).items() if any(p is q for q in idle)}
    values = [clone_exact(p) for p in idle]
    use(opt, new)
    for lr in (LR, 0.7):  # converted in the first of these steps, once
        opt.param_groups[0]["lr"] = lr
        for p in params_of(opt):
            p.grad = None if p in expected else nonzero(p)
        opt.step()
    assert_all_same(idle, values)
    assert_buffers(opt, expected)


@pytest.mark.parametrize("leave", ["step", "state_dict"])
@EACH_WAY
def test_a_parameter_that_is_in_two_groups_is_converted_once(old, new, leave):
    opt = in_training(old, shapes=[(33,), (17,)])
    opt.param_groups.append({**opt.param_groups[0], "params": params_of(opt)[:1]})
    expected = conversions_of(opt, new)
    for p in expected if leave == "step" else ():
        p.grad = None
    use(opt, new)
    for _ in range(2):
        if leave == "step":
            opt.step()
        assert_buffers(opt if leave == "step" else opt.state_dict(), expected)


@pytest.mark.parametrize("when", ["before", "after"])
@EACH_WAY
def test_lists_and_groups_are_reordered_around_an_edit(old, new, when):
    """The formulation belongs to the buffer, not to a position."""
    opt = in_training(old)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.randn(19, dtype=torch.float64))]})
    step(opt)
    expected = conversions_of(opt, new)
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
    assert_buffers(opt, expected)


@EACH_WAY
def test_a_parameter_that_moves_to_a_group_of_another_formulation(old, new):
    opt = in_training(old)
    opt.add_param_group({"params": [], "formulation": new, "lr": 0.3})
    moved = opt.param_groups[0]["params"].pop(2)
    opt.param_groups[1]["params"].append(moved)
    expected = conversions_of(opt, new, 0.3, only=moved)
    assert_buffers(opt.state_dict(), [expected[p] for p in params_of(opt)])


@EACH_WAY
def test_a_parameter_that_leaves_and_comes_back(old, new):
    """Out of all groups for a while (frozen, say), its state kept; meanwhile the group changes its formulation."""
    opt = in_training(old)
    away = opt.param_groups[0]["params"].pop(2)
    expected = conversions_of(opt, new)[away]
    step(opt)
    use(opt, new)
    step(opt, 2)
    opt.param_groups[0]["params"].append(away)
    away.grad = None
    opt.step()
    assert_same(opt.state[away]["momentum_buffer"], expected)


def test_parameters_that_never_had_a_buffer_follow_any_edit():
    pair = pair_of([(33,), (17,)], "ema", PLAIN, torch.float64)
    pair.edit(lr=0.1)
    use(pair.mine, "classical")
    pair.mine.state_dict()
    use(pair.mine, "ema")
    pair.step()


def test_deleting_the_state_makes_every_edit_possible():
    pair = pair_of(SMALL, "classical", PLAIN, torch.float64)
    for formulation in ("classical", "ema"):
        pair.both(lambda opt: opt.state.clear())
        pair.edit(formulation=formulation, lr=LR)
        pair.step(3)


IMPOSSIBLE = [("torch", "ema"), ("classical", "ema"), ("ema", "torch"), ("ema", "classical")]
ACTIONS = [FusedMomentum.step, FusedMomentum.state_dict, FusedMomentum.torch_state_dict]
EACH_ACTION = pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)


@EACH_ACTION
@pytest.mark.parametrize(("old", "new"), IMPOSSIBLE, ids=lambda name: name)
def test_edits_to_and_from_ema_raise_and_write_nothing(old, new, action):
    """The first group could be converted; it is not. After the edit is undone, everything goes on."""
    opt = in_training("torch", 1, shapes=[(33,)], nesterov=True)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.randn(17).double())], "formulation": old})
    step(opt, 2)
    twin = copy.deepcopy(opt)
    opt.param_groups[0]["formulation"] = "classical"
    opt.param_groups[1]["formulation"] = new
    for _ in range(2):
        with refused(opt, ValueError, rf"param_groups\[1\]\['formulation'\].*'{old}' to '{new}'"):
            action(opt)
    opt.param_groups[0]["formulation"], opt.param_groups[1]["formulation"] = "torch", old
    go_on(opt, twin, times=2)
    assert_same_training(opt, twin)


@EACH_ACTION
@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0)], ids=["int", "float", "tensor"])
@EACH_WAY
def test_a_conversion_at_lr_zero_raises_and_writes_nothing(old, new, zero, action):
    opt = in_training(old, nesterov=True)
    opt.param_groups[0].update(lr=zero, formulation=new)
    with refused(opt, ValueError, r"lr.*is 0"):
        action(opt)
    opt.param_groups[0]["lr"] = LR
    assert_buffers(opt.state_dict(), conversions_of(opt, new))


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize(("old", "new"), [("SGD", "classical"), ("classical", "torch")], ids=lambda name: name)
def test_into_another_formulation_at_the_loaded_lr(old, new, times):
    """The checkpoint itself stays what it was, so that it can be loaded again."""
    source = in_training(old)
    mine = FusedMomentum(clone_params(params_of(source)), lr=99.0, formulation=new)
    checkpoint = copy.deepcopy(source.state_dict())  # which shares the buffers, as torch's does
    kept, expected = copy.deepcopy(checkpoint), conversions_of(source, new)
    for _ in range(times):
        mine.load_state_dict(checkpoint)
    assert_buffers(checkpoint, [entry["momentum_buffer"] for entry in kept["state"].values()])
    assert_buffers(mine.state_dict(), expected)
    assert mine.param_groups[0].get("formulation", "torch") == new and mine.param_groups[0]["lr"] == LR
    go_on(source, mine, times=5)
    assert_close_params(source, mine)


@pytest.mark.parametrize(("formulation", "nesterov"), [("classical", False), ("classical", True), ("ema", False)])
def test_torch_goes_on_from_torch_state_dict(formulation, nesterov):
    source = in_training(formulation, nesterov=nesterov)
    sgd = torch.optim.SGD(clone_params(params_of(source)), lr=99.0, foreach=False)
    sgd.load_state_dict(copy.deepcopy(source.torch_state_dict()))
    go_on(source, sgd)
    assert_close_params(source, sgd)


@pytest.mark.parametrize(
    ("formulation", "hyper", "edit", "match", "remedy"),
    [
        (
            "torch",
            {"decoupled_weight_decay": True, "weight_decay": 0.1},
            {},
            r"param_groups\[0\] has decoupled.* set it to False",
            {"decoupled_weight_decay": False},
        ),
        (
            "ema",
            {"nesterov": True},
            {},
            r"param_groups\[0\] is Nesterov in the ema.* nesterov to False",
            {"nesterov": False},
        ),
        ("ema", {}, {"momentum": 0.0}, "buffer of parameter 0 .* set its group's momentum", {"momentum": 0.5}),
        ("classical", {}, {"lr": 0.0}, "parameter 0 is divided by the lr, which is 0; set its group's lr", {"lr": 0.1}),
    ],
)
def test_what_torch_state_dict_refuses(formulation, hyper, edit, match, remedy):
    opt = in_training(formulation, **hyper)
    opt.param_groups[0].update(edit)
    with pytest.raises(ValueError, match=match):
        opt.torch_state_dict()
    opt.param_groups[0].update(remedy)
    opt.torch_state_dict()


@FORMULATION
def test_a_checkpoint_of_the_same_formulation_goes_on_to_the_bit(formulation):
    source = in_training(formulation, nesterov=True)
    mine = FusedMomentum(clone_params(params_of(source)), formulation=formulation)
    mine.load_state_dict(through_file(source.state_dict()))
    go_on(source, mine)
    assert_same_training(source, mine)


@pytest.mark.parametrize(("old", "new"), [*IMPOSSIBLE, ("SGD", "ema"), ("torch", "zero-lr")], ids=lambda name: name)
def test_a_checkpoint_that_cannot_be_converted_leaves_the_optimizer_as_it_was(old, new):
    source = in_training(old, lr=0.7)
    if new == "zero-lr":
        source.param_groups[0]["lr"], new = 0.0, "classical"
    mine = in_training(new, nesterov=True)
    twin = copy.deepcopy(mine)
    with refused(mine, ValueError, f"to '{new}'"):
        mine.load_state_dict(source.state_dict())
    go_on(mine, twin)
    assert_same_training(mine, twin)
    use(mine, "classical" if new == "torch" else "torch")  # the plan still knows what the buffers are in
    if new == "ema":
        with pytest.raises(ValueError, match="changed from 'ema' to 'torch'"):
            mine.state_dict()
    else:
        mine.state_dict()


@pytest.mark.parametrize(("own", "loaded"), list(itertools.product((False, True), repeat=2)))
def test_decoupled_weight_decay_is_kept_or_loaded(own, loaded):
    """Kept when the checkpoint has no such key (torch's, or one of a training without), loaded when it has."""
    pair = pair_of(SMALL, "torch", {**PLAIN, "weight_decay": 0.1, "decoupled_weight_decay": own}, torch.float64)
    others = in_training("SGD", weight_decay=0.1), in_training("torch", decoupled_weight_decay=loaded, weight_decay=0.1)
    for other, wanted in zip(others, (own, own or loaded), strict=True):
        pair.mine.load_state_dict(copy.deepcopy(other.state_dict()))
        pair.theirs.load_state_dict(copy.deepcopy(other.state_dict()))
        assert pair.mine.param_groups[0].get("decoupled_weight_decay", False) is wanted
        pair.theirs.param_groups[0].update(decoupled_weight_decay=wanted, formulation="torch", foreach=False)
        pair.step(2)

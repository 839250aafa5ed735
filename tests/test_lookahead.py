"""Nesterov's two points: the textbook's sequence, and eval() and train() that move between them without a trace."""

import copy
import io
import pickle

import pytest
import torch
from helpers import Snapshot, assert_same, clone_exact, clone_params, in_layout, matching_isas

from momentum_ext import _C, FusedMomentum

FORMULATIONS = ["torch", "classical", "ema"]
FORMULATION = pytest.mark.parametrize("formulation", FORMULATIONS)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=["fp32", "fp64", "bf16", "fp16"]
)
MU, LR = 0.9, 0.05
SHAPES = [(3, 5), (), (0,), (1,), (15,), (16,), (17,), (255,), (257,), (64, 33), (1003,)]


def distance(formulation, lr=LR):
    return MU if formulation == "classical" else MU * lr


# ----------------------------------------------------------------------------------------------------- the textbook

INPUTS = torch.linspace(-2, 2, 40, dtype=torch.float64).reshape(20, 2)
TARGETS = torch.sin(3 * INPUTS[:, 0]) * INPUTS[:, 1]


def loss(point):
    """A small tanh network on 20 points, its 33 weights in one vector."""
    hidden = torch.tanh(INPUTS @ point[:16].view(2, 8) + point[16:24])
    return (hidden @ point[24:32] + point[32] - TARGETS).square().mean()


def grad_at(point):
    point = point.clone().requires_grad_()
    return torch.autograd.grad(loss(point), point)[0]


def start():
    return torch.randn(33, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def textbook(lrs):
    """v = mu v + lr grad(p - mu v); p = p - v."""
    p, v = start(), torch.zeros(33, dtype=torch.float64)
    points = []
    for lr in lrs:
        v = MU * v + lr * grad_at(p - MU * v)
        p = p - v
        points.append(p)
    return torch.stack(points)


def iterates(formulation, lrs):
    """What eval() shows after each step; the gradient is taken where the parameters are while training."""
    param = torch.nn.Parameter(start())
    opt = FusedMomentum([param], momentum=MU, nesterov=True, formulation=formulation)
    points = []
    for lr in lrs:
        opt.param_groups[0]["lr"] = lr
        opt.zero_grad()
        loss(param).backward()
        opt.step()
        opt.eval()
        points.append(param.detach().clone())
        opt.train()
    return torch.stack(points)


STEPS = 300
CONSTANT = [LR] * STEPS
SCHEDULE = [LR * (0.2 + abs((step % 100) - 50) / 50) for step in range(STEPS)]
# 300 steps carry each rounding on; the errors do not grow where the training converges.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def test_the_function_is_not_linear_and_the_training_gets_somewhere():
    """Else the tests below would prove little: the gradient ahead must differ from the one at the iterate."""
    points = textbook(CONSTANT)
    assert loss(points[-1]) < 0.5 * loss(start())
    p, v = start(), torch.zeros(33, dtype=torch.float64)
    for lr in CONSTANT:
        v = MU * v + lr * grad_at(p)
        p = p - v
    assert (p - points[-1]).abs().max() > 1e-3


@FORMULATION
def test_the_textbooks_sequence_while_lr_is_constant(formulation):
    """In ema's units the textbook's learning rate is (1 - mu) lr."""
    scale = 1 - MU if formulation == "ema" else 1.0
    torch.testing.assert_close(iterates(formulation, CONSTANT), textbook([scale * lr for lr in CONSTANT]), **CLOSE)


def test_under_a_schedule_classical_is_the_textbooks():
    torch.testing.assert_close(iterates("classical", SCHEDULE), textbook(SCHEDULE), **CLOSE)


@pytest.mark.parametrize("formulation", ["torch", "ema"])
def test_under_a_schedule_the_others_are_not(formulation):
    """Their history is multiplied by the present learning rate. It is a documented difference, not a rounding."""
    scale = 1 - MU if formulation == "ema" else 1.0
    expected = textbook([scale * lr for lr in SCHEDULE])
    mine = iterates(formulation, SCHEDULE)
    torch.testing.assert_close(mine[0], expected[0], **CLOSE)
    assert (mine - expected).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------- there and back


def nonzero(shape, dtype):
    wide = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    if dtype.is_complex:
        return torch.view_as_complex(nonzero((*shape, 2), wide))
    values = torch.randn(shape, dtype=wide)
    return torch.where(values == 0, torch.ones_like(values), values).to(dtype)


def in_training(values, formulation="torch", steps=2, **hyper):
    params = clone_params(values)
    opt = FusedMomentum(params, lr=LR, **{"momentum": MU, "nesterov": True, "formulation": formulation, **hyper})
    step(opt, steps)
    return opt, params


def step(opt, times=1):
    for _ in range(times):
        for group in opt.param_groups:
            for param in group["params"]:
                param.grad = nonzero(param.shape, param.dtype)
        opt.step()


def iterate_of(lookahead, buffer, by):
    """In the arithmetic of the rule: one fma, in float for 16 bits, rounded once."""
    if lookahead.dtype.is_complex:
        return torch.view_as_complex(
            iterate_of(torch.view_as_real(lookahead).contiguous(), torch.view_as_real(buffer).contiguous(), by)
        )
    wide = torch.float64 if torch.float64 in (lookahead.dtype, buffer.dtype) else torch.float32
    return lookahead.detach().to(wide).contiguous().add(buffer.to(wide).contiguous(), alpha=by).to(lookahead.dtype)


class Visit:
    """eval() with a look at what it has done, then train() with a look at whether everything is back."""

    def __init__(self, opt, formulation):
        self.opt, self.by = opt, distance(formulation)
        self.before = Snapshot(opt, "versions", "grads", "groups")

    def eval(self):
        self.opt.eval()
        for index, (param, value) in enumerate(zip(self.before.params, self.before.values, strict=True)):
            if param in self.opt.state:
                value = iterate_of(value, self.opt.state[param]["momentum_buffer"], self.by)
            assert_same(param, value, f"iterate of params[{index}]")
        return self

    def train(self):
        self.opt.train()
        self.before.assert_unchanged()
        assert not {"train_mode", "lookahead_distance"} & set(self.opt.param_groups[0])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=["c64", "c128"])
@FORMULATION
def test_round_trip_of_complex(dtype, formulation):
    opt, _ = in_training([nonzero(shape, dtype) for shape in SHAPES], formulation)
    Visit(opt, formulation).eval().train()


@DTYPES
@FORMULATION
def test_round_trip(dtype, formulation, isa):
    opt, params = in_training([nonzero(shape, dtype) for shape in SHAPES], formulation)
    visit = Visit(opt, formulation).eval()
    assert any(not torch.equal(p, value) for p, value in zip(params, visit.before.values, strict=True))
    visit.train()


LAYOUTS = ["contiguous", "permuted", "offset", "column", "step", "inner"]


@pytest.mark.parametrize("buffer_layout", ["as-made", "contiguous", "column"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "channels_last"])
@DTYPES
def test_round_trip_of_layouts(dtype, layout, buffer_layout, isa):
    values = [nonzero(shape, dtype) for shape in [(4, 3, 5, 7), (300,), (17, 31)]]
    if layout == "channels_last":
        values = [values[0].to(memory_format=torch.channels_last)]
    else:
        values = [in_layout(value, layout) for value in values]
    opt, params = in_training(values)
    if buffer_layout != "as-made":
        for param in params:
            opt.state[param]["momentum_buffer"] = in_layout(opt.state[param]["momentum_buffer"], buffer_layout)
    Visit(opt, "torch").eval().train()


@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@DTYPES
def test_round_trip_with_a_buffer_of_another_dtype(dtype, buffer_dtype, isa):
    opt, params = in_training([nonzero((1003,), dtype), in_layout(nonzero((17, 31), dtype), "column")])
    for param in params:
        opt.state[param]["momentum_buffer"] = nonzero(param.shape, buffer_dtype)
    Visit(opt, "torch").eval().train()


@pytest.mark.parametrize(
    "values",
    [(1e-30,), (1e-7,), (1e4,), (6e4,), (3e38,), (float("inf"), -float("inf")), (float("nan"),), (0.0, -0.0)],
    ids=str,
)
@pytest.mark.parametrize("where", ["param", "buffer", "both"])
@DTYPES
def test_round_trip_of_extreme_values(dtype, where, values, isa):
    """Tiny buffers that move nothing, huge ones that swallow the parameter or overflow, Inf and NaN."""
    opt, params = in_training([nonzero((1003,), dtype), in_layout(nonzero((17, 31), dtype), "column")], "classical")
    for param in params:
        scale = torch.tensor(values, dtype=torch.float64).repeat(param.numel())[: param.numel()].view(param.shape)
        for name, target in (("param", param.data), ("buffer", opt.state[param]["momentum_buffer"])):
            if where in (name, "both"):
                target[::2] = (target.double() * scale).to(dtype)[::2]
    Visit(opt, "classical").eval().train()


@DTYPES
def test_round_trip_on_several_threads(dtype, isa, threads):
    """The iterate that train() computes again is the same whatever the number of threads was."""
    opt, _ = in_training([nonzero((n,), dtype) for n in (100_003, 5, 65_537)], steps=1)
    visit = Visit(opt, "torch").eval()
    torch.set_num_threads(2)
    visit.train()


@DTYPES
def test_another_instruction_set_on_the_way_back(dtype):
    isas = matching_isas()
    for there, back in zip(isas, [*isas[1:], isas[0]], strict=True):
        _C.set_isa(there)
        opt, _ = in_training([nonzero((n,), dtype) for n in (1003, 33)])
        visit = Visit(opt, "torch").eval()
        _C.set_isa(back)
        visit.train()


@pytest.mark.parametrize("name", _C.isas())
@DTYPES
def test_every_instruction_set_comes_back_to_the_bit(dtype, name):
    """Also the one whose roundings differ from torch's."""
    _C.set_isa(name)
    opt, params = in_training([nonzero((n,), dtype) for n in (1003, 33)])
    before = Snapshot(opt, "versions", "grads", "groups")
    opt.eval()
    for param, value in zip(params, before.values, strict=True):
        buffer = opt.state[param]["momentum_buffer"]
        expected = iterate_of(value, buffer, distance("torch"))
        torch.testing.assert_close(param.detach(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert not torch.equal(param, value)
    opt.train()
    before.assert_unchanged()


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize("layout", ["contiguous", "column", "step"])
@DTYPES
def test_round_trip_of_tensors_that_torch_updates(dtype, layout):
    """A tensor subclass has no kernel."""
    values = [in_layout(nonzero(shape, dtype), layout) for shape in [(257,), (17, 31)]]
    params = [torch.nn.Parameter(value.as_subclass(Own)) for value in values]
    opt = FusedMomentum([*params, torch.nn.Parameter(nonzero((33,), dtype))], lr=LR, momentum=MU, nesterov=True)
    step(opt, 2)
    before = Snapshot(opt, "versions", "grads", "groups")
    opt.eval()
    for param, value in zip(before.params, before.values, strict=True):
        buffer = opt.state[param]["momentum_buffer"].as_subclass(torch.Tensor)
        expected = iterate_of(value.as_subclass(torch.Tensor), buffer, distance("torch"))
        found = param.detach().as_subclass(torch.Tensor)
        assert not torch.equal(found, value.as_subclass(torch.Tensor))
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    opt.train()
    before.assert_unchanged()


def test_round_trip_with_a_sparse_buffer():
    """torch keeps the momentum of sparse gradients sparse."""
    param = torch.nn.Parameter(torch.randn(20, 5))
    opt = FusedMomentum([param], lr=LR, momentum=MU)
    rows = torch.randn(20, 5) * (torch.arange(20) % 3 == 0)[:, None]
    param.grad = rows.to_sparse(1)
    opt.step()
    buffer = opt.state[param]["momentum_buffer"]
    assert buffer.is_sparse
    opt.param_groups[0]["nesterov"] = True
    value = param.detach().clone()
    opt.eval()
    torch.testing.assert_close(param.detach(), value + MU * LR * buffer.to_dense())
    assert not torch.equal(param, value)
    opt.train()
    assert_same(param, value)


def test_a_parameter_that_is_in_two_groups_moves_once():
    opt, params = in_training([torch.randn(33)])
    opt.param_groups.append({**opt.param_groups[0], "params": params[:]})
    visit = Visit(opt, "torch").eval()
    visit.train()
    step(opt)


@pytest.mark.parametrize("first", [{"nesterov": False}, {"lr": 0.5}], ids=str)
def test_a_parameter_that_is_in_two_groups_of_different_kind(first):
    opt, params = in_training([torch.randn(33)])
    opt.param_groups.insert(0, {**opt.param_groups[0], "params": params[:], **first})
    before = Snapshot(opt, "versions", "grads", "groups")
    opt.eval()
    assert not torch.equal(params[0], before.values[0])
    opt.train()
    before.assert_unchanged()


# -------------------------------------------------------------------------------------------------------- the modes


def test_calling_twice_has_no_effect():
    opt, _ = in_training([torch.randn(300), torch.randn(17)])
    visit = Visit(opt, "torch").eval()
    held = Snapshot(opt)
    visit.eval()  # the same iterate is expected
    held.assert_unchanged()
    visit.train()
    visit.train()


def test_train_without_eval_has_no_effect():
    opt, _ = in_training([torch.randn(300)])
    Visit(opt, "torch").train()
    step(opt)


@pytest.mark.parametrize("hyper", [{"nesterov": False}, {"nesterov": False, "momentum": 0}], ids=str)
def test_without_nesterov_nothing_moves(hyper):
    """But the mode is one for all groups: a step raises here, too."""
    opt, _ = in_training([torch.randn(300)], **hyper)
    before = Snapshot(opt, "versions", "grads", "groups")
    opt.eval()
    before.assert_unchanged()
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        opt.step()
    opt.train()
    before.assert_unchanged()
    step(opt)


def test_before_the_first_step_nothing_moves():
    opt, _ = in_training([torch.randn(300)], steps=0)
    before = Snapshot(opt, "versions", "grads", "groups")
    opt.eval()
    before.assert_unchanged()
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        step(opt)
    opt.train()
    before.assert_unchanged()
    step(opt)


def test_parameters_without_a_buffer_stay():
    opt, params = in_training([torch.randn(300), torch.randn(17)], steps=0)
    params[0].grad = torch.randn(300)
    opt.step()
    visit = Visit(opt, "torch").eval()
    assert not torch.equal(params[0], visit.before.values[0])
    visit.train()


def test_a_mixture_of_groups_moves_each_in_its_units():
    params = [torch.nn.Parameter(torch.randn(257)) for _ in range(4)]
    hypers = [{}, {"formulation": "classical", "lr": 0.3}, {"formulation": "ema"}, {"nesterov": False}]
    opt = FusedMomentum(
        [{"params": [p], **h} for p, h in zip(params, hypers, strict=True)], lr=LR, momentum=MU, nesterov=True
    )
    step(opt, 3)
    before = Snapshot(opt, "versions", "grads", "groups")
    opt.eval()
    for param, value, by in zip(params, before.values, [MU * LR, MU, MU * LR, 0], strict=True):
        assert_same(param, iterate_of(value, opt.state[param]["momentum_buffer"], by))
    opt.train()
    before.assert_unchanged()


def test_a_step_in_eval_mode_raises_and_changes_nothing_until_train():
    opt, params = in_training([torch.randn(300), torch.randn(17)])
    twin, _ = in_training([torch.randn(1)])
    twin = copy.deepcopy(opt)
    opt.eval()
    before = Snapshot(opt, "versions", "grads", "groups")
    versions = [p._version for p in params]
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"step\(\).*optimizer\.train\(\)"):
            step(opt)
        before.assert_unchanged()
        assert [p._version for p in params] == versions
    opt.train()
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        p.grad = nonzero(p.shape, p.dtype)
        q.grad = p.grad.clone()
    opt.step()
    twin.step()
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        assert_same(p, q)
        assert_same(opt.state[p]["momentum_buffer"], twin.state[q]["momentum_buffer"])


def test_training_goes_on_as_if_eval_had_never_been_called(threads):
    visited, _ = in_training([torch.randn(n) for n in (300, 40_001, 33_000)], steps=1)
    plain = copy.deepcopy(visited)
    for _ in range(4):
        visited.eval()
        visited.train()
        for p, q in zip(visited.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
            p.grad = nonzero(p.shape, p.dtype)
            q.grad = p.grad.clone()
        visited.step()
        plain.step()
        for p, q in zip(visited.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
            assert_same(p, q)


def test_elements_that_are_changed_in_between_move_by_the_distance():
    """A model that was loaded in eval mode, say; the others come back to the bit."""
    opt, params = in_training([torch.randn(1003), in_layout(torch.randn(17, 31), "column")], "classical")
    before = Snapshot(opt, "versions", "grads", "groups")
    opt.eval()
    changed = {}
    for param in params:
        with torch.no_grad():
            param[::3] += 1.5
        changed[param] = param.detach().clone()
    opt.train()
    for param, value in zip(params, before.values, strict=True):
        buffer = opt.state[param]["momentum_buffer"]
        assert_same(param[::3], changed[param][::3].sub(buffer[::3], alpha=MU))
        for rest in (1, 2):
            assert_same(param[rest::3], value[rest::3])


@pytest.mark.parametrize(
    "edit", [{"lr": 0.7}, {"nesterov": False}, {"momentum": 0.5}, {"lr": 0.0}, {"lr": torch.tensor(0.3)}], ids=str
)
def test_hyperparameters_edited_in_between_do_not_matter(edit):
    """A scheduler that steps while the model is evaluated."""
    opt, _ = in_training([torch.randn(300)])
    visit = Visit(opt, "torch").eval()
    opt.param_groups[0].update(edit)
    visit.train()


def test_a_tensor_lr_that_is_written_in_place_does_not_matter():
    opt, _ = in_training([torch.randn(300)])
    lr = torch.tensor(LR, dtype=torch.float64)
    opt.param_groups[0]["lr"] = lr
    visit = Visit(opt, "torch").eval()
    lr.fill_(9.0)
    visit.train()


@pytest.mark.parametrize("action", ["state_dict", "deepcopy", "pickle", "eval"])
def test_a_formulation_edited_in_between_waits_for_train(action):
    """The distance is in the buffer's units, so the buffer stays as it is: an error says so; train() comes back."""
    opt, params = in_training([torch.randn(300)])
    visit = Visit(opt, "torch").eval()
    buffer = opt.state[params[0]]["momentum_buffer"].clone()
    opt.param_groups[0]["formulation"] = "classical"
    held = Snapshot(opt)
    actions = {"state_dict": opt.state_dict, "eval": opt.eval}
    actions |= {"deepcopy": lambda: copy.deepcopy(opt), "pickle": lambda: pickle.dumps(opt)}
    with pytest.raises(ValueError, match=r"optimizer\.train\(\)"):
        actions[action]()
    held.assert_unchanged()
    visit.train()
    opt.state_dict()
    assert_same(opt.state[params[0]]["momentum_buffer"], buffer * LR)


def test_a_checkpoint_of_eval_mode_in_another_formulation_is_refused():
    opt, _ = in_training([torch.randn(300)])
    opt.eval()
    checkpoint = opt.state_dict()
    other, _ = in_training([torch.randn(300)], "classical")
    groups, before = other.param_groups, Snapshot(other, "versions", "grads", "groups")
    with pytest.raises(ValueError, match=r"optimizer\.train\(\)"):
        other.load_state_dict(checkpoint)
    assert other.param_groups is groups and "train_mode" not in groups[0]
    before.assert_unchanged()
    step(other)


def test_add_param_group_in_eval_mode():
    opt, params = in_training([torch.randn(300)])
    visit = Visit(opt, "torch").eval()
    added = torch.nn.Parameter(torch.randn(17))
    opt.add_param_group({"params": [added]})
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        step(opt)
    opt.train()
    assert_same(params[0], visit.before.values[0])
    before = [p.detach().clone() for p in (params[0], added)]
    step(opt)
    assert all(not torch.equal(p, value) for p, value in zip((params[0], added), before, strict=True))


def test_autograd_knows_that_the_parameters_have_moved():
    for action in ("eval", "train"):
        opt, params = in_training([torch.randn(300), torch.randn(17)])
        if action == "train":
            opt.eval()
        output = sum(p.square().sum() for p in params)
        getattr(opt, action)()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()


def test_the_memory_of_the_copy_is_given_back():
    """After train() the state has torch's form again."""
    opt, params = in_training([torch.randn(300)])
    opt.eval()
    assert set(opt.state[params[0]]) == {"momentum_buffer", "lookahead"}
    opt.train()
    assert set(opt.state[params[0]]) == {"momentum_buffer"}


def test_momentum_that_is_deleted_in_eval_mode():
    """Then the iterate is where the gradient belongs; the other parameter goes back."""
    opt, params = in_training([torch.randn(300), torch.randn(17)])
    visit = Visit(opt, "torch").eval()
    iterate = params[0].detach().clone()
    del opt.state[params[0]]["momentum_buffer"]
    opt.train()
    assert_same(params[0], iterate)
    assert_same(params[1], visit.before.values[1])
    assert not opt.state[params[0]]
    step(opt)


def test_a_buffer_of_another_shape_is_refused_before_anything_moves():
    opt, params = in_training([torch.randn(300), torch.randn(17)])
    good = opt.state[params[1]]["momentum_buffer"]
    opt.state[params[1]]["momentum_buffer"] = torch.ones(18)
    before = Snapshot(opt, "versions", "grads", "groups")
    with pytest.raises(RuntimeError, match="shape"):
        opt.eval()
    before.assert_unchanged()
    opt.state[params[1]]["momentum_buffer"] = good
    step(opt)


# ------------------------------------------------------------------------------------------------------ checkpoints


def through_torch_save(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS = {
    "direct": lambda state: state,
    "deepcopy": copy.deepcopy,
    "torch.save": through_torch_save,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}


def assert_resumes(resumed, lookaheads):
    """It remembers that the iterate is held, and train() gives the very bits of the look-ahead point."""
    params = resumed.param_groups[0]["params"]
    held = Snapshot(resumed, "grads")
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        step(resumed)
    resumed.eval()
    held.assert_unchanged()
    resumed.train()
    for param, value in zip(params, lookaheads, strict=True):
        assert_same(param, value)
    step(resumed)


@pytest.mark.parametrize("way", WAYS)
@DTYPES
@FORMULATION
def test_state_dict_of_eval_mode(formulation, dtype, way):
    """With the model's parameters as they were saved with it: the iterate."""
    opt, params = in_training([nonzero(shape, dtype) for shape in SHAPES], formulation)
    lookaheads = [p.detach().clone() for p in params]
    opt.eval()
    fresh = FusedMomentum(clone_params(params), lr=99.0, formulation=formulation)
    fresh.load_state_dict(WAYS[way](opt.state_dict()))
    opt.train()  # before the other one's step: "direct" shares the buffers
    for param, value in zip(params, lookaheads, strict=True):
        assert_same(param, value)
    assert_resumes(fresh, lookaheads)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["deepcopy", "pickle"]
)
def test_optimizer_copied_in_eval_mode(way):
    opt, params = in_training([torch.randn(shape) for shape in SHAPES])
    lookaheads = [p.detach().clone() for p in params]
    opt.eval()
    assert_resumes(way(opt), lookaheads)


def test_a_checkpoint_of_train_mode_ends_eval_mode():
    """The loaded state says where the loaded model is."""
    opt, params = in_training([torch.randn(300)])
    checkpoint, values = copy.deepcopy(opt.state_dict()), [clone_exact(p) for p in params]
    step(opt)
    opt.eval()
    opt.load_state_dict(checkpoint)
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)
    opt.train()
    for param, value in zip(params, values, strict=True):
        assert_same(param, value)
    step(opt)


def test_torch_takes_a_state_dict_of_eval_mode():
    """It trains on from where the parameters are; what it does not know, it keeps."""
    opt, params = in_training([torch.randn(300)])
    opt.eval()
    sgd = torch.optim.SGD(clone_params(params), lr=0.1)
    sgd.load_state_dict(opt.state_dict())
    step(sgd)


def test_a_closure_does_not_run_in_eval_mode():
    param = torch.nn.Parameter(torch.randn(33))
    opt = FusedMomentum([param], lr=0.1, momentum=0.9, nesterov=True)
    param.grad = torch.randn(33)
    opt.step()
    opt.eval()
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        opt.step(lambda: pytest.fail("the closure must not run"))


def test_a_freed_parameter_is_refused():
    param = torch.nn.Parameter(torch.randn(33))
    opt = FusedMomentum([param], lr=0.1, momentum=0.9, nesterov=True)
    param.grad = torch.randn(33)
    opt.step()
    param.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed"):
        opt.eval()
    assert "lookahead" not in opt.state[param] and "train_mode" not in opt.param_groups[0]

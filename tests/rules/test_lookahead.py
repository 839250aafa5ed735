"""Nesterov's two points: the textbook's sequence, and iterate_weights(), which goes there and back without a trace."""

import copy
import itertools
import pickle
from contextlib import contextmanager

import pytest
import torch
from harness import Snapshot, assert_same, assert_same_training, params_of, refused
from values import FLOAT_DTYPES, FLOATS, FP8, clone_params, dtype_name, in_layout, matching_isas, nonzero

from momentum_ext import _C, FusedMomentum

FORMULATION = pytest.mark.parametrize("formulation", ["torch", "classical", "ema"])
MU, LR = 0.9, 0.05
SHAPES = [(3, 5), (), (0,), (1,), (15,), (16,), (17,), (255,), (257,), (64, 33), (1003,)]


def distance(formulation):
    return MU if formulation == "classical" else MU * LR


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
    torch.set_num_threads(1)  # with more, torch's tiny operations wait for each other
    return torch.randn(33, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def textbook(lrs, looks_ahead=True):
    """v = mu v + lr grad(p - mu v); p = p - v."""
    p, v = start(), torch.zeros(33, dtype=torch.float64)
    points = []
    for lr in lrs:
        v = MU * v + lr * grad_at(p - MU * v * looks_ahead)
        p = p - v
        points.append(p)
    return torch.stack(points)


def iterates(formulation, lrs):
    """What iterate_weights() shows after each step; the gradient is taken where the parameters are outside."""
    param = torch.nn.Parameter(start())
    opt = FusedMomentum([param], momentum=MU, nesterov=True, formulation=formulation)
    points = []
    for lr in lrs:
        opt.param_groups[0]["lr"] = lr
        opt.zero_grad()
        loss(param).backward()
        opt.step()
        with opt.iterate_weights():
            points.append(param.detach().clone())
    return torch.stack(points)


CONSTANT = [LR] * 200
SCHEDULE = [LR * (0.2 + abs((step % 100) - 50) / 50) for step in range(200)]
# 200 steps carry each rounding on; the errors do not grow where the training converges.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def test_the_function_is_not_linear_and_the_training_gets_somewhere():
    """Else the tests below would prove little: the gradient ahead must differ from the one at the iterate."""
    points = textbook(CONSTANT)
    assert loss(points[-1]) < 0.5 * loss(start())
    assert (textbook(CONSTANT, looks_ahead=False)[-1] - points[-1]).abs().max() > 1e-3


@FORMULATION
def test_the_textbooks_sequence_while_lr_is_constant(formulation):
    """In ema's units the textbook's learning rate is (1 - mu) lr."""
    scale = 1 - MU if formulation == "ema" else 1.0
    torch.testing.assert_close(iterates(formulation, CONSTANT), textbook([scale * lr for lr in CONSTANT]), **CLOSE)


@FORMULATION
def test_under_a_schedule_classical_alone_is_the_textbooks(formulation):
    """The others multiply their history by the present learning rate: a documented difference, not a rounding."""
    scale = 1 - MU if formulation == "ema" else 1.0
    found, expected = iterates(formulation, SCHEDULE), textbook([scale * lr for lr in SCHEDULE])
    if formulation == "classical":
        torch.testing.assert_close(found, expected, **CLOSE)
    else:
        torch.testing.assert_close(found[0], expected[0], **CLOSE)
        assert (found - expected).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------- there and back


def in_training(values, steps=2, **hyper):
    opt = FusedMomentum(clone_params(values), **{"lr": LR, "momentum": MU, "nesterov": True, **hyper})
    step(opt, steps)
    return opt, opt.param_groups[0]["params"]


def step(opt, times=1):
    for _ in range(times):
        for param in params_of(opt):
            param.grad = nonzero(param)
        opt.step()


def buffer_of(opt, param):
    entry = opt.state[param]
    buffer = entry["momentum_buffer"]
    return _C.dequantize(buffer, entry["momentum_scale"], param.shape) if "momentum_scale" in entry else buffer


def iterate_of(lookahead, buffer, by):
    """In the arithmetic of the rule: one fma, in float for 16 bits, rounded once."""
    if lookahead.dtype.is_complex:
        parts = (torch.view_as_real(tensor).contiguous() for tensor in (lookahead, buffer))
        return torch.view_as_complex(iterate_of(*parts, by))
    wide = torch.float64 if torch.float64 in (lookahead.dtype, buffer.dtype) else torch.float32
    return lookahead.detach().to(wide).contiguous().add(buffer.to(wide).contiguous(), alpha=by).to(lookahead.dtype)


def keys_of(opt):
    return [set(entry) for entry in (*opt.param_groups, *opt.state.values())]


@contextmanager
def visited(opt, *by, but=()):
    """iterate_weights() with a look at each iterate, at what it keeps, and at whether everything is back after it."""
    before, keys = Snapshot(opt, "versions", *but), keys_of(opt)
    by = itertools.cycle(by or [MU * LR])
    with opt.iterate_weights():
        for index, (param, value, each) in enumerate(zip(before.params, before.values, by, strict=False)):
            expected = iterate_of(value, buffer_of(opt, param), each) if each and param in opt.state else value
            assert_same(param, expected, f"iterate of params[{index}]")
        assert keys_of(opt) == keys
        yield before
    before.assert_unchanged()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64, torch.complex128], ids=str)
@FORMULATION
def test_round_trip(dtype, formulation, isa):
    opt, _ = in_training([nonzero(shape, dtype) for shape in SHAPES], formulation=formulation)
    with visited(opt, distance(formulation)) as before:
        assert any(before.has_moved)


@pytest.mark.parametrize("buffer_layout", ["as-made", "contiguous", "column"])
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "offset", "column", "step", "inner", "channels_last"])
@FLOAT_DTYPES
def test_layouts(dtype, layout, buffer_layout, isa):
    values = [nonzero(shape, dtype) for shape in [(4, 3, 5, 7), (300,), (17, 31)]]
    if layout == "channels_last":
        values = [values[0].to(memory_format=torch.channels_last)]
    else:
        values = [in_layout(value, layout) for value in values]
    opt, params = in_training(values)
    if buffer_layout != "as-made":
        for param in params:
            opt.state[param]["momentum_buffer"] = in_layout(opt.state[param]["momentum_buffer"], buffer_layout)
    with visited(opt) as before:
        assert all(before.has_moved)


@pytest.mark.parametrize("buffer_dtype", FLOATS, ids=dtype_name)
@FLOAT_DTYPES
def test_buffers_of_another_dtype(dtype, buffer_dtype, isa):
    opt, params = in_training([nonzero((1003,), dtype), in_layout(nonzero((17, 31), dtype), "column")])
    for param in params:
        opt.state[param]["momentum_buffer"] = nonzero(param.shape, buffer_dtype)
    with visited(opt) as before:
        assert all(before.has_moved)


@pytest.mark.parametrize(
    "options", [{"momentum_dtype": "int8"}, {"momentum_dtype": FP8}, {"master_weights": True}], ids=str
)
@FLOAT_DTYPES
def test_low_precision(dtype, options, isa):
    opt, _ = in_training([nonzero((1003,), dtype), nonzero((17, 31), dtype)], **options)
    with visited(opt) as before:
        assert all(before.has_moved)


@pytest.mark.parametrize(
    "values",
    [(1e-30,), (1e-7,), (1e4,), (6e4,), (3e38,), (float("inf"), -float("inf")), (float("nan"),), (0.0, -0.0)],
    ids=str,
)
@pytest.mark.parametrize("where", ["param", "buffer", "both"])
@FLOAT_DTYPES
def test_extreme_values(dtype, where, values, isa):
    """Tiny buffers that move nothing, huge ones that swallow the parameter or overflow, Inf and NaN."""
    shapes = [nonzero((1003,), dtype), in_layout(nonzero((17, 31), dtype), "column")]
    opt, params = in_training(shapes, formulation="classical")
    for param in params:
        scale = torch.tensor(values, dtype=torch.float64).repeat(param.numel())[: param.numel()].view(param.shape)
        for name, target in (("param", param.data), ("buffer", opt.state[param]["momentum_buffer"])):
            if where in (name, "both"):
                target[::2] = (target.double() * scale).to(dtype)[::2]
    with visited(opt, MU):
        pass


@FLOAT_DTYPES
def test_threads(dtype, isa, threads):
    """The iterate that the way back computes again is the same whatever the number of threads was."""
    opt, _ = in_training([nonzero((n,), dtype) for n in (100_003, 5, 65_537)], steps=1)
    with visited(opt):
        torch.set_num_threads(2)


@FLOAT_DTYPES
def test_another_instruction_set_on_the_way_back(dtype):
    isas = matching_isas()
    for there, back in zip(isas, [*isas[1:], isas[0]], strict=True):
        _C.set_isa(there)
        opt, _ = in_training([nonzero((n,), dtype) for n in (1003, 33)])
        with visited(opt):
            _C.set_isa(back)


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize("layout", ["contiguous", "column", "step"])
@pytest.mark.parametrize("kind", [torch.Tensor, Own])
@pytest.mark.parametrize("name", _C.isas())
@FLOAT_DTYPES
def test_where_roundings_may_differ_from_torchs(dtype, name, kind, layout):
    """Instruction sets without fma, and tensor subclasses: close to the rule there, and to the bit back."""
    _C.set_isa(name)
    values = [in_layout(nonzero(shape, dtype), layout).as_subclass(kind) for shape in [(257,), (17, 31), (1003,)]]
    opt = FusedMomentum([torch.nn.Parameter(value) for value in values], lr=LR, momentum=MU, nesterov=True)
    step(opt, 2)
    before = Snapshot(opt, "versions")
    with opt.iterate_weights():
        for param, value in zip(before.params, before.values, strict=True):
            found, value, buffer = (
                each.detach().as_subclass(torch.Tensor) for each in (param, value, opt.state[param]["momentum_buffer"])
            )
            assert not torch.equal(found, value)
            expected = iterate_of(value, buffer, MU * LR)
            torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    before.assert_unchanged()


def test_sparse_buffer():
    """torch keeps the momentum of sparse gradients sparse."""
    opt, (param,) = in_training([torch.randn(20, 5)], steps=0, nesterov=False)
    param.grad = (torch.randn(20, 5) * (torch.arange(20) % 3 == 0)[:, None]).to_sparse(1)
    opt.step()
    opt.param_groups[0]["nesterov"] = True
    buffer = opt.state[param]["momentum_buffer"]
    assert buffer.is_sparse
    before = Snapshot(opt, "versions")
    with opt.iterate_weights():
        torch.testing.assert_close(param.detach(), before.values[0] + MU * LR * buffer.to_dense())
        assert before.has_moved == [True]
    before.assert_unchanged()


def test_another_device_beside_the_cpu():
    opt, _ = in_training([torch.randn(33)])
    meta = torch.nn.Parameter(torch.empty(5, device="meta"))
    opt.add_param_group({"params": [meta]})
    opt.state[meta]["momentum_buffer"] = torch.empty(5, device="meta")
    before = Snapshot(opt, "versions")
    with opt.iterate_weights():
        assert not torch.equal(before.params[0], before.values[0])
    before.assert_unchanged()


SHARING = {
    "one tensor": lambda w: [w, w],
    "overlapping": lambda w: [w[:-5], w[7:]],
    "the other way round": lambda w: [w[7:], w[:-5]],
    "one element each": lambda w: [w[i : i + 5_001] for i in range(0, 395_000, 5_000)],
    "interleaved": lambda w: [w[::2], w[1::2]],
    "three": lambda w: [w[: w.numel() // 2], w, w[w.numel() // 3 :]],
    "a subclass": lambda w: [w.as_subclass(Own), w[1:]],
    "beside others": lambda w: [torch.randn(5), w, torch.randn(3), w[9:].view(-1)],
}


@pytest.mark.parametrize("case", SHARING)
def test_parameters_that_share_memory(case):
    """They move one after the other, and back in reverse."""
    torch.set_num_threads(2)
    weight = torch.randn(400_000)
    params = [torch.nn.Parameter(view) for view in SHARING[case](weight)]
    opt = FusedMomentum(params, lr=LR, momentum=MU, nesterov=True)
    step(opt, 2)
    before, expected = Snapshot(opt, "versions"), clone_params(params)
    with torch.no_grad():
        for param, copied in zip(params, expected, strict=True):
            copied.copy_(iterate_of(copied, opt.state[param]["momentum_buffer"], MU * LR))
    for _ in range(5):  # a race does not show each time
        with opt.iterate_weights():
            for param, copied in zip(params, expected, strict=True):
                assert_same(param.detach().as_subclass(torch.Tensor), copied.detach().as_subclass(torch.Tensor))
        before.assert_unchanged()


@pytest.mark.parametrize("first", [{}, {"nesterov": False}, {"lr": 0.5}], ids=str)
def test_a_parameter_that_is_in_two_groups_moves_once(first):
    opt, params = in_training([torch.randn(33)])
    opt.param_groups.insert(0, {**opt.param_groups[0], "params": params[:], **first})
    with visited(opt, MU * first.get("lr", LR)):
        pass
    step(opt)


def mixed_groups():
    """Each in its units."""
    hypers = [{}, {"formulation": "classical", "lr": 0.3}, {"formulation": "ema"}, {"nesterov": False}]
    groups = [{"params": [torch.nn.Parameter(torch.randn(257))], **hyper} for hyper in hypers]
    opt = FusedMomentum(groups, lr=LR, momentum=MU, nesterov=True)
    step(opt, 3)
    return opt


def without_a_buffer():
    opt, params = in_training([torch.randn(300), torch.randn(17)], steps=0)
    params[0].grad = torch.randn(300)
    opt.step()
    return opt


def waiting_for_a_conversion():
    opt, _ = in_training([torch.randn(300)])
    opt.param_groups[0]["formulation"] = "classical"
    return opt


MOVES = {
    "mixed groups": (mixed_groups, [MU * LR, MU, MU * LR, 0]),
    "no Nesterov": (lambda: in_training([torch.randn(300)], nesterov=False)[0], [0]),
    "no momentum": (lambda: in_training([torch.randn(300)], nesterov=False, momentum=0)[0], [0]),
    "before the first step": (lambda: in_training([torch.randn(300)], steps=0)[0], [0]),
    "one without a buffer": (without_a_buffer, [MU * LR, 0]),
    "buffers in the form that they still have": (waiting_for_a_conversion, [MU * LR]),
}


@pytest.mark.parametrize("case", MOVES)
def test_who_moves(case):
    make, by = MOVES[case]
    opt = make()
    with visited(opt, *by) as before:
        assert before.has_moved == [each != 0 for each in by]
        with pytest.raises(RuntimeError, match="iterate_weights"):
            opt.step()  # the context is one for all groups
    step(opt)


# ----------------------------------------------------------------------------------------------------------- inside


def copied(opt):
    """An object of the same class with the optimizer's attributes."""
    wrapper = object.__new__(type(opt))
    wrapper.__dict__.update(opt.__dict__)
    return wrapper


def subclassed(opt):
    """As Lightning's and Fabric's wrappers: a class of its own, over a copy of the attributes, and its own step()."""

    class Wrapper:
        def __init__(self):
            self.__dict__ = {key: value for key, value in opt.__dict__.items() if key not in ("state_dict", "step")}
            self.__class__ = type("Wrapped", (Wrapper, type(opt)), {})

        def step(self, closure=None):
            return opt.step(closure)

    return Wrapper()


class Forwarding:
    """As accelerate's."""

    def __init__(self, opt):
        self.opt = opt

    def __getattr__(self, name):
        return getattr(self.opt, name)


REFUSED = {
    "step": lambda opt: opt.step(),
    "step with a closure": lambda opt: opt.step(lambda: pytest.fail("the closure must not run")),
    "state_dict": lambda opt: opt.state_dict(),
    "torch_state_dict": lambda opt: opt.torch_state_dict(),
    "load_state_dict": lambda opt: opt.load_state_dict({"state": {}, "param_groups": []}),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "iterate_weights": lambda opt: opt.iterate_weights().__enter__(),
    "ema_weights": lambda opt: opt.ema_weights().__enter__(),
}


@pytest.mark.parametrize("action", REFUSED)
@pytest.mark.parametrize("context", ["iterate_weights", "ema_weights"])
@pytest.mark.parametrize("enters", [0, 1, 2, 3], ids=["itself", "copied", "subclassed", "forwarding"])
def test_refused_inside(context, action, enters):
    """By the optimizer and whatever wraps it, before or inside, whoever enters; nothing changes."""
    opt, params = in_training([torch.randn(300), torch.randn(17)], ema_decay=0.5)
    twin = copy.deepcopy(opt)
    wraps = [lambda opt: opt, copied, subclassed, Forwarding]
    faces = [wrap(opt) for wrap in wraps]
    before = Snapshot(opt, "versions")
    with getattr(faces[enters], context)():
        assert all(before.has_moved)
        held = Snapshot(opt)
        for face in (*faces, *(wrap(opt) for wrap in wraps)):
            if isinstance(face, Forwarding) and action in ("deepcopy", "pickle"):
                continue  # these look for attributes where no optimizer is yet
            with pytest.raises(RuntimeError, match=rf"leave {context}\(\) first"):
                REFUSED[action](face)
            held.assert_unchanged()
    before.assert_unchanged()
    for p, q in zip(params, params_of(twin), strict=True):
        p.grad = nonzero(p)
        q.grad = p.grad.clone()
    faces[enters].step()
    twin.step()
    assert_same_training(opt, twin)


def test_an_exception_inside_restores():
    opt, _ = in_training([torch.randn(300), torch.randn(17)])
    before = Snapshot(opt, "versions")
    with pytest.raises(KeyError, match="mine"), opt.iterate_weights():
        assert all(before.has_moved)
        raise KeyError("mine")
    before.assert_unchanged()
    with visited(opt):
        pass
    step(opt)


def test_elements_that_are_changed_inside_move_by_the_distance():
    """A model that was loaded there, say; the others come back to the bit."""
    values = [torch.randn(1003), in_layout(torch.randn(17, 31), "column")]
    opt, params = in_training(values, formulation="classical")
    before = Snapshot(opt)
    with opt.iterate_weights(), torch.no_grad():
        for param in params:
            param[::3] += 1.5
        changed = [param.detach().clone() for param in params]
    for param, value, inside in zip(params, before.values, changed, strict=True):
        assert_same(param[::3], inside[::3].sub(opt.state[param]["momentum_buffer"][::3], alpha=MU))
        for rest in (1, 2):
            assert_same(param[rest::3], value[rest::3])


EDITS = {
    **{str(edit): lambda opt, edit=edit: opt.param_groups[0].update(edit) for edit in (
        {"lr": 0.7}, {"nesterov": False}, {"momentum": 0.5}, {"lr": 0.0}, {"lr": torch.tensor(0.3)},
        {"formulation": "classical"},
    )},
    "lr.fill_": lambda opt: opt.param_groups[0]["lr"].fill_(9.0),
    "add_param_group": lambda opt: opt.add_param_group({"params": [torch.nn.Parameter(torch.randn(17))]}),
    "state.clear": lambda opt: opt.state.clear(),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_edits_inside_do_not_matter_on_the_way_back(edit):
    """A scheduler that steps while the model is evaluated."""
    opt, (param,) = in_training([torch.randn(300)])
    if edit == "lr.fill_":
        opt.param_groups[0]["lr"] = torch.tensor(LR, dtype=torch.float64)
    value, buffer = param.detach().clone(), opt.state[param]["momentum_buffer"].clone()
    with opt.iterate_weights():
        assert not torch.equal(param, value)
        EDITS[edit](opt)
    assert_same(param, value)
    if "formulation" in edit:
        assert_same(opt.state_dict()["state"][0]["momentum_buffer"], buffer * LR)
    step(opt)


def test_autograd_knows_that_the_parameters_have_moved():
    opt, params = in_training([torch.randn(300), torch.randn(17)])
    outside = sum(p.square().sum() for p in params)
    with opt.iterate_weights():
        inside = sum(p.square().sum() for p in params)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outside.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()


# ----------------------------------------------------------------------------------------------------- what is wrong


# Memory that is not there from the start: plan/test_missing_memory.py.


@pytest.mark.parametrize(
    "context, what", [("iterate_weights", "param"), ("ema_weights", "param"), ("ema_weights", "ema")]
)
def test_memory_that_goes_inside(context, what):
    """Looked at again on the way back; the context is left all the same."""
    opt, params = in_training([torch.randn(n) for n in (33, 300)], ema_decay=0.5)
    storage = (params[1] if what == "param" else opt.state[params[1]][what]).untyped_storage()
    with pytest.raises(RuntimeError, match=r"1.*freed or resized"), getattr(opt, context)():
        storage.resize_(storage.nbytes() - 4)
    storage.resize_(storage.nbytes() + 4)
    with getattr(opt, context)():
        pass


def freed():
    buffer = torch.ones(300)
    buffer.untyped_storage().resize_(0)
    return buffer


BAD = {
    "its shape": lambda: torch.ones(301),
    "another device": lambda: torch.ones(300, device="meta"),
    "ComplexFloat": lambda: torch.ones(300, dtype=torch.complex64),
    "freed or resized": freed,
}


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("first", [torch.Tensor.clone, torch.Tensor.to_sparse], ids=["dense", "sparse"])
def test_a_buffer_that_cannot_be_used(first, bad, shares):
    """The parameter before it, which a kernel moves or torch, stays where it is; the context is not entered."""
    weight = torch.randn(600)
    params = [torch.nn.Parameter(weight[:300]), torch.nn.Parameter(weight[200:500] if shares else weight[300:])]
    opt = FusedMomentum(params, lr=LR, momentum=MU, nesterov=True)
    step(opt, 2)
    first_state, second_state = (opt.state[param] for param in params)
    first_state["momentum_buffer"] = first(first_state["momentum_buffer"])
    good, second_state["momentum_buffer"] = second_state["momentum_buffer"], BAD[bad]()
    for _ in range(2):
        with refused(opt, RuntimeError, bad, "versions"), opt.iterate_weights():
            pytest.fail("it must not come here")
    second_state["momentum_buffer"], before = good, weight.clone()
    with opt.iterate_weights():
        assert not torch.equal(weight, before)
    assert_same(weight, before)

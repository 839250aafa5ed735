"""clip_grad_norm_ and max_grad_norm: torch's clipping, without a write to the gradients."""

import itertools
import math

import pytest
import torch
from harness import Pair, Snapshot, assert_same, norm_in_double, params_of, refused
from torch.nn.utils import clip_grad_norm_, get_total_norm
from values import EACH_COPY, FLOAT_DTYPES, LAYOUTS, clone_exact, clone_params, in_layout

import momentum_ext
from momentum_ext import _C, FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
BLOCK = 16384  # elements in a block of the norm
SIZES = (0, 1, 7, 8, 31, 32, 33, 255, 256, 257, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5)
NORM_TYPES = pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
SCALERS = pytest.mark.parametrize("kind", [momentum_ext.GradScaler, torch.amp.GradScaler], ids=["ours", "torch's"])


def with_grads(tensors):
    params = clone_params(tensors)
    for param in params:
        param.grad = torch.randn(param.shape).to(param.dtype)
    return params


def exact_norm(params, norm_type=2.0):
    values = torch.cat([p.grad.detach().abs().double().reshape(-1) for p in params if p.grad is not None])
    return torch.linalg.vector_norm(values, norm_type).item()


def pair_of(*sizes, scale=1.0, **mine):
    """With gradients; the options are those of FusedMomentum alone."""
    pair = Pair([torch.randn(size) for size in sizes], **HYPER, mine=mine)
    pair.new_grads(scale=scale)
    return pair


def grads_of(opt):
    return [param.grad for param in params_of(opt)]


def clip(pair, max_norm, *args, **options):
    """Both clip: (our norm, torch's)."""
    ours = pair.mine.clip_grad_norm_(max_norm, *args, **options)
    return ours, clip_grad_norm_(params_of(pair.theirs), max_norm, *args, **options)


def step_close(pair):
    """The only difference is the norm's last bit, so the coefficient's: two roundings of the gradient."""
    pair.both(lambda opt: opt.step())
    pair.check_close(2e-6, 2e-6)


def scaler_of(kind, scale):
    scaler = kind("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))
    return scaler


# -------------------------------------------------------------------------------------------------------------- norm


@NORM_TYPES
@FLOAT_DTYPES
def test_norm(norm_type, dtype):
    params = with_grads([torch.zeros(n, dtype=dtype) for n in SIZES])
    opt = FusedMomentum(params, **HYPER)
    norm = opt.clip_grad_norm_(1e9, norm_type)
    theirs = get_total_norm([p.grad for p in params if p.numel()], norm_type)
    assert (norm.dtype, norm.shape, norm.device) == (theirs.dtype, theirs.shape, theirs.device)
    exact = torch.tensor(exact_norm(params, norm_type), dtype=torch.float64).to(dtype)
    torch.testing.assert_close(norm, exact, rtol=max(1e-13, torch.finfo(dtype).eps), atol=0)


ODD = {
    **{layout: lambda layout=layout: in_layout(torch.randn(17, 23), layout) for layout in LAYOUTS},
    "expanded": lambda: torch.tensor(3.0).expand(1000),
    "complex": lambda: torch.randn(33, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", ODD)
def test_norm_of_odd_gradients(kind):
    params = clone_params([torch.zeros_like(ODD[kind](), memory_format=torch.contiguous_format) for _ in range(3)])
    for param in params:
        param.grad = ODD[kind]()
    norm = FusedMomentum(params, **HYPER).clip_grad_norm_(1e9)
    torch.testing.assert_close(norm.item(), exact_norm(params), rtol=1e-7, atol=0)


@NORM_TYPES
def test_same_bits_on_every_run_thread_count_and_instruction_set(norm_type):
    opt = FusedMomentum(with_grads([torch.zeros(n) for n in (*SIZES, 200 * BLOCK + 77)]), **HYPER)
    norms = set()
    for name, threads, _ in itertools.product(_C.isas(), (1, 2, 3, 7), range(3)):
        _C.set_isa(name)
        torch.set_num_threads(threads)
        norms.add(norm_in_double(opt, norm_type))
    assert len(norms) == 1


@pytest.mark.parametrize(("value", "dtype"), [(1e30, torch.float32), (1e-40, torch.float32), (1e300, torch.float64)])
def test_range(value, dtype):
    """Squares that leave the range of the dtype, and for doubles that of a double."""
    param = torch.nn.Parameter(torch.zeros(10_000, dtype=dtype))
    param.grad = torch.full((10_000,), value, dtype=dtype)
    norm = FusedMomentum([param], lr=0.1).clip_grad_norm_(1.0)
    torch.testing.assert_close(norm.item(), 100 * param.grad[0].item(), rtol=1e-6, atol=0)


def test_many_small_ones_beside_a_large_one():
    """In fp32, adding 2**-26 to 1 changes nothing, however often."""
    param = torch.nn.Parameter(torch.zeros(1 << 22))
    param.grad = torch.full((1 << 22,), 2.0**-13)
    param.grad[0] = 1.0
    norm = norm_in_double(FusedMomentum([param], lr=0.1))
    assert norm**2 == pytest.approx(1 + ((1 << 22) - 1) * 2.0**-26, rel=1e-15)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@NORM_TYPES
def test_not_finite(bad, norm_type):
    pair = pair_of(33, 70_000)
    for param in pair.params[1]:
        param.grad[12345] = bad
    assert_same(*clip(pair, 1.0, norm_type))
    pair.step_as_is()


def test_error_if_nonfinite():
    pair = pair_of(33)
    for param in pair.params[0]:
        param.grad[3] = math.nan
    with refused(pair.mine, RuntimeError, "non-finite"):
        pair.mine.clip_grad_norm_(1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(params_of(pair.theirs), 1.0, error_if_nonfinite=True)


def test_no_gradients():
    pair = Pair([torch.randn(5)], **HYPER)
    assert_same(*clip(pair, 1.0))
    pair.step_as_is()


# -------------------------------------------------------------------------------------------------------------- step


@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1.0, 40.0, 1e6])
@pytest.mark.parametrize(
    "how, norm_type", [("call", 1.0), ("call", 2.0), ("call", math.inf), ("call", 3.0), ("constructor", 2.0)]
)
def test_trajectory_of_torch(how, max_norm, norm_type):
    """To the bit where nothing is to clip; only norms of torch's own functions write."""
    pair = pair_of(33, 1000, BLOCK + 3, **({"max_grad_norm": max_norm} if how == "constructor" else {}))
    for step in range(20):
        pair.new_grads(scale=0.001 if step % 4 == 0 else 1.0)
        given = [grad.clone() for grad in grads_of(pair.mine)]
        expected = clip_grad_norm_(params_of(pair.theirs), max_norm, norm_type)
        if how == "call":
            norm = pair.mine.clip_grad_norm_(max_norm, norm_type)
        pair.both(lambda opt: opt.step())
        norm = pair.mine.grad_norm if how == "constructor" else norm
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        for grad, before in zip(grads_of(pair.mine), given, strict=True) if norm_type != 3.0 else ():
            assert_same(grad, before)
    pair.check_close(2e-6, 2e-6)
    if max_norm == 1e6:
        pair.check()


def test_in_a_closure():
    pair = pair_of(1000, scale=7.0)

    def closure(opt, clips):
        params_of(opt)[0].grad = torch.full((1000,), 3.0)
        clips(0.5)
        return 1.25

    assert pair.mine.step(lambda: closure(pair.mine, pair.mine.clip_grad_norm_)) == 1.25
    pair.theirs.step(lambda: closure(pair.theirs, lambda norm: clip_grad_norm_(params_of(pair.theirs), norm)))
    pair.check_close(1e-6, 1e-6)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_several_groups_and_a_parameter_that_is_repeated_in_one():
    """It counts once."""
    params = with_grads([torch.randn(33), torch.randn(65), torch.ones(3)])
    opt = FusedMomentum([{"params": [params[0], params[1], params[1]]}, {"params": params[2:]}], lr=1)
    torch.testing.assert_close(opt.clip_grad_norm_(1.0).item(), exact_norm(params), rtol=1e-6, atol=0)


def test_sparse_gradients_take_torchs_path():
    """Which knows no norm of them."""
    pair = pair_of((50, 19), 7)
    for param in pair.params[0]:
        param.grad = (torch.arange(50.0)[:, None] * torch.ones(50, 19) % 3).to_sparse(1).coalesce()
    for clips in (pair.mine.clip_grad_norm_, lambda norm: clip_grad_norm_(params_of(pair.theirs), norm)):
        with refused(pair.mine, NotImplementedError, r"linalg_vector_norm.*Sparse"):
            clips(1.0)


@pytest.mark.parametrize("max_grad_norm", [-1.0, math.nan])
def test_bad_max_grad_norm(max_grad_norm):
    with pytest.raises(ValueError, match="max_grad_norm"):
        FusedMomentum([torch.nn.Parameter(torch.ones(1))], lr=0.1, max_grad_norm=max_grad_norm)


@EACH_COPY
def test_max_grad_norm_survives_copies(copied):
    opt = copied(FusedMomentum([torch.nn.Parameter(torch.randn(33))], lr=0.1, max_grad_norm=0.25))
    (param,) = params_of(opt)
    param.grad = torch.full((33,), 9.0)
    before = clone_exact(param)
    opt.step()
    assert torch.linalg.vector_norm(before - param.detach()).item() == pytest.approx(0.1 * 0.25, rel=1e-4)


# --------------------------------------------------------------------------------------------------------------- AMP


ORDERS = ["step", "unscale-step", "unscale-clip-step", "constructor"]


@pytest.mark.parametrize(
    "scaler_kind, order",
    # torch's clipping beside our scaler writes to gradients that are still scaled: the docstring names the method
    [
        *itertools.product([momentum_ext.GradScaler, torch.amp.GradScaler], ORDERS),
        (torch.amp.GradScaler, "clip-by-torch"),
    ],
)
@pytest.mark.parametrize("overflow_at", [(), (0,), (0, 3, 7)], ids=str)
def test_grad_scaler(scaler_kind, order, overflow_at):
    pair = pair_of(33, BLOCK + 9, **({"max_grad_norm": 2.0} if order == "constructor" else {}))
    opt, sgd = pair.optimizers
    scalers = [kind("cpu", init_scale=1024.0, growth_interval=3) for kind in (scaler_kind, torch.amp.GradScaler)]
    for step in range(12):
        pair.new_grads()
        before = Snapshot(opt, "grads")
        for index, (optimizer, scaler) in enumerate(zip(pair.optimizers, scalers, strict=True)):
            scale = scaler.scale(torch.ones(())).item()
            for params in pair.params:
                params[index].grad *= scale
            if step in overflow_at:
                pair.params[1][index].grad[77] = math.inf
            clips = order not in ("step", "unscale-step")
            if order != "step" and not (order == "constructor" and optimizer is opt):
                scaler.unscale_(optimizer)
            if (clips and optimizer is sgd) or order == "clip-by-torch":
                clip_grad_norm_(params_of(optimizer), 2.0)
            elif order == "unscale-clip-step":
                opt.clip_grad_norm_(2.0)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        if step in overflow_at:
            before.assert_unchanged()
    pair.check_close(3e-6, 3e-6)


def test_our_grad_scaler_does_not_write():
    pair = pair_of(33, scale=1024.0)
    scaler = scaler_of(momentum_ext.GradScaler, 1024.0)
    (grad,) = grads_of(pair.mine)
    kept, version = grad.clone(), grad._version
    scaler.unscale_(pair.mine)
    pair.mine.clip_grad_norm_(1.0)
    scaler.step(pair.mine)
    assert grad._version == version
    assert_same(grad, kept)


def test_our_grad_scaler_with_another_optimizer_and_fp16():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.full((3,), 8.0)
    scaler = scaler_of(momentum_ext.GradScaler, 8.0)
    opt = torch.optim.SGD([param], lr=0.5)
    scaler.unscale_(opt)
    assert param.grad.tolist() == [1.0] * 3
    scaler.step(opt)
    assert param.tolist() == [0.5] * 3
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    half.grad = torch.ones(3, dtype=torch.float16)
    scaler, opt = scaler_of(momentum_ext.GradScaler, 8.0), FusedMomentum([half], lr=0.1)
    with pytest.raises(ValueError, match="FP16"):
        scaler.unscale_(opt)


def test_a_step_that_fails_leaves_no_clipping_behind():
    pair = pair_of(33, 9, scale=7.0, max_grad_norm=0.5)
    opt, second = pair.mine, pair.params[1][0]
    opt.state[second]["momentum_buffer"] = torch.zeros(5)
    with pytest.raises(RuntimeError, match="momentum_buffer"):
        opt.step()
    del opt.state[second]
    pair.set_grad(0, torch.full((33,), 2.0))
    opt.step()
    torch.testing.assert_close(opt.grad_norm, get_total_norm(grads_of(pair.theirs)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_refused", [True, False], ids=["refused", "loaded"])
def test_a_state_that_comes_leaves_the_clipping(is_refused):
    pair = pair_of(33, scale=7.0)
    clip(pair, 0.5, foreach=True)
    if is_refused:
        other = FusedMomentum(with_grads([torch.randn(33)]), lr=0.1, momentum=0.9, formulation="ema")
        other.step()
        with pytest.raises(ValueError, match="formulation"):
            pair.mine.load_state_dict(other.state_dict())
    else:
        pair.mine.load_state_dict(pair.mine.state_dict())
    step_close(pair)


@SCALERS
def test_a_step_that_raised_is_not_scaled_twice_later(kind):
    param = torch.nn.Parameter(torch.zeros(33))
    opt = FusedMomentum([param], lr=0.1)
    scaler = scaler_of(kind, 64.0)
    hook = opt.register_step_pre_hook(lambda *_: 1 / 0)
    param.grad = torch.full((33,), 64.0)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        scaler.step(opt)
    assert not {"grad_scale", "found_inf"} & vars(opt).keys()
    hook.remove()
    opt.zero_grad()
    scaler.update()
    param.grad = torch.full((33,), 64.0)
    scaler.step(opt)
    assert param.tolist() == pytest.approx([-0.1] * 33)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_step_that_the_user_leaves_out(in_place):
    """scaler.update() ends what unscale_() began, as with torch's scaler."""
    param = torch.nn.Parameter(torch.zeros(9))
    opt = FusedMomentum([param], lr=0.5)
    scaler = scaler_of(momentum_ext.GradScaler, 8.0)
    for leave_out in (True, False):
        if in_place and param.grad is not None:
            param.grad.zero_().add_(8.0)
        else:
            param.grad = torch.full((9,), 8.0)
        scaler.unscale_(opt)
        if not leave_out:
            scaler.step(opt)
        scaler.update()
    assert param.tolist() == [-0.5] * 9

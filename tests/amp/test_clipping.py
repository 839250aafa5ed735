"""clip_grad_norm_ and max_grad_norm: torch's clipping, without a write to the gradients."""

import itertools
import math

import pytest
import torch
from harness import LAYOUTS, Snapshot, assert_same, clone_exact, clone_params, in_layout

import momentum_ext
from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
BLOCK = 16384  # elements in a block of the norm
SIZES = (0, 1, 7, 8, 31, 32, 33, 255, 256, 257, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5)


def with_grads(tensors, scale=1.0):
    params = clone_params(tensors)
    for param in params:
        param.grad = torch.randn(param.shape).to(param.dtype) * scale
    return params


def exact_norm(params, norm_type=2.0):
    values = torch.cat([p.grad.detach().abs().double().reshape(-1) for p in params if p.grad is not None])
    return torch.linalg.vector_norm(values, norm_type).item()


def twins(tensors, scale=1.0, **hyper):
    """(FusedMomentum, its parameters, torch's for-loop, its parameters), with equal gradients."""
    mine = with_grads(tensors, scale)
    theirs = clone_params(mine)
    for a, b in zip(mine, theirs, strict=True):
        b.grad = a.grad.clone()
    return FusedMomentum(mine, **HYPER, **hyper), mine, torch.optim.SGD(theirs, **HYPER, foreach=False), theirs


# -------------------------------------------------------------------------------------------------------------- norm


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_norm(norm_type, dtype):
    params = with_grads([torch.zeros(n, dtype=dtype) for n in SIZES])
    opt = FusedMomentum(params, **HYPER)
    norm = opt.clip_grad_norm_(1e9, norm_type)
    theirs = torch.nn.utils.get_total_norm([p.grad for p in params if p.numel()], norm_type)
    assert (norm.dtype, norm.shape, norm.device) == (theirs.dtype, theirs.shape, theirs.device)
    exact = torch.tensor(exact_norm(params, norm_type), dtype=torch.float64).to(dtype)
    torch.testing.assert_close(norm, exact, rtol=max(1e-13, torch.finfo(dtype).eps), atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_of_layouts(layout):
    params = [torch.nn.Parameter(torch.zeros(17, 23)) for _ in range(3)]
    for param in params:
        param.grad = in_layout(torch.randn(17, 23), layout)
    norm = FusedMomentum(params, **HYPER).clip_grad_norm_(1.0)
    torch.testing.assert_close(norm.item(), exact_norm(params), rtol=1e-7, atol=0)


def test_norm_of_an_expanded_gradient_and_of_complex_ones():
    params = [torch.nn.Parameter(torch.zeros(1000)), torch.nn.Parameter(torch.zeros(33, dtype=torch.complex64))]
    params[0].grad = torch.tensor(3.0).expand(1000)
    params[1].grad = torch.randn(33, dtype=torch.complex64)
    norm = FusedMomentum(params, lr=0.1).clip_grad_norm_(1e9)
    torch.testing.assert_close(norm.item(), exact_norm(params), rtol=1e-7, atol=0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_same_bits_on_every_run_thread_count_and_instruction_set(norm_type):
    params = with_grads([torch.zeros(n) for n in (*SIZES, 200 * BLOCK + 77)])
    opt = FusedMomentum(params, **HYPER)
    before, isa = torch.get_num_threads(), momentum_ext._C.isa()
    try:
        norms = set()
        for name, threads, _ in itertools.product(momentum_ext._C.isas(), (1, 2, 3, 7), range(3)):
            momentum_ext._C.set_isa(name)
            torch.set_num_threads(threads)
            norms.add(opt._grad_factor._norms.compute(opt.param_groups, norm_type)[0])
    finally:
        momentum_ext._C.set_isa(isa)
        torch.set_num_threads(before)
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
    norm = FusedMomentum([param], lr=0.1)._grad_factor
    value, _ = norm._norms.compute([{"params": [param]}], 2.0)
    assert value**2 == pytest.approx(1 + ((1 << 22) - 1) * 2.0**-26, rel=1e-15)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_not_finite(bad, norm_type):
    opt, mine, sgd, theirs = twins([torch.randn(33), torch.randn(70_000)])
    for params in (mine, theirs):
        params[1].grad[12345] = bad
    norm = opt.clip_grad_norm_(1.0, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type)
    assert_same(norm, expected)
    opt.step()
    sgd.step()
    for a, b in zip(mine, theirs, strict=True):
        assert_same(a, b)


def test_error_if_nonfinite():
    opt, mine, _, theirs = twins([torch.randn(33)])
    for params in (mine, theirs):
        params[0].grad[3] = math.nan
    before = Snapshot(opt)
    for clip in (opt.clip_grad_norm_, lambda *a, **k: torch.nn.utils.clip_grad_norm_(theirs, *a, **k)):
        with pytest.raises(RuntimeError, match="non-finite"):
            clip(1.0, error_if_nonfinite=True)
    before.assert_unchanged()


def test_no_gradients():
    param = torch.nn.Parameter(torch.randn(5))
    opt = FusedMomentum([param], **HYPER)
    assert_same(opt.clip_grad_norm_(1.0), torch.nn.utils.clip_grad_norm_([param], 1.0))
    opt.step()


# -------------------------------------------------------------------------------------------------------------- step


@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1.0, 40.0])
@pytest.mark.parametrize(
    "how, norm_type", [("call", 1.0), ("call", 2.0), ("call", math.inf), ("call", 3.0), ("constructor", 2.0)]
)
def test_trajectory_of_torch(how, max_norm, norm_type):
    """The only difference is the norm's last bit, so the coefficient's: two roundings of the gradient."""
    extra = {"max_grad_norm": max_norm} if how == "constructor" else {}
    opt, mine, sgd, theirs = twins([torch.randn(n) for n in (33, 1000, BLOCK + 3)], **extra)
    for step in range(20):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape) * (0.001 if step % 4 == 0 else 1.0)
            b.grad = a.grad.clone()
        given = [p.grad.clone() for p in mine]
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
        if how == "call":
            norm = opt.clip_grad_norm_(max_norm, norm_type)
        opt.step()
        sgd.step()
        norm = opt.grad_norm if how == "constructor" else norm
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        if norm_type != 3.0:  # torch's own function, which writes
            for param, grad in zip(mine, given, strict=True):
                assert_same(param.grad, grad)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(
            opt.state[a]["momentum_buffer"], sgd.state[b]["momentum_buffer"], rtol=2e-6, atol=2e-6
        )


def test_nothing_clipped_is_nothing_changed():
    opt, mine, sgd, theirs = twins([torch.randn(n) for n in (33, 1000)])
    for _ in range(20):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        opt.clip_grad_norm_(1e6)
        opt.step()
        sgd.step()
    for a, b in zip(mine, theirs, strict=True):
        assert_same(a, b)


def test_in_a_closure():
    opt, mine, sgd, theirs = twins([torch.randn(1000)], scale=7.0)

    def closure(params, clip):
        params[0].grad = torch.full((1000,), 3.0)
        clip()
        return 1.25

    assert opt.step(lambda: closure(mine, lambda: opt.clip_grad_norm_(0.5))) == 1.25
    sgd.step(lambda: closure(theirs, lambda: torch.nn.utils.clip_grad_norm_(theirs, 0.5)))
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-6)


def test_several_groups_and_a_parameter_in_two():
    params = with_grads([torch.randn(33), torch.randn(65)])
    with pytest.warns(UserWarning, match="duplicate"):
        opt = FusedMomentum(
            [{"params": [params[0], params[1], params[1]]}, {"params": with_grads([torch.ones(3)])}], lr=1
        )
    unique = [params[0], params[1], opt.param_groups[1]["params"][0]]
    torch.testing.assert_close(opt.clip_grad_norm_(1.0).item(), exact_norm(unique), rtol=1e-6, atol=0)


def test_sparse_gradients_take_torchs_path():
    """Which knows no norm of them."""
    for kind in (FusedMomentum, torch.optim.SGD):
        params = clone_params([torch.randn(50, 19), torch.ones(7)])
        params[0].grad = (torch.arange(50.0)[:, None] * torch.ones(50, 19) % 3).to_sparse(1).coalesce()
        params[1].grad = torch.full((7,), 2.0)
        opt = kind(params, lr=0.1)
        before = Snapshot(opt)
        with pytest.raises(NotImplementedError, match=r"linalg_vector_norm.*Sparse"):
            opt.clip_grad_norm_(1.0) if kind is FusedMomentum else torch.nn.utils.clip_grad_norm_(params, 1.0)
        before.assert_unchanged()


@pytest.mark.parametrize("max_grad_norm", [-1.0, math.nan])
def test_bad_max_grad_norm(max_grad_norm):
    with pytest.raises(ValueError, match="max_grad_norm"):
        FusedMomentum([torch.nn.Parameter(torch.ones(1))], lr=0.1, max_grad_norm=max_grad_norm)


def test_max_grad_norm_survives_copies():
    import copy
    import pickle

    opt = FusedMomentum(with_grads([torch.randn(33)], scale=50.0), lr=0.1, max_grad_norm=0.25)
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        param = copied.param_groups[0]["params"][0]
        param.grad = torch.full((33,), 9.0)
        before = clone_exact(param)
        copied.step()
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
    extra = {"max_grad_norm": 2.0} if order == "constructor" else {}
    opt, mine, sgd, theirs = twins([torch.randn(33), torch.randn(BLOCK + 9)], **extra)
    scalers = [kind("cpu", init_scale=1024.0, growth_interval=3) for kind in (scaler_kind, torch.amp.GradScaler)]
    for step in range(12):
        values = [torch.randn(p.shape) for p in mine]
        if step in overflow_at:
            values[1][77] = math.inf
        before = Snapshot(opt, "grads")
        for optimizer, params, scaler in ((opt, mine, scalers[0]), (sgd, theirs, scalers[1])):
            scale = scaler.scale(torch.ones(())).item()
            for param, value in zip(params, values, strict=True):
                param.grad = value * scale
            clips = order not in ("step", "unscale-step")
            if order != "step" and not (order == "constructor" and optimizer is opt):
                scaler.unscale_(optimizer)
            if (clips and optimizer is sgd) or order == "clip-by-torch":
                torch.nn.utils.clip_grad_norm_(params, 2.0)
            elif order == "unscale-clip-step":
                opt.clip_grad_norm_(2.0)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        if step in overflow_at:
            before.assert_unchanged()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)


def test_our_grad_scaler_does_not_write():
    opt, mine, _, _ = twins([torch.randn(33)], scale=1024.0)
    scaler = momentum_ext.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    kept, version = mine[0].grad.clone(), mine[0].grad._version
    scaler.unscale_(opt)
    opt.clip_grad_norm_(1.0)
    scaler.step(opt)
    assert mine[0].grad._version == version
    assert_same(mine[0].grad, kept)


def test_our_grad_scaler_with_another_optimizer_and_fp16():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.full((3,), 8.0)
    scaler = momentum_ext.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    opt = torch.optim.SGD([param], lr=0.5)
    scaler.unscale_(opt)
    assert param.grad.tolist() == [1.0] * 3
    scaler.step(opt)
    assert param.tolist() == [0.5] * 3
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    half.grad = torch.ones(3, dtype=torch.float16)
    with pytest.raises(ValueError, match="FP16"):
        momentum_ext_scaler = momentum_ext.GradScaler("cpu")
        momentum_ext_scaler.scale(torch.ones(()))
        momentum_ext_scaler.unscale_(FusedMomentum([half], lr=0.1))


def test_a_step_that_fails_leaves_no_clipping_behind():
    opt, mine, _, theirs = twins([torch.randn(33), torch.randn(9)], scale=7.0, max_grad_norm=0.5)
    buffer = torch.zeros(5)
    opt.state[mine[1]]["momentum_buffer"] = buffer
    with pytest.raises(RuntimeError, match="momentum_buffer"):
        opt.step()
    del opt.state[mine[1]]
    mine[0].grad = torch.full((33,), 2.0)
    theirs[0].grad = mine[0].grad.clone()
    norm = torch.nn.utils.get_total_norm([p.grad for p in theirs])
    opt.step()
    torch.testing.assert_close(opt.grad_norm, norm, rtol=1e-6, atol=0)


def test_a_state_that_is_refused_leaves_the_clipping():
    opt, mine, sgd, theirs = twins([torch.randn(33)], scale=7.0)
    opt.clip_grad_norm_(0.5)
    torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    other = FusedMomentum(with_grads([torch.randn(33)]), lr=0.1, momentum=0.9, formulation="ema")
    other.step()
    with pytest.raises(ValueError, match="formulation"):
        opt.load_state_dict(other.state_dict())
    opt.step()
    sgd.step()
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-6)


def test_a_parameter_repeated_in_its_group_counts_once():
    params = with_grads([torch.randn(33), torch.randn(65)])
    with pytest.warns(UserWarning, match="duplicate"):
        opt = FusedMomentum([*params, params[0]], lr=0.1)
    torch.testing.assert_close(opt.clip_grad_norm_(1.0).item(), exact_norm(params), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [momentum_ext.GradScaler, torch.amp.GradScaler], ids=["ours", "torch's"])
def test_a_step_that_raised_is_not_scaled_twice_later(kind):
    opt, mine, _, _ = twins([torch.zeros(33)])
    opt.param_groups[0].update(momentum=0, weight_decay=0, nesterov=False)
    scaler = kind("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    hook = opt.register_step_pre_hook(lambda *_: 1 / 0)
    mine[0].grad = torch.full((33,), 64.0)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        scaler.step(opt)
    assert not {"grad_scale", "found_inf"} & vars(opt).keys()
    hook.remove()
    opt.zero_grad()
    scaler.update()
    mine[0].grad = torch.full((33,), 64.0)
    scaler.step(opt)
    assert mine[0].tolist() == pytest.approx([-0.1] * 33)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_step_that_the_user_leaves_out(in_place):
    """scaler.update() ends what unscale_() began, as with torch's scaler."""
    param = torch.nn.Parameter(torch.zeros(9))
    opt = FusedMomentum([param], lr=0.5)
    scaler = momentum_ext.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
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


def test_a_state_that_is_loaded_leaves_the_clipping():
    opt, mine, sgd, theirs = twins([torch.randn(33)], scale=7.0)
    opt.clip_grad_norm_(0.5, foreach=True)
    torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    opt.load_state_dict(opt.state_dict())
    opt.step()
    sgd.step()
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-6)

"""What cannot be done is said before anything is written; a step that overflowed leaves every state alone."""

import pytest
import torch
from harness import Snapshot, assert_same, refused
from precision_twin import FEW, Twin, mode_name, optimizer_of, options_of_mode, twin_of
from values import BF16, EIGHT_BITS, FP8, FP16, FP32, INT8, dtype_name

from momentum_ext import FusedMomentum, GradScaler

ERRORS = (ValueError, TypeError, RuntimeError)
SECOND = r"param_groups\[0\]\['params'\]\[1\]"


def training(steps=2, sizes=(300, 9), dtype=FP32, **options):
    """The broken tensor of each test is the last one, after those that would have been written by then."""
    params = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]
    return optimizer_of(*params, steps=steps, **options), params


NONE_OF_THEM = [torch.int32, torch.float64, torch.complex64, torch.uint8, torch.float8_e5m2]


@pytest.mark.parametrize("wrong", [*NONE_OF_THEM, "bf16", "torch.int8", "float64", 8, True], ids=str)
def test_momentum_dtypes_that_there_are_none_of(wrong):
    with pytest.raises((ValueError, TypeError), match="momentum_dtype"):
        FusedMomentum([torch.nn.Parameter(torch.randn(3))], lr=0.1, momentum=0.9, momentum_dtype=wrong)
    with pytest.raises((ValueError, TypeError), match="momentum_dtype"):
        group = {"params": [torch.nn.Parameter(torch.randn(3))], "momentum_dtype": wrong}
        FusedMomentum([group], lr=0.1, momentum=0.9)
    opt, _ = training()
    opt.param_groups[0]["momentum_dtype"] = wrong
    with refused(opt, ERRORS, r"(?s)param_groups\[0\].*momentum_dtype"):
        opt.step()


@pytest.mark.parametrize("momentum_dtype", [FP32, BF16, INT8, FP8], ids=dtype_name)
def test_complex_parameters_have_torchs_buffer_only(momentum_dtype):
    params = [torch.nn.Parameter(torch.randn(30)), torch.nn.Parameter(torch.randn(9, dtype=torch.complex64))]
    opt = FusedMomentum(
        [{"params": params[:1]}, {"params": params[1:], "momentum_dtype": momentum_dtype}], lr=0.1, momentum=0.9
    )
    for param in params:
        param.grad = torch.randn_like(param)
    with refused(opt, ValueError, r"param_groups\[1\]\['params'\]\[0\]"):
        opt.step()
    opt.param_groups[1].update(momentum_dtype=None, master_weights=True, stochastic_rounding=True)
    opt.step()
    assert opt.state[params[1]]["momentum_buffer"].dtype is torch.complex64


@pytest.mark.parametrize("momentum_dtype", EIGHT_BITS, ids=dtype_name)
@pytest.mark.parametrize("scale", ["missing", "short", "long", "fp16", "two-dimensional"])
def test_scales_that_do_not_fit_their_buffer(momentum_dtype, scale):
    opt, params = training(momentum_dtype=momentum_dtype)
    state = opt.state[params[1]]
    wrong = {
        "short": torch.ones(0),
        "long": torch.ones(2),
        "fp16": torch.ones(1, dtype=FP16),
        "two-dimensional": torch.ones(1, 1),
    }
    if scale == "missing":
        del state["momentum_scale"]
    else:
        state["momentum_scale"] = wrong[scale]
    with refused(opt, ERRORS, rf"(?s)(?=.*scale).*{SECOND}"):
        opt.step()


@pytest.mark.parametrize("name, dtype", [("param_remainder", BF16), ("master_param", FP16)])
@pytest.mark.parametrize("what", ["dtype", "shape"])
def test_masters_of_another_form(name, dtype, what):
    opt, params = training(dtype=dtype, master_weights=True)
    right = opt.state[params[1]][name]
    opt.state[params[1]][name] = right.to(torch.float64) if what == "dtype" else torch.zeros(10, dtype=right.dtype)
    with refused(opt, ERRORS, rf"(?s)(?=.*{name}).*{SECOND}"):
        opt.step()


@pytest.mark.parametrize("mode", FEW, ids=mode_name)
def test_wrong_gradients_are_found_before_anything_is_written(mode):
    opt, params = training(dtype=mode["dtype"], **options_of_mode(mode))
    params[1].grad_dtype = None
    params[1].grad = torch.randn(9).to(torch.complex64)
    is_random = mode.get("stochastic_rounding") or mode.get("master_weights") == 24
    says = "stochastic_rounding" if is_random else "result type ComplexFloat"
    with refused(opt, ERRORS, says):
        opt.step()


@pytest.mark.parametrize("momentum_dtype", [INT8, BF16], ids=dtype_name)
def test_sparse_gradients_take_torchs_path(momentum_dtype):
    """In fp32 and rounded on the way back; with stochastic rounding there is no such path, and it says so."""
    opt, params = training(momentum_dtype=momentum_dtype)
    for param in params:
        param.grad = torch.randn(param.shape).to_sparse()
    before = Snapshot(opt)
    opt.step()
    assert opt.state[params[0]]["momentum_buffer"].dtype is momentum_dtype
    assert all(before.has_moved)
    opt.param_groups[0]["stochastic_rounding"] = True
    with refused(opt, RuntimeError, "stochastic_rounding"):
        opt.step()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=dtype_name)
@pytest.mark.parametrize("momentum_dtype", [None, FP32, INT8, FP8], ids=dtype_name)
@pytest.mark.parametrize("master", [False, True], ids=["plain", "master"])
def test_sparse_gradients_from_the_first_step_on(dtype, momentum_dtype, master):
    """As the same gradients written out, within what two orders of rounding differ by."""
    start = torch.randn(300, 4).to(dtype)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    options = {"momentum_dtype": momentum_dtype, "master_weights": master}
    opts = [FusedMomentum([p], lr=0.1, momentum=0.9, **options) for p in params]
    for rows in ([1, 5, 7], [5, 299], [0, 1]):
        grad = torch.sparse_coo_tensor([rows], torch.randn(len(rows), 4).to(dtype), start.shape, check_invariants=True)
        params[0].grad, params[1].grad = grad, grad.to_dense()
        if dtype is FP16 and momentum_dtype is None and not master and len(opts[0].state):
            before = params[0].detach().clone()
            with pytest.raises(RuntimeError, match="not implemented for 'Half'"):  # torch's own second step
                opts[0].step()
            assert_same(params[0].detach(), before)  # torch has multiplied the buffer by then
            return
        for opt in opts:
            opt.step()
        first, second = (
            {key: value.dtype for key, value in opt.state[p].items()} for opt, p in zip(opts, params, strict=True)
        )
        assert first == second
    coarsest = 0.05 if momentum_dtype in (INT8, FP8) else 0.0
    tolerance = 2 * torch.finfo(dtype).eps
    found, wanted = (p.detach().float() for p in params)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance + coarsest)
    assert not torch.equal(found, start.float())


# ------------------------------------------------------------------------------------------------------------ overflow


@pytest.mark.parametrize("mode", FEW, ids=mode_name)
@pytest.mark.parametrize(
    "fused, scaler_type", [(True, torch.amp.GradScaler), (False, GradScaler)], ids=["torch", "ours"]
)
def test_overflow_leaves_all_states_alone(mode, fused, scaler_type):
    """Nothing changes in a step that overflowed, and it does not count: the next one has the oracle's bits."""
    twin = twin_of(mode, (300, 9), momentum=0.9, fused=fused)
    scaler = scaler_type("cpu", init_scale=4.0, growth_interval=1000)
    scaler.scale(torch.ones(()))
    for first in (True, False):
        twin.new_grads()
        twin.params[1].grad[3] = float("inf")
        kept = Snapshot(twin.opt)
        scaler.step(twin.opt)
        scaler.update()
        kept.assert_unchanged()
        assert first == (not twin.opt.state.get(twin.params[0]))
        twin.step(2)


@pytest.mark.parametrize("mode", FEW, ids=mode_name)
def test_loss_scale_is_divided_out(mode):
    values, options = torch.linspace(-1, 1, 300).to(mode["dtype"]), options_of_mode(mode)
    plain, scaled = (Twin([values], momentum=0.9, fused=True, **options) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    for _ in range(3):
        plain.step()
        scaled.params[0].grad = plain.params[0].grad * 8
        scaler.step(scaled.opt)
        scaler.update()
    assert_same(scaled.params[0].detach(), plain.params[0].detach())

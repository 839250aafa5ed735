"""Each case in which torch.optim.SGD's fused, foreach or for-loop path fails, by name, with ours right.

The oracle is torch's for-loop or fp64 arithmetic, never fused=True. `test_torch_*` would be wrong to write: torch may
mend its defects, and then nothing changes here.
"""

import pytest
import torch
from harness import Oracle, Pair, Snapshot, assert_same, clone_exact

import momentum_ext
from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9}


# ------------------------------------------------------------------------------------------------- bf16/fp16 on CPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", [64, 1000])
def test_fused_16_bit_parameters_not_updated(size, dtype, isa):
    """pytorch#191763: 0 of 64 and 8 of 1000 elements moved, the vector loop never stored."""
    param = torch.nn.Parameter(torch.ones(size, dtype=dtype))
    opt = FusedMomentum([param], **HYPER)
    param.grad = torch.full((size,), 0.5, dtype=dtype)
    opt.step()
    assert (param != 1).sum() == size
    Pair([torch.randn(size).to(dtype)], Oracle, **HYPER).step(10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_for_loop_rounds_16_bit_after_every_operation(dtype):
    """One rounding per stored value instead of one per operation: nearer to fp64 than the for-loop, in the mean too."""
    hyper = {**HYPER, "weight_decay": 0.05, "nesterov": True}
    pair = Pair([torch.randn(20_000).to(dtype)], **hyper)
    mine, theirs = pair.params[0]
    exact = torch.nn.Parameter(mine.detach().double())
    reference = torch.optim.SGD([exact], **hyper, foreach=False)
    pair.new_grads()
    exact.grad = mine.grad.double()
    reference.step()
    pair.both(lambda opt: opt.step())
    ours, torchs = ((p.detach().double() - exact.detach()).abs() for p in (mine, theirs))
    assert ours.mean() < torchs.mean()
    assert (ours <= torchs + 2e-6).all()


# ----------------------------------------------------------------------------------------------------------- layouts


def test_fused_writes_outside_a_strided_parameter(isa):
    """A column of a matrix on CPU: the fused kernel wrote its neighbours instead."""
    matrix = torch.randn(1000, 8)
    pair = Pair([matrix[:, 3]], **HYPER)
    whole = torch.empty(0).set_(pair.params[0][0].untyped_storage()).view(1000, 8)
    before = whole.clone()
    pair.step(3)
    assert_same(whole[:, 3], pair.params[0][1].detach())
    others = [0, 1, 2, 4, 5, 6, 7]
    assert_same(whole[:, others], before[:, others], "the other columns")
    assert not torch.equal(whole[:, 3], before[:, 3])


def test_fused_wrong_for_channels_last_parameter_with_contiguous_gradient(isa):
    """Silently paired elements by their place in memory."""
    values = torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last)
    pair = Pair([values], **HYPER)
    for _ in range(3):
        grad = torch.randn(16, 8, 3, 3)
        assert grad.is_contiguous() and not pair.params[0][0].is_contiguous()
        pair.set_grad(0, grad)
        pair.step_as_is()


# -------------------------------------------------------------------------------------------- first step, overflow


@pytest.mark.parametrize("dampening", [0, 0.5])
def test_fused_typeerror_when_a_gradient_appears_at_a_later_step(dampening):
    """One first-step flag for the whole group."""
    pair = Pair([torch.randn(100), torch.randn(100)], **HYPER, dampening=dampening)
    for step in range(6):
        pair.new_grads()
        if step < 3:
            pair.set_grad(1, None)
        pair.step_as_is()


@pytest.mark.parametrize("by", ["attribute", "GradScaler"])
def test_fused_leaves_an_uninitialised_buffer_after_an_overflow_on_step_1(by):
    """And the next step read it: NaN from finite gradients."""
    pair = Pair([torch.randn(100), torch.randn(5)], **HYPER, dampening=0.5)
    scaler = momentum_ext.GradScaler("cpu", init_scale=2.0)
    pair.new_grads()
    pair.params[0][0].grad[7] = torch.inf
    before = Snapshot(pair.mine)
    if by == "attribute":
        pair.mine.found_inf = torch.tensor(1.0)
        pair.mine.step()
        del pair.mine.found_inf
    else:
        scaler.scale(torch.ones(()))
        scaler.step(pair.mine)
        scaler.update()
    before.assert_unchanged()
    assert not pair.mine.state
    pair.step(3)


# ------------------------------------------------------------------------------------------- gradients stay as they are


@pytest.mark.parametrize("option", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
def test_foreach_changes_gradients_with_nesterov_and_no_weight_decay(option):
    param = torch.nn.Parameter(torch.randn(100))
    opt = FusedMomentum([param], **HYPER, nesterov=True, **option)
    for _ in range(3):
        param.grad = torch.randn(100)
        kept, version = clone_exact(param.grad), param.grad._version
        opt.step()
        assert_same(param.grad, kept, "gradient")
        assert param.grad._version == version


def test_fused_changes_gradients_when_grad_scale_is_set():
    param = torch.nn.Parameter(torch.randn(100))
    opt = FusedMomentum([param], **HYPER)
    opt.grad_scale, opt.found_inf = torch.tensor(3.0), torch.tensor(0.0)
    param.grad = torch.randn(100)
    kept, version = clone_exact(param.grad), param.grad._version
    opt.step()
    assert_same(param.grad, kept, "gradient")
    assert param.grad._version == version


# ------------------------------------------------------------------------------------------------------ mixed dtypes


def test_for_loop_makes_a_bf16_buffer_for_an_fp32_parameter_with_bf16_gradients():
    """And fused raises. Ours computes in fp32 and keeps the momentum in the parameter's dtype."""
    pair = Pair([torch.randn(1000)], **HYPER)
    for param in pair.params[0]:
        param.grad_dtype = None
    for _ in range(5):
        grad = torch.randn(1000).to(torch.bfloat16)
        mine, theirs = pair.params[0]
        mine.grad, theirs.grad = grad, grad.float()
        pair.step_as_is()
    assert pair.mine.state[pair.params[0][0]]["momentum_buffer"].dtype is torch.float32


# ------------------------------------------------------- sparse, complex; DTensor: distributed/test_dtensor.py


def test_fused_raises_for_sparse_gradients():
    weights = []
    for kind in (FusedMomentum, torch.optim.SGD):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(50, 19, sparse=True)
        opt = kind(embedding.parameters(), lr=0.1, foreach=False)
        for _ in range(3):
            opt.zero_grad()
            embedding(torch.randint(50, (8,))).square().sum().backward()
            opt.step()
        weights.append(embedding.weight)
    assert_same(*weights)


def test_fused_raises_for_complex_parameters():
    values = torch.randn(300, dtype=torch.complex64)
    param, twin = torch.nn.Parameter(values.clone()), torch.nn.Parameter(torch.view_as_real(values).clone())
    mine, theirs = FusedMomentum([param], **HYPER), torch.optim.SGD([twin], **HYPER, foreach=False)
    for _ in range(3):
        param.grad = torch.randn(300, dtype=torch.complex64)
        twin.grad = torch.view_as_real(param.grad).clone()
        mine.step()
        theirs.step()
        assert_same(torch.view_as_real(param.detach()), twin)


# -------------------------------------------------------------------------------------------------------------- sizes


def test_fused_cuda_counts_elements_in_int():
    """Element offsets past 2^31 on the CPU, over a sparse file; the CUDA kernel's index arithmetic has native tests."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    gap = (1 << 31) + 1
    with TemporaryDirectory() as folder:
        base = torch.from_file(str(Path(folder) / "sparse"), shared=True, size=2 * gap, dtype=torch.float32)
        values = torch.randn(2, 300)
        pair = Pair([values], **HYPER)
        theirs = pair.params[0][1]
        param = torch.nn.Parameter(base.as_strided((2, 300), (gap, 1)))
        with torch.no_grad():
            param.copy_(values)
        mine = FusedMomentum([param], **HYPER)
        for _ in range(3):
            param.grad = torch.randn(2, 300)
            theirs.grad = param.grad.clone()
            mine.step()
            pair.theirs.step()
            assert_same(param, theirs)

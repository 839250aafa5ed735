"""Any memory layout of parameter, gradient and buffer: the same values as torch, and nothing written beside them."""

import itertools
import random

import pytest
import torch
from harness import DENSE_LAYOUTS, LAYOUTS, Oracle, Pair, assert_same, clone_exact, in_layout

from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
SHAPES = [(6, 5), (4, 3, 7, 9), (37, 130)]


def storage_of(tensor):
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def assert_only_elements_written(tensor, before):
    """The storage of `tensor` equals `before` everywhere but at the tensor's own elements."""
    expected = clone_exact(before)
    expected.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).copy_(tensor.detach())
    assert_same(storage_of(tensor.detach()), expected, "the storage around the tensor")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("param_layout, grad_layout, buffer_layout", list(itertools.product(LAYOUTS, LAYOUTS, LAYOUTS)))
def test_every_combination(param_layout, grad_layout, buffer_layout, shape):
    pair = Pair([in_layout(torch.randn(shape), param_layout)], **HYPER)
    for opt, param in zip(pair.optimizers, pair.params[0], strict=True):
        values = torch.linspace(-1, 1, param.numel()).view(shape)
        opt.state[param]["momentum_buffer"] = in_layout(values, buffer_layout)
    param = pair.params[0][0]
    buffer = pair.mine.state[param]["momentum_buffer"]
    before, buffer_before = clone_exact(storage_of(param.detach())), clone_exact(storage_of(buffer))
    for _ in range(2):
        pair.set_grad(0, in_layout(pair.random_like(param), grad_layout))
        grad_before = clone_exact(storage_of(param.grad))
        pair.step_as_is()
        assert_same(storage_of(param.grad), grad_before, "the gradient's storage")
    assert_only_elements_written(param, before)
    assert_only_elements_written(buffer, buffer_before)
    assert pair.mine.state[param]["momentum_buffer"] is buffer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("param_layout, grad_layout", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_dtypes_and_fresh_buffers(param_layout, grad_layout, dtype, isa):
    pair = Pair([in_layout(torch.randn(37, 130).to(dtype), param_layout)], Oracle, **HYPER)
    for _ in range(3):
        pair.set_grad(0, in_layout(pair.random_like(pair.params[0][0]), grad_layout))
        pair.step_as_is()


def in_random_order(values, rng):
    """`values`, dense, the dimensions in any order in memory."""
    order = rng.sample(range(values.dim()), values.dim())
    inverse = [order.index(d) for d in range(values.dim())]
    return values.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)


# Around the edges of blocks (16 x 16, 32 x 8, 8 x 32 elements) and of tiles (256), and dimensions shorter than those.
EDGES = [(15, 17), (16, 16), (33, 31), (63, 65), (1, 300), (2, 257), (255, 3), (7, 3, 5), (9, 16, 17), (64, 8, 3, 3)]
EDGES += [(130, 129), (3, 2, 4, 5, 6), (40, 33, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_orders_of_dimensions(shape, dtype, isa):
    rng = random.Random(str(shape))
    params = [in_random_order(torch.randn(shape, dtype=dtype), rng) for _ in range(6)]
    pair = Pair(params, **HYPER)
    for index, both in enumerate(pair.params):
        buffer = in_random_order(torch.randn(shape, dtype=dtype), rng)
        if index % 2 == 0:
            for opt, param in zip(pair.optimizers, both, strict=True):
                opt.state[param]["momentum_buffer"] = clone_exact(buffer)
    for step in range(2):
        for index, (param, _) in enumerate(pair.params):
            grad = in_random_order(pair.random_like(param), rng)
            if step == 1 and index == 1:
                grad = grad[:1].expand_as(grad)
            pair.set_grad(index, grad)
        pair.step_as_is()


def test_threads_that_share_blocks(threads):
    """Every block has one thread, wherever the list is divided."""
    rng = random.Random(1)
    shapes = [(300, 257), (9, 70_001), (70_001, 3), (41, 43, 47), (16, 3, 64, 65), (1000, 2, 3, 5)]
    pair = Pair([in_random_order(torch.randn(shape), rng) for shape in shapes], **HYPER)
    for _ in range(2):
        for index, (param, _) in enumerate(pair.params):
            pair.set_grad(index, in_random_order(pair.random_like(param), rng))
        pair.step_as_is()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_a_fresh_buffer(layout):
    """As torch.empty_like(param) has it: dense parameters keep their strides."""
    param = torch.nn.Parameter(in_layout(torch.randn(6, 5, 4), layout))
    opt = FusedMomentum([param], lr=0.1, momentum=0.9)
    param.grad = torch.randn(6, 5, 4)
    opt.step()
    assert opt.state[param]["momentum_buffer"].stride() == torch.empty_like(param).stride()
    assert opt.state[param]["momentum_buffer"].storage_offset() == 0


def test_channels_last_parameter_contiguous_gradient(isa):
    values = torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last)
    pair = Pair([values], **HYPER)
    assert pair.params[0][0].is_contiguous(memory_format=torch.channels_last)
    pair.step(3)


def test_channels_last_convolution_trained_by_autograd():
    """The gradients' layout is what autograd makes of it."""
    torch.manual_seed(1)
    models = [
        torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)) for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    models = [m.to(memory_format=torch.channels_last) for m in models]
    opts = [
        FusedMomentum(models[0].parameters(), **HYPER),
        torch.optim.SGD(models[1].parameters(), **HYPER, foreach=False),
    ]
    for _ in range(5):
        data = torch.randn(2, 3, 12, 12).to(memory_format=torch.channels_last)
        for model, opt in zip(models, opts, strict=True):
            opt.zero_grad()
            model(data).square().mean().backward()
            opt.step()
        for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert_same(mine, theirs)
            assert mine.stride() == theirs.stride()


@pytest.mark.parametrize("column", [0, 3, 6])
def test_column_of_a_matrix(column, isa):
    matrix = torch.randn(501, 7)
    pair = Pair([matrix[:, column]], **HYPER)
    param = pair.params[0][0]
    before = clone_exact(storage_of(param.detach()))
    pair.step(3)
    assert_only_elements_written(param, before)


@pytest.mark.parametrize("step", [2, 3, 16])
def test_step_slice(step, isa):
    pair = Pair([torch.randn(2000)[1::step]], **HYPER)
    param = pair.params[0][0]
    before = clone_exact(storage_of(param.detach()))
    pair.step(3)
    assert_only_elements_written(param, before)


def test_large_strided_parameters(threads):
    """More strided elements than one thread takes, in one list with dense ones."""
    matrix = torch.randn(300, 700)
    pair = Pair([matrix.t()[:, ::2], torch.randn(70_001), matrix[1:, 5:].clone()[::3], torch.randn(9)], **HYPER)
    pair.step(2)


@pytest.mark.parametrize(
    "shape, expanded",
    [((6, 5), (1, 5)), ((6, 5), (6, 1)), ((37, 130), (1, 1)), ((8,), (1,)), ((4, 3, 5), (4, 1, 5)), ((1031,), (1,))],
)
def test_expanded_gradient(shape, expanded):
    """One element for many, set by hand; it is read, never written."""
    pair = Pair([torch.randn(shape)], **HYPER)
    for _ in range(3):
        source = pair.random_like(torch.empty(expanded))
        pair.set_grad(0, source.expand(shape))
        kept = pair.params[0][0].grad
        pair.step_as_is()
        assert_same(kept, source.expand(shape))


def test_gradient_of_sum():
    """backward() of a sum gives an expanded gradient in autograd itself."""
    pair = Pair([torch.randn(33, 5)], **HYPER)
    for param in pair.params[0]:
        (gradient,) = torch.autograd.grad(param.sum(), param)
        param.grad = gradient
    pair.step_as_is()


def test_self_overlapping_gradient():
    pair = Pair([torch.randn(20, 5)], **HYPER)
    pair.step()
    pair.set_grad(0, torch.randn(24).as_strided((20, 5), (1, 1)))
    pair.step_as_is()


@pytest.mark.parametrize("hyper", [HYPER, {"lr": 0.1}], ids=["momentum", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gradient_with_the_neg_bit(hyper, dtype):
    pair = Pair([torch.randn(33, 5).to(dtype)], Oracle, **hyper)
    for _ in range(3):
        pair.set_grad(0, torch._neg_view(pair.random_like(pair.params[0][0])))
        assert pair.params[0][0].grad.is_neg()
        pair.step_as_is()


def test_imaginary_part_of_a_conjugate_as_gradient():
    """z.conj().imag: strided, with the neg bit."""
    pair = Pair([torch.randn(33, 5)], **HYPER)
    for _ in range(3):
        values = torch.randn(33, 5, dtype=torch.complex64)
        for param in pair.params[0]:
            param.grad = values.clone().conj().imag
        assert pair.params[0][0].grad.is_neg()
        pair.step_as_is()


def test_parameter_with_the_neg_bit():
    pair = Pair([torch._neg_view(torch.randn(33, 5))], **HYPER)
    assert pair.params[0][0].is_neg()
    pair.step(3)


def test_buffer_with_the_neg_bit():
    pair = Pair([torch.randn(33, 5)], **HYPER)
    values = torch.randn(33, 5)
    for opt, param in zip(pair.optimizers, pair.params[0], strict=True):
        opt.state[param]["momentum_buffer"] = torch._neg_view(values.clone())
    pair.step(3)


# ----------------------------------------------------------------------------------------------------------- complex


COMPLEX_HYPERS = [HYPER, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, {"lr": 0.1}]


def real_twin(pair_params, hyper):
    """torch's for-loop on the real views of the same complex data."""
    twins = [torch.nn.Parameter(torch.view_as_real(p.detach().resolve_conj()).clone()) for p in pair_params]
    return twins, torch.optim.SGD(twins, **hyper, foreach=False)


@pytest.mark.parametrize("conj", [False, True], ids=["plain-gradients", "conj-gradients"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=["complex64", "complex128"])
@pytest.mark.parametrize("layout", [*DENSE_LAYOUTS, "column"])
@pytest.mark.parametrize("hyper", COMPLEX_HYPERS, ids=lambda hyper: "-".join(hyper))
def test_complex_as_its_real_view(dtype, layout, hyper, conj, isa):
    params = [torch.nn.Parameter(in_layout(torch.randn(n, 3, dtype=dtype), layout)) for n in (1, 11, 300)]
    twins, theirs = real_twin(params, hyper)
    mine = FusedMomentum(params, **hyper)
    for _ in range(4):
        for param, twin in zip(params, twins, strict=True):
            grad = torch.randn(param.shape, dtype=dtype)
            param.grad = grad.conj() if conj else grad
            twin.grad = torch.view_as_real(param.grad.resolve_conj()).clone()
        mine.step()
        theirs.step()
        for param, twin in zip(params, twins, strict=True):
            assert_same(torch.view_as_real(param.detach()), twin)
            if hyper.get("momentum"):
                buffer = mine.state[param]["momentum_buffer"]
                assert buffer.dtype is dtype
                assert_same(torch.view_as_real(buffer.resolve_conj()), theirs.state[twin]["momentum_buffer"])


def test_complex_parameter_with_the_conj_bit():
    """To rounding: such a parameter has no real view, torch's own complex arithmetic does it."""
    param = torch.nn.Parameter(torch.randn(33, dtype=torch.complex64).conj())
    assert param.is_conj()
    twins, theirs = real_twin([param], HYPER)
    mine = FusedMomentum([param], **HYPER)
    for _ in range(3):
        param.grad = torch.randn(33, dtype=torch.complex64)
        twins[0].grad = torch.view_as_real(param.grad).clone()
        mine.step()
        theirs.step()
        torch.testing.assert_close(torch.view_as_real(param.detach().resolve_conj()), twins[0].detach())


# ------------------------------------------------------------------------------------------------- 0-dim, empty, odd


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0, 3), (1,), (1, 1, 1)], ids=str)
def test_zero_dim_and_empty(shape, isa):
    pair = Pair([torch.randn(shape), torch.randn(33), torch.randn(shape)], **HYPER)
    pair.step(4)
    assert pair.mine.state[pair.params[0][0]]["momentum_buffer"].shape == torch.Size(shape)


def test_only_empty_tensors():
    pair = Pair([torch.randn(0), torch.randn(0, 5)], **HYPER)
    pair.step(3)


def test_size_one_dimensions_with_odd_strides():
    """Strides of dimensions of size one mean nothing, whatever they are."""
    base = torch.randn(64)
    pair = Pair([base.as_strided((1, 33), (7777, 1)), torch.randn(33, 1).as_strided((33, 1), (1, 5000))], **HYPER)
    for _ in range(3):
        for index, (param, _) in enumerate(pair.params):
            strides = [1 if n > 1 else 99 for n in param.shape]
            pair.set_grad(index, pair.random_like(param).as_strided(param.shape, strides))
        pair.step_as_is()


def test_many_dimensions():
    """As many dimensions as torch's own kernels take, in a layout that can't be flattened."""
    shape = (2, 1, 2, 1, 2, 1, 2, 1, 2, 3)
    values = torch.randn([2 * n for n in shape])[tuple(slice(None, None, 2) for _ in shape)]
    pair = Pair([values], **HYPER)
    for _ in range(2):
        pair.set_grad(0, in_layout(pair.random_like(values), "permuted"))
        pair.step_as_is()


# --------------------------------------------------------------------------------------- tensors that share memory


def test_parameters_that_overlap_each_other():
    """In order, as the for-loop: the second sees what the first wrote."""
    base = torch.randn(120_000)
    pair = Pair([base[:80_000], base[40_000:], base[10:50], base[::2]], lr=0.1, momentum=0.9, weight_decay=0.1)
    pair.step(3)


def test_parameters_that_are_the_same_memory_under_two_names():
    base = torch.randn(33, 5)
    pair = Pair([base, base.view(5, 33), base.t()], lr=0.1, momentum=0.9, weight_decay=0.1)
    pair.step(3)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("size", [33, 70_001])
def test_the_same_parameter_twice_in_one_group(size):
    param = torch.nn.Parameter(torch.randn(size))
    pair = Pair([param, torch.randn(5), param], lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1)
    assert pair.params[0][0] is pair.params[2][0]
    pair.step(3)


def test_the_same_gradient_for_two_parameters():
    pair = Pair([torch.randn(300), torch.randn(300)], **HYPER)
    for _ in range(3):
        grad = torch.randn(300)
        for mine, theirs in pair.params:
            mine.grad = theirs.grad = grad
        pair.step_as_is()


def test_gradient_that_is_the_parameter_itself():
    for hyper in (HYPER, {"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.1}):
        pair = Pair([torch.randn(300)], **hyper)
        for param in pair.params[0]:
            param.grad = param.detach()
        for _ in range(3):
            pair.step_as_is()

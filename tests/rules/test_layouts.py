"""Any memory layout of parameter, gradient and buffer: the same values as torch, and nothing written beside them."""

import itertools
import random

import pytest
import torch
from harness import Oracle, Pair, assert_alike, assert_same, for_loop, only_elements_written
from values import DENSE_LAYOUTS, EXACT, EXACT_DTYPES, FLOAT_DTYPES, LAYOUTS, clone_exact, in_layout

from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
SHAPES = [(6, 5), (4, 3, 7, 9), (37, 130)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("param_layout, grad_layout, buffer_layout", list(itertools.product(LAYOUTS, LAYOUTS, LAYOUTS)))
def test_every_combination(param_layout, grad_layout, buffer_layout, shape):
    pair = Pair([in_layout(torch.randn(shape), param_layout)], **HYPER)
    for opt, param in pair.each(0):
        values = torch.linspace(-1, 1, param.numel()).view(shape)
        opt.state[param]["momentum_buffer"] = in_layout(values, buffer_layout)
    param = pair.params[0][0]
    buffer = pair.mine.state[param]["momentum_buffer"]
    for _ in range(2):
        pair.set_grad(0, in_layout(pair.random_like(param), grad_layout))
        kept = clone_exact(param.grad)
        with only_elements_written(param, buffer, param.grad):
            pair.step_as_is()
        assert_same(param.grad, kept, "gradient")
    assert pair.mine.state[param]["momentum_buffer"] is buffer


@FLOAT_DTYPES
@pytest.mark.parametrize("param_layout, grad_layout", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_dtypes_and_fresh_buffers(param_layout, grad_layout, dtype, isa):
    """The buffer is made as torch.empty_like(param) is: dense parameters keep their strides."""
    pair = Pair([in_layout(torch.randn(37, 130).to(dtype), param_layout)], Oracle, **HYPER)
    param = pair.params[0][0]
    for _ in range(3):
        pair.set_grad(0, in_layout(pair.random_like(param), grad_layout))
        pair.step_as_is()
    buffer = pair.mine.state[param]["momentum_buffer"]
    assert (buffer.dtype, buffer.stride(), buffer.storage_offset()) == (dtype, torch.empty_like(param).stride(), 0)


def in_random_order(values, rng):
    """`values`, dense, the dimensions in any order in memory."""
    order = rng.sample(range(values.dim()), values.dim())
    inverse = [order.index(d) for d in range(values.dim())]
    return values.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)


# Around the edges of blocks (16 x 16, 32 x 8, 8 x 32 elements) and of tiles (256), and dimensions shorter than those.
EDGES = [(15, 17), (16, 16), (33, 31), (63, 65), (1, 300), (2, 257), (255, 3), (7, 3, 5), (9, 16, 17), (64, 8, 3, 3)]
EDGES += [(130, 129), (3, 2, 4, 5, 6), (40, 33, 2)]


@EXACT_DTYPES
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_orders_of_dimensions(shape, dtype, isa):
    rng = random.Random(str(shape))
    pair = Pair([in_random_order(torch.randn(shape, dtype=dtype), rng) for _ in range(6)], **HYPER)
    for index in range(0, 6, 2):
        buffer = in_random_order(torch.randn(shape, dtype=dtype), rng)
        for opt, param in pair.each(index):
            opt.state[param]["momentum_buffer"] = clone_exact(buffer)
    for step in range(2):
        for index, (param, _) in enumerate(pair.params):
            grad = in_random_order(pair.random_like(param), rng)
            pair.set_grad(index, grad[:1].expand_as(grad) if (step, index) == (1, 1) else grad)
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


VIEWS = {
    "channels_last": lambda: torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last),
    **{f"column {i}": lambda i=i: torch.randn(501, 7)[:, i] for i in (0, 3, 6)},
    **{f"every {n}th": lambda n=n: torch.randn(2000)[1::n] for n in (2, 3, 16)},
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_with_contiguous_gradients(view, isa):
    """Torch's fused step writes outside of a column, and pairs a channels_last parameter's elements wrongly."""
    pair = Pair([VIEWS[view]()], **HYPER)
    param = pair.params[0][0]
    assert not param.is_contiguous()
    before = clone_exact(param)
    with only_elements_written(param):
        pair.step(3)
    assert (param != before).all()


def test_channels_last_convolution_trained_by_autograd():
    """The gradients' layout is what autograd makes of it."""

    def run(kind):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        model = model.to(memory_format=torch.channels_last)
        opt = kind(model.parameters(), **HYPER)
        for _ in range(5):
            opt.zero_grad()
            model(torch.randn(2, 3, 12, 12).to(memory_format=torch.channels_last)).square().mean().backward()
            opt.step()
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        return model.parameters()

    assert_alike(run)


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


GRADIENTS = {
    "of a sum": lambda param: torch.autograd.grad(param.sum(), param)[0],  # autograd itself expands it
    "self-overlapping": lambda param: torch.linspace(-1, 1, 38).as_strided((33, 5), (1, 1)),
    "imaginary": lambda param: torch.complex(param.detach(), param.detach() * 0.5).conj().imag,
    "itself": lambda param: param.detach(),
}


@pytest.mark.parametrize("hyper", [HYPER, {"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.1}], ids=lambda h: "-".join(h))
@pytest.mark.parametrize("kind", GRADIENTS)
def test_odd_gradients(kind, hyper):
    """Of a conjugate's imaginary part: strided, with the neg bit."""
    pair = Pair([torch.randn(33, 5)], **hyper)
    pair.step()
    for _ in range(3):
        for _, param in pair.each(0):
            param.grad = GRADIENTS[kind](param)
        assert pair.params[0][0].grad.is_neg() == (kind == "imaginary")
        pair.step_as_is()


@pytest.mark.parametrize("hyper", [HYPER, {"lr": 0.1}], ids=["momentum", "plain"])
@FLOAT_DTYPES
def test_gradient_and_buffer_with_the_neg_bit(hyper, dtype):
    pair = Pair([torch.randn(33, 5).to(dtype)], Oracle, **hyper)
    for step in range(4):
        pair.set_grad(0, torch._neg_view(pair.random_like(pair.params[0][0])))
        assert pair.params[0][0].grad.is_neg()
        if step == 2 and "momentum" in hyper and dtype in EXACT:  # such a buffer takes torch's path, which rounds often
            values = torch.randn(33, 5).to(dtype)
            for opt, param in pair.each(0):
                opt.state[param]["momentum_buffer"] = torch._neg_view(values.clone())
        pair.step_as_is()


# ----------------------------------------------------------------------------------------------------------- complex


COMPLEX_HYPERS = [HYPER, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, {"lr": 0.1}]


def real_twins(params, hyper):
    """torch's for-loop on the real views of the same complex data."""
    twins = [torch.nn.Parameter(torch.view_as_real(p.detach().resolve_conj()).clone()) for p in params]
    return twins, for_loop(twins, **hyper)


@pytest.mark.parametrize("conj", [False, True], ids=["plain-gradients", "conj-gradients"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=["complex64", "complex128"])
@pytest.mark.parametrize("layout", [*DENSE_LAYOUTS, "column"])
@pytest.mark.parametrize("hyper", COMPLEX_HYPERS, ids=lambda hyper: "-".join(hyper))
def test_complex_as_its_real_view(dtype, layout, hyper, conj, isa):
    params = [torch.nn.Parameter(in_layout(torch.randn(n, 3, dtype=dtype), layout)) for n in (1, 11, 300)]
    twins, theirs = real_twins(params, hyper)
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
    twins, theirs = real_twins([param], HYPER)
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
    Pair([torch.randn(0), torch.randn(0, 5)], **HYPER).step(3)


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

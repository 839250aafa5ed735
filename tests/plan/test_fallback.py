"""What the fused pass doesn't take goes through torch's own functional sgd, per tensor, in the same step."""

import pytest
import torch
from harness import Pair, Snapshot, assert_alike, assert_all_same, assert_same, for_loop, params_of, refused
from values import clone_exact

from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}
KINDS = (FusedMomentum, for_loop)


# ------------------------------------------------------------------------------------------------------------ sparse


@pytest.mark.parametrize("hyper", [{"lr": 0.1}, HYPER, {"lr": 0.1, "maximize": True}], ids=lambda h: "-".join(h))
def test_sparse_gradients(hyper):
    """An embedding with sparse=True beside dense layers, in one group; torch's fused step raises."""

    def run(kind):
        model = torch.nn.Sequential(torch.nn.Embedding(50, 19, sparse=True), torch.nn.Linear(19, 33))
        opt = kind(model.parameters(), **hyper)
        for _ in range(5):
            opt.zero_grad()
            model(torch.randint(50, (8,))).square().mean().backward()
            assert model[0].weight.grad.is_sparse
            opt.step()
        return model.parameters()

    assert_alike(run)


def test_sparse_gradient_where_a_dense_one_was():
    pair = Pair([torch.randn(20, 5), torch.randn(33)], **HYPER)
    pair.step(3)
    for _ in range(2):
        pair.new_grads()
        values = torch.zeros(20, 5)
        values[::3] = torch.randn(7, 5)
        for param in pair.params[0]:
            param.grad_dtype = None
            param.grad = None
            param.grad = values.to_sparse()
        pair.step_as_is()
    for param in pair.params[0]:
        param.grad = None
    pair.step(2)


@pytest.mark.parametrize(
    "hyper", [{"weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True}], ids=lambda h: "-".join(h)
)
def test_sparse_gradients_where_torch_refuses(hyper):
    """Whatever torch does with it, its type of error too; and an error leaves the dense tensors alone as well."""
    results = []
    for kind in KINDS:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(33)), torch.nn.Parameter(torch.randn(20, 5))]
        opt = kind(params, lr=0.1, **hyper)
        values = torch.zeros(20, 5)
        values[::3] = 1.5
        params[0].grad, params[1].grad = torch.randn(33), values.to_sparse()
        before = Snapshot(opt)
        try:
            opt.step()
            results.append([clone_exact(p) for p in params])
        except Exception as error:
            if kind is FusedMomentum:
                before.assert_unchanged()
            results.append(type(error))
    if isinstance(results[1], type):
        assert results[0] is results[1]
    else:
        assert_all_same(*results)


# ---------------------------------------------------------------------------------------------------- differentiable


@pytest.mark.parametrize(
    "hyper", [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}], ids=lambda h: "-".join(h)
)
def test_differentiable(hyper):
    """Gradients flow through the steps to what the gradients came from."""

    def run(kind):
        source = torch.randn(33, dtype=torch.float64, requires_grad=True)
        param = torch.randn(33, dtype=torch.float64).requires_grad_().clone()
        param.retain_grad()
        opt = kind([param], **hyper, differentiable=True)
        for factor in (1.0, 2.0):
            param.grad = source * factor
            opt.step()
        (gradient,) = torch.autograd.grad(param.square().sum(), source)
        assert gradient.abs().min() > 0
        return param.detach(), gradient

    assert_alike(run)


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_hyperparameter_that_requires_grad(key):
    """torch itself writes the gradient under such a weight decay; we don't."""
    pair = Pair([torch.randn(300), torch.randn(33, 5)], **HYPER)
    pair.step(2)
    pair.edit(**{key: torch.tensor(0.03, requires_grad=True)})
    for _ in range(3):
        pair.new_grads()
        kept = [mine.grad.clone() for mine, _ in pair.params]
        pair.step_as_is()
        assert_all_same([mine.grad for mine, _ in pair.params], kept)


def test_lr_with_a_gradient_through_a_differentiable_step():
    def run(kind):
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        param = torch.randn(33, dtype=torch.float64).requires_grad_().clone()
        opt = kind([param], lr=lr, differentiable=True)
        for _ in range(2):
            param.grad = torch.randn(33, dtype=torch.float64)
            opt.step()
        (gradient,) = torch.autograd.grad(param.square().sum(), lr)
        return param.detach(), gradient

    assert_alike(run)


# --------------------------------------------------------------------------------------------- devices and subclasses


def test_meta_parameters_among_others():
    """Mixed devices in one group; meta tensors have no data, their state has the right form."""
    pair = Pair([torch.randn(300)], **HYPER)
    metas = [torch.nn.Parameter(torch.empty(33, 5, device="meta")) for _ in range(2)]
    for opt, meta in zip(pair.optimizers, metas, strict=True):
        opt.param_groups[0]["params"].insert(0, meta)
    for _ in range(3):
        for meta in metas:
            meta.grad = torch.empty(33, 5, device="meta")
        grad = torch.randn(300)
        pair.set_grad(1, grad)
        pair.step_as_is()
    assert pair.mine.state[metas[0]]["momentum_buffer"].is_meta


def test_subclass_that_only_names_itself():
    """A plain subclass, as libraries use for typed tensors."""

    class Named(torch.Tensor):
        pass

    pair = Pair([torch.randn(300), torch.randn(33)], **HYPER)
    for opt in pair.optimizers:
        params = opt.param_groups[0]["params"]
        params[0] = params[0].detach().as_subclass(Named).requires_grad_()
    for _ in range(3):
        pair.new_grads()
        pair.both(lambda opt: opt.step())
        for mine, theirs in pair.params:
            assert_same(mine.detach().as_subclass(torch.Tensor), theirs.detach().as_subclass(torch.Tensor))


def test_subclass_with_its_own_dispatch():
    """Two tensors that behave as one: each operation goes through __torch_dispatch__."""
    from torch.testing._internal.two_tensor import TwoTensor

    pair = Pair([torch.randn(33, 5), torch.randn(7)], **HYPER)
    twins = [Pair([torch.randn(33, 5)], **HYPER) for _ in range(2)]
    two = torch.nn.Parameter(TwoTensor(*(t.params[0][0].detach().clone() for t in twins)))
    pair.mine.param_groups[0]["params"].append(two)
    for _ in range(4):
        for twin in twins:
            twin.step()
        two.grad = TwoTensor(*(t.params[0][0].grad.clone() for t in twins))
        for mine, theirs in zip(params_of(pair.mine)[:2], params_of(pair.theirs), strict=True):
            theirs.grad = pair.random_like(theirs)
            mine.grad = theirs.grad.clone()
        pair.both(lambda opt: opt.step())
        assert_all_same(params_of(pair.mine)[:2], params_of(pair.theirs))
        buffer = pair.mine.state[two]["momentum_buffer"]
        for name, twin in zip("ab", twins, strict=True):
            theirs = twin.params[0][1]
            assert_same(getattr(two.data, name), theirs)
            assert_same(getattr(buffer, name), twin.theirs.state[theirs]["momentum_buffer"])


# ------------------------------------------------------------------------------------------------- refused by torch


def test_differentiable_step_of_a_leaf_writes_nothing():
    """torch refuses the leaf, but only after it has updated what comes before it."""
    first, leaf = torch.ones(33), torch.nn.Parameter(torch.ones(9))
    first.grad, leaf.grad = torch.ones(33), torch.ones(9)
    opt = FusedMomentum([first, leaf], **HYPER, differentiable=True)
    with refused(opt, RuntimeError, "leaf Variable that requires grad"):
        opt.step()


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_integer_that_no_number_of_torch_holds(name):
    param = torch.nn.Parameter(torch.ones(9))
    errors = []
    for kind in KINDS:
        opt = kind([param], **{**HYPER, name: 2**70})
        param.grad = torch.ones(9)
        opt.step() if name == "momentum" else None  # there is no buffer to multiply on the first step
        with pytest.raises(Exception, match=r".") as error:
            opt.step()
        errors.append(error.type)
    assert errors[0] is errors[1]


# ------------------------------------------------------------------------------------------------- unusual layouts


def jagged(values):
    return torch.nested.nested_tensor([values[:2], values[2:]], layout=torch.jagged)


@pytest.mark.parametrize("make", [jagged, torch.Tensor.to_mkldnn], ids=["jagged", "mkldnn"])
def test_layouts_that_only_torch_knows(make):
    def run(kind):
        values = torch.randn(5)
        param = make(values.clone()).requires_grad_()
        opt = kind([param], lr=0.1)
        for _ in range(3):
            param.grad = param.detach() * 0.5
            opt.step()
        end = (param.values() if param.is_nested else param.to_dense()).detach()
        assert not torch.equal(end, values)
        return [end]

    assert_alike(run)

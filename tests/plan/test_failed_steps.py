"""After a step that raised, or that could not be fused, the next one is right: nothing of the failed one is left."""

import numpy as np
import pytest
import torch

from momentum_ext import FusedMomentum


def make(n=3, numel=300, **kwargs):
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(numel)) for _ in range(n)]
    for p in params:
        p.grad = torch.randn(numel)
    return params, FusedMomentum(params, lr=0.1, momentum=0.9, **kwargs)


def twin_of(params, opt):
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = torch.optim.SGD(twins, lr=0.1, momentum=0.9, foreach=False, fused=False)
    other.load_state_dict(opt.state_dict())
    for p, q in zip(params, twins, strict=True):
        buffer = opt.state[p].get("momentum_buffer")
        other.state[q]["momentum_buffer"] = None if buffer is None else buffer.clone()
        q.grad = None if p.grad is None else p.grad.clone()
    return twins, other


def assert_next_step_is_right(params, opt):
    twins, other = twin_of(params, opt)
    for _ in range(2):
        opt.step()
        other.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(opt.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])


def test_after_a_buffer_that_was_no_tensor():
    params, opt = make()
    opt.step()
    buffer = opt.state[params[1]]["momentum_buffer"]
    opt.state[params[1]]["momentum_buffer"] = "oops"
    with pytest.raises(TypeError, match=r"params'\]\[1\].*momentum_buffer"):
        opt.step()
    opt.state[params[1]]["momentum_buffer"] = buffer
    assert_next_step_is_right(params, opt)


def test_after_a_step_on_torchs_path_without_gradients():
    params, opt = make()
    opt.step()
    grads = [p.grad for p in params]
    for p in params:
        p.grad = None
    opt.param_groups[0]["lr"] = np.float32(0.1)  # a kind of number that only torch reads
    opt.step()
    opt.param_groups[0]["lr"] = 0.1
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    assert_next_step_is_right(params, opt)


@pytest.mark.parametrize("good", [0, 1, 2])
def test_state_that_refuses_an_entry_on_the_first_step(good):
    class Refuses(dict):
        full = True

        def __setitem__(self, key, value):
            if self.full and len(self) == good:
                raise KeyboardInterrupt("in the middle")
            super().__setitem__(key, value)

    params, opt = make()
    before = [p.detach().clone() for p in params]
    opt.state = Refuses()
    with pytest.raises(KeyboardInterrupt, match="in the middle"):
        opt.step()
    assert not opt.state
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    opt.state.full = False
    opt.step()
    assert all(torch.equal(opt.state[p]["momentum_buffer"], p.grad) for p in params)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_gradient_that_is_another_parameter(momentum):
    """Large, so that two threads would meet; torch updates one after the other."""
    results = []
    for kind, options in ((FusedMomentum, {}), (torch.optim.SGD, {"foreach": False, "fused": False})):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(1 << 18)) for _ in range(3)]
        params[0].grad = torch.randn(1 << 18)
        params[1].grad = params[2].detach()
        params[2].grad = params[0].detach()
        opt = kind(params, lr=0.1, momentum=momentum, **options)
        for _ in range(5):
            opt.step()
        results.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_that_becomes_the_buffer():
    """Between two steps: the plan still has the same tensors."""
    results = []
    for kind, options in ((FusedMomentum, {}), (torch.optim.SGD, {"foreach": False, "fused": False})):
        torch.manual_seed(0)
        param, buffer = torch.nn.Parameter(torch.randn(33)), torch.randn(33)
        opt = kind([param], lr=0.1, momentum=0.9, **options)
        opt.state[param]["momentum_buffer"] = buffer
        for grad in (torch.randn(33), torch.randn(33), buffer):
            param.grad = grad
            opt.step()
        results.append([param.detach(), buffer])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_whose_storage_shrinks():
    params, opt = make(numel=300)
    for _ in range(2):  # then the plan counts versions while it compares
        opt.step()
    params[1].grad.untyped_storage().resize_(16)
    tensors = [*params, *(opt.state[param]["momentum_buffer"] for param in params)]
    versions = [tensor._version for tensor in tensors]
    with pytest.raises(RuntimeError, match=r"gradient of param_groups\[0\]\['params'\]\[1\].*16 bytes"):
        opt.step()
    assert [tensor._version for tensor in tensors] == versions


def test_step_inside_a_step_is_an_error():
    _, opt = make()

    class Curious(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            opt.step()

    opt.state = Curious()
    with pytest.raises(RuntimeError, match="inside a step"):
        opt.step()
    assert not opt.state


def test_loaded_state_with_keys_of_its_own(tmp_path):
    """A loaded state's strings are not the interned ones."""
    params, opt = make()
    opt.step()
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    opt.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_next_step_is_right(params, opt)

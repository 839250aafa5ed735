"""Each tensor has its own first step: the one at which it has no buffer."""

import pytest
import torch
from harness import Pair, assert_same

DAMPENED = {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.01}


def test_buffer_after_the_first_step_is_the_gradient():
    pair = Pair([torch.randn(300)], lr=0.1, momentum=0.9, dampening=0.4)
    pair.step()
    param = pair.params[0][0]
    assert_same(pair.mine.state[param]["momentum_buffer"], param.grad)
    assert pair.mine.state[param]["momentum_buffer"].data_ptr() != param.grad.data_ptr()


@pytest.mark.parametrize(
    "hyper", [DAMPENED, {"lr": 0.1, "momentum": 0.9, "nesterov": True}], ids=["dampened", "nesterov"]
)
def test_gradient_that_first_appears_at_step_50(hyper, isa):
    pair = Pair([torch.randn(300), torch.randn(33), torch.randn(5)], **hyper)
    for step in range(60):
        pair.new_grads()
        if step < 50:
            pair.set_grad(1, None)
        pair.step_as_is()
        assert (pair.params[1][0] in pair.mine.state) == (step >= 50)


def test_gradients_that_come_and_go():
    """Every third step a different tensor sits out; its buffer and value stay."""
    pair = Pair([torch.randn(n) for n in (300, 33, 5, 1000)], **DAMPENED)
    for step in range(30):
        pair.new_grads()
        for absent in range(4):
            if (step + absent) % 3 == 0 or step < 5 * absent:
                pair.set_grad(absent, None)
        pair.step_as_is()


def test_no_gradient_at_all():
    pair = Pair([torch.randn(300), torch.randn(5)], **DAMPENED)
    pair.step_as_is()
    assert not pair.mine.state
    pair.step()


def test_buffer_none_means_first_step():
    """What old checkpoints of torch hold for a parameter that never stepped."""
    pair = Pair([torch.randn(300), torch.randn(5)], **DAMPENED)
    pair.step(3)
    for opt, param in zip(pair.optimizers, pair.params[0], strict=True):
        opt.state[param]["momentum_buffer"] = None
    pair.step(3)


def test_deleted_buffer_means_first_step():
    pair = Pair([torch.randn(300), torch.randn(5)], **DAMPENED)
    pair.step(3)
    for opt, param in zip(pair.optimizers, pair.params[1], strict=True):
        del opt.state[param]["momentum_buffer"]
    pair.step(3)


def test_momentum_switched_on_later():
    pair = Pair([torch.randn(300), torch.randn(5)], lr=0.1, dampening=0.4)
    pair.step(5)
    assert not pair.mine.state
    pair.both(lambda opt: opt.param_groups[0].update(momentum=0.9))
    pair.step(5)


def test_momentum_switched_off_and_on_again_keeps_the_buffer():
    pair = Pair([torch.randn(300), torch.randn(5)], **DAMPENED)
    pair.step(3)
    buffer = pair.mine.state[pair.params[0][0]]["momentum_buffer"]
    before = buffer.clone()
    pair.both(lambda opt: opt.param_groups[0].update(momentum=0))
    pair.step(3)
    assert_same(buffer, before)
    pair.both(lambda opt: opt.param_groups[0].update(momentum=0.9))
    pair.step(3)
    assert pair.mine.state[pair.params[0][0]]["momentum_buffer"] is buffer


def test_first_steps_and_later_steps_in_one_call():
    """A group in which some tensors have a buffer and others don't, over more elements than one thread takes."""
    pair = Pair([torch.randn(n) for n in (32_000, 7, 32_001, 64, 300, 9_999)], **DAMPENED)
    pair.new_grads()
    for index in (0, 3):
        pair.set_grad(index, None)
    pair.step_as_is()
    pair.step(3)


def test_the_buffer_is_updated_in_place():
    """Whoever holds the buffer sees it change, as with torch."""
    pair = Pair([torch.randn(300)], **DAMPENED)
    pair.step()
    param = pair.params[0][0]
    buffer = pair.mine.state[param]["momentum_buffer"]
    before = buffer.clone()
    pair.step()
    assert pair.mine.state[param]["momentum_buffer"] is buffer
    assert not torch.equal(buffer, before)

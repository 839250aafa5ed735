"""Each tensor has its own first step: the one at which it has no buffer."""

import pytest
import torch
from harness import Pair, assert_same

DAMPENED = {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.01}


def pair_of(*sizes, **hyper):
    return Pair([torch.randn(size) for size in sizes or (300, 5)], **(hyper or DAMPENED))


def test_the_buffer_starts_as_the_gradient_and_stays_in_its_place():
    """Whoever holds the buffer sees it change, as with torch; with momentum 0 in between it does not."""
    pair = pair_of(300, lr=0.1, momentum=0.9, dampening=0.4)
    pair.step()
    param = pair.params[0][0]
    buffer = pair.mine.state[param]["momentum_buffer"]
    assert_same(buffer, param.grad)
    assert buffer.data_ptr() != param.grad.data_ptr()
    for momentum, stays in ((0.9, False), (0, True), (0.9, False)):
        before = buffer.clone()
        pair.edit(momentum=momentum)
        pair.step(3)
        assert torch.equal(buffer, before) == stays
        assert pair.mine.state[param]["momentum_buffer"] is buffer


@pytest.mark.parametrize("change", [{}, {"dampening": 0}, {"dampening": 0, "nesterov": True}], ids=str)
def test_gradient_that_first_appears_at_step_50(change, isa):
    pair = pair_of(300, 33, 5, **{**DAMPENED, **change})
    for step in range(60):
        pair.step(missing=[1] if step < 50 else [])
        assert (pair.params[1][0] in pair.mine.state) == (step >= 50)


def test_gradients_that_come_and_go():
    """Every third step a different tensor sits out; its buffer and value stay."""
    pair = pair_of(300, 33, 5, 1000)
    for step in range(30):
        pair.step(missing=[i for i in range(4) if (step + i) % 3 == 0 or step < 5 * i])


def test_no_gradient_at_all():
    pair = pair_of()
    pair.step_as_is()
    assert not pair.mine.state
    pair.step()


@pytest.mark.parametrize("how", ["None", "deleted"])
def test_no_buffer_means_first_step(how):
    """None is what old checkpoints of torch hold for a parameter that never stepped."""
    pair = pair_of()
    pair.step(3)
    for opt, param in pair.each(1):
        opt.state[param]["momentum_buffer"] = None
        if how == "deleted":
            del opt.state[param]["momentum_buffer"]
    pair.step(3)


def test_momentum_switched_on_later():
    pair = pair_of(lr=0.1, dampening=0.4)
    pair.step(5)
    assert not pair.mine.state
    pair.edit(momentum=0.9)
    pair.step(5)


def test_first_steps_and_later_steps_in_one_call():
    """A group in which some tensors have a buffer and others don't, over more elements than one thread takes."""
    pair = pair_of(32_000, 7, 32_001, 64, 300, 9_999)
    pair.step(missing=[0, 3])
    pair.step(3)

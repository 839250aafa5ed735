"""Codes of 4 bits, two in a byte, are never taken for what they are not."""

import pytest
import torch
from precision_twin import optimizer_of

from momentum_ext import FusedMomentum

INT4 = {"lr": 0.1, "momentum": 0.9, "momentum_dtype": "int4"}


def test_a_checkpoint_of_another_model_is_refused():
    """A whole number of rows would fit, with half as many in the first dimension."""
    saved = optimizer_of(torch.nn.Parameter(torch.randn(64, 64)), steps=1, momentum_dtype="int4").state_dict()
    other = FusedMomentum([torch.nn.Parameter(torch.randn(128, 32))], **INT4)
    with pytest.raises(ValueError, match=r"momentum_buffer.*load the checkpoint of this model"):
        other.load_state_dict(saved)


def test_codes_whose_order_was_changed_are_refused():
    """The pairs are in the innermost dimension."""
    param = torch.nn.Parameter(torch.randn(4, 6))
    optimizer = optimizer_of(param, steps=1, momentum_dtype="int4")
    entry = optimizer.state[param]
    entry["momentum_buffer"] = entry["momentum_buffer"].t().contiguous().t()
    with pytest.raises(RuntimeError, match=r"momentum_buffer.*delete it"):
        optimizer.step()


def test_parameters_of_bytes_have_no_other_dtype():
    """Whose own buffers are bytes."""
    param = torch.ones(6, dtype=torch.uint8)
    param.grad = torch.ones(6, dtype=torch.uint8)
    optimizer = FusedMomentum([param], **{**INT4, "lr": 1, "momentum": 1})
    with pytest.raises(RuntimeError, match=r"\['params'\]\[0\]: momentum_dtype and state_dtype are for floating-point"):
        optimizer.step()
    assert not optimizer.state[param]


def test_a_parameter_that_has_grown_since():
    param = torch.nn.Parameter(torch.randn(10, 6))
    optimizer = optimizer_of(param, steps=1, momentum_dtype="int4")
    param.grad = None
    param.data = torch.randn(12, 6)
    with pytest.raises(ValueError, match="made beside a parameter of another shape"):
        optimizer.state_dict()

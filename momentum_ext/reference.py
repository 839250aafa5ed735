"""The update in plain torch: the text to read, and the oracle that the tests compare the kernels with.

The kernels' own text is ``csrc/update_rule.h``; this is the same rule for whole tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["update"]


def update(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    momentum: float = 0,
    dampening: float = 0,
    weight_decay: float = 0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One step of momentum SGD for one tensor, out of place.

    Computed in the dtype of what is given: with fp64 tensors it is the exact reference for low-precision steps.

    Args:
        param: the parameter, any shape, floating-point or complex.
        grad: its gradient, same shape.
        momentum_buffer: same shape; None on the tensor's first step.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        grad_scale: the gradient has been multiplied by this (GradScaler); it is divided out in fp32 precision.

    Returns:
        The new parameter and the new momentum buffer (None when ``momentum == 0``).

    The formula is torch.optim.SGD's, ``torch/optim/sgd.py``.
    """
    g = grad
    if grad_scale is not None:
        g = g * torch.tensor(1.0 / grad_scale, dtype=torch.float32).item()
    if maximize:
        g = -g
    if weight_decay != 0:
        g = g.add(param, alpha=weight_decay)
    if momentum == 0:
        return param.add(g, alpha=-lr), None
    if momentum_buffer is None:
        b = g.clone()
    else:
        b = momentum_buffer.mul(momentum).add(g, alpha=1 - dampening)
    direction = g.add(b, alpha=momentum) if nesterov else b
    return param.add(direction, alpha=-lr), b

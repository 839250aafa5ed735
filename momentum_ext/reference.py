"""The update in plain torch: the text to read, and the oracle that the tests compare the kernels with.

The kernels' own text is ``csrc/rules/sgd.h``; this is the same rule for whole tensors.
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
    formulation: str = "torch",
    decoupled_weight_decay: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One step of momentum SGD for one tensor, out of place.

    Computed in the dtype of what is given: with fp64 tensors it is the exact reference for low-precision steps.

    Args:
        param: the parameter, any shape, floating-point or complex.
        grad: its gradient, same shape.
        momentum_buffer: same shape; None on the tensor's first step.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        grad_scale: the gradient has been multiplied by this (GradScaler); it is divided out in fp32 precision.
        formulation: ``"torch"``, ``"classical"`` or ``"ema"``: how momentum is written, see FusedMomentum. All are
            ``b = momentum * b + alpha * g; p = p - step * b`` with different numbers; without momentum they are one.
        decoupled_weight_decay: shrink the parameter instead of adding to the gradient.

    Returns:
        The new parameter and the new momentum buffer (None when ``momentum == 0``).

    Raises:
        ValueError: for a formulation that is none of the three.

    With ``formulation="torch"`` the formula is torch.optim.SGD's, ``torch/optim/sgd.py``. The other two have no
    dampening, and start from a buffer of zeros: the first step is like every other.
    """
    if formulation not in ("torch", "classical", "ema"):
        raise ValueError(f"Invalid formulation: {formulation!r}")
    g = grad
    if grad_scale is not None:
        g = g * torch.tensor(1.0 / grad_scale, dtype=torch.float32, device="cpu").item()
    if maximize:
        g = -g
    if weight_decay != 0 and decoupled_weight_decay:
        param = param.mul(1 - lr * weight_decay)
    elif weight_decay != 0:
        g = g.add(param, alpha=weight_decay)
    if momentum == 0:
        return param.add(g, alpha=-lr), None

    if formulation == "torch":  # b = mu b + (1 - dampening) g, from b = g;  p = p - lr b
        alpha, first_alpha, nesterov_alpha, step = 1 - dampening, 1.0, 1.0, lr
    elif formulation == "classical":  # v = mu v + lr g, from 0;  p = p - v
        alpha, first_alpha, nesterov_alpha, step = lr, lr, lr, 1.0
    else:  # ema: v = mu v + (1 - mu) g, from 0;  p = p - lr v
        alpha, first_alpha, nesterov_alpha, step = 1 - momentum, 1 - momentum, 1 - momentum, lr
    if momentum_buffer is None:
        b = g.mul(first_alpha)
    else:
        b = momentum_buffer.mul(momentum).add(g, alpha=alpha)
    direction = g.mul(nesterov_alpha).add(b, alpha=momentum) if nesterov else b
    return param.add(direction, alpha=-step), b

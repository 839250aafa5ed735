"""The ways in which the field writes momentum, outside the kernels: checks, checkpoints and torch's own path."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.sgd import sgd

from momentum_ext.keys import BUFFER

__all__ = ["FORMULATIONS", "check_group", "torch_step", "update_by_torch"]

FORMULATIONS = ("torch", "classical", "ema")


def check_group(group: dict[str, Any]) -> None:
    """Refuse what no step could do, when a group is made.

    Raises:
        ValueError: for an unknown formulation, or dampening beside one that has none.
    """
    formulation = group.get("formulation", "torch")
    if formulation not in FORMULATIONS:
        raise ValueError(f"Invalid formulation: {formulation!r}; expected 'torch', 'classical' or 'ema'")
    if formulation != "torch" and group["dampening"] != 0:
        raise ValueError(
            f"dampening belongs to formulation 'torch', got dampening={group['dampening']} with {formulation!r}"
        )


def torch_step(group: dict[str, Any], param: Tensor, grad: Tensor, buffer: Tensor | None) -> Tensor | None:
    """The group's update of one tensor by torch's functional sgd; returns the momentum buffer.

    torch's rule is every formulation's, given another gradient and lr: with ``lr * grad`` and an lr of 1 it is the
    classical form, with ``(1 - momentum) * grad`` the exponential moving average.
    """
    lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
    formulation = group.get("formulation", "torch")
    if weight_decay != 0 and group.get("decoupled_weight_decay", False):
        param.mul_(1 - _number(lr) * _number(weight_decay))
        weight_decay = 0
    if isinstance(weight_decay, Tensor) and weight_decay.requires_grad:
        grad = grad.clone()  # torch would write into it
    if formulation != "torch" and momentum != 0:
        factor = _number(lr) if formulation == "classical" else 1 - _number(momentum)
        grad, weight_decay = grad * factor, _number(weight_decay) * factor
        lr = 1.0 if formulation == "classical" else lr
    buffers = [buffer]
    sgd(
        [param],
        [grad],
        buffers,
        foreach=False,
        fused=False,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )
    return buffers[0]


def update_by_torch(group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
    """The same, with the buffer in the parameter's state."""
    has_momentum = group["momentum"] != 0
    buffer = torch_step(group, param, grad, state.get(BUFFER) if has_momentum else None)
    if has_momentum:
        state[BUFFER] = buffer


def _number(value: Any) -> Any:
    """A Python number of a tensor or NumPy scalar, whose dtype and shape must not take part in what is computed."""
    if isinstance(value, Tensor) and value.requires_grad:
        return value
    return value.item() if hasattr(value, "item") else value

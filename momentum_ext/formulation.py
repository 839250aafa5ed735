"""The ways in which the field writes momentum, outside the kernels: checks, checkpoints and torch's own path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

__all__ = ["FORMULATIONS", "check_group", "check_torch_step", "torch_step"]

FORMULATIONS = ("torch", "classical", "ema")

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


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


def _number(value: Any) -> Any:
    """A Python number of a tensor or NumPy scalar, whose dtype and shape must not take part in what is computed."""
    if isinstance(value, Tensor) and value.requires_grad:
        return value
    return value.item() if hasattr(value, "item") else value


def check_torch_step(group: dict[str, Any], param: Tensor, grad: Tensor, buffer: Tensor | None) -> None:
    """Let torch raise on one-element stand-ins what it would raise for these tensors, while nothing is written."""
    torch_step(group, _stand_in(param), _stand_in(grad), _stand_in(buffer) if isinstance(buffer, Tensor) else None)


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same kind, of one element or as empty: torch refuses it where it would refuse the original."""
    shape = [min(size, 1) for size in tensor.shape]
    options: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}
    if tensor.layout == torch.sparse_coo:
        # torch refuses some dtypes only where elements are added up: as many as show it.
        count = min(tensor._nnz(), 1 if tensor.is_coalesced() else 2)
        indices = torch.zeros((tensor.sparse_dim(), count), dtype=torch.int64, device=tensor.device)
        values = torch.ones([count, *shape[tensor.sparse_dim() :]], **options)
        stand_in = torch.sparse_coo_tensor(
            indices, values, shape, check_invariants=False, is_coalesced=tensor.is_coalesced()
        )
    else:
        is_empty = tensor.layout in _COMPRESSED and tensor._nnz() == 0
        stand_in = (torch.zeros if is_empty else torch.ones)(shape, **options)
        if tensor.layout == torch._mkldnn:  # type: ignore[attr-defined]
            stand_in = stand_in.to_mkldnn()
        elif tensor.layout in _COMPRESSED:
            is_blocked = tensor.layout in (torch.sparse_bsr, torch.sparse_bsc)
            stand_in = stand_in.to_sparse(layout=tensor.layout, blocksize=(1, 1) if is_blocked else None)
    if tensor.requires_grad:
        stand_in.requires_grad_()
    return stand_in if tensor.is_leaf else stand_in.clone()

"""Torch's own path: what it would refuse, found out before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_on_stand_ins"]

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def check_on_stand_ins(
    update: Callable[[dict[str, Any], Tensor, Tensor, dict[str, Any]], None],
    group: dict[str, Any],
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
) -> None:
    """Let torch raise on one-element stand-ins what it would raise for these tensors."""
    stand_ins = {key: _stand_in(each) if isinstance(each, Tensor) else each for key, each in state.items()}
    update(group, _stand_in(param), _stand_in(grad), stand_ins)


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

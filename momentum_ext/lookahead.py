"""Nesterov's two points: where the gradient is taken, and where the textbook's iterate is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from momentum_ext import _C
from momentum_ext.precision import BUFFER, EIGHT_BITS, SCALE

__all__ = ["LOOKAHEAD", "iterates", "restore_lookahead"]

# What checkpoints of 0.1.0 have that were saved after eval(): the copies, and how far the parameters were moved.
_TRAIN_MODE = "train_mode"
_DISTANCE = "lookahead_distance"
LOOKAHEAD = "lookahead"

# Parameter, momentum buffer, a tensor that keeps the look-ahead point, and the distance in momentum buffers.
_Move = tuple[Tensor, Tensor, Tensor, float]


@contextmanager
def iterates(param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> Iterator[None]:
    """Within the context, parameters that are trained with Nesterov are the textbook's iterates.

    ``param += distance * momentum_buffer`` with distance ``momentum * lr``, or ``momentum`` in the classical form,
    whose buffer has the learning rate in it.
    """
    moves: dict[Tensor, _Move] = {}  # a parameter may be in two groups
    for group in param_groups:
        distance = _distance(group)
        for param in group["params"] if distance != 0 else ():
            buffer = state[param].get(BUFFER) if param in state else None
            if buffer is not None and param not in moves:
                moves[param] = (param, _as_float(buffer, state[param]), torch.empty_like(param).detach(), distance)
    _move(list(moves.values()), back=False)
    try:
        yield
    finally:
        _move(list(moves.values()), back=True)


def restore_lookahead(param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> None:
    """After loading what 0.1.0 had saved after eval(): the parameters go back to the look-ahead point.

    Those that are still the iterates get the very bits that they had, others move by the same distance.
    """
    moves = []
    for group in param_groups:
        distance = group.pop(_DISTANCE, 0.0)
        group.pop(_TRAIN_MODE, None)
        for param in group["params"]:
            entry = state.get(param, {})
            lookahead, buffer = entry.pop(LOOKAHEAD, None), entry.get(BUFFER)
            if lookahead is not None and buffer is not None and distance:
                moves.append((param, _as_float(buffer, entry), lookahead, distance))
    _move(moves, back=True)


def _as_float(buffer: Tensor, state: dict[str, Any]) -> Tensor:
    """A momentum buffer that the kernel can read."""
    return _C.dequantize(buffer, state[SCALE]) if buffer.dtype in EIGHT_BITS else buffer


def _distance(group: dict[str, Any]) -> float:
    """From the look-ahead point to the iterate, in momentum buffers as they are stored."""
    if not group["nesterov"]:
        return 0.0
    is_classical = group.get("buffer_formulation", "torch") == "classical"
    return float(group["momentum"]) * (1.0 if is_classical else float(group["lr"]))


def _move(moves: list[_Move], back: bool) -> None:
    """In one pass; where parameters share memory, one after the other, and back in reverse."""
    if back:
        moves = moves[::-1]
    for batch in [[move] for move in moves] if _share_memory([move[0] for move in moves]) else [moves]:
        _C.move_lookahead(*([move[k] for move in batch] for k in range(4)), back)


def _share_memory(tensors: list[Tensor]) -> bool:
    """By address: tensors that only lie interleaved count, too."""
    ranges = []
    for tensor in tensors:
        if type(tensor.data) is Tensor and tensor.layout == torch.strided and tensor.numel():
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            ranges.append((start, start + (reach + 1) * tensor.element_size()))
    ranges.sort()
    return any(begin < end for (_, end), (begin, _) in pairwise(ranges))

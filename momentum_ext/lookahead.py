"""Nesterov's two points: where the gradient is taken, and where the textbook's iterate is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from momentum_ext import _C
from momentum_ext.dtensor import local
from momentum_ext.keys import BUFFER, LOOKAHEAD, SCALE
from momentum_ext.precision import is_in_blocks

__all__ = ["iterates", "restore_lookahead"]

# What checkpoints of 0.1.0 have that were saved after eval(): the copies, and how far the parameters were moved.
_TRAIN_MODE = "train_mode"
_DISTANCE = "lookahead_distance"

# Parameter, momentum buffer, a tensor that keeps the look-ahead point, and the distance in momentum buffers.
_Move = tuple[Tensor, Tensor, Tensor, float]


@contextmanager
def iterates(param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> Iterator[None]:
    """Within the context, parameters that are trained with Nesterov are the textbook's iterates.

    ``param += distance * momentum_buffer`` with distance ``momentum * lr``, or ``momentum`` in the classical form,
    whose buffer has the learning rate in it.
    """
    moves: dict[Tensor, _Move] = {}  # a parameter may be in two groups
    for g, group in enumerate(param_groups):
        distance = _distance(group)
        for i, param in enumerate(group["params"] if distance != 0 else ()):
            entry = state.get(param, {})
            if entry.get(BUFFER) is not None and param not in moves:
                name = f"param_groups[{g}]['params'][{i}]"
                _C.check_memory(param, name)
                for key in (BUFFER, SCALE):
                    if key in entry:
                        _C.check_memory(entry[key], f"{key} of {name}")
                shard, buffer = local(param), local(_as_float(param, entry))  # of a DTensor
                moves[param] = (shard, buffer, torch.empty_like(shard).detach(), distance)
    done: list[list[_Move]] = []
    try:
        for batch in _batches(list(moves.values())):
            _move(batch, back=False)
            done.append(batch)
        _count_writes(moves)
        yield
    finally:
        lost = None
        for batch in reversed(done):
            try:
                _move(batch, back=True)
            except RuntimeError:  # of one of them; the others still come back
                for move in reversed(batch):
                    try:
                        _move([move], back=True)
                    except RuntimeError as error:
                        lost = error
        _count_writes(moves)
        if lost is not None:
            raise lost


def _count_writes(moves: dict[Tensor, _Move]) -> None:
    """A DTensor counts what is written to its shard."""
    for param, move in moves.items():
        if move[0] is not param:
            torch.autograd.graph.increment_version(param)


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
                moves.append((param, _as_float(param, entry), lookahead, distance))
    for batch in reversed(_batches(moves)):
        _move(batch, back=True)


def _as_float(param: Tensor, state: dict[str, Any]) -> Tensor:
    """The parameter's momentum buffer, as the kernel can read it; one in blocks as values of the local shard."""
    buffer: Tensor = state[BUFFER]
    if not is_in_blocks(buffer, param):
        return buffer
    return _C.dequantize(local(buffer), local(state[SCALE]), local(param).shape)


def _distance(group: dict[str, Any]) -> float:
    """From the look-ahead point to the iterate, in momentum buffers as they are stored."""
    if not group["nesterov"]:
        return 0.0
    is_classical = group.get("buffer_formulation", "torch") == "classical"
    return float(group["momentum"]) * (1.0 if is_classical else float(group["lr"]))


def _move(batch: list[_Move], back: bool) -> None:
    params, buffers, lookaheads, distances = map(list, zip(*batch, strict=True)) if batch else ([], [], [], [])
    _C.move_lookahead(params, buffers, lookaheads, distances, back)


def _batches(moves: list[_Move]) -> list[list[_Move]]:
    """All in one pass; one after the other where parameters share memory, and where torch may refuse one of them."""
    params, buffers = [move[0] for move in moves], [move[1] for move in moves]
    plain = all(type(param.data) is Tensor and param.layout == torch.strided for param in params) and all(
        buffer.layout == torch.strided and buffer.is_floating_point() for buffer in buffers
    )
    return [moves] if plain and not _share_memory(params) else [[move] for move in moves]


def _share_memory(tensors: list[Tensor]) -> bool:
    """By address: tensors that only lie interleaved count, too."""
    ranges = []
    for tensor in tensors:
        if tensor.numel():
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            ranges.append((start, start + (reach + 1) * tensor.element_size()))
    ranges.sort()
    return any(begin < end for (_, end), (begin, _) in pairwise(ranges))

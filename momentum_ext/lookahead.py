"""Nesterov's two points: where the gradient is taken, and where the textbook's iterate is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from momentum_ext import _C
from momentum_ext.precision import EIGHT_BITS, SCALE

__all__ = ["hold_iterate", "hold_lookahead"]

# A group has these keys while the iterate is held, and only then; a parameter's state has LOOKAHEAD.
TRAIN_MODE = "train_mode"
DISTANCE = "lookahead_distance"
LOOKAHEAD = "lookahead"


def hold_iterate(param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> None:
    """Move parameters that are trained with Nesterov from the look-ahead point to the iterate.

    ``param += distance * momentum_buffer`` with distance ``momentum * lr``, or ``momentum`` in the classical form,
    whose buffer has the learning rate in it.
    """
    moves = []
    seen = set()  # a parameter may be in two groups
    for group in param_groups:
        if not group.get(TRAIN_MODE, True):
            continue
        group_distance = _distance(group)
        for param in group["params"] if group_distance != 0 else ():
            buffer = state[param].get("momentum_buffer") if param in state else None
            if buffer is not None and param not in seen:
                seen.add(param)
                buffer = _as_float(buffer, state[param])
                moves.append((param, buffer, torch.empty_like(param).detach(), group_distance))
    _move(moves, back=False)
    for param, _, lookahead, _ in moves:
        state[param][LOOKAHEAD] = lookahead
    for group in param_groups:
        if group.get(TRAIN_MODE, True):
            group[TRAIN_MODE], group[DISTANCE] = False, _distance(group)


def hold_lookahead(param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> None:
    """Move them back: to the very bits that they had, except where they have been changed in between."""
    moved = [
        (param, group[DISTANCE])
        for group in param_groups
        if group.get(DISTANCE)
        for param in group["params"]
        if param in state and LOOKAHEAD in state[param]
    ]
    moves = [
        (param, _as_float(buffer, state[param]), state[param][LOOKAHEAD], distance)
        for param, distance in moved
        if (buffer := state[param].get("momentum_buffer")) is not None  # without momentum the two points are one
    ]
    _move(moves, back=True)
    for param, _ in moved:
        state[param].pop(LOOKAHEAD, None)
    for group in param_groups:
        group.pop(TRAIN_MODE, None)
        group.pop(DISTANCE, None)


def check_train_mode(param_groups: list[dict[str, Any]]) -> None:
    """Raises RuntimeError while the iterate is held. A step without a closure leaves this to the compiled plan."""
    if not all(group.get(TRAIN_MODE, True) for group in param_groups):
        raise RuntimeError(
            "step(): the parameters are where optimizer.eval() has moved them, not where the gradients belong; call "
            "optimizer.train() before the backward pass"
        )


def _as_float(buffer: Tensor, state: dict[str, Any]) -> Tensor:
    """A momentum buffer that the kernel can read."""
    return _C.dequantize(buffer, state[SCALE]) if buffer.dtype in EIGHT_BITS else buffer


def _distance(group: dict[str, Any]) -> float:
    """From the look-ahead point to the iterate, in momentum buffers."""
    if not group["nesterov"]:
        return 0.0
    return float(group["momentum"]) * (1.0 if group.get("formulation") == "classical" else float(group["lr"]))


def _move(moves: list[tuple[Tensor, Tensor, Tensor, float]], back: bool) -> None:
    once = {id(param): (param, *rest) for param, *rest in reversed(moves)}  # a parameter may be in two groups
    params, buffers, lookaheads, distances = zip(*once.values()) if once else ([], [], [], [])
    _C.move_lookahead(list(params), list(buffers), list(lookaheads), list(distances), back)

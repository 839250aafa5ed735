"""Which of the last step's updates were too small for what they are stored in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from momentum_ext import _C
from momentum_ext.dtensor import local
from momentum_ext.keys import BUFFER, BUFFER_FORMULATION, MASTER, REMAINDER, SCALE
from momentum_ext.precision import HALVES, rounds_at_random

__all__ = ["StoredUpdates", "UpdateReport", "report"]


@dataclass
class StoredUpdates:
    """The last updates of a group's parameters that are stored alike.

    Attributes:
        group: index in ``param_groups``.
        dtype: of the parameters.
        storage: what holds their values: the dtype, and the master where there is one.
        rounding: ``"to nearest"`` or ``"at random"``.
        numel: elements that were counted.
        updates: of these, those whose update was not zero.
        below: updates below the storage's resolution: rounded to nearest they would leave their element as it was.
        lost: updates that had no effect and could have none: rounded to nearest those below; at random those that are
            lost before they are rounded, in fp32. The others that are below move their element now and then, by the
            right distance on average.
    """

    group: int
    dtype: torch.dtype
    storage: str
    rounding: str
    numel: int = 0
    updates: int = 0
    below: int = 0
    lost: int = 0


class UpdateReport(list[StoredUpdates]):
    """A row for each group and storage; prints as a table."""

    def __str__(self) -> str:
        lines = [f"group  {'stored in':<24} {'rounded':<10} {'updates':>14} {'below resolution':>17} {'lost':>8}"]
        for row in self:
            below, lost = (f"{100 * count / max(row.updates, 1):.1f} %" for count in (row.below, row.lost))
            cells = f"{row.storage:<24} {row.rounding:<10} {row.updates:>14,} {below:>17} {lost:>8}"
            lines.append(f"{row.group:>5}  {cells}")
        return "\n".join(lines)


def report(plan: _C.Plan, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> UpdateReport:
    """See FusedMomentum.update_report()."""
    rows: dict[tuple[int, str, str], StoredUpdates] = {}
    for (g, group, param), (updates, below, lost) in zip(
        _listed(param_groups), _count(plan, param_groups, state), strict=True
    ):
        if updates < 0:
            continue
        storage = _storage_of(param, state.get(param, {}))
        by_chance = _is_random(group, param, state.get(param, {}))
        rounding = "at random" if by_chance else "to nearest"
        row = rows.setdefault((g, storage, rounding), StoredUpdates(g, param.dtype, storage, rounding))
        row.numel += local(param).numel()
        row.updates += updates
        row.below += below
        row.lost += lost if by_chance else below
    if not rows:
        raise RuntimeError(
            "update_report(): there is no update to look at; call it after step(), and with nesterov or without "
            "momentum before zero_grad(), because the gradients are then a part of the update"
        )
    return UpdateReport(rows.values())


def _listed(param_groups: list[dict[str, Any]]) -> Iterable[tuple[int, dict[str, Any], Tensor]]:
    return ((g, group, param) for g, group in enumerate(param_groups) for param in group["params"])


def _count(plan: _C.Plan, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> list[list[int]]:
    params = [param for _, _, param in _listed(param_groups)]
    entries = [state.get(param, {}) for param in params]
    unstarted = {id(buffer) for buffer in plan.unstarted_buffers()}
    buffers = [local(entry.get(BUFFER)) for entry in entries]
    groups = [{**group, "formulation": group.get(BUFFER_FORMULATION, "torch")} for group in param_groups]
    try:
        counts = plan.count_updates(
            groups,
            [local(param) for param in params],
            [_gradient_of(param) for param in params],
            [None if id(buffer) in unstarted else buffer for buffer in buffers],
            [local(entry.get(SCALE)) for entry in entries],
            [local(entry.get(REMAINDER, entry.get(MASTER))) for entry in entries],
        )
    except ValueError as error:  # of a formulation that the buffers still have
        raise RuntimeError(f"update_report(): {error}; call it before the edit, or after the next step") from error
    return counts.tolist()


def _gradient_of(param: Tensor) -> Tensor | None:
    """As the kernels can read it; None also for one that a step redistributes."""
    grad = param.grad
    if grad is None or getattr(grad, "placements", None) != getattr(param, "placements", None):
        return None
    shard: Tensor = local(grad)
    return shard.resolve_conj().resolve_neg()


def _storage_of(param: Tensor, entry: dict[str, Any]) -> str:
    name = str(param.dtype).removeprefix("torch.")
    if MASTER in entry or REMAINDER in entry:
        has_24_bits = REMAINDER in entry and entry[REMAINDER].dtype == torch.int8
        return f"{name} + {24 if has_24_bits else 32}-bit master"
    return name


def _is_random(group: dict[str, Any], param: Tensor, entry: dict[str, Any]) -> bool:
    if MASTER in entry or REMAINDER in entry:
        return rounds_at_random(group) and REMAINDER in entry and entry[REMAINDER].dtype == torch.int8
    return bool(group.get("stochastic_rounding")) and param.dtype in HALVES

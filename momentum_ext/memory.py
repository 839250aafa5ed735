"""What an optimizer's tensors need, counted before they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from momentum_ext.keys import AVERAGE, MASTER, REMAINDER, SCALE_OF
from momentum_ext.precision import IN_BLOCKS, SCALE_BLOCK, dtype_of_state, packs

__all__ = ["MemorySummary", "summarize"]

_StatesOf = Callable[[dict[str, Any]], tuple[str, ...]]


class MemorySummary(dict[str, int]):
    """Bytes by kind (``"params"``, ``"grads"``, ``"momentum_buffer"``, ...); prints as a table.

    Attributes:
        num_params: elements of all parameters together.
        total: bytes of all kinds together.
    """

    def __init__(self, bytes_by_kind: dict[str, int], num_params: int) -> None:
        super().__init__(bytes_by_kind)
        self.num_params = num_params

    @property
    def total(self) -> int:
        return sum(self.values())

    def __str__(self) -> str:
        rows = [(kind, size) for kind, size in self.items() if size] + [("total", self.total)]
        lines = [f"{'':<16} {'bytes':>16} {'bytes/parameter':>16}"]
        for kind, size in rows:
            lines.append(f"{kind:<16} {size:>16,} {size / max(self.num_params, 1):>16.3f}")
        lines.insert(-1, "-" * len(lines[0]))
        return "\n".join([f"{self.num_params:,} parameters", *lines])


def summarize(
    param_groups: list[dict[str, Any]], state: dict[Tensor, Any], states_of: _StatesOf, has_average: bool
) -> MemorySummary:
    """See FusedMomentum.memory_summary(). `states_of`: the keys of a group's states."""
    keys = dict.fromkeys(key for group in param_groups for key in states_of(group))
    states = [each for key in keys for each in (key, SCALE_OF[key])]
    sizes = dict.fromkeys(("params", "grads", *states, REMAINDER, MASTER, AVERAGE), 0)
    seen: set[int] = set()
    num_params = 0
    for group in param_groups:
        for param in group["params"]:
            if id(param) in seen:
                continue
            seen.add(id(param))
            num_params += param.numel()
            for kind, size in _sizes_of(param, group, state.get(param, {}), states_of(group), has_average).items():
                sizes[kind] += size
    return MemorySummary(sizes, num_params)


def _sizes_of(
    param: Tensor, group: dict[str, Any], state: dict[str, Any], states: tuple[str, ...], has_average: bool
) -> dict[str, int]:
    numel, size = param.numel(), param.numel() * param.element_size()
    sizes = {"params": size}
    if not param.requires_grad and param.grad is None and not state:
        return sizes  # a frozen parameter
    sizes["grads"] = param.grad.numel() * param.grad.element_size() if param.grad is not None else size
    for key in states:
        dtype = dtype_of_state(group, param, key)
        sizes[key] = (numel + 1) // 2 if packs(key, dtype) else numel * dtype.itemsize
        if dtype in IN_BLOCKS:
            sizes[SCALE_OF[key]] = 2 * -(-numel // SCALE_BLOCK)
    if group.get("master_weights", False):
        if param.dtype == torch.bfloat16:
            sizes[REMAINDER] = (1 if group["master_weights"] == 24 else 2) * numel
        elif param.dtype == torch.float16:
            sizes[MASTER] = 4 * numel
    if has_average:
        sizes[AVERAGE] = size
    return sizes

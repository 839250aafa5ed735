"""What torch.compile traces in the place of the steps of rules with counters; see compiled.py, which leads here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from momentum_ext.keys import SCALE_OF
from momentum_ext.rule_operator import RULES

if TYPE_CHECKING:
    from momentum_ext.fused import FusedOptimizer

__all__ = ["number_or_1", "rule_step", "why_not"]


def why_not(optimizer: FusedOptimizer, groups: list[dict[str, Any]]) -> str | None:
    """A key of compiled._REASONS where no graph can be made of the step, besides what holds for every rule."""
    if optimizer.ema_decay is not None:
        return "rule"
    traced = RULES[optimizer._rule]
    for group in groups:
        if group["capturable"]:
            return "hyperparameters"
        if not all(_is_number(_value(group, name)) for name in traced.hyperparameters if name != "lr"):
            return "hyperparameters"
        lr = group["lr"]
        if not (_is_number(lr) or (isinstance(lr, Tensor) and not lr.requires_grad)):
            return "hyperparameters"
    for group in groups:
        for param in group["params"]:
            _ = param.grad  # looked at before the state: see compiled.py
            state = optimizer.state.get(param)
            if state is not None and not _is_traceable(state, param, traced.states_of(group), traced.counters):
                return "options"
    return None


def _is_traceable(state: dict[str, Any], param: Tensor, states: tuple[str, ...], counters: dict[str, float]) -> bool:
    if any(scale in state for scale in SCALE_OF.values()):
        return False
    if not any(key in state for key in states):
        return True  # its first step
    if not all(key in state for key in (*states, *counters)):
        return False  # the eager step says what is missing
    if any(state[key].dtype != param.dtype for key in states):
        return False
    return all(isinstance(state[key], Tensor) and state[key].device.type == "cpu" for key in counters)


def _value(group: dict[str, Any], name: str) -> Any:
    if name in ("beta1", "beta2"):
        return group["betas"][0 if name == "beta1" else 1]
    return group[name]


def _is_number(value: Any) -> bool:
    return isinstance(value, (float, int, bool))


@torch.no_grad()
def rule_step(optimizer: FusedOptimizer, factor: Tensor | None) -> None:
    traced = RULES[optimizer._rule]
    groups = optimizer.__dict__["param_groups"]
    params: list[Tensor] = []
    grads: list[Tensor] = []
    sizes: list[int] = []
    for group in groups:
        listed = [param for param in group["params"] if param.grad is not None]
        params += listed
        grads += [param.grad for param in listed]
        sizes.append(len(listed))
    states: list[Tensor] = []
    counters: list[Tensor] = []
    i = 0
    for group, size in zip(groups, sizes, strict=True):
        keys = traced.states_of(group)
        for param in params[i : i + size]:
            state = optimizer.state.get(param)
            if state is None or keys[0] not in state:
                new = {
                    key: torch.full((), start, dtype=_get_scalar_dtype(), device="cpu")
                    for key, start in traced.counters.items()
                }
                for key in keys:
                    new[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state = new if state is None else {**state, **new}
                optimizer.state[param] = state
            counters += [state[key] for key in traced.counters]
            states += [state[key] for key in keys]
        i += size
    torch.ops.momentum_ext.rule_step(
        optimizer._rule,
        params,
        grads,
        states,
        counters,
        sizes,
        list(traced.hyperparameters),
        [number_or_1(_value(group, name)) for group in groups for name in traced.hyperparameters],
        [group["lr"] if isinstance(group["lr"], Tensor) else None for group in groups],
        factor,
    )


def number_or_1(value: Any) -> float:
    """1 for a tensor, which is an argument of its own."""
    return 1.0 if isinstance(value, Tensor) else float(value)

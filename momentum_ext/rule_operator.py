"""The operator of a compiled graph for rules whose states and counters are lists: torch.ops.momentum_ext.rule_step.

``rule_step``: lists of tensors, those of one parameter group after those of the other.

- ``rule``: the kernels' name for what the optimizer does.
- ``params``, ``grads``: of those parameters that have a gradient.
- ``states``: all of the first parameter, then all of the second. ``counters``: the same, numbers on the CPU.
- One value for each group: ``group_sizes`` and ``lr_tensors``, of which one that is not None stands for the float; its
  value may change from call to call. ``numbers``: the hyperparameters in ``names``, group after group.
- ``grad_factor``: multiplies the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from momentum_ext import _C
from momentum_ext.fallback import check_on_stand_ins

__all__ = ["RULES", "TracedRule"]


class TracedRule(NamedTuple):
    """What a graph has to know of a rule; its optimizer's file puts it into RULES."""

    hyperparameters: tuple[str, ...]  # numbers and flags of a group; "beta1" and "beta2" are its "betas"
    states_of: Callable[[dict[str, Any]], tuple[str, ...]]
    counters: dict[str, float]  # with what they start from
    update_by_torch: Callable[[dict[str, Any], Tensor, Tensor, dict[str, Any]], None]


RULES: dict[str, TracedRule] = {}

_LIBRARY = torch.library.Library("momentum_ext", "FRAGMENT")
_LIBRARY.define(
    "rule_step(str rule, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] counters, "
    "int[] group_sizes, str[] names, float[] numbers, Tensor?[] lr_tensors, Tensor? grad_factor=None) -> ()"
)


def _groups_of(names: list[str], numbers: list[float], count: int) -> list[dict[str, Any]]:
    """The groups' hyperparameters, as they stand in param_groups."""
    groups = []
    for g in range(count):
        group: dict[str, Any] = dict(zip(names, numbers[g * len(names) : (g + 1) * len(names)], strict=True))
        group["betas"] = (group.pop("beta1"), group.pop("beta2"))
        flags = ("amsgrad", "maximize", "decoupled_weight_decay")
        groups.append(group | {name: bool(group[name]) for name in flags if name in group})
    return groups


def _rule_step(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    counters: list[Tensor],
    group_sizes: list[int],
    names: list[str],
    numbers: list[float],
    lr_tensors: list[Tensor | None],
    grad_factor: Tensor | None = None,
) -> None:
    traced = RULES[rule]
    ends = list(accumulate(group_sizes, initial=0))
    groups = _groups_of(names, numbers, len(group_sizes))
    left, left_counters = iter(states), iter(counters)
    state: dict[Tensor, dict[str, Tensor]] = {}
    for g, group in enumerate(groups):
        group |= {"params": params[ends[g] : ends[g + 1]], "capturable": False, "differentiable": False}
        if lr_tensors[g] is not None:
            group["lr"] = lr_tensors[g]
        for param in group["params"]:
            state[param] = {key: next(left_counters) for key in traced.counters}
            state[param] |= {key: next(left) for key in traced.states_of(group)}
    factor = 1.0 if grad_factor is None else float(grad_factor)
    grad_of = dict(zip(params, grads, strict=True))
    plan = _C.Plan(rule, "momentum_ext.rule_step")
    with plan.prepare(groups, state, grads=grad_of) as prepared:
        by_torch = [(groups[g], groups[g]["params"][i]) for g, i in prepared.fallback()]
        for group, param in by_torch:
            check_on_stand_ins(traced.update_by_torch, group, param, grad_of[param], state[param])
        prepared.begin()
        for group, param in by_torch:
            grad = grad_of[param] if factor == 1.0 else grad_of[param] * factor
            traced.update_by_torch(group, param, grad, state[param])
        prepared.run(factor)


_LIBRARY.impl("rule_step", _rule_step, "CompositeExplicitAutograd")


@torch.library.register_fake("momentum_ext::rule_step", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake_rule_step(rule: str, params: list[Tensor], grads: list[Tensor], *rest: object) -> None:
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        torch._check(param.shape == grad.shape, lambda i=i: f"grads[{i}]: expected the shape of its parameter")

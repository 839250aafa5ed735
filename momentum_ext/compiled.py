"""What torch.compile traces in the place of FusedMomentum's methods.

Eager steps hand the optimizer to C++, where no graph could see what is read and written. Here the same lists are
collected in Python, once, while the graph is made, and the graph calls an operator on them. torch.compile guards what
was looked at: another list of parameters, a gradient that comes or goes, or an edited hyperparameter that is a Python
number makes another graph, a tensor's new value does not.

`param_groups` is read from the optimizer's ``__dict__``: read as an attribute, Dynamo would fix the parameters'
addresses and no longer find them in a backward pass of the same graph. Gradients are looked at before the state, whose
keys are the parameters: the other way round, each new gradient would be another graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from momentum_ext import operators  # noqa: F401  # registers them
from momentum_ext.averaging import UpdateCount
from momentum_ext.compiled_rule import number_or_1, rule_step, why_not
from momentum_ext.keys import AVERAGE, BUFFER, BUFFER_FORMULATION, MASTER, REMAINDER, SCALE
from momentum_ext.precision import uses_low_precision

if TYPE_CHECKING:
    from momentum_ext.fused import FusedOptimizer

__all__ = ["Traced", "clip_grad_norm_", "step", "zero_grad"]

# What the state of parameters has whose group wants, or wanted, more than the operator knows.
_EAGER_STATE = (SCALE, REMAINDER, MASTER)


# What a graph sets to None, by names of their own: torch 2.13's Dynamo has one constant for every None that is written
# out, and once a gradient that is None was read in some graph, it takes that constant for the gradient, in all later
# graphs too.
_NO_GRAD = None
_NO_FACTOR = None


# Dynamo of torch 2.11 fixes the parameters' addresses all the same: a backward pass after zero_grad() in one graph
# would find no parameters, and say nothing.
_GRAPHS_ZERO_GRAD = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


class Traced:
    """What a graph may set: Dynamo forgets what is set on an optimizer itself."""

    def __init__(self, ema_count: int) -> None:
        self.ema_count = UpdateCount(ema_count)
        self.grad_norm: Tensor | None = None


def step(optimizer: FusedOptimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """FusedMomentum.step() in a graph; the eager one, between two graphs, where that cannot be."""
    reason = _why_not(optimizer, args, kwargs)
    if reason is not None:
        return _EAGER_STEPS[reason](optimizer, args, kwargs)
    if optimizer._rule == "sgd":
        return _step(optimizer)
    if optimizer.max_grad_norm is not None:
        optimizer._traced.grad_norm = _clip(optimizer, optimizer.max_grad_norm, 2.0, False)
    rule_step(optimizer, optimizer._grad_factor.traced)
    return _clear_factor(optimizer)


@torch.no_grad()
def _step(optimizer: FusedOptimizer) -> None:
    if optimizer.max_grad_norm is not None:
        optimizer._traced.grad_norm = _clip(optimizer, optimizer.max_grad_norm, 2.0, False)
    params: list[Tensor] = []
    grads: list[Tensor] = []
    sizes: list[int] = []
    idle: list[Tensor] = []
    groups = optimizer.__dict__["param_groups"]
    for group in groups:
        size = 0
        for param in group["params"]:
            if param.grad is None:
                idle.append(param)
            else:
                params.append(param)
                grads.append(param.grad)
                size += 1
        sizes.append(size)

    buffers: list[Tensor] = []
    is_first_step: list[bool] = []
    i = 0
    for group, size in zip(groups, sizes, strict=True):
        for param in params[i : i + size]:
            buffer = _find(optimizer, param, BUFFER) if group["momentum"] != 0 else None
            is_first_step.append(buffer is None and group["momentum"] != 0)
            if group["momentum"] != 0:
                if buffer is None:
                    buffer = torch.empty_like(param, memory_format=torch.preserve_format)
                    _keep(optimizer, param, BUFFER, buffer)
                buffers.append(buffer)
        i += size

    averages: list[Tensor] = []
    averaged: list[int] = []
    is_new_average: list[bool] = []
    count: Tensor | None = None
    weight: Tensor | None = None
    if optimizer.ema_decay is not None:
        count = optimizer._traced.ema_count.as_tensor()
        weight = torch.ops.momentum_ext.average_weight(count, optimizer.ema_decay, optimizer.ema_warmup)
        for i, param in enumerate(params):
            average = _find(optimizer, param, AVERAGE)
            is_new_average.append(average is None)
            if average is None:
                average = torch.empty_like(param, memory_format=torch.preserve_format)
                _keep(optimizer, param, AVERAGE, average)
            averages.append(average)
            averaged.append(i)
        idle = [param for param in idle if _find(optimizer, param, AVERAGE) is not None]

    torch.ops.momentum_ext.step(
        params,
        grads,
        buffers,
        averages,
        averaged,
        is_new_average,
        is_first_step,
        sizes,
        [number_or_1(group["lr"]) for group in groups],
        [_tensor(group["lr"]) for group in groups],
        [float(group["momentum"]) for group in groups],
        [float(group["dampening"]) for group in groups],
        [number_or_1(group["weight_decay"]) for group in groups],
        [_tensor(group["weight_decay"]) for group in groups],
        [bool(group["nesterov"]) for group in groups],
        [bool(group["maximize"]) for group in groups],
        [bool(group.get("decoupled_weight_decay", False)) for group in groups],
        [group.get("formulation", "torch") for group in groups],
        optimizer._grad_factor.traced,
        weight,
    )
    if weight is not None and idle:
        torch.ops.momentum_ext.average(idle, [_find(optimizer, param, AVERAGE) for param in idle], weight)
    if count is not None:
        count.add_(1)
    _clear_factor(optimizer)


def zero_grad(optimizer: FusedOptimizer, set_to_none: bool) -> None:
    """FusedMomentum.zero_grad() in a graph, where this torch can."""
    if not _GRAPHS_ZERO_GRAD:
        _eager_zero_grad(optimizer, set_to_none)
        return
    _clear_factor(optimizer)
    for group in optimizer.__dict__["param_groups"]:
        for param in group["params"]:
            if param.grad is not None and set_to_none:
                param.grad = _NO_GRAD
            elif param.grad is not None:
                with torch.no_grad():
                    param.grad.zero_()


def clip_grad_norm_(
    optimizer: FusedOptimizer, max_norm: float, norm_type: float, error_if_nonfinite: bool, group: Any
) -> Tensor:
    """FusedMomentum.clip_grad_norm_() in a graph: the factor stays a tensor, for a step that comes in any graph."""
    if _has_ranks(optimizer, group):
        return _clip_over_ranks(optimizer, max_norm, norm_type, error_if_nonfinite, group)  # type: ignore[no-any-return]
    if optimizer._grad_factor.is_active and optimizer._grad_factor.traced is None:
        return _eager_clip(optimizer, max_norm, norm_type, error_if_nonfinite, None)  # type: ignore[no-any-return]
    return _clip(optimizer, max_norm, norm_type, error_if_nonfinite)


@torch.no_grad()
def _clip(optimizer: FusedOptimizer, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    factor = optimizer._grad_factor
    grads = [
        param.grad
        for group in optimizer.__dict__["param_groups"]
        for param in group["params"]
        if param.grad is not None
    ]
    norm, factor.traced = torch.ops.momentum_ext.clip(
        grads, float(max_norm), float(norm_type), error_if_nonfinite, factor.traced
    )
    factor.is_active = True
    return norm  # type: ignore[no-any-return]


def _clear_factor(optimizer: FusedOptimizer) -> None:
    factor = optimizer._grad_factor
    if factor.is_active:
        factor.traced = factor._known = _NO_FACTOR
        factor._coefficients, factor.is_active = [], False


def _find(optimizer: FusedOptimizer, param: Tensor, key: str) -> Tensor | None:
    state = optimizer.state.get(param)
    return None if state is None else state.get(key)


def _keep(optimizer: FusedOptimizer, param: Tensor, key: str, tensor: Tensor) -> None:
    state = optimizer.state.get(param)
    if state is None:
        optimizer.state[param] = {key: tensor}
    else:
        state[key] = tensor


def _tensor(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


# ----------------------------------------------------------------------------------- what is left to the eager step

_REASONS = {
    "rule": "averages of the weights have no operator beside this rule",
    "closure": "a closure is called by the eager step",
    "hooks": "step hooks are called by the eager step",
    "scaler": "a GradScaler has left grad_scale or found_inf on the optimizer",
    "differentiable": "differentiable=True takes torch's own path",
    "held": "other weights are in the parameters' place (ema_weights(), iterate_weights())",
    "clipped": "the gradients were clipped or unscaled outside of the compiled function; clip inside",
    "formulation": "a group's formulation was edited, so that its momentum buffers are to be converted first",
    "options": "a group has momentum_dtype, master_weights or stochastic_rounding, or its state has another dtype",
    "idle": "lr is 0 in every group, which is no training",
    "count": "the averages' count of updates is on the CUDA device, since an overflow or a warm-up there",
    "hyperparameters": "a hyperparameter is neither a number nor a tensor that needs no gradient",
    "repeated": "a parameter is listed twice",
    "ranks": "parameters are DTensors, or a norm goes over a process group",
}


def _why_not(optimizer: FusedOptimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """A key of _REASONS where no graph can be made of the step."""
    groups = optimizer.__dict__["param_groups"]
    if args or kwargs:
        return "closure"
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if (hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks) and not optimizer._is_wrapped_by_torch():
        return "hooks"
    if "grad_scale" in optimizer.__dict__ or "found_inf" in optimizer.__dict__:
        return "scaler"
    if optimizer.defaults["differentiable"]:
        return "differentiable"
    if _has_ranks(optimizer, optimizer.process_group):
        return "ranks"
    if optimizer._held_weights.context is not None:
        return "held"
    if optimizer._grad_factor.is_active and optimizer._grad_factor.traced is None:
        return "clipped"
    if optimizer.ema_decay is not None and optimizer._traced.ema_count.is_on_device:
        return "count"
    if any(map(uses_low_precision, groups)) or (optimizer._rule == "sgd" and _has_other_state(optimizer)):
        return "options"
    if any(group.get("formulation", "torch") != group.get(BUFFER_FORMULATION, "torch") for group in groups):
        return "formulation"
    if all(_is_number(group["lr"]) and group["lr"] == 0 for group in groups):
        return "idle"
    reason = _why_not_momentum(groups) if optimizer._rule == "sgd" else why_not(optimizer, groups)
    if reason is not None:
        return reason
    seen = set()
    for group in groups:
        for param in group["params"]:
            if param in seen:
                return "repeated"
            seen.add(param)
    return None


def _why_not_momentum(groups: list[dict[str, Any]]) -> str | None:
    for group in groups:
        if not (_is_number(group["momentum"]) and _is_number(group["dampening"])):
            return "hyperparameters"
        if not (_is_plain(group["lr"]) and _is_plain(group["weight_decay"])):
            return "hyperparameters"
    return None


def _has_ranks(optimizer: FusedOptimizer, process_group: Any) -> bool:
    """Whether a step or a norm has to do with other ranks."""
    params = [param for group in optimizer.__dict__["param_groups"] for param in group["params"]]
    return process_group is not None or any(hasattr(param, "device_mesh") for param in params)


def _has_other_state(optimizer: FusedOptimizer) -> bool:
    """State in another format than a group without options has, which the next eager step converts."""
    params = [param for group in optimizer.__dict__["param_groups"] for param in group["params"]]
    grads = [param.grad for param in params]  # looked at before the state: see above
    for param, _ in zip(params, grads, strict=True):
        buffer = _find(optimizer, param, BUFFER)
        if buffer is not None and buffer.dtype != param.dtype:
            return True
        if any(_find(optimizer, param, key) is not None for key in _EAGER_STATE):
            return True
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, (float, int)) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    return not value.requires_grad if isinstance(value, Tensor) else _is_number(value)


def _outside(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """The function, run between two graphs; with fullgraph=True torch's error says why."""
    outside = torch._disable_dynamo(function)  # type: ignore[attr-defined]
    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    outside._torchdynamo_disable_msg = f"FusedMomentum: {reason}"  # type: ignore[attr-defined]
    outside.__qualname__ = f"FusedMomentum: {reason}"  # torch 2.6 prints the function's name alone
    return outside


def _run_eager_step(optimizer: FusedOptimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return optimizer._own_step(*args, **kwargs)


def _run_eager_clip(
    optimizer: FusedOptimizer, max_norm: float, norm_type: float, error_if_nonfinite: bool, group: Any
) -> Tensor:
    return optimizer._grad_factor.clip(optimizer.param_groups, max_norm, norm_type, error_if_nonfinite, group)


def _eager_step_because(reason: str) -> Callable[..., Any]:
    def eager_step(optimizer: FusedOptimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _run_eager_step(optimizer, args, kwargs)

    return _outside(eager_step, reason)


def _run_eager_zero_grad(optimizer: FusedOptimizer, set_to_none: bool) -> None:
    optimizer.zero_grad(set_to_none)


_EAGER_STEPS = {name: _eager_step_because(reason) for name, reason in _REASONS.items()}
_eager_clip = _outside(_run_eager_clip, _REASONS["clipped"])
_clip_over_ranks = _outside(_run_eager_clip, _REASONS["ranks"])
_eager_zero_grad = _outside(
    _run_eager_zero_grad, "zero_grad() in a graph needs torch 2.13; call the model's zero_grad() there, or this outside"
)

"""The operators that a compiled graph has where eager has methods: torch.ops.momentum_ext.*

The optimizer's state is in the arguments, so that torch.compile sees what is read and what is written. None of them
keeps anything. Tensors that the kernels are not made for are updated by torch, inside the operator.

``step``: lists of tensors, those of one parameter group after those of the other.

- ``params``, ``grads``: of those parameters that have a gradient. ``momentum_buffers``: one for each of them whose
  group's momentum is not 0. ``averages``: one for each place in ``averaged``, which says whose it is.
- ``is_new_average``: for each average; it starts at what the parameter is before the step.
- ``is_first_step``: for each parameter; its buffer's content is then not read.
- One value for each group: ``group_sizes`` and the hyperparameters. An element of ``lr_tensors`` or
  ``weight_decay_tensors`` that is not None stands for the float at its place; its value may change from call to call.
- ``grad_factor``: multiplies the gradients. ``average_weight``: the new parameter's weight in its average.

A list more of state for each parameter is an argument more.
"""

from __future__ import annotations

import functools
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from momentum_ext import _C
from momentum_ext.averaging import average_weight as _average_weight
from momentum_ext.clipping import clip_by_norm
from momentum_ext.fallback import check_on_stand_ins
from momentum_ext.formulation import torch_step, update_by_torch
from momentum_ext.keys import BUFFER

__all__: list[str] = []

_LIBRARY = torch.library.Library("momentum_ext", "DEF")
_LIBRARY.define(
    "step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] averages, int[] averaged, "
    "bool[] is_new_average, bool[] is_first_step, int[] group_sizes, float[] lr, Tensor?[] lr_tensors, "
    "float[] momentum, float[] dampening, float[] weight_decay, Tensor?[] weight_decay_tensors, bool[] nesterov, "
    "bool[] maximize, bool[] decoupled_weight_decay, str[] formulations, Tensor? grad_factor=None, "
    "Tensor? average_weight=None) -> ()"
)
_LIBRARY.define(
    "clip(Tensor[] grads, float max_norm, float norm_type, bool error_if_nonfinite, Tensor? grad_factor=None)"
    " -> (Tensor norm, Tensor grad_factor)"
)
_LIBRARY.define("average(Tensor[] params, Tensor(a!)[] averages, Tensor average_weight) -> ()")
_LIBRARY.define("average_weight(Tensor count, float decay, bool warmup) -> Tensor")


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    averages: list[Tensor],
    averaged: list[int],
    is_new_average: list[bool],
    is_first_step: list[bool],
    group_sizes: list[int],
    lr: list[float],
    lr_tensors: list[Tensor | None],
    momentum: list[float],
    dampening: list[float],
    weight_decay: list[float],
    weight_decay_tensors: list[Tensor | None],
    nesterov: list[bool],
    maximize: list[bool],
    decoupled_weight_decay: list[bool],
    formulations: list[str],
    grad_factor: Tensor | None = None,
    average_weight: Tensor | None = None,
) -> None:
    if sum(group_sizes) != len(params):
        raise RuntimeError(f"group_sizes: expected the {len(params)} parameters, got {sum(group_sizes)}")
    ends = list(accumulate(group_sizes, initial=0))
    groups: list[dict[str, Any]] = [
        {
            "params": params[ends[g] : ends[g + 1]],
            "lr": _either(lr_tensors[g], lr[g]),
            "momentum": momentum[g],
            "dampening": dampening[g],
            "weight_decay": _either(weight_decay_tensors[g], weight_decay[g]),
            "nesterov": nesterov[g],
            "maximize": maximize[g],
            "decoupled_weight_decay": decoupled_weight_decay[g],
            "formulation": formulations[g],
        }
        for g in range(len(group_sizes))
    ]
    left = iter(momentum_buffers)
    buffers = [
        next(left, None) if momentum[g] != 0 else None for g in range(len(group_sizes)) for _ in groups[g]["params"]
    ]
    kept: list[Tensor | None] = [None] * len(params)
    started = []
    for place, average, is_new in zip(averaged, averages, is_new_average, strict=True):
        if is_new:
            started.append((params[place], average))
        else:
            kept[place] = average
    factor = 1.0 if grad_factor is None else float(grad_factor)
    weight = 0.0 if average_weight is None else float(average_weight)
    run = _C.ListStep(groups, params, grads, buffers, kept, is_first_step, factor, weight)

    by_torch = [(groups[g], ends[g] + i) for g, i in run.fallback()]
    for group, i in by_torch:
        state = {} if is_first_step[i] else {BUFFER: buffers[i]}
        check_on_stand_ins(update_by_torch, group, params[i], grads[i], state)
    for param, average in started:
        average.copy_(param)
    for group, i in by_torch:
        grad = grads[i] if factor == 1.0 else grads[i] * factor
        buffer = torch_step(group, params[i], grad, None if is_first_step[i] else buffers[i])
        ours = buffers[i]
        if ours is not None and buffer is not None and buffer is not ours:
            ours.copy_(buffer)
    run.run()
    for param, average in started:
        _average_one(param, average, weight)


def _either(tensor: Tensor | None, number: float) -> Tensor | float:
    return number if tensor is None else tensor


def _clip(
    grads: list[Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    grad_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    factor = 1.0 if grad_factor is None else float(grad_factor)
    computed = _C.GradNorm().compute_of(grads, norm_type)
    if computed is None or computed[0] is None:  # for torch, or on a CUDA device
        norm = torch.nn.utils.get_total_norm(grads, norm_type, error_if_nonfinite)
        value, dtype = float(norm), norm.dtype
    else:
        value, dtype = computed[0], computed[1]
    norm, coefficient = clip_by_norm(value * abs(factor), dtype, max_norm, norm_type, error_if_nonfinite)
    norm = norm.to(grads[0].device) if grads else norm
    return norm, torch.tensor(factor * coefficient, dtype=torch.float64, device="cpu")


def _average(params: list[Tensor], averages: list[Tensor], average_weight: Tensor) -> None:
    weight = float(average_weight)
    for param, average in zip(params, averages, strict=True):
        _average_one(param, average, weight)


def _average_one(param: Tensor, average: Tensor, weight: float) -> None:
    if weight == 1.0:
        average.copy_(param)
    else:
        average.lerp_(param, weight)


for _name, _function in (("step", _step), ("clip", _clip), ("average", _average)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.impl(_LIBRARY, "average_weight", "CompositeExplicitAutograd")
def _weight(count: Tensor, decay: float, warmup: bool) -> Tensor:
    return torch.tensor(_average_weight(decay, warmup, int(count)), dtype=torch.float64, device="cpu")


@torch.library.register_fake(  # type: ignore[untyped-decorator]
    "momentum_ext::step", lib=_LIBRARY
)
def _fake_step(params: list[Tensor], grads: list[Tensor], *rest: object) -> None:
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        torch._check(param.shape == grad.shape, lambda i=i: f"grads[{i}]: expected the shape of its parameter")


@torch.library.register_fake(  # type: ignore[untyped-decorator]
    "momentum_ext::clip", lib=_LIBRARY
)
def _fake_clip(grads: list[Tensor], *rest: object) -> tuple[Tensor, Tensor]:
    dtypes = [grad.dtype.to_real() for grad in grads] or [torch.float32]
    device = grads[0].device if grads else torch.device("cpu")
    norm = torch.empty((), dtype=functools.reduce(torch.promote_types, dtypes), device=device)
    return norm, torch.empty((), dtype=torch.float64, device="cpu")


@torch.library.register_fake(  # type: ignore[untyped-decorator]
    "momentum_ext::average", lib=_LIBRARY
)
def _fake_average(params: list[Tensor], averages: list[Tensor], average_weight: Tensor) -> None:
    return None


@torch.library.register_fake(  # type: ignore[untyped-decorator]
    "momentum_ext::average_weight", lib=_LIBRARY
)
def _fake_weight(count: Tensor, decay: float, warmup: bool) -> Tensor:
    return torch.empty((), dtype=torch.float64, device="cpu")

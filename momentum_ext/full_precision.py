"""A model's weights in fp32: what optimizers with master weights know of them, out and in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from momentum_ext.dtensor import like, local
from momentum_ext.keys import MASTER, REMAINDER
from momentum_ext.precision import HALVES, exact_param, split_param

__all__ = ["fp32_state_dict", "load_fp32_state_dict"]


def fp32_state_dict(param_groups: list[dict[str, Any]], state: dict[Any, Any], model: nn.Module) -> dict[str, Any]:
    """See :meth:`FusedMomentum.fp32_state_dict`."""
    model = _unwrapped(model)
    has_master = _with_master(param_groups)
    found = model.state_dict()
    with torch.no_grad():
        for name, param in model.named_parameters(remove_duplicate=False):
            if name in found and param.dtype in HALVES:
                found[name] = _exact(param, state.get(param, {}) if param in has_master else {})
    return found


@torch.no_grad()
def load_fp32_state_dict(
    param_groups: list[dict[str, Any]], state: dict[Any, Any], model: nn.Module, state_dict: dict[str, Any]
) -> None:
    """See :meth:`FusedMomentum.load_fp32_state_dict`."""
    model = _unwrapped(model)
    has_master = _with_master(param_groups)
    targets = model.state_dict()
    _check(targets, state_dict)
    params = dict(model.named_parameters(remove_duplicate=False))
    masters = {}
    for name, value in state_dict.items():
        param = params.get(name)
        if param is not None and param in has_master and param.dtype in HALVES:
            masters[name] = _split(param, value, has_master[param])
    for name, target in targets.items():  # nothing can fail from here on
        if name in masters:
            rounded, key, master = masters[name]
            target.copy_(rounded)
            state[params[name]][key] = master
        elif isinstance(target, Tensor):
            target.copy_(state_dict[name])


def _unwrapped(model: Any) -> nn.Module:
    """What DistributedDataParallel and torch.compile have put a wrapper around."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model._orig_mod
    return model  # type: ignore[no-any-return]


def _with_master(param_groups: list[dict[str, Any]]) -> dict[Any, bool | int]:
    """The parameters that want one, with what their group says of it."""
    wanted = ((group["params"], group.get("master_weights", False)) for group in param_groups)
    return {param: master for params, master in wanted if master for param in params}


def _exact(param: Any, entry: dict[str, Any]) -> Tensor:
    value = exact_param(local(param.detach()), {key: local(entry[key]) for key in (REMAINDER, MASTER) if key in entry})
    return like(param, value) if hasattr(param, "_spec") else value


def _split(param: Any, value: Tensor, master_weights: bool | int) -> tuple[Tensor, str, Tensor]:
    """The parameter, the key of its master and the master that this value makes."""
    shard = local(param.detach())
    exact = torch.empty_like(shard, dtype=torch.float32).copy_(local(value))
    rounded, key, master = split_param(shard.dtype, exact, master_weights)
    if hasattr(param, "_spec"):
        return like(param, rounded), key, like(param, master)
    return rounded, key, master


def _check(targets: dict[str, Any], state_dict: dict[str, Any]) -> None:
    """Raises RuntimeError for whatever does not fit, all of it."""
    wrong = [f"missing: {name}" for name in targets if name not in state_dict]
    wrong += [f"unexpected: {name}" for name in state_dict if name not in targets]
    for name, target in targets.items():
        value = state_dict.get(name, target)
        if not isinstance(target, Tensor):
            continue
        if not isinstance(value, Tensor):
            wrong.append(f"{name}: expected a tensor, got {type(value).__name__}")
        elif value.shape != target.shape:
            wrong.append(f"{name}: expected shape {tuple(target.shape)}, got {tuple(value.shape)}")
        elif _placement(value) != _placement(target):
            wrong.append(f"{name}: expected {_described(target)}, got {_described(value)}")
    if wrong:
        raise RuntimeError("load_fp32_state_dict(): nothing was loaded. " + "; ".join(wrong))


def _placement(tensor: Any) -> Any:
    return (tensor.device_mesh, tensor.placements) if hasattr(tensor, "_spec") else None


def _described(tensor: Any) -> str:
    if not hasattr(tensor, "_spec"):
        return "a plain tensor"
    return f"a DTensor of {list(tensor.placements)} on {tensor.device_mesh}"

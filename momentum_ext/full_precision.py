"""A model's weights in fp32: what optimizers with master weights know of them, out and in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from momentum_ext.dtensor import described, like, local
from momentum_ext.keys import MASTER, REMAINDER
from momentum_ext.precision import HALVES, exact_param, split_param

__all__ = ["fp32_state_dict", "load_fp32_state_dict"]


@torch.no_grad()
def fp32_state_dict(param_groups: list[dict[str, Any]], state: dict[Any, Any], model: nn.Module) -> dict[str, Any]:
    """See :meth:`FusedMomentum.fp32_state_dict`."""
    model = _unwrapped(model)
    masters = _master_weights(param_groups, model)
    params = _params_by_name(model.state_dict(keep_vars=True), masters, model, "fp32_state_dict()")
    found = model.state_dict()
    widened: dict[Any, Tensor] = {}  # a tied weight stays one
    for name, param in params.items():
        if param.dtype in HALVES:
            if param not in widened:
                widened[param] = _exact(param, state.get(param, {}) if masters.get(param) else {})
            found[name] = widened[param]
    return found


@torch.no_grad()
def load_fp32_state_dict(
    param_groups: list[dict[str, Any]], state: dict[Any, Any], model: nn.Module, state_dict: dict[str, Any]
) -> None:
    """See :meth:`FusedMomentum.load_fp32_state_dict`."""
    model = _unwrapped(model)
    masters = _master_weights(param_groups, model)
    targets = model.state_dict(keep_vars=True)
    params = _params_by_name(targets, masters, model, "load_fp32_state_dict()")
    _check(targets, state_dict)
    rounded, new_masters = dict(state_dict), []
    for name, param in params.items():
        if param.dtype in HALVES and masters.get(param):
            rounded[name], key, master = _split(param, state_dict[name], masters[param])
            new_masters.append((param, key, master))
    model.load_state_dict(rounded)
    for param in model.parameters():
        for key in (REMAINDER, MASTER) if param in state else ():
            state[param].pop(key, None)
    for param, key, master in new_masters:
        state[param][key] = master


def _unwrapped(model: Any) -> nn.Module:
    """What DistributedDataParallel and torch.compile have put a wrapper around."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__module__.startswith("torch._dynamo"):
            model = model._orig_mod
        elif isinstance(model, nn.Module):
            return model
        else:
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _master_weights(param_groups: list[dict[str, Any]], model: nn.Module) -> dict[Any, bool | int]:
    """What the group of each of the optimizer's parameters says of masters."""
    wanted = {param: group.get("master_weights", False) for group in param_groups for param in group["params"]}
    if not any(param in wanted for param in model.parameters()):
        raise ValueError("model: none of its parameters is this optimizer's; pass the model that it steps")
    return wanted


def _params_by_name(
    targets: dict[str, Any], masters: dict[Any, bool | int], model: nn.Module, caller: str
) -> dict[str, Any]:
    """The parameters that the model's state dict holds, by its names, whatever wrappers and hooks make of these."""
    params = set(model.parameters())
    found = {name: each for name, each in targets.items() if isinstance(each, Tensor) and each in params}
    held = set(found.values())
    for name, param in model.named_parameters():
        if masters.get(param) and param.dtype in HALVES and param not in held:
            raise RuntimeError(
                f"{caller}: the model's state_dict() does not hold its parameter {name} itself, as under "
                "FullyShardedDataParallel or with a hook that copies, so its master cannot be told; call it where the "
                "state dict does"
            )
    return found


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


def _check(targets: dict[str, Any], state_dict: Any) -> None:
    """Raises for whatever does not fit, all of it, before anything is loaded."""
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
    wrong = [f"missing: {name}" for name in targets if name not in state_dict]
    wrong += [f"unexpected: {name}" for name in state_dict if name not in targets]
    for name, target in targets.items():
        if isinstance(target, Tensor) and name in state_dict and (why := _misfit(target, state_dict[name])):
            wrong.append(f"{name}: {why}")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise RuntimeError(f"load_fp32_state_dict(): nothing was loaded. {'; '.join(wrong[:8])}{more}")


def _misfit(target: Tensor, value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"expected a tensor, got {type(value).__name__}"
    if value.shape != target.shape:
        return f"expected shape {tuple(target.shape)}, got {tuple(value.shape)}; load the weights of this model"
    if _placement(value) != _placement(target):
        remedy = "distribute_tensor()" if _placement(target) else "full_tensor()"
        return f"expected {described(target)}, got {described(value)}; see {remedy} of torch.distributed.tensor"
    if value.layout != torch.strided or value.is_meta or value.is_complex() != target.is_complex():
        found = f"{value.dtype}, {value.layout} on {value.device}"
        return f"expected a dense tensor that {target.dtype} can hold, got {found}; convert it"
    return ""


def _placement(tensor: Any) -> Any:
    return (tensor.device_mesh, tensor.placements) if hasattr(tensor, "_spec") else None

"""Checkpoints of low-precision state: loaded without torch's casts, and written for torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from momentum_ext import _C
from momentum_ext.averaging import COUNT
from momentum_ext.precision import BUFFER, EIGHT_BITS, HALVES, MASTER, OPTIONS, REMAINDER, ROUNDING_STEP, SCALE

__all__ = ["as_torch_state_dict", "keep_dtypes", "settle", "unpack"]

_OWN_KEYS = (*OPTIONS, ROUNDING_STEP, COUNT, "formulation", "decoupled_weight_decay")


class _Kept:
    """A tensor that torch's load_state_dict does not look into, and so does not cast."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def keep_dtypes(optimizer: torch.optim.Optimizer, load: Callable[[], None]) -> None:
    """Call `load`, which is the optimizer's load_state_dict, with state that keeps its dtypes; see :func:`unpack`."""

    def hide(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        hidden = {
            key: {
                name: _Kept(value) if name in (BUFFER, SCALE, REMAINDER, MASTER) and type(value) is Tensor else value
                for name, value in entry.items()
            }
            if isinstance(entry, dict)
            else entry
            for key, entry in state_dict["state"].items()
        }
        return {**state_dict, "state": hidden}

    handle = optimizer.register_load_state_dict_pre_hook(hide)  # after the user's own
    try:
        load()
    finally:
        handle.remove()


def unpack(state: dict[Any, Any]) -> None:
    """Take the tensors that :func:`keep_dtypes` has hidden to their parameters' devices."""
    for param, entry in state.items():
        for name, value in entry.items() if isinstance(entry, dict) else ():
            if isinstance(value, _Kept):
                entry[name] = _on_device(param, value.tensor)


def _on_device(param: Any, tensor: Tensor) -> Tensor:
    if not isinstance(param, Tensor):
        return tensor
    # Wider than what is computed with: from a model of another dtype, and cast as torch casts it.
    is_too_wide = tensor.dtype == torch.float64 and param.is_floating_point()
    return tensor.to(param.device, param.dtype if is_too_wide else None)


def settle(group: dict[str, Any], state: dict[Any, Any]) -> None:
    """After loading: a group that names no momentum_dtype has buffers as torch would, or in fp32 for 16-bit parameters.

    What a group names is converted in the next step, from what was stored.
    """
    for param in group["params"]:
        entry = state.get(param, {})
        buffer = entry.get(BUFFER)
        if not isinstance(buffer, Tensor) or not param.is_floating_point():
            continue
        if group.get("momentum_dtype") is None:
            if buffer.dtype in EIGHT_BITS and SCALE in entry:
                entry[BUFFER] = _C.dequantize(buffer, entry.pop(SCALE)).to(param.dtype)
            elif not (buffer.dtype == torch.float32 and param.dtype in HALVES):
                entry[BUFFER] = buffer.to(param.dtype)
        if not group.get("master_weights", False):
            entry.pop(REMAINDER, None)
            entry.pop(MASTER, None)


def as_torch_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What torch.optim.SGD can load, of what FusedMomentum.state_dict() has returned; see torch_state_dict()."""
    groups = []
    for g, group in enumerate(state_dict["param_groups"]):
        if "train_mode" in group:
            raise RuntimeError("torch_state_dict(): optimizer.eval() holds the iterate; call optimizer.train() first")
        if group.get("decoupled_weight_decay", False) and group["weight_decay"] != 0:
            raise ValueError(
                f"torch_state_dict(): param_groups[{g}] has decoupled_weight_decay, which torch.optim.SGD has not"
            )
        plain = {key: value for key, value in group.items() if key not in _OWN_KEYS}
        if group.get("formulation") == "ema" and group["momentum"] != 0:
            if group["nesterov"]:
                raise ValueError(
                    f"torch_state_dict(): param_groups[{g}] is Nesterov in the ema formulation, for which "
                    "torch.optim.SGD would need dampening"
                )
            plain["dampening"] = group["momentum"]
        groups.append(plain)
    group_of = {index: group for group in state_dict["param_groups"] for index in group["params"]}
    state = {}
    for index, entry in state_dict["state"].items():
        buffer = entry.get(BUFFER)
        if not isinstance(buffer, Tensor):
            continue
        if buffer.dtype in EIGHT_BITS:
            buffer = _C.dequantize(buffer, entry[SCALE])
        group = group_of.get(index, {})
        if group.get("formulation") == "classical" and group["momentum"] != 0:
            if float(group["lr"]) == 0:
                raise ValueError("torch_state_dict(): classical buffers are divided by the lr, which is 0")
            buffer = buffer / group["lr"]
        state[index] = {BUFFER: buffer}
    return {"state": state, "param_groups": groups}

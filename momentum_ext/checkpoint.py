"""Checkpoints: what leaves by state_dict(), and what comes in by load_state_dict(), without torch's casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from momentum_ext import _C
from momentum_ext.dtensor import is_cut, like, local
from momentum_ext.keys import (
    AVERAGE,
    AVERAGE_COUNT,
    BUFFER,
    BUFFER_FORMULATION,
    COUNTERS,
    LOOKAHEAD,
    MASTER,
    MOMENTUM_OPTIONS,
    NON_NEGATIVE,
    REMAINDER,
    ROUNDING_STEP,
    SCALE_OF,
)
from momentum_ext.precision import ROOTS, SCALE_BLOCK, check_options, is_in_blocks, packs, rounds_at_random

__all__ = [
    "as_momentum_state_dict",
    "as_torch_state_dict",
    "changed",
    "check_complete",
    "check_counters",
    "keep_dtypes",
    "with_changes",
    "without_defaults",
]

# What a group says of its tensors' state, beside its optimizer's options.
_NOTES = (ROUNDING_STEP, AVERAGE_COUNT, BUFFER_FORMULATION)

# State of ours, and the dtypes in which it leaves and comes back where gloo and NCCL do not move its own.
_OWN_STATE = (*SCALE_OF, *SCALE_OF.values(), REMAINDER, MASTER, AVERAGE, LOOKAHEAD)
_SCALES = tuple(SCALE_OF.values())
_LEAVES_AS = {torch.int16: torch.bfloat16, torch.float8_e4m3fn: torch.uint8}
_COMES_BACK_AS = {
    (REMAINDER, torch.bfloat16): torch.int16,
    **{(key, torch.uint8): torch.float8_e4m3fn for key in SCALE_OF},
    **{(key, torch.int8): ROOTS for key in NON_NEGATIVE},
}

# Of a buffer in blocks, in the dict that it leaves as: what flattens a checkpoint makes keys of their own of them, so
# that codes are never taken for values.
_CODES, _SCALE = "codes", "scale"


def without_defaults(group: dict[str, Any], options: dict[str, Any]) -> None:
    """Drop our options where they say what torch's optimizer would do; dtypes become their names."""
    check_options(group, options)
    for name, default in options.items():
        if group.get(name, default) == default:
            group.pop(name, None)
    if not rounds_at_random(group):  # seed and step say nothing without it
        group.pop("rounding_seed", None)
        group.pop(ROUNDING_STEP, None)


# ---- out ------------------------------------------------------------------------------------------------------------


def changed(state: Any, changes: list[Any], names: dict[int, Any]) -> Any:
    """A copy of the state with these changes, as :func:`with_changes` takes them."""
    state = state.copy()
    for param, key, tensor in changes:
        entry = state[names[id(param)]] = dict(state[names[id(param)]])
        if tensor is None:
            entry.pop(key, None)
        else:
            entry[key] = tensor
    return state


def with_changes(
    state_dict: dict[str, Any], changes: list[Any], params: dict[Any, Tensor], compact: bool
) -> dict[str, Any]:
    """A state dict with what the next step would start from, in forms and dtypes that can travel.

    `changes` are (parameter, key, tensor or None), `params` the parameters by the state dict's keys. `compact`: buffers
    in blocks leave as codes where any sharding between blocks can be made of them.
    """
    state = changed(state_dict["state"], changes, {id(param): name for name, param in params.items()})
    for name, entry in state.items():
        for key, scale in SCALE_OF.items() if isinstance(entry, dict) and name in params else ():
            if scale in entry and is_in_blocks(entry.get(key), params[name]):
                entry = state[name] = _travelling(params[name], entry, key, compact)
        views = {
            key: _view(entry[key], _LEAVES_AS[entry[key].dtype])
            for key in (_OWN_STATE if isinstance(entry, dict) else ())
            if isinstance(entry.get(key), Tensor) and entry[key].dtype in _LEAVES_AS
        }
        if views:
            state[name] = {**entry, **views}
    return {**state_dict, "state": state}


def _travelling(param: Tensor, entry: dict[str, Any], buffer: str, compact: bool) -> dict[str, Any]:
    """State whose buffer in blocks has become codes and scales that shard alike, or its values in fp32."""
    rest = {key: value for key, value in entry.items() if key not in (buffer, SCALE_OF[buffer])}
    codes, scale = local(entry[buffer]), local(entry[SCALE_OF[buffer]])
    is_packed = packs(buffer, codes.dtype)
    is_plain = local(param) is param
    # Of a DTensor, strides are the whole tensor's: all ranks find the same.
    in_rows = param.dim() > 1 and param.is_contiguous() and codes.is_contiguous() and not is_cut(param, SCALE_BLOCK)
    if not compact or not in_rows:
        values = _C.dequantize(codes, scale, local(param).shape, buffer in NON_NEGATIVE)
        return {**rest, buffer: values if is_plain else like(param, values)}
    in_a_row = param.shape[-1] // 2 if is_packed else param.shape[-1]
    is_root = codes.dtype == ROOTS and not is_packed
    codes = codes.view(torch.int8 if is_root else _LEAVES_AS.get(codes.dtype, codes.dtype))
    if not is_plain:
        codes = like(param, codes, (*param.shape[:-1], in_a_row))
        scale = like(param, scale, (*param.shape[:-1], param.shape[-1] // SCALE_BLOCK, 2))
    return {**rest, buffer: {_CODES: codes, _SCALE: scale}}


def _view(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same memory in another dtype of the same size; of a DTensor, too."""
    shard = local(tensor)
    return tensor.view(dtype) if shard is tensor else like(tensor, shard.view(dtype))


# ---- in -------------------------------------------------------------------------------------------------------------


class _Kept:
    """A tensor that torch's load_state_dict does not look into, and so does not cast."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def keep_dtypes(optimizer: torch.optim.Optimizer, load: Callable[[], None]) -> None:
    """Call `load`, which is the optimizer's load_state_dict, with state that keeps its dtypes; see :func:`unpack`."""

    def hide(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        def hidden_of(name: Any, value: Any) -> Any:
            if name in SCALE_OF and isinstance(value, dict):
                return {key: _Kept(each) if isinstance(each, Tensor) else each for key, each in value.items()}
            is_kept = name in (*_OWN_STATE, *COUNTERS) and isinstance(value, Tensor)
            return _Kept(value) if is_kept else value

        hidden = {
            key: {name: hidden_of(name, value) for name, value in entry.items()} if isinstance(entry, dict) else entry
            for key, entry in state_dict["state"].items()
        }
        return {**state_dict, "state": hidden}

    handle = optimizer.register_load_state_dict_pre_hook(hide)  # after the user's own
    try:
        load()
    finally:
        handle.remove()


def unpack(state: dict[Any, Any]) -> None:
    """Take what :func:`keep_dtypes` has hidden to the parameters' devices, and codes and scales to their keys."""
    for param, entry in state.items():
        if not isinstance(entry, dict):
            continue
        for buffer, scale in SCALE_OF.items():
            if isinstance(entry.get(buffer), dict):
                saved = entry.pop(buffer)
                entry |= {name: saved[key] for name, key in ((buffer, _CODES), (scale, _SCALE)) if key in saved}
            if entry.get(scale) == {}:  # what torch makes of a flattened checkpoint, for a key that it does not have
                del entry[scale]
        for name, value in entry.items():
            if isinstance(value, _Kept) and name in COUNTERS:
                entry[name] = value.tensor
            elif isinstance(value, _Kept):
                tensor = value.tensor
                # A uint8 parameter's buffer is uint8, too.
                is_own = name not in SCALE_OF or SCALE_OF[name] in entry
                dtype = _COMES_BACK_AS.get((name, tensor.dtype)) if is_own else None
                if name in _SCALES or (dtype == torch.float8_e4m3fn and tensor.shape != param.shape):
                    tensor = local(tensor)  # of a local shard: scales, and codes that are packed
                elif dtype is not None:
                    tensor = _view(tensor, dtype)
                entry[name] = tensor.to(param.device) if isinstance(param, Tensor) else tensor


def check_counters(param_groups: list[dict[str, Any]], state: dict[Any, Any], counters: tuple[str, ...]) -> None:
    """Raises ValueError for state without what torch's optimizer counts steps with, by name."""
    for g, group in enumerate(param_groups):
        for i, param in enumerate(group["params"]):
            entry = state.get(param) or {}
            for key in counters if entry else ():
                if not isinstance(entry.get(key), Tensor | float | int):
                    raise ValueError(
                        f"state of param_groups[{g}]['params'][{i}]: it has no number as \"{key}\", but "
                        f"{sorted(entry)}; load a checkpoint of this kind of optimizer"
                    )


def check_complete(param_groups: list[dict[str, Any]], state: dict[Any, Any]) -> None:
    """Raises ValueError for state that is not whole, by name."""
    for g, group in enumerate(param_groups):
        for i, param in enumerate(group["params"]):
            entry = state.get(param, {})
            name = f"state of param_groups[{g}]['params'][{i}]"
            for key in (*SCALE_OF, REMAINDER, MASTER, AVERAGE):
                tensor, scale = entry.get(key), SCALE_OF.get(key, "")
                in_blocks = scale != "" and param.is_floating_point() and is_in_blocks(tensor, param)
                if in_blocks and isinstance(tensor, Tensor) and not isinstance(entry.get(scale), Tensor):
                    raise ValueError(
                        f'{name}: its "{key}" is {tensor.dtype} and there is no "{scale}" beside it; delete it to '
                        "start from zeros, or load a whole checkpoint"
                    )
                if not isinstance(tensor, Tensor) or tensor.shape == param.shape:
                    continue
                is_packed = in_blocks and packs(key, tensor.dtype)
                if not is_packed or not _C.is_packed_of(tensor, local(param).shape):
                    raise ValueError(
                        f'{name}: its "{key}" has shape {tuple(tensor.shape)} and the parameter {tuple(param.shape)}; '
                        "load the checkpoint of this model"
                    )
            if isinstance(entry.get(AVERAGE), Tensor) and AVERAGE_COUNT not in group:
                raise ValueError(
                    f'{name}: it has an average ("{AVERAGE}") and its group no "{AVERAGE_COUNT}", which counts '
                    "the updates; "
                    "delete the averages to start new ones, or load a whole checkpoint"
                )


# ---- for torch's optimizers -----------------------------------------------------------------------------------------


def _decoded(key: str, codes: Tensor, scale: Tensor) -> Tensor:
    """What codes that have left beside their scales stand for, in fp32."""
    columns = scale.shape[-2] * SCALE_BLOCK
    shard = local(codes)
    sizes = (*shard.shape[:-1], local(scale).shape[-2] * SCALE_BLOCK)
    if codes.shape[-1] == columns and (key, codes.dtype) in _COMES_BACK_AS:
        shard = shard.view(_COMES_BACK_AS[key, codes.dtype])
    values = _C.dequantize(shard, local(scale), sizes, key in NON_NEGATIVE)
    return values if local(codes) is codes else like(codes, values, (*codes.shape[:-1], columns))


def as_torch_state_dict(state_dict: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What torch's optimizer can load, of what ours with these options has returned; see torch_state_dict()."""
    own_keys = (*options, *_NOTES)
    groups = [
        {key: value for key, value in group.items() if key not in own_keys} for group in state_dict["param_groups"]
    ]
    state = {}
    for index, entry in state_dict["state"].items():
        plain = {key: value for key, value in entry.items() if key not in _OWN_STATE}
        for key in SCALE_OF:
            values, scale = entry.get(key), entry.get(SCALE_OF[key])
            if isinstance(values, dict):
                values, scale = values[_CODES], values[_SCALE]
            if isinstance(values, Tensor):
                plain[key] = values if scale is None else _decoded(key, values, scale)
        if plain:
            state[index] = plain
    return {"state": state, "param_groups": groups}


def as_momentum_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What torch.optim.SGD can load, of what FusedMomentum.state_dict() has returned; see torch_state_dict()."""
    for_torch = as_torch_state_dict(state_dict, MOMENTUM_OPTIONS)
    for g, (plain, group) in enumerate(zip(for_torch["param_groups"], state_dict["param_groups"], strict=True)):
        if group.get("decoupled_weight_decay", False) and group["weight_decay"] != 0:
            raise ValueError(
                f"torch_state_dict(): param_groups[{g}] has decoupled_weight_decay, which torch.optim.SGD has not; "
                "set it to False there for SGD's L2 decay, or weight_decay to 0"
            )
        if group.get("formulation") == "ema" and group["momentum"] != 0:
            if group["nesterov"]:
                raise ValueError(
                    f"torch_state_dict(): param_groups[{g}] is Nesterov in the ema formulation, for which "
                    "torch.optim.SGD would need dampening; set nesterov to False there"
                )
            plain["dampening"] = group["momentum"]
    group_of = {index: group for group in state_dict["param_groups"] for index in group["params"]}
    for index, entry in for_torch["state"].items():
        if BUFFER not in entry:
            continue
        group = group_of.get(index, {})
        written = group.get(BUFFER_FORMULATION, "torch")
        if written == "ema" and group["momentum"] == 0:
            raise ValueError(
                f"torch_state_dict(): the buffer of parameter {index} is in the ema formulation, which has no form of "
                "torch's without momentum; set its group's momentum, or delete the buffer"
            )
        if written == "classical":
            if float(group["lr"]) == 0:
                raise ValueError(
                    f"torch_state_dict(): the classical buffer of parameter {index} is divided by the lr, which is 0; "
                    "set its group's lr to what the training goes on with"
                )
            entry[BUFFER] = entry[BUFFER] / group["lr"]
    return for_torch

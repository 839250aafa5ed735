"""State in fewer bits, or in more, than the parameters: the options, and torch's own path.

What is stored, and how it is rounded, is described in docs/precision.md; the kernels' own text is
``csrc/formats``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from momentum_ext import _C
from momentum_ext.dtensor import local
from momentum_ext.keys import BUFFER, COUNTERS, MASTER, NON_NEGATIVE, REMAINDER, SCALE_OF

__all__ = [
    "IN_BLOCKS",
    "PACKED",
    "SCALE_BLOCK",
    "check_low_precision_step",
    "check_options",
    "dtype_of_state",
    "exact_param",
    "is_in_blocks",
    "low_precision_step",
    "needs_low_precision_step",
    "packs",
    "rounds_at_random",
    "rounds_stored",
    "split_param",
    "uses_low_precision",
]

INT4 = torch.int4  # type: ignore[attr-defined]  # missing in torch's stubs
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn, INT4)
_DTYPE_OF = {str(dtype).removeprefix("torch."): dtype for dtype in STATE_DTYPES}
PACKED = torch.uint8  # int4, two in a byte
ROOTS = torch.uint8  # of states that are never negative, a byte each
IN_BLOCKS = (torch.int8, torch.float8_e4m3fn, PACKED)
SCALE_BLOCK = 32  # elements of a buffer in blocks that share a scale, of two bytes
HALVES = (torch.bfloat16, torch.float16)


def _dtype_named(name: str, found: Any) -> torch.dtype | None:
    dtype = _DTYPE_OF.get(found) if isinstance(found, str) else found
    if found is not None and dtype not in STATE_DTYPES:
        raise ValueError(
            f"Invalid {name}: {found!r}; expected None or {', '.join(_DTYPE_OF)}, as a torch.dtype or its name"
        )
    return dtype


def _asked_dtype(group: dict[str, Any], key: str) -> torch.dtype | None:
    """What the group says of the state with this key: groups hold names, which every checkpoint format can carry."""
    found = group.get("state_dtype")
    dtype = _dtype_named("state_dtype", found.get(key) if isinstance(found, dict) else found)
    return (_dtype_named("momentum_dtype", group.get("momentum_dtype")) if key == BUFFER else None) or dtype


def dtype_of_state(group: dict[str, Any], param: Tensor, key: str) -> torch.dtype:
    """That of the parameter's state: fp32 beside a master, else the parameter's own; PACKED for int4."""
    has_master = group.get("master_weights", False) and param.dtype in HALVES
    dtype = _asked_dtype(group, key) or (torch.float32 if has_master else param.dtype)
    if key in NON_NEGATIVE:
        return ROOTS if dtype == torch.int8 else dtype
    if dtype == INT4:
        return PACKED if _C.can_pack(local(param.detach())) else torch.int8
    return dtype


def packs(key: str, dtype: torch.dtype) -> bool:
    """Whether the state with this key and dtype has two codes in a byte."""
    return dtype == PACKED and key not in NON_NEGATIVE


def is_in_blocks(buffer: Any, param: Tensor) -> bool:
    """Whether a buffer has codes of 8 or 4 bits, beside a scale for each block."""
    return isinstance(buffer, Tensor) and buffer.dtype in IN_BLOCKS and buffer.dtype != param.dtype


def check_options(group: dict[str, Any], options: dict[str, Any]) -> None:
    """Refuse what no step could do, when a group is made; dtypes become names.

    Raises:
        ValueError: for a dtype that is none of those that states can have, and for a state that there is not.
        TypeError: for a seed that is no int, and for other values of master_weights and stochastic_rounding.
    """
    masters = group.get("master_weights", False)
    if not isinstance(masters, bool) and (type(masters) is not int or masters not in (24, 32)):
        raise TypeError(f"Invalid master_weights: {masters!r}; expected a bool, 24 or 32")
    if masters == 32:
        group["master_weights"] = True
    if not isinstance(group.get("stochastic_rounding"), bool | None):
        raise TypeError(f"Invalid stochastic_rounding: {group['stochastic_rounding']!r}; expected a bool or None")
    if "momentum_dtype" in options:
        _move_to_momentum_dtype(group)
    for name in ("momentum_dtype", "state_dtype"):
        found = group.get(name)
        if isinstance(found, dict):
            if unknown := set(found) - (set(SCALE_OF) - {BUFFER}):
                raise ValueError(f"Invalid state_dtype: {found!r}; there is no state {sorted(unknown)[0]!r}")
            dtypes = {key: _dtype_named(name, dtype) for key, dtype in found.items()}
            for key, dtype in dtypes.items():
                if key in NON_NEGATIVE:
                    _check_second_moment(dtype, f"{key} in {found[key]}", "")
            group[name] = {key: _name_of(dtype) for key, dtype in dtypes.items() if dtype is not None} or None
        elif (dtype := _dtype_named(name, found)) is not None:
            if name == "state_dtype":
                _check_second_moment(dtype, str(found), f' or {{"exp_avg": {_name_of(dtype)!r}}}')
            group[name] = _name_of(dtype)
    if not isinstance(group.get("rounding_seed", 0), int):
        raise TypeError(f"Invalid rounding_seed: {group['rounding_seed']!r}; expected an int")


def _check_second_moment(dtype: torch.dtype | None, what: str, remedy: str) -> None:
    if dtype in (INT4, torch.float16, torch.float8_e4m3fn):
        raise ValueError(
            f"Invalid state_dtype: {what} would store small second moments as 0, whose steps would be wild; use int8, "
            f"bfloat16, float32{remedy}"
        )


def _move_to_momentum_dtype(group: dict[str, Any]) -> None:
    """Momentum has one state, and its own key for the dtype."""
    found = group.pop("state_dtype", None)
    if isinstance(found, dict):
        if unknown := set(found) - {BUFFER}:
            raise ValueError(f"Invalid state_dtype: {found!r}; momentum has no state {sorted(unknown)[0]!r}")
        found = found.get(BUFFER)
    dtype = _dtype_named("state_dtype", found)
    if dtype is None:
        return
    if _dtype_named("momentum_dtype", group.get("momentum_dtype")) not in (None, dtype):
        raise ValueError(
            f"state_dtype is {found!r} and momentum_dtype {group['momentum_dtype']!r}; give one of the two"
        )
    group["momentum_dtype"] = dtype


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def uses_low_precision(group: dict[str, Any]) -> bool:
    """Whether the group asks for anything that torch.optim.SGD does not store; a seed or a False does not."""
    return any(group.get(name) for name in ("momentum_dtype", "state_dtype", "master_weights", "stochastic_rounding"))


def rounds_at_random(group: dict[str, Any]) -> bool:
    """Whether anything of this group is: masters of 24 bits unless it says no, and else what it asks for."""
    rounds_masters = group.get("stochastic_rounding") is None and group.get("master_weights", False) == 24
    return rounds_masters or rounds_stored(group)


def rounds_stored(group: dict[str, Any]) -> bool:
    """Whether what is stored in 16 bits or fewer is; by default where second moments are, which fall too slowly."""
    asked: bool | None = group.get("stochastic_rounding")
    if asked is not None:
        return asked
    return any(_asked_dtype(group, key) not in (None, torch.float32) for key in NON_NEGATIVE)


# ---- torch's own path -----------------------------------------------------------------------------------------------


def needs_low_precision_step(group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> bool:
    """True where torch's function cannot be given the tensors as they are stored."""
    has_master = REMAINDER in state or MASTER in state
    in_blocks = any(is_in_blocks(state.get(key), param) for key in SCALE_OF)
    return in_blocks or has_master or uses_low_precision(group)


def check_low_precision_step(
    group: dict[str, Any], param: Tensor, states: tuple[str, ...], differentiable: bool, name: str
) -> None:
    """Raises RuntimeError for what only the kernels can do."""
    if differentiable:
        raise RuntimeError(f"{name}: state dtypes, master_weights and stochastic_rounding need differentiable=False")
    asked = any(_asked_dtype(group, key) is not None for key in states)
    if asked and not (param.is_floating_point() or param.is_complex()):
        raise RuntimeError(
            f"{name}: momentum_dtype and state_dtype are for floating-point parameters, got {param.dtype}; put it into "
            "a group without"
        )
    dtypes = [dtype_of_state(group, param, key) for key in states]
    if any(dtype in IN_BLOCKS for dtype in dtypes) and type(param.data) is not Tensor:
        raise RuntimeError(
            f"{name}: momentum_dtype and state_dtype of 8 bits or fewer need plain tensors, got "
            f"{type(param.data).__name__}; put it into a group with one of 16 or 32 bits"
        )
    is_low = any(dtype in (*HALVES, *IN_BLOCKS) for dtype in dtypes)
    stored_randomly = param.dtype in HALVES or (rounds_stored(group) and is_low)
    if rounds_at_random(group) and stored_randomly:
        raise RuntimeError(
            f"{name}: stochastic_rounding, which masters of 24 bits have unless it is False, needs tensors and "
            "hyperparameters that the kernels are made for (dense and plain, the gradient too; numbers or tensors that "
            "need no gradient); put it into a group without"
        )


def low_precision_step(
    group: dict[str, Any],
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    states: tuple[str, ...],
    step: Callable[[dict[str, Any], Tensor, Tensor, dict[str, Any]], None],
) -> None:
    """`step` with values in fp32, which are then stored as the group wants them."""
    has_master = group.get("master_weights", False) and param.dtype in HALVES
    is_low = param.dtype in HALVES
    value = exact_param(param, state) if has_master else param.float() if is_low else param
    values = {key: number for key, number in state.items() if key in COUNTERS}
    for key in states:
        stored = state.get(key)
        if isinstance(stored, Tensor):
            in_blocks = is_in_blocks(stored, param)
            values[key] = (
                _C.dequantize(stored, state[SCALE_OF[key]], param.shape, key in NON_NEGATIVE)
                if in_blocks
                else stored.to(value.dtype)
            )
    step(group, value, grad.to(value.dtype), values)
    for key, new in values.items():
        dtype = dtype_of_state(group, param, key) if key in states else None
        if dtype is None:
            state[key] = new
        elif dtype in IN_BLOCKS:
            # torch starts from a sparse gradient's copy; blocks are dense.
            dense = new.to_dense() if new.layout != torch.strided else new
            state[key], state[SCALE_OF[key]] = _C.quantize(dense, dtype, param, key in NON_NEGATIVE)
        else:
            state[key] = new.to(dtype)
            state.pop(SCALE_OF[key], None)
    if has_master:
        rounded, key, master = split_param(param.dtype, value, group["master_weights"])
        param.copy_(rounded)
        state[key] = master
    else:
        state.pop(REMAINDER, None)
        state.pop(MASTER, None)
        if is_low:
            param.copy_(value)


def exact_param(param: Tensor, state: dict[str, Any]) -> Tensor:
    """The fp32 value of a 16-bit parameter: with its master where the state has one."""
    if param.dtype == torch.bfloat16:
        if REMAINDER not in state:
            return param.float()
        rest: Tensor = state[REMAINDER].to(torch.int32)  # as join() in csrc/formats/master.h
        if state[REMAINDER].dtype == torch.int8:
            rest = rest * 256
        rest = rest.masked_fill(((param == 0) & (rest < 0)) | (param.isinf() & (rest > 0)), 0)
        return (param.float().view(torch.int32) + rest).view(torch.float32)
    if MASTER not in state:
        return param.float()
    rounded = state[MASTER].to(param.dtype)
    is_own = (rounded.view(torch.int16) == param.view(torch.int16)) | (rounded.isnan() & param.isnan())
    return torch.where(is_own, state[MASTER], param.float())


def split_param(dtype: torch.dtype, value: Tensor, master_weights: bool | int) -> tuple[Tensor, str, Tensor]:
    """A parameter of this 16-bit dtype, the key of its master and the master, of an fp32 value, rounded to nearest."""
    if dtype == torch.float16:
        return value.to(dtype), MASTER, value
    bits = torch.where(value.isnan(), torch.full_like(value, torch.nan), value).view(torch.int32)
    if master_weights == 24:
        bits = (bits + 0x80) & -0x100
    rounded = ((bits + 0x8000) & -0x10000).view(torch.float32).to(dtype)  # as split() in csrc/formats/master.h
    remainder = (bits >> 8).to(torch.int8) if master_weights == 24 else bits.to(torch.int16)
    return rounded, REMAINDER, remainder

"""DTensors: what the step, which updates their local shards, asks of them where something is new."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import make_contiguous_strides_for
from torch.utils._python_dispatch import _disable_current_modes

from momentum_ext.ranks import groups_of

__all__ = ["awaited", "described", "is_cut", "like", "local", "mismatch", "place_in_whole", "redistributed", "where_is"]


def local(tensor: Any) -> Any:
    """The local shard of a DTensor; anything else as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def like(param: Any, shard: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """A DTensor of the parameter's mesh, placements and global shape, or another, whose local shard this is."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import TensorMeta

    if shape is None:
        meta = TensorMeta(param.shape, param.stride(), shard.dtype)
    else:
        meta = TensorMeta(torch.Size(shape), make_contiguous_strides_for(shape), shard.dtype)
    spec = param._spec
    if spec.tensor_meta != meta:
        spec = spec.shallow_copy_with_tensor_meta(meta)
    return DTensor(shard, spec, requires_grad=False)


def is_cut(tensor: Any, block: int) -> bool:
    """Whether placements cut the last dimension elsewhere than between blocks; the same on all ranks."""
    size: int = tensor.shape[-1]
    sizes = [size]
    if hasattr(tensor, "_spec"):
        for ranks, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            if getattr(placement, "dim", None) == tensor.dim() - 1:
                sizes.append(-(-sizes[-1] // ranks))
    return any(each % block != 0 for each in sizes)


def place_in_whole(param: Any, name: str) -> tuple[int, int, int]:
    """Where the elements of a parameter's shard are in the whole tensor.

    Returns (first, run, stride): element i of the shard is element ``first + i // run * stride + i % run`` of the
    whole, ``first + i`` where run is 0.

    Raises:
        RuntimeError: for a sharding whose shards are no runs of one length, one distance apart; on all ranks alike.
    """
    shard, whole = param._local_tensor, param.shape
    if why := _no_runs(param):
        raise RuntimeError(
            f"{name}: stochastic_rounding needs {why}, got {tuple(shard.shape)} of {tuple(whole)}{where_is(param)}; "
            "shard it otherwise, or put it into a group without"
        )
    if shard.numel() == 0:
        return 0, 0, 0
    offsets = param.__create_chunk_list__()[0].offsets
    first, stride = 0, 1
    levels: list[list[int]] = []  # [how many, how far apart], from the elements of a run outwards
    for size, offset, whole_size in zip(reversed(shard.shape), reversed(offsets), reversed(whole), strict=True):
        first += offset * stride
        if levels and levels[-1][0] * levels[-1][1] == stride:
            levels[-1][0] *= size
        elif size != 1:
            levels.append([size, stride])
        stride *= whole_size
    if levels and levels[0][1] != 1:
        levels.insert(0, [1, 1])
    if len(levels) < 2:
        return first, 0, 0
    (run, _), (_, distance) = levels
    return first, run, distance


def _no_runs(param: Any) -> str:
    """What shards of this sharding are not; empty where all of them are runs, one distance apart."""
    whole, sizes = param.shape, param.device_mesh.shape
    rows = zip(whole, param.stride(), make_contiguous_strides_for(whole), strict=True)
    shard = param._local_tensor
    strides = [shard.stride(d) for d in range(shard.dim()) if shard.shape[d] > 1]
    if any(size > 1 and stride != row for size, stride, row in rows) or strides != sorted(strides, reverse=True):
        return "a whole tensor whose rows lie one after the other, and shards alike"
    dims = [getattr(placement, "dim", None) for placement in param.placements]
    for m, (dim, placement) in enumerate(zip(dims, param.placements, strict=True)):
        later = math.prod(size for each, size in zip(dims[m + 1 :], sizes[m + 1 :], strict=True) if each == dim)
        if dim is not None and getattr(placement, "split_factor", later) != later:
            return "shards that are in one piece"
    cut = sorted({dim for dim, size in zip(dims, sizes, strict=True) if dim is not None and min(size, whole[dim]) > 1})
    if cut and cut[-1] > 0 and math.prod(whole[cut[-1] :]) >= 1 << 32:
        return "rows of fewer than 2^32 elements"
    if len(cut) > 1 and math.prod(whole[: cut[-2]]) > 1:
        return "shards that are runs of the whole tensor, one distance apart"
    return ""


def awaited(grad: Any) -> Tensor:
    """The local shard of a gradient, once the collective that makes it has run."""
    shard = grad._local_tensor
    return shard.wait() if hasattr(shard, "wait") else shard  # type: ignore[no-any-return]


# A number of what is to be done with a gradient, which ranks compare: nothing, an error, or what makes a collective.
_NOTHING, _IS_ELSEWHERE, _MOVES = 0, 1, 2


def redistributed(
    params: list[Any], grads: list[Any], name: Callable[[int], str], meshes: set[Any] | None, step: int
) -> list[Tensor | None]:
    """The local shards of gradients that lie otherwise than their parameters, brought to where those lie; else None.

    The ranks of a mesh agree first, by one all-reduce, on what each is about to redistribute: a rank that lacks one
    of the gradients would take part in the collective of another. `meshes` are those that have to, because of a
    gradient here or in an earlier step, and grow; None: all. `step` is a number of this step: a rank that did not know
    that it had to agree is one behind.

    Raises:
        RuntimeError: with the name of the first gradient in which ranks of its mesh differ, on all of them.
    """
    plans = [_plan_of(param, grad) for param, grad in zip(params, grads, strict=True)]
    listed = dict.fromkeys(param.device_mesh for param in params)  # in the order of the list, alike on all ranks
    meshes = set(listed) if meshes is None else meshes
    meshes |= {param.device_mesh for param, plan in zip(params, plans, strict=True) if plan != _NOTHING}
    placed: list[Tensor | None] = [None] * len(params)
    errors = {i: mismatch for i, plan in enumerate(plans) if plan == _IS_ELSEWHERE}
    for mesh in listed:
        if mesh not in meshes:
            continue
        indices = [i for i, param in enumerate(params) if param.device_mesh == mesh]
        *differs, is_another_step = _differ(mesh, [*(plans[i] for i in indices), step])
        if is_another_step:
            errors[indices[0]] = _another_step
        for i in itertools.compress(indices, differs):
            errors.setdefault(i, _difference)
        if errors.keys().isdisjoint(indices):  # else other meshes still wait for this rank
            for i in indices:
                if plans[i] >= _MOVES:
                    with torch.no_grad():
                        placed[i] = awaited(grads[i].redistribute(placements=params[i].placements))
    if errors:
        first = min(errors)
        raise RuntimeError(f"{name(first)}: {errors[first](params[first], grads[first])}")
    return placed


def _plan_of(param: Any, grad: Any) -> int:
    if not hasattr(grad, "_spec"):
        return _NOTHING
    if grad.device_mesh != param.device_mesh or grad.shape != param.shape:
        return _IS_ELSEWHERE
    if grad.placements == param.placements:
        return _NOTHING
    return _MOVES + zlib.crc32(f"{grad.placements} {grad.dtype}".encode())


def _differ(mesh: Any, plans: list[int]) -> list[bool]:
    """Where ranks of the mesh have other numbers than others."""
    with _disable_current_modes():  # also where this rank's operators are watched, others wait
        bounds = torch.tensor([plans, [-plan for plan in plans]], device=mesh.device_type)
        for group in groups_of(mesh, range(mesh.ndim)):
            torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MAX, group)
        largest, smallest = bounds.tolist()
    return [a != -b for a, b in zip(largest, smallest, strict=True)]


def _difference(param: Any, other: Any) -> str:
    """What is wrong with a gradient that ranks would redistribute otherwise, and the remedy."""
    found = "None" if other is None else f"{described(other)} in {other.dtype}"
    return (
        f"it is {found}, other ranks have another, and it takes all of them to bring it to where its parameter is"
        f"{where_is(param)}; give it the same placements and dtype on all ranks of the mesh (zeros for None), "
        "or set it to None on all"
    )


def _another_step(param: Any, other: Any) -> str:
    return (
        "ranks are at different steps: one of them lacked all gradients that have to be brought to where their "
        f"parameters are{where_is(param)}, and has gone on; give it zeros instead of None, also in its first step, and "
        "start again from a checkpoint"
    )


def where_is(param: Any) -> str:
    """Rank, placements and mesh, for errors."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "?"
    return f" on rank {rank} of {list(param.placements)} on {param.device_mesh}"


def described(tensor: Any) -> str:
    """Kind and shape of a tensor, and of a DTensor where it is, for errors."""
    if not hasattr(tensor, "_spec"):
        return f"a plain {type(tensor).__name__} of shape {tuple(tensor.shape)}"
    return f"a DTensor of shape {tuple(tensor.shape)}{where_is(tensor)}"


def mismatch(param: Any, other: Any) -> str:
    """What is wrong with a gradient or state that does not lie as its parameter does, and the remedy."""
    return (
        f"it is {described(other)}, and its parameter {described(param)}; distribute it as its parameter "
        "(torch.distributed.tensor.distribute_tensor), or set it to None or delete it"
    )

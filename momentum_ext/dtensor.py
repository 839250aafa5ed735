"""DTensors: what the step, which updates their local shards, asks of them where something is new."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["Ranks", "awaited", "like", "local", "mismatch", "redistributed", "where_is"]


def local(tensor: Any) -> Any:
    """The local shard of a DTensor; anything else as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def like(param: Any, shard: Tensor) -> Tensor:
    """A DTensor of the parameter's mesh, placements and global shape, whose local shard this is."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import TensorMeta

    meta = TensorMeta(param.shape, param.stride(), shard.dtype)
    spec = param._spec
    if spec.tensor_meta != meta:
        spec = spec.shallow_copy_with_tensor_meta(meta)
    return DTensor(shard, spec, requires_grad=False)


def redistributed(param: Any, grad: Any, name: str) -> Tensor:
    """The local shard of a gradient that lies otherwise than its parameter, brought to where that lies."""
    if grad.device_mesh != param.device_mesh or grad.shape != param.shape:
        raise RuntimeError(f"{name}: {mismatch(param, grad)}")
    with torch.no_grad():
        shard = grad.redistribute(placements=param.placements)._local_tensor
    # Of a collective that is not waited for yet.
    return shard.wait() if hasattr(shard, "wait") else shard  # type: ignore[no-any-return]


def where_is(param: Any) -> str:
    """Rank, placements and mesh, for errors."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "?"
    return f" on rank {rank} of {list(param.placements)} on {param.device_mesh}"


def mismatch(param: Any, other: Any) -> str:
    """What is wrong with a gradient or state that does not lie as its parameter does, and the remedy."""

    def described(tensor: Any) -> str:
        if not hasattr(tensor, "_spec"):
            return f"a plain {type(tensor).__name__} of shape {tuple(tensor.shape)}"
        return f"a DTensor of shape {tuple(tensor.shape)}{where_is(tensor)}"

    return (
        f"it is {described(other)}, and its parameter {described(param)}; distribute it as its parameter "
        "(torch.distributed.tensor.distribute_tensor), or set it to None or delete it"
    )


def awaited(grad: Any) -> Tensor:
    """The local shard of a gradient, once the collective that makes it has run."""
    shard = grad._local_tensor
    return shard.wait() if hasattr(shard, "wait") else shard  # type: ignore[no-any-return]


class Ranks:
    """Adds up what ranks have found of a norm: one all-reduce for each mesh of the parameters, replicas counted once.

    Which collectives run depends on the parameters alone, never on gradients, so that no rank waits for ever.
    """

    def __init__(self, params: list[Any], process_group: Any) -> None:
        meshes: dict[Any, list[int]] = {}  # each with its parameters' indices
        for i, param in enumerate(params):
            if hasattr(param, "_spec"):
                meshes.setdefault(param.device_mesh, []).append(i)
        self.num_meshes = len(meshes)
        self.mesh_of = [-1] * len(params)
        self._process_group = process_group
        self._specs = [getattr(param, "_spec", None) for param in params]  # as long as they live, no other is there
        self._meshes = []
        for number, (mesh, indices) in enumerate(meshes.items()):
            placements = [params[i].placements for i in indices]
            dims = [d for d in range(mesh.ndim) if not all(each[d].is_replicate() for each in placements)]
            coordinate = mesh.get_coordinate()
            for i, places in zip(indices, placements, strict=True):
                is_counted = coordinate is not None and all(
                    coordinate[d] == 0 or not places[d].is_replicate() for d in dims
                )
                self.mesh_of[i] = number if is_counted else -2
            groups = [] if coordinate is None else _groups(mesh, dims)
            self._meshes.append((torch.device(mesh.device_type), groups))

    def reduce(self, sums: list[float], is_max: bool, status: int, dtypes: list[bool]) -> tuple[float, int, list[bool]]:
        """The norm's sums (or largest elements) of each mesh and of plain tensors, over all ranks together.

        Returns also the worst status that a rank has, and the dtypes that gradients have on any.
        """
        *of_meshes, total = sums
        flags = [status == 1, status == 2, *dtypes]
        with _disable_current_modes():  # also where this rank's operators are watched, others wait
            for found, (device, groups) in zip(of_meshes, self._meshes, strict=True):
                reduced, flags = _reduce(found, is_max, flags, device, groups)
                total = _larger(total, reduced) if is_max else total + reduced
            if self._process_group is not None:
                device = _device_of(self._process_group)
                total, flags = _reduce(total, is_max, flags, device, [self._process_group])
        is_not_ours, is_error, *dtypes = flags
        return total, 2 if is_error else 1 if is_not_ours else 0, dtypes


def _groups(mesh: Any, dims: list[int]) -> list[Any]:
    """The groups to reduce over, one after the other; None: all processes."""
    sizes = {d: mesh.size(d) for d in dims if mesh.size(d) > 1}
    if len(sizes) > 1 and math.prod(sizes.values()) == torch.distributed.get_world_size():
        return [None]
    return [mesh.get_group(d) for d in sizes]


def _device_of(process_group: Any) -> torch.device:
    """Where the group's backend reduces."""
    devices = process_group._device_types
    return torch.device("cpu") if torch.device("cpu") in devices else devices[0]


def _reduce(
    value: float, is_max: bool, flags: list[bool], device: torch.device, groups: list[Any]
) -> tuple[float, list[bool]]:
    """One all-reduce for each group: of the value, and of flags, whose sum says what their largest would."""
    if not groups:
        return value, flags
    is_nan = math.isnan(value)  # the largest of numbers need not be one that is none
    numbers = [0.0 if is_nan else value, *map(float, [is_nan, *flags])]
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    op = torch.distributed.ReduceOp.MAX if is_max else torch.distributed.ReduceOp.SUM
    for group in groups:
        torch.distributed.all_reduce(tensor, op, group)
    found, is_nan, *told = tensor.tolist()
    return math.nan if is_nan else found, [bool(each) for each in told]


def _larger(a: float, b: float) -> float:
    return a if a > b or math.isnan(a) else b

"""Norms over ranks: what each has found of it, added up by collectives."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["ANOTHER_RANK", "NO_MESH", "Ranks", "groups_of"]

# In the place of a mesh's number: a parameter that is no DTensor, and a replica that another rank counts. Also in
# csrc/binding/grad_norm.h.
NO_MESH, ANOTHER_RANK = -1, -2


class Ranks:
    """Adds up what ranks have found of a norm: one all-reduce for each mesh of the parameters, replicas counted once.

    With a process group, one more over that: of each mesh once, however many of its ranks are in the group, and of
    every rank's plain tensors. Which of these run depends on the parameters alone, never on gradients, so that no rank
    waits for ever.
    """

    def __init__(self, params: list[Any], process_group: Any) -> None:
        meshes: dict[Any, list[int]] = {}  # each with its parameters' indices
        for i, param in enumerate(params):
            if hasattr(param, "_spec"):
                meshes.setdefault(param.device_mesh, []).append(i)
        self.num_meshes = len(meshes)
        self.mesh_of = [NO_MESH] * len(params)
        self._process_group = process_group
        self._specs = [getattr(param, "_spec", None) for param in params]  # kept: GradNorm compares their addresses
        self._meshes = []
        for number, (mesh, indices) in enumerate(meshes.items()):
            placements = [params[i].placements for i in indices]
            dims = [d for d in range(mesh.ndim) if not all(each[d].is_replicate() for each in placements)]
            coordinate = mesh.get_coordinate()
            for i, places in zip(indices, placements, strict=True):
                is_counted = coordinate is not None and all(
                    coordinate[d] == 0 or not places[d].is_replicate() for d in dims
                )
                self.mesh_of[i] = number if is_counted else ANOTHER_RANK
            groups = groups_of(mesh, dims)
            speaks = process_group is None or _is_first_of(mesh, process_group)
            self._meshes.append((torch.device(mesh.device_type), groups, speaks))

    def reduce(self, sums: list[float], is_max: bool, status: int, dtypes: list[bool]) -> tuple[float, int, list[bool]]:
        """The norm's sums (or largest elements) of each mesh and of plain tensors, over all ranks together.

        Returns also the worst status that a rank has, and the dtypes that gradients have on any.
        """
        *of_meshes, total = sums
        flags = [*(status == each for each in (1, 2, 3)), *dtypes]
        with _disable_current_modes():  # also where this rank's operators are watched, others wait
            for found, (device, groups, speaks) in zip(of_meshes, self._meshes, strict=True):
                reduced, flags = _reduce(found, is_max, flags, device, groups)
                if speaks:
                    total = _larger(total, reduced) if is_max else total + reduced
            if self._process_group is not None:
                device = _device_of(self._process_group)
                total, flags = _reduce(total, is_max, flags, device, [self._process_group])
        return total, max(each * flags[each - 1] for each in (1, 2, 3)), flags[3:]


def groups_of(mesh: Any, dims: Iterable[int]) -> list[Any]:
    """The groups to reduce over these dimensions, one after the other; None: all processes. Empty outside the mesh."""
    if mesh.get_coordinate() is None:
        return []
    sizes = {d: mesh.size(d) for d in dims if mesh.size(d) > 1}
    if len(sizes) > 1 and math.prod(sizes.values()) == torch.distributed.get_world_size():
        return [None]
    return [mesh.get_group(d) for d in sizes]


def _is_first_of(mesh: Any, process_group: Any) -> bool:
    """Whether this rank is the first of the mesh in the group: all of them know the mesh's sum."""
    here = set(torch.distributed.get_process_group_ranks(process_group)) & set(mesh.mesh.flatten().tolist())
    return torch.distributed.get_rank() == min(here, default=-1)


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

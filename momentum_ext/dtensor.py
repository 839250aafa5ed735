"""DTensors: what the step, which updates their local shards, asks of them where something is new."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import make_contiguous_strides_for

__all__ = ["awaited", "is_cut", "like", "local", "mismatch", "place_in_whole", "redistributed", "where_is"]


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
    """Where the elements of a parameter's shard are in the whole tensor, in the order in which they lie in memory.

    Returns (first, run, stride): element i of the shard is element ``first + i // run * stride + i % run`` of the
    whole, ``first + i`` where run is 0.

    Raises:
        RuntimeError: for a shard that is no rows of one length, one distance apart.
    """
    shard, whole = param._local_tensor, param.shape
    sizes, offsets = shard.shape, param.__create_chunk_list__()[0].offsets
    if shard.numel() == 0:
        return 0, 0, 0
    order = sorted(range(shard.dim()), key=param.stride, reverse=True)  # from the outermost to the innermost
    strides = [shard.stride(d) for d in order if sizes[d] != 1]
    if strides != sorted(strides, reverse=True):  # distribute_tensor() lays shards out anew
        order = sorted(range(shard.dim()), key=shard.stride, reverse=True)
    first, stride = 0, 1
    rows: list[list[int]] = []  # [how many, how far apart], from the elements of a row outwards
    for d in reversed(order):
        first += offsets[d] * stride
        if rows and rows[-1][0] * rows[-1][1] == stride:
            rows[-1][0] *= sizes[d]
        elif sizes[d] != 1:
            rows.append([sizes[d], stride])
        stride *= whole[d]
    if rows and rows[0][1] != 1:
        rows.insert(0, [1, 1])
    if len(rows) <= 1:
        return first, 0, 0
    if len(rows) > 2 or max(rows[0][0], rows[1][1]) >= 1 << 32:
        raise RuntimeError(
            f"{name}: stochastic_rounding needs shards that are rows of the whole tensor, one distance apart, got "
            f"{tuple(sizes)} of {tuple(whole)}{where_is(param)}; shard fewer dimensions, or put it into a group without"
        )
    return first, rows[0][0], rows[1][1]


def awaited(grad: Any) -> Tensor:
    """The local shard of a gradient, once the collective that makes it has run."""
    shard = grad._local_tensor
    return shard.wait() if hasattr(shard, "wait") else shard  # type: ignore[no-any-return]


def redistributed(param: Any, grad: Any, name: str) -> Tensor:
    """The local shard of a gradient that lies otherwise than its parameter, brought to where that lies."""
    if grad.device_mesh != param.device_mesh or grad.shape != param.shape:
        raise RuntimeError(f"{name}: {mismatch(param, grad)}")
    with torch.no_grad():
        return awaited(grad.redistribute(placements=param.placements))


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

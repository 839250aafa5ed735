"""Values of tests: dtypes, memory layouts, random values without zeros, and copies to the bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from momentum_ext import _C

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
INT8, FP8, INT4 = torch.int8, torch.float8_e4m3fn, torch.int4
EXACT, HALVES, EIGHT_BITS = (FP32, FP64), (BF16, FP16), (INT8, FP8)
FLOATS = EXACT + HALVES
DATA_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_name(dtype: Any) -> str | None:
    return str(dtype).removeprefix("torch.") if dtype is None or isinstance(dtype, torch.dtype) else None


EXACT_DTYPES, HALF_DTYPES, FLOAT_DTYPES = (
    pytest.mark.parametrize("dtype", dtypes, ids=dtype_name) for dtypes in (EXACT, HALVES, FLOATS)
)


def matching_isas() -> list[str]:
    """The instruction sets whose arithmetic is this process's torch's: those with fma, unless torch runs without it."""
    isas = list(_C.isas())
    if "baseline" not in isas:
        return isas
    torch_has_fma = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return [name for name in isas if (name != "baseline") == torch_has_fma]


# ---------------------------------------------------------------------------------------------------------- copies


def clone_exact(tensor: Tensor, storages: dict[int, torch.UntypedStorage] | None = None) -> Tensor:
    """A copy with the same strides, storage offset, storage neighbours and neg/conj bit; `storages` keeps aliases."""
    tensor = tensor.detach()
    storages = {} if storages is None else storages
    storage = tensor.untyped_storage()
    if storage._cdata not in storages:
        storages[storage._cdata] = storage.clone()
    out = torch.empty(0, dtype=tensor.dtype).set_(
        storages[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride()
    )
    if tensor.is_conj():
        out = torch._conj(out)
    if tensor.is_neg():
        out = torch._neg_view(out)
    return out


def clone_params(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Exact copies as parameters, tensors that share memory still sharing it, a repeated tensor still the same one."""
    storages: dict[int, torch.UntypedStorage] = {}
    done: dict[int, Tensor] = {}
    out = []
    for tensor in tensors:
        if id(tensor) not in done:
            copied = clone_exact(tensor, storages)
            trains = copied.is_floating_point() or copied.is_complex()
            done[id(tensor)] = torch.nn.Parameter(copied, requires_grad=trains)
        out.append(done[id(tensor)])
    return out


def nonzero(like: Any, dtype: torch.dtype | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Random values, none of them zero, in a fresh contiguous tensor of a tensor's shape and dtype, or of a shape."""
    shape = tuple(like.shape if isinstance(like, Tensor) else like)
    dtype = dtype or (like.dtype if isinstance(like, Tensor) else FP32)
    if dtype.is_complex:
        return torch.view_as_complex(nonzero((*shape, 2), dtype.to_real(), generator))
    wide = FP64 if dtype is FP64 else FP32
    values = torch.randn(shape, generator=generator, dtype=wide)
    return torch.where(values == 0, torch.ones_like(values), values).to(dtype)


def all_values(dtype: torch.dtype) -> Tensor:
    """Each bit pattern of a 16-bit dtype once: normal, subnormal, Inf and NaN."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def without_repeats(tensor: Tensor) -> Tensor:
    """For the oracle: an expanded tensor written out.

    Where a gradient has stride 0, torch's loop uses fma or not depending on where in a vector an element falls, so
    two equal elements can come out different. The rule is the one that torch applies to the same values written out.
    """
    return tensor.contiguous() if 0 in tensor.stride() else tensor


def through_file(value: Any, weights_only: bool = True) -> Any:
    """As torch.save and torch.load bring it back."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIES = {"deepcopy": copy.deepcopy, "pickle": through_pickle}
EACH_COPY = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


# ---------------------------------------------------------------------------------------------------------- layouts


def in_layout(values: Tensor, layout: str) -> Tensor:
    """`values` held in another memory layout. Guard elements around strided views are NaN-free and non-zero."""
    if values.dim() == 0 and layout != "offset":
        return values.clone()
    if layout == "contiguous":
        return values.contiguous().clone()
    if layout == "permuted":  # dense, dimensions stored in reverse order
        order = list(reversed(range(values.dim())))
        return values.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
    if layout == "offset":  # one element into its storage: unaligned for every vector width
        base = torch.full((values.numel() + 2,), 7.0, dtype=values.dtype)
        base[1:-1] = values.reshape(-1)
        return base[1:-1].view(values.shape)
    if layout == "column":  # last dimension strided, gaps between elements
        base = torch.full((*values.shape, 3), 7.0, dtype=values.dtype)
        base[..., 1] = values
        return base[..., 1]
    if layout == "step":  # every other row
        base = torch.full((2 * values.shape[0], *values.shape[1:]), 7.0, dtype=values.dtype)
        base[::2] = values
        return base[::2]
    if layout == "inner":  # a block in the middle of a larger array
        base = torch.full([n + 2 for n in values.shape], 7.0, dtype=values.dtype)
        block = base[tuple(slice(1, -1) for _ in values.shape)]
        return block.copy_(values)
    raise ValueError(f"no layout {layout!r}")


DENSE_LAYOUTS = ["contiguous", "permuted", "offset"]
STRIDED_LAYOUTS = ["column", "step", "inner"]
LAYOUTS = DENSE_LAYOUTS + STRIDED_LAYOUTS


def memory_of(storage: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
    """All of it, in elements of that dtype, or in bytes where it is no multiple of them."""
    dtype = torch.uint8 if storage.nbytes() % dtype.itemsize else dtype
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage)


def storage_of(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor in its dtype."""
    return memory_of(tensor.untyped_storage(), tensor.dtype)

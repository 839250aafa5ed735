"""What the low-precision states must hold after a step, in NumPy and to the bit, written from their description alone.

Nothing here is shared with csrc/ or with reference.py. Values are one-dimensional arrays in the memory order of the
momentum buffer; 16-bit values are uint16, 8-bit ones int8 or uint8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

F32, U32, U64 = np.float32, np.uint32, np.uint64
BLOCK = 32


@dataclass(frozen=True)
class Options:
    """A parameter group's hyperparameters, and where in the training a step stands."""

    lr: float = 0.1
    momentum: float = 0.9
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    formulation: str = "torch"
    decoupled_weight_decay: bool = False
    momentum_dtype: torch.dtype | None = None
    master_weights: bool | int = False
    stochastic_rounding: bool | None = None
    rounding_seed: int = 0
    grad_scale: float | None = None
    step: int = 0
    """Steps that the optimizer has taken before this one."""
    tensor: int = 0
    """The parameter's position in the concatenated groups."""
    fma: bool = True
    """False: the instruction set rounds products before it adds."""


# ------------------------------------------------------------------------------------------------- arithmetic, bits


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, F32).view(U32)


def from_bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, U32).view(F32)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, fused: bool = True) -> np.ndarray:
    """a * b + c rounded once to fp32.

    The product is exact in fp64. The sum is rounded there to odd, so that rounding it again to fp32 is as rounding the
    exact sum (Boldo and Melquiond, "When double rounding is odd", 2005).
    """
    if not fused:
        return (F32(1) * a * b + c).astype(F32)
    product, c = np.asarray(a, np.float64) * np.asarray(b, np.float64), np.asarray(c, np.float64)
    total = product + c
    other = total - product
    error = (product - (total - other)) + (c - other)
    to_odd = np.isfinite(total) & (error != 0) & (total.view(U64) % 2 == 0)
    total = np.where(to_odd, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return total.astype(F32)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): [n, 4] to [n, 4]."""
    mask, (k0, k1) = U64(0xFFFFFFFF), key
    c0, c1, c2, c3 = (counter[:, i].astype(U64) for i in range(4))
    for _ in range(7):
        p0, p1 = c0 * U64(0xD2511F53), c2 * U64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> U64(32)) ^ c1 ^ U64(k0), p1 & mask, (p0 >> U64(32)) ^ c3 ^ U64(k1), p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], 1).astype(U32)


def random_16(numel: int, options: Options, first: int = 0) -> np.ndarray:
    """16 random bits for each of the elements first, first + 1, ...: uint32 [numel]."""
    block = np.arange(first // 8, -(-(first + numel) // 8), dtype=U64)
    counter = np.empty((len(block), 4), U64)
    counter[:, 0] = block & U64(0xFFFFFFFF)
    counter[:, 1] = options.tensor
    counter[:, 2] = options.step & 0xFFFFFFFF
    counter[:, 3] = block >> U64(32)
    seed = options.rounding_seed & 0xFFFFFFFFFFFFFFFF
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    halves = np.stack([words & U32(0xFFFF), words >> U32(16)], 2).reshape(-1)  # of each word the low one first
    return halves[first % 8 : first % 8 + numel]


def exchanged(random: np.ndarray) -> np.ndarray:
    """The buffer's random bits: the parameter's with their two bytes exchanged."""
    return (random >> U32(8) | random << U32(8)) & U32(0xFFFF)


# ---------------------------------------------------------------------------------------------------------- 16 bits


def widen(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """fp32 of what is held as fp32, or as bits of bf16 or fp16."""
    if dtype is torch.float32:
        return values
    if dtype is torch.bfloat16:
        return from_bits(values.astype(U32) << U32(16))
    return values.view(np.float16).astype(F32)


def narrow(values: np.ndarray, dtype: torch.dtype, random: np.ndarray | None = None) -> np.ndarray:
    """Rounded to nearest, ties to even; with `random`, up or down by chance."""
    if dtype is torch.float32:
        return values
    x = bits(values)
    sign, magnitude = x >> U32(16) & U32(0x8000), x & U32(0x7FFFFFFF)
    special = magnitude >= 0x7F800000
    if dtype is torch.bfloat16:
        add = U32(0x7FFF) + (x >> U32(16) & U32(1)) if random is None else random.astype(U32)
        out = np.where(special, x, x + add) >> U32(16)
        nan = U32(0x7FC0)
    elif random is None:
        with np.errstate(over="ignore"):
            out = values.astype(np.float16).view(np.uint16).astype(U32)
        nan = U32(0x7E00)
    else:
        normal = np.minimum((magnitude - U32(0x38000000) + (random >> U32(3))) >> U32(13), U32(0x7C00))
        small = np.floor(np.abs(values) * F32(2**24) + random.astype(F32) * F32(2**-16))
        small = np.where(magnitude < 0x38800000, small, 0).astype(U32)
        out = sign | np.where(magnitude < 0x38800000, small, normal)
        out = np.where(special, sign | U32(0x7C00), out)
        nan = U32(0x7E00)
    return np.where(magnitude > 0x7F800000, nan, out).astype(np.uint16)


def split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bf16 bits rounded to nearest with ties away from zero, the int16 remainder) of fp32."""
    x = bits(values)
    high = ((x + U32(0x8000)) >> U32(16)).astype(np.uint16)
    remainder = (x & U32(0xFFFF)).astype(np.uint16).view(np.int16)
    nan = np.isnan(values)
    return np.where(nan, np.uint16(0x7FC0), high), np.where(nan, np.int16(0), remainder)


def split_24(values: np.ndarray, random: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The same of fp32 rounded to its upper 24 bits: to nearest, ties away from zero, or by 8 random bits."""
    x = np.where(np.isnan(values), U32(0x7FC00000), bits(values))
    upper = (x + (U32(0x80) if random is None else random.astype(U32) & U32(0xFF))) >> U32(8)
    return ((upper + U32(0x80)) >> U32(8)).astype(np.uint16), upper.astype(np.uint8).view(np.int8)


def join(high: np.ndarray, remainder: np.ndarray | None) -> np.ndarray:
    """The fp32 that `split` or `split_24` has taken apart."""
    x = high.astype(U32) << U32(16)
    if remainder is None:
        return from_bits(x)
    return from_bits(x + (remainder.astype(np.int32) * (256 if remainder.dtype == np.int8 else 1)).view(U32))


def remainder_of(state: dict[str, Tensor], options: Options) -> Tensor | None:
    """In the format that the options want: of 16 bits, the upper 8, to nearest, beside the same parameter."""
    found = state.get("param_remainder")
    wanted = torch.int8 if options.master_weights == 24 else torch.int16
    if found is None or found.dtype is wanted:
        return found
    values = found.to(torch.int32)
    return (values * 256 if wanted is torch.int16 else ((values + 128) >> 8).clamp(-128, 127)).to(wanted)


def believed(param: np.ndarray, master: np.ndarray | None) -> np.ndarray:
    """fp16: the master, but the parameter where somebody else has written it."""
    wide = widen(param, torch.float16)
    if master is None:
        return wide
    matches = (narrow(master, torch.float16) == param) | (np.isnan(master) & np.isnan(wide))
    return np.where(matches, master, wide)


# ----------------------------------------------------------------------------------------------------------- blocks


LEVELS = {
    torch.int8: np.array([c * (3 * c + 259) for c in range(128)]),
    torch.int4: np.array([c * (c + 10) for c in range(8)]),
}
"""What codes stand for, in units of the block's scale."""
TOP = {torch.int8: F32(81280), torch.float8_e4m3fn: F32(448), torch.int4: F32(119)}
IN_BLOCKS = tuple(TOP)
SMALLEST = {dtype: F32(2.0**-100) / top for dtype, top in TOP.items()}
"""The scale of a block of 2^-100; what is below is stored as zeros."""


def cut(x: np.ndarray, add: np.ndarray | int = 0) -> np.ndarray:
    """Positive fp32 with 8 bits of mantissa."""
    return from_bits((bits(x) + U32(add)) & U32(0xFFFF8000))


def quantize(values: np.ndarray, dtype: torch.dtype, random: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of 32 with a scale each: (int8 or the bits of e4m3fn, and the scales as bytes, [blocks, 2]).

    `random` has 16 bits for each element of all blocks, whole ones.
    """
    top = TOP[dtype]
    blocks = np.zeros((-(-len(values) // BLOCK), BLOCK), F32)
    blocks.reshape(-1)[: len(values)] = values
    magnitude = np.abs(blocks)
    largest = np.max(magnitude, axis=1, initial=0)  # NaN where there is one
    overflows = ~np.isfinite(largest)
    exact = np.where(overflows, F32(1), largest) / top
    down, limit = cut(exact), cut(F32(np.finfo(F32).max) / top)
    if random is None:
        scale = cut(exact, 0x4000)
    else:
        random = random.reshape(-1, BLOCK)
        scale = cut(exact, (random[:, 0] ^ random[:, 1]) & U32(0x7FFF))
    scale = np.minimum(scale, limit)
    vanishes = scale < cut(SMALLEST[dtype])
    dead = overflows | vanishes
    inverse = F32(1) / np.where(dead, F32(1), scale)
    magnitude = np.where(dead[:, None], F32(0), magnitude)
    if random is None:
        units = magnitude * inverse[:, None]
    else:  # values above the largest value that a smaller scale can store move with it
        knee = top * down
        stretch = np.where(scale > down, (top * scale - knee) / np.where(largest > knee, largest - knee, F32(1)), 0)
        above = np.maximum(magnitude - knee[:, None], F32(0)) * stretch[:, None].astype(F32)
        units = (np.minimum(magnitude, knee[:, None]) + above) * np.nextafter(inverse, F32(np.inf))[:, None]
        units = np.minimum(units, top)
    units = np.where(dead[:, None], F32(0), units)
    if dtype in LEVELS:
        levels = LEVELS[dtype]
        magnitudes = nearest_code(units, levels) if random is None else random_code(units, random, levels)
        codes = np.where(np.signbit(blocks), -magnitudes, magnitudes).astype(np.int8)
    else:
        codes = e4m3fn(np.copysign(units, blocks), random)
        codes = np.where(dead[:, None], np.uint8(0), codes)
    kept = np.where(overflows, F32(np.nan), np.where(vanishes, F32(0), scale))
    as_bytes = (bits(kept) >> U32(15)).astype("<u2").view(np.uint8).reshape(-1, 2)
    return codes.reshape(-1)[: len(values)].copy(), as_bytes


def nearest_code(units: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Ties to the smaller magnitude."""
    midpoints = (levels[1:] + levels[:-1]) / 2  # exact in fp32
    return np.searchsorted(midpoints.astype(F32), units, side="left")


def random_code(units: np.ndarray, random: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Up with the probability of the place between two levels."""
    code = np.searchsorted(levels.astype(F32), units, side="right") - 1
    gap = np.append(np.diff(levels), 1)[code].astype(F32)
    chance = (random.astype(F32) + F32(0.5)) * F32(2**-16)
    return code + (units - levels[code].astype(F32) > chance * gap)


def e4m3fn(values: np.ndarray, random: np.ndarray | None) -> np.ndarray:
    """Finite values, at most 448 after clamping, as bits of float8_e4m3fn."""
    magnitude = np.minimum(np.abs(values), F32(448))
    x = bits(magnitude)
    if random is None:
        add = U32(0x7FFFF) + (x >> U32(20) & U32(1))
        small = np.rint(magnitude * F32(512))
    else:
        add = random << U32(4)
        small = np.floor(magnitude * F32(512) + random.astype(F32) * F32(2**-16))
    is_small = magnitude < F32(2**-6)
    normal = np.minimum((x - U32(0x3C000000) + add) >> U32(20), U32(0x7E))
    out = np.where(is_small, np.where(is_small, small, 0).astype(U32), normal)
    return (out | np.signbit(values).astype(U32) << U32(7)).astype(np.uint8)


def dequantize(q: np.ndarray, scale: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    if dtype in LEVELS:
        wide = np.sign(q).astype(F32) * LEVELS[dtype][np.abs(q.astype(np.int64))].astype(F32)
    else:
        magnitude = q.astype(U32) & U32(0x7F)
        wide = np.where(magnitude < 8, magnitude.astype(F32) / F32(512), from_bits((magnitude << U32(20)) + 0x3C000000))
        wide = np.where(magnitude == 0x7F, F32(np.nan), np.where(q & 0x80, -wide, wide))
    return wide.astype(F32) * np.repeat(scales_of(scale), BLOCK)[: len(q)]


def scales_of(as_bytes: np.ndarray) -> np.ndarray:
    return from_bits(np.ascontiguousarray(as_bytes).reshape(-1).view("<u2").astype(U32) << U32(15))


def scales_like(scale: np.ndarray, codes: Tensor) -> Tensor:
    """With the shape that they have beside these codes."""
    size = BLOCK // 2 if codes.dtype is torch.uint8 else BLOCK  # of a block's codes in memory
    along_rows = codes.dim() > 1 and codes.shape[-1] % size == 0 and codes.is_contiguous()
    shape = (*codes.shape[:-1], codes.shape[-1] // size, 2) if along_rows else (len(scale), 2)
    return torch.from_numpy(scale).reshape(shape)


def innermost(like: Tensor, order: list[int]) -> int | None:
    """The dimension of more than one element that is innermost in memory, where it has an even number of them."""
    dims = [dim for dim in order if like.shape[dim] != 1]
    return dims[-1] if dims and like.shape[dims[-1]] % 2 == 0 else None


def packed(codes: np.ndarray, like: Tensor, order: list[int]) -> Tensor:
    """int4: the first of two in the lower half of a byte."""
    pairs = np.append(codes, np.zeros(len(codes) % 2, np.int8)).reshape(-1, 2).astype(np.uint8) & 15
    flat = torch.from_numpy(pairs[:, 0] | pairs[:, 1] << 4)
    halved = innermost(like, order)
    if halved is None:
        return flat
    sizes = [like.shape[dim] // (2 if dim == halved else 1) for dim in order]
    return flat.reshape(sizes).permute([order.index(dim) for dim in range(like.dim())])


def unpacked(buffer: Tensor, like: Tensor, order: list[int]) -> np.ndarray:
    in_order = buffer.permute(order) if innermost(like, order) is not None else buffer
    flat = in_order.contiguous().reshape(-1).clone().numpy()
    codes = np.stack([flat & 15, flat >> 4], 1).reshape(-1)[: like.numel()].astype(np.int8)
    return np.where(codes > 7, codes - 16, codes).astype(np.int8)


# ------------------------------------------------------------------------------------------------------- one tensor

RAW = {torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.float8_e4m3fn: np.uint8}
HELD_AS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float8_e4m3fn: torch.uint8}


def order_of(param: Tensor) -> list[int]:
    """The dimensions from the slowest to the fastest in the momentum buffer's memory."""
    strides = torch.empty_like(param, memory_format=torch.preserve_format).stride()
    return sorted(range(param.dim()), key=lambda dim: -strides[dim])


def flat(tensor: Tensor, order: list[int]) -> np.ndarray:
    """A tensor's values (16-bit ones and fp8 as bits) in the buffer's memory order."""
    tensor = tensor.detach().permute(order).contiguous().reshape(-1).clone()  # what NumPy sees cannot be resized
    raw = tensor.view(HELD_AS.get(tensor.dtype, tensor.dtype)).numpy()
    return raw.view(RAW.get(tensor.dtype, raw.dtype))


def tensor_of(values: np.ndarray, dtype: torch.dtype, like: Tensor, order: list[int]) -> Tensor:
    """The reverse of `flat`, with the layout that torch.empty_like gives."""
    held = torch.from_numpy(np.ascontiguousarray(values).view(np.int16 if values.dtype == np.uint16 else values.dtype))
    typed = held.view(dtype).reshape([like.shape[dim] for dim in order])
    out = torch.empty_like(like, dtype=dtype, memory_format=torch.preserve_format)
    return out.copy_(typed.permute([order.index(dim) for dim in range(like.dim())]))


def buffer_values(state: dict[str, Tensor], param: Tensor) -> np.ndarray | None:
    """In the order of the parameter's memory."""
    buffer, order = state.get("momentum_buffer"), order_of(param)
    if buffer is None:
        return None
    scale = state["momentum_scale"].clone().numpy() if "momentum_scale" in state else None
    if buffer.dtype is torch.uint8:
        return dequantize(unpacked(buffer, param, order), scale, torch.int4)
    values = flat(buffer, order)
    return widen(values, buffer.dtype) if scale is None else dequantize(values, scale, buffer.dtype)


def truth_of(param: Tensor, state: dict[str, Tensor], options: Options, order: list[int]) -> np.ndarray:
    """The fp32 values that are trained."""
    held = flat(param, order)
    if options.master_weights and param.dtype is torch.bfloat16:
        remainder = remainder_of(state, options)
        return join(held, None if remainder is None else flat(remainder, order))
    if options.master_weights and param.dtype is torch.float16:
        master = state.get("master_param")
        return believed(held, None if master is None else flat(master, order))
    return widen(held, param.dtype)


def with_buffer(
    state: dict[str, Tensor], values: np.ndarray, dtype: torch.dtype, like: Tensor, random: np.ndarray | None = None
) -> dict[str, Tensor]:
    """The state with these values as its momentum buffer."""
    order = order_of(like)
    out = {key: value for key, value in state.items() if key not in ("momentum_buffer", "momentum_scale")}
    if dtype not in IN_BLOCKS:
        values = narrow(values, dtype, None if random is None else random[: len(values)])
        return {**out, "momentum_buffer": tensor_of(values, dtype, like, order)}
    codes, scale = quantize(values, dtype, random)
    buffer = packed(codes, like, order) if dtype is torch.int4 else tensor_of(codes, dtype, like, order)
    return {**out, "momentum_buffer": buffer, "momentum_scale": scales_like(scale, buffer)}


def dtype_of_buffer(param: Tensor, options: Options) -> torch.dtype:
    """fp32 beside a master, else the parameter's own, unless the options say another; int8 for int4 without pairs."""
    has_master = options.master_weights and param.dtype in (torch.bfloat16, torch.float16)
    dtype = options.momentum_dtype or (torch.float32 if has_master else param.dtype)
    order = [dim for dim in order_of(param) if param.shape[dim] != 1]
    has_pairs = order == sorted(order) or innermost(param, order) is not None
    return torch.int8 if dtype is torch.int4 and not has_pairs else dtype


def oracle_convert(
    state: dict[str, Tensor], param: Tensor, options: Options, formulation: str | None = None
) -> dict[str, Tensor]:
    """What a step with these options starts from: without momentum the buffer stays as it is.

    A buffer in another dtype, or in another `formulation` than theirs, is computed in fp32 and rounded once.
    """
    wanted = {torch.bfloat16: "param_remainder", torch.float16: "master_param"} if options.master_weights else {}
    unwanted = {"param_remainder", "master_param"} - {wanted.get(param.dtype)}
    state = {key: value for key, value in state.items() if key not in unwanted}
    buffer, dtype = state.get("momentum_buffer"), dtype_of_buffer(param, options)
    if options.momentum == 0 or buffer is None:
        return state
    if param.dtype in wanted and wanted[param.dtype] not in state:
        like = torch.empty_like(param, memory_format=torch.preserve_format)
        remainder = torch.int8 if options.master_weights == 24 else torch.int16
        is_split = param.dtype is torch.bfloat16
        master = torch.zeros_like(like, dtype=remainder) if is_split else like.float().copy_(param)
        state[wanted[param.dtype]] = master
    if "param_remainder" in state:
        state["param_remainder"] = remainder_of(state, options)
    converts = formulation not in (None, options.formulation)
    if buffer.dtype is (torch.uint8 if dtype is torch.int4 else dtype) and not converts:
        return state
    lr = F32(options.lr)
    values = buffer_values(state, param)
    if converts:
        values = values / lr if options.formulation == "torch" else values * lr
    return with_buffer(state, values, dtype, param)


def step_values(p: np.ndarray, g: np.ndarray, b: np.ndarray | None, o: Options) -> tuple[np.ndarray, np.ndarray | None]:
    """The rule in fp32, each rounding as it is written: the new parameter and buffer."""
    inverse = 1.0 if o.grad_scale is None else float(F32(1.0 / o.grad_scale))
    g = F32(-inverse if o.maximize else inverse) * g
    if o.weight_decay != 0 and o.decoupled_weight_decay:
        p = F32(1 - o.lr * o.weight_decay) * p
    elif o.weight_decay != 0:
        g = fma(F32(o.weight_decay), p, g, o.fma)
    alpha, first, ahead, rate = 1 - o.dampening, 1.0, 1.0, o.lr
    if o.formulation == "classical" and o.momentum != 0:
        alpha, first, ahead, rate = o.lr, o.lr, o.lr, 1.0
    elif o.formulation == "ema" and o.momentum != 0:
        alpha, first, ahead, rate = 1 - o.momentum, 1 - o.momentum, 1 - o.momentum, o.lr
    direction = g
    if o.momentum != 0:
        b = F32(first) * g if b is None else fma(F32(alpha), g, F32(o.momentum) * b, o.fma)
        direction = fma(F32(o.momentum), b, F32(ahead) * g, o.fma) if o.nesterov else b
    return fma(-F32(rate), direction, p, o.fma), b


def oracle_step(
    param: Tensor, grad: Tensor, state: dict[str, Tensor], options: Options
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the parameter, its state) after a step, as new tensors. `grad` may have another dtype and layout."""
    order = order_of(param)
    numel = param.numel()
    with np.errstate(all="ignore"):
        truth, buffer = step_values(
            truth_of(param, state, options, order),
            widen(flat(grad, order), grad.dtype),
            None if options.momentum == 0 else buffer_values(state, param),
            options,
        )
        out = dict(state)
        if options.momentum != 0:
            dtype = dtype_of_buffer(param, options)
            random = exchanged(random_16(-(-numel // BLOCK) * BLOCK, options)) if options.stochastic_rounding else None
            out = with_buffer(out, buffer, dtype, param, None if dtype is torch.float32 else random)
        random = None
        if options.master_weights == 24 and param.dtype is torch.bfloat16:
            by_chance = options.stochastic_rounding is not False
            held, remainder = split_24(truth, random_16(numel, options) if by_chance else None)
            out["param_remainder"] = tensor_of(remainder, torch.int8, param, order)
        elif options.master_weights and param.dtype is torch.bfloat16:
            held, remainder = split(truth)
            out["param_remainder"] = tensor_of(remainder, torch.int16, param, order)
        elif options.master_weights and param.dtype is torch.float16:
            held = narrow(truth, torch.float16)
            out["master_param"] = tensor_of(truth, torch.float32, param, order)
        else:
            if options.stochastic_rounding and param.dtype is not torch.float32:
                random = random_16(numel, options)
            held = narrow(truth, param.dtype, random)
    return tensor_of(held, param.dtype, param, order), out


def options_of(group: dict, **where: object) -> Options:
    """Those of an optimizer's parameter group, whose hyperparameters are numbers and whose dtypes may be names."""
    known = {key: group[key] for key in Options.__dataclass_fields__ if key in group}
    if isinstance(known.get("momentum_dtype"), str):
        known["momentum_dtype"] = getattr(torch, known["momentum_dtype"])
    return replace(Options(**known), **where)


def parts_of_value(value: Tensor | dict[str, Tensor]) -> list[Tensor]:
    """The tensors of a state dict's value: a buffer of 8 bits is a dict."""
    return list(value.values()) if isinstance(value, dict) else [value]


def as_live(entry: dict[str, Tensor], param: Tensor) -> dict[str, Tensor]:
    """A state dict's tensors by the keys and in the dtypes that a parameter's state has."""
    stored = {("param_remainder", torch.bfloat16): torch.int16}
    if isinstance(entry.get("momentum_buffer"), dict):
        saved = entry["momentum_buffer"]
        entry = {**entry, "momentum_buffer": saved["codes"], "momentum_scale": saved["scale"]}
        if saved["codes"].shape == param.shape:
            stored["momentum_buffer", torch.uint8] = torch.float8_e4m3fn
    return {key: value.view(stored.get((key, value.dtype), value.dtype)) for key, value in entry.items()}


def as_saved(state: dict[str, Tensor], param: Tensor) -> dict[str, Tensor]:
    """What a checkpoint keeps of a state: buffers in blocks that are no parts of rows are their values."""
    buffer, scale = state.get("momentum_buffer"), state.get("momentum_scale")
    if scale is None or (buffer.dim() > 1 and scale.dim() == buffer.dim() + 1):
        return state
    values = tensor_of(buffer_values(state, param), torch.float32, param, order_of(param))
    return {**{key: value for key, value in state.items() if key != "momentum_scale"}, "momentum_buffer": values}

"""What the tests share: exact copies, exact comparison, the oracle, and the same training run twice."""

from __future__ import annotations

import contextlib
import copy
import io
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

import momentum_ext
from momentum_ext import FusedMomentum

DATA_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def matching_isas() -> list[str]:
    """The instruction sets whose arithmetic is this process's torch's: those with fma, unless torch runs without it."""
    isas = list(momentum_ext._C.isas())
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


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The strided tensors that hold its values: itself, unless it is sparse, opaque or a subclass that wraps others."""
    tensor = tensor.detach()
    if hasattr(tensor, "__tensor_flatten__"):
        return [part for name in tensor.__tensor_flatten__()[0] for part in parts_of(getattr(tensor, name))]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return [tensor] if tensor.layout == torch.strided else []


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


def without_repeats(tensor: Tensor) -> Tensor:
    """For the oracle: an expanded tensor written out.

    Where a gradient has stride 0, torch's loop uses fma or not depending on where in a vector an element falls, so
    two equal elements can come out different. The rule is the one that torch applies to the same values written out.
    """
    return tensor.contiguous() if 0 in tensor.stride() else tensor


# ------------------------------------------------------------------------------------------------------ comparison


def bits(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(where it is NaN, its bits as integers with NaNs cleared): equal exactly when values are, -0.0 unlike 0.0."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    tensor = tensor.resolve_neg().contiguous()
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor, dtype=torch.bool), tensor
    nan = tensor.isnan()
    return nan, tensor.view(DATA_INT[tensor.element_size()]).masked_fill(nan, 0)


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if actual.is_meta or expected.is_meta:
        return actual.is_meta and expected.is_meta
    if actual.layout != torch.strided:
        actual, expected = actual.to_dense(), expected.to_dense()
    if actual.is_floating_point() and not (actual.is_neg() or expected.is_neg()):
        integer = DATA_INT[actual.element_size()]
        if torch.equal(actual.detach().view(integer), expected.detach().view(integer)):
            return True  # by far the most frequent case
    return all(torch.equal(a, e) for a, e in zip(bits(actual), bits(expected), strict=True))


def assert_same(actual: Tensor, expected: Tensor, what: str = "tensor") -> None:
    if same_bits(actual, expected):
        return
    found, wanted = actual.detach(), expected.detach()
    text = f"{what}: {found.dtype} {tuple(found.shape)} is not bit-identical to {wanted.dtype} {tuple(wanted.shape)}"
    if found.shape == wanted.shape and found.numel():
        differs = (found != wanted) & ~(found.isnan() & wanted.isnan())
        where = differs.nonzero()
        at = tuple(where[0].tolist()) if len(where) else None
        values = f", first at {at}: {found[at].item()!r}, expected {wanted[at].item()!r}" if at is not None else ""
        text += f"; {len(where)} of {found.numel()} values differ{values}"
    raise AssertionError(text)


# ---------------------------------------------------------------------------------------------------------- oracle


class Oracle(torch.optim.SGD):
    """torch's for-loop, and where that rounds more than once per stored value, the for-loop on widened copies.

    fp32 and fp64 go through torch's for-loop itself. 16-bit and mixed dtypes are widened to the widest arithmetic
    type among parameter, gradient and buffer, go through the same for-loop, and are rounded once on the way back.
    grad_scale and found_inf mean what torch.amp.GradScaler documents.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params: Any, **hyper: Any) -> None:
        super().__init__(params, **{**hyper, "foreach": False, "fused": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and float(found_inf) != 0:
            return loss
        inverse = None if scale is None else torch.tensor(1.0 / float(scale), dtype=torch.float32)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group, inverse)
        return loss

    def _update(self, param: Tensor, group: dict[str, Any], inverse: Tensor | None) -> None:
        state = self.state[param] if group["momentum"] != 0 else {}
        buffer = state.get("momentum_buffer")
        if buffer is not None and buffer.dtype is not param.dtype:  # the parameter was converted: its buffer follows
            buffer = torch.empty_like(param, memory_format=torch.preserve_format).copy_(buffer)
        tensors = [t for t in (param, param.grad, buffer) if t is not None]
        opmath = torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32
        wide_param = param.detach().to(opmath)
        grad = param.grad.detach().to(opmath)
        if inverse is not None:
            grad = grad * inverse.to(opmath)
        wide_buffer = None if buffer is None else buffer.to(opmath)
        buffers: list[Tensor | None] = [wide_buffer]
        names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
        sgd([wide_param], [grad], buffers, foreach=False, fused=False, **{name: group[name] for name in names})
        if wide_param.dtype is not param.dtype:
            param.copy_(wide_param)
        if group["momentum"] == 0:
            return
        if buffer is None:
            buffer = torch.empty_like(param, memory_format=torch.preserve_format).copy_(buffers[0])
        elif wide_buffer is not buffer:
            buffer.copy_(buffers[0])
        state["momentum_buffer"] = buffer


# ------------------------------------------------------------------------------------------- the same training twice


class Pair:
    """FusedMomentum and torch's for-loop over exact copies of the same parameters, fed the same gradients."""

    def __init__(self, params: Sequence[Any], oracle: type = torch.optim.SGD, seed: int = 0, **hyper: Any) -> None:
        groups = params if params and isinstance(params[0], dict) else [{"params": list(params)}]
        self.generator = torch.Generator().manual_seed(seed)
        self.mine = FusedMomentum(self._copy(groups), **copy.deepcopy(hyper))
        forloop = {} if oracle is Oracle else {"foreach": False, "fused": False}
        self.theirs = oracle(self._copy(groups), **copy.deepcopy(hyper), **forloop)

    @staticmethod
    def _copy(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        flat = iter(clone_params([p for group in groups for p in group["params"]]))
        rest = [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in groups]
        return [{"params": [next(flat) for _ in g["params"]], **r} for g, r in zip(groups, rest, strict=True)]

    @property
    def optimizers(self) -> tuple[FusedMomentum, torch.optim.SGD]:
        return self.mine, self.theirs

    @property
    def params(self) -> list[tuple[Tensor, Tensor]]:
        """(FusedMomentum's, torch's) for each parameter, in order."""
        mine, theirs = ([p for group in opt.param_groups for p in group["params"]] for opt in self.optimizers)
        return list(zip(mine, theirs, strict=True))

    def random_like(self, tensor: Tensor) -> Tensor:
        """Non-zero values in a fresh contiguous tensor."""
        if tensor.is_complex():
            real = torch.view_as_real(torch.empty(tensor.shape, dtype=tensor.dtype))
            return torch.view_as_complex(self.random_like(real))
        wide = torch.float64 if tensor.dtype is torch.float64 else torch.float32
        values = torch.randn(tensor.shape, generator=self.generator, dtype=wide)
        return torch.where(values == 0, torch.ones_like(values), values).to(tensor.dtype)

    def set_grad(self, index: int, grad: Tensor | None) -> None:
        mine, theirs = self.params[index]
        mine.grad = None if grad is None else clone_exact(grad)
        theirs.grad = None if grad is None else without_repeats(clone_exact(grad))

    def new_grads(self) -> None:
        """Freshly allocated random gradients for every parameter."""
        for mine, theirs in self.params:
            mine.grad = self.random_like(mine)
            theirs.grad = mine.grad.clone()

    def both(self, action: Callable[[Any], Any]) -> None:
        """Does the same to both optimizers."""
        for opt in self.optimizers:
            action(opt)

    def step(self, times: int = 1) -> None:
        """New gradients, a step of both, a comparison; so many times."""
        for _ in range(times):
            self.new_grads()
            self.step_as_is()

    def step_as_is(self) -> None:
        """A step of both with the gradients that are there, and a comparison."""
        self.both(lambda opt: opt.step())
        self.check()

    def check(self) -> None:
        """Parameters, buffers and which state exists are the same, bit for bit."""
        for index, (mine, theirs) in enumerate(self.params):
            assert_same(mine, theirs, f"params[{index}]")
            has, should = (opt.state.get(p) for opt, p in ((self.mine, mine), (self.theirs, theirs)))
            assert (has is None) == (should is None), f"state of params[{index}]: {has} instead of {should}"
            if should is None:
                continue
            assert set(has) == set(should), f"state of params[{index}] has {set(has)} instead of {set(should)}"
            buffer, wanted = has.get("momentum_buffer"), should.get("momentum_buffer")
            assert (buffer is None) == (wanted is None), f"momentum_buffer of params[{index}]"
            if wanted is not None:
                assert_same(buffer, wanted, f"momentum_buffer of params[{index}]")


def memory_of(storage: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
    """All of it, in elements of that dtype, or in bytes where it is no multiple of them."""
    dtype = torch.uint8 if storage.nbytes() % dtype.itemsize else dtype
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage)


class Snapshot:
    """All that an optimizer can reach, to prove later that nothing has changed.

    Of a tensor: which object, dtype, layout, version, and the bits of all its memory, around a view too. Of anything
    else: type and value. `but` names what may differ: "grads", "groups", "versions".
    """

    def __init__(self, opt: torch.optim.Optimizer, *but: str) -> None:
        self.opt, self.but = opt, but
        self.params = [p for group in opt.param_groups for p in group["params"]]
        self.values = [None if p.is_meta or p.layout != torch.strided else clone_exact(p) for p in self.params]
        self._memory: dict[int, tuple[torch.UntypedStorage, torch.dtype, Tensor]] = {}
        self._found = {what: (value, self._describe(value)) for what, value in self._reach()}

    def assert_unchanged(self) -> None:
        now = dict(self._reach())
        assert list(now) == list(self._found), f"{now.keys() ^ self._found.keys()} appeared or went"
        for what, (value, described) in self._found.items():
            if isinstance(value, (Tensor, dict, list)):
                assert now[what] is value, f"{what} is another object"
            assert self._describe(now[what]) == described, what
        for param, value in zip(self.params, self.values, strict=True):
            if value is not None and param.untyped_storage().nbytes():
                assert_same(param, value, "a parameter")  # says where; the rest is compared below
        for storage, dtype, kept in self._memory.values():
            if not same_bits(memory_of(storage, dtype), kept):
                found = ((what, self._storages_of(value)) for what, (value, _) in self._found.items())
                raise AssertionError(f"the memory of {[what for what, owned in found if storage._cdata in owned]}")

    def _reach(self) -> Iterable[tuple[str, Any]]:
        if "groups" not in self.but:
            yield from self._inside("param_groups", self.opt.param_groups)
        yield from ((f"params[{index}]", param) for index, param in enumerate(self.params))
        names = {id(param): f"params[{index}]" for index, param in enumerate(self.params)}
        for param, entry in self.opt.state.items():
            yield from self._inside(f"state of {names.get(id(param), id(param))}", entry)
        for name, value in vars(self.opt).items():
            is_a_scalers = name in ("found_inf", "grad_scale")
            if not (name.startswith("_") or name in ("param_groups", "state") or is_a_scalers or callable(value)):
                yield from self._inside(name, value)
        if "grads" not in self.but:
            yield from ((f"grad of params[{index}]", param.grad) for index, param in enumerate(self.params))

    def _inside(self, what: str, value: Any) -> Iterable[tuple[str, Any]]:
        yield what, value
        if isinstance(value, (dict, list)):
            for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                yield from self._inside(f"{what}[{key!r}]", each)

    def _describe(self, value: Any) -> Any:
        if isinstance(value, (dict, list)):
            return len(value)
        if not isinstance(value, Tensor):
            return type(value), repr(value)
        for storage, dtype in self._storages_of(value).values():
            if storage._cdata not in self._memory:
                self._memory[storage._cdata] = storage, dtype, memory_of(storage, dtype).clone()
        version = None if "versions" in self.but or value.is_inference() else value._version
        where = [
            (part.dtype, part.shape, part.stride(), part.storage_offset(), part.untyped_storage()._cdata,
             part.untyped_storage().nbytes(), part.is_neg(), part.is_conj())
            for part in parts_of(value)
        ]  # fmt: skip
        return type(value), value.dtype, value.layout, value.requires_grad, version, where

    @staticmethod
    def _storages_of(value: Any) -> dict[int, tuple[torch.UntypedStorage, torch.dtype]]:
        parts = parts_of(value) if isinstance(value, Tensor) and not value.is_meta else []
        return {part.untyped_storage()._cdata: (part.untyped_storage(), part.dtype) for part in parts}


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


# ------------------------------------------------------------------------------------------------------- processes


def ends(pid: int) -> bool:
    """Whether a process that is not ours to wait for ends within ten seconds."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def one_process_group() -> Iterator[None]:
    """torch.distributed, with this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = torch.distributed.TCPStore("127.0.0.1", port, 1, True)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def through_file(value: Any, weights_only: bool = True) -> Any:
    """As torch.save and torch.load bring it back."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)

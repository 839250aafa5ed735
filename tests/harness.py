"""What the tests share: comparison to the bit, the oracles, the same training twice, and what proves that nothing has
changed. The private names of the product that tests need stand here, at the end; values.py has what is compared.
"""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.sgd import sgd
from values import DATA_INT, clone_exact, clone_params, memory_of, nonzero, storage_of, without_repeats

from momentum_ext import FusedMomentum, reference

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"

# ------------------------------------------------------------------------------------------------------ comparison


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The strided tensors that hold its values: itself, unless it is sparse, opaque or a subclass that wraps others."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]  # a DTensor names its mesh too
        return [part for each in inner if isinstance(each, Tensor) for part in parts_of(each)]
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return [tensor] if tensor.layout == torch.strided else []


def bits(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(where it is NaN, its bits as integers with NaNs cleared): equal exactly when values are, -0.0 unlike 0.0."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    tensor = tensor.resolve_neg().contiguous()
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor, dtype=torch.bool), tensor
    if tensor.itemsize == 1:  # no kernels in torch; of these a NaN has one pattern
        return torch.zeros_like(tensor, dtype=torch.bool), tensor.view(torch.int8)
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
    if hasattr(actual, "__tensor_flatten__") and type(actual.detach()) is type(expected.detach()):
        for part, wanted in zip(parts_of(actual), parts_of(expected), strict=True):
            assert_same(part, wanted, what)
        return
    if same_bits(actual, expected):
        return
    found, wanted = (each.detach() if each.layout == torch.strided else each.to_dense() for each in (actual, expected))
    text = f"{what}: {found.dtype} {tuple(found.shape)} is not bit-identical to {wanted.dtype} {tuple(wanted.shape)}"
    if found.shape == wanted.shape and found.numel():
        if found.itemsize == wanted.itemsize == 1:
            found, wanted = found.view(torch.uint8), wanted.view(torch.uint8)
        differs = (found != wanted) & ~(found.isnan() & wanted.isnan())
        where = differs.nonzero()
        at = tuple(where[0].tolist()) if len(where) else None
        values = f", first at {at}: {found[at].item()!r}, expected {wanted[at].item()!r}" if at is not None else ""
        text += f"; {len(where)} of {found.numel()} values differ{values}"
    raise AssertionError(text)


def assert_all_same(actual: Iterable[Tensor], expected: Iterable[Tensor], what: str = "tensors") -> None:
    for index, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_same(mine, theirs, f"{what}[{index}]")


@contextlib.contextmanager
def only_elements_written(*tensors: Tensor) -> Iterator[None]:
    """Around these tensors' elements, their storages are the same afterwards."""
    befores = [storage_of(tensor).clone() for tensor in tensors]
    yield
    for tensor, before in zip(tensors, befores, strict=True):
        before.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).copy_(tensor.detach())
        assert_same(storage_of(tensor), before, "the storage around the tensor")


def params_of(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in opt.param_groups for param in group["params"]]


def assert_same_training(
    mine: torch.optim.Optimizer, theirs: torch.optim.Optimizer, get: Callable[[Tensor], Tensor] = lambda t: t
) -> None:
    """Parameters, which state there is, and all of it, to the bit. `get` brings a tensor of `mine` to the CPU."""
    for index, (a, b) in enumerate(zip(params_of(mine), params_of(theirs), strict=True)):
        where = f"params[{index}]"
        assert_same(get(a), b, where)
        found, wanted = mine.state.get(a), theirs.state.get(b)
        assert (found is None) == (wanted is None), f"state of {where}: {found} instead of {wanted}"
        if wanted is None:
            continue
        assert set(found) == set(wanted), f"state of {where} has {set(found)} instead of {set(wanted)}"
        for key, value in wanted.items():
            if isinstance(value, Tensor):
                may_be_on_host = key in ("step", "mu_product")  # as torch's
                assert may_be_on_host or found[key].device == a.device, f"{key} of {where} is on {found[key].device}"
                assert_same(get(found[key]), value, f"{key} of {where}")
            else:
                assert found[key] == value, f"{key} of {where}"


# --------------------------------------------------------------------------------------------------------- oracles


def for_loop(params: Any, **hyper: Any) -> torch.optim.SGD:
    """torch's for-loop over tensors and operations."""
    return torch.optim.SGD(params, **{**hyper, "foreach": False, "fused": False})


class Oracle(torch.optim.SGD):
    """torch's for-loop, and where that rounds more than once per stored value, the for-loop on widened copies.

    fp32 and fp64 go through torch's for-loop itself. 16-bit and mixed dtypes are widened to the widest arithmetic
    type among parameter, gradient and buffer, go through the same for-loop, and are rounded once on the way back.
    What torch does not have, other formulations and decoupled weight decay, is momentum_ext.reference's, whose text
    test_reference.py compares with torch's for-loop and with the field's formulas. `ema_decay` is the average that
    torch.optim.swa_utils keeps; grad_scale and found_inf mean what torch.amp.GradScaler documents.
    """

    _step_supports_amp_scaling = True
    ema_decay: float | None = None  # here, because torch's copies of an optimizer do not have its attributes

    def __init__(
        self,
        params: Any,
        formulation: str = "torch",
        decoupled_weight_decay: bool = False,
        ema_decay: float | None = None,
        **hyper: Any,
    ) -> None:
        super().__init__(params, **{**hyper, "foreach": False, "fused": False})
        self.ema_decay, self.averages = ema_decay, {}
        for group in self.param_groups:
            group.setdefault("formulation", formulation)
            group.setdefault("decoupled_weight_decay", decoupled_weight_decay)

    def __getstate__(self) -> dict[str, Any]:
        """Copies go on averaging; torch's have the groups and the state alone."""
        return {**super().__getstate__(), "ema_decay": self.ema_decay, "averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but a buffer keeps its dtype until a step with momentum reads it."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, name in zip(group["params"], saved["params"], strict=True):
                buffer = state_dict["state"].get(name, {}).get("momentum_buffer")
                if group["momentum"] == 0 and buffer is not None and buffer.dtype is not param.dtype:
                    self.state[param]["momentum_buffer"] = buffer.clone()

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
        if self.ema_decay is not None:
            self._average()
        return loss

    def _update(self, param: Tensor, group: dict[str, Any], inverse: Tensor | None) -> None:
        state = self.state[param] if group["momentum"] != 0 else {}
        buffer = state.get("momentum_buffer")
        if buffer is not None and buffer.dtype is not param.dtype:  # the parameter was converted: its buffer follows
            buffer = torch.empty_like(param, memory_format=torch.preserve_format).copy_(buffer)
        tensors = [t for t in (param, param.grad, buffer) if t is not None]
        opmath = torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32
        opmath = opmath.to_complex() if param.is_complex() else opmath
        wide_param = param.detach().to(opmath)
        grad = param.grad.detach().to(opmath)
        if inverse is not None:
            grad = grad * inverse.to(opmath)
        wide_buffer = None if buffer is None else buffer.to(opmath)
        hyper = {key: group[key] for key in ("weight_decay", "momentum", "dampening", "nesterov", "maximize", "lr")}
        formulation, decoupled = (group.get(key) for key in ("formulation", "decoupled_weight_decay"))
        if formulation in (None, "torch") and not decoupled:
            buffers: list[Tensor | None] = [wide_buffer]
            sgd([wide_param], [grad], buffers, foreach=False, fused=False, **hyper)
            new = buffers[0]
        else:
            hyper |= {key: float(hyper[key]) for key in ("lr", "weight_decay")}
            wide_param, new = reference.update(
                wide_param, grad, wide_buffer, **hyper, formulation=formulation, decoupled_weight_decay=decoupled
            )
        if wide_param.data_ptr() != param.data_ptr():
            param.copy_(wide_param)
        if group["momentum"] == 0:
            return
        if buffer is None:
            buffer = torch.empty_like(param, memory_format=torch.preserve_format).copy_(new)
        elif new is not buffer:
            buffer.copy_(new)
        state["momentum_buffer"] = buffer

    def _average(self) -> None:
        """Of all parameters; the state has it from the first gradient on, before that a parameter has not moved."""
        params = dict.fromkeys(params_of(self))
        if not self.averages:
            self.averages = {param: param.detach().clone() for param in params}
        else:
            for param in params:
                self.averages[param].lerp_(param.detach(), 1.0 - self.ema_decay)
        for param in params:
            if param.grad is not None or param in self.state:
                self.state[param]["ema"] = self.averages[param]


# ------------------------------------------------------------------------------------------- the same training twice


class Pair:
    """FusedMomentum and an oracle over exact copies of the same parameters, fed the same gradients.

    The options in `mine` are FusedMomentum's alone. Its tensors may lie on other devices, by turns, where `put` and
    `get` take them to and from (cuda/devices.py); the oracle's are on the CPU.
    """

    kind: Any = FusedMomentum
    devices: Sequence[Any] = ("cpu",)
    put: Callable[[Tensor, Any], Tensor] = staticmethod(lambda tensor, device: tensor)
    get: Callable[[Tensor], Tensor] = staticmethod(lambda tensor: tensor)

    def __init__(
        self,
        params: Sequence[Any],
        oracle: Callable[..., Any] = for_loop,
        seed: int = 0,
        mine: dict[str, Any] | None = None,
        **hyper: Any,
    ) -> None:
        groups = params if params and isinstance(params[0], dict) else [{"params": list(params)}]
        self.generator = torch.Generator().manual_seed(seed)
        self.mine = self.kind(self._copy(groups), **copy.deepcopy(hyper), **(mine or {}))
        for index, param in enumerate(dict.fromkeys(params_of(self.mine))):
            param.data = self.put(param.data, self.devices[index % len(self.devices)])
        self.theirs = oracle(self._copy(groups), **copy.deepcopy(hyper))

    @classmethod
    def of(cls, mine: FusedMomentum, theirs: torch.optim.Optimizer) -> Pair:
        """Two optimizers that are there."""
        pair = cls([torch.zeros(1)])
        pair.mine, pair.theirs = mine, theirs
        return pair

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
        """(FusedMomentum's, the oracle's) for each parameter, in order."""
        return list(zip(*map(params_of, self.optimizers), strict=True))

    def each(self, index: int) -> list[tuple[torch.optim.SGD, Tensor]]:
        """(optimizer, its parameter) on both sides."""
        return list(zip(self.optimizers, self.params[index], strict=True))

    def random_like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return nonzero(tensor, dtype, self.generator)

    def set_grad(self, index: int, grad: Tensor | None) -> None:
        mine, theirs = self.params[index]
        mine.grad = None if grad is None else self.put(clone_exact(grad), mine.device)
        theirs.grad = None if grad is None else without_repeats(clone_exact(grad))

    def new_grads(self, missing: Iterable[int] = (), scale: float = 1.0) -> None:
        """Freshly allocated random gradients for every parameter but these."""
        for index, (mine, theirs) in enumerate(self.params):
            grad = self.random_like(theirs) * scale
            mine.grad = None if index in missing else self.put(grad.clone(), mine.device)
            theirs.grad = None if index in missing else grad

    def both(self, action: Callable[[Any], Any]) -> None:
        """Does the same to both optimizers."""
        for opt in self.optimizers:
            action(opt)

    def edit(self, **changes: Any) -> None:
        """Of the first group, on both sides."""
        self.both(lambda opt: opt.param_groups[0].update(copy.deepcopy(changes)))

    def step(self, times: int = 1, missing: Iterable[int] = ()) -> None:
        """New gradients, a step of both, a comparison; so many times."""
        for _ in range(times):
            self.new_grads(missing)
            self.step_as_is()

    def step_as_is(self) -> None:
        """A step of both with the gradients that are there, and a comparison."""
        self.both(lambda opt: opt.step())
        self.check()

    def check(self) -> None:
        """Parameters, which state exists, and all of it are the same, bit for bit."""
        assert_same_training(*self.optimizers, self.get)

    def check_close(self, rtol: float, atol: float) -> None:
        """Up to what two orders of rounding make."""
        for mine, theirs in self.params:
            torch.testing.assert_close(self.get(mine).detach(), theirs.detach(), rtol=rtol, atol=atol)
            found, wanted = self.mine.state.get(mine, {}), self.theirs.state.get(theirs, {})
            assert set(found) == set(wanted)
            for key, value in wanted.items():
                torch.testing.assert_close(self.get(found[key]), value, rtol=rtol, atol=atol)


def assert_alike(run: Callable[[Any], Any]) -> Any:
    """What `run(kind)` returns, tensors, is the same for FusedMomentum and for torch's for-loop; returns ours."""
    found = []
    for kind in (FusedMomentum, for_loop):
        torch.manual_seed(0)
        found.append(list(run(kind)))
    assert_all_same(*found)
    return found[0]


# ------------------------------------------------------------------------------------------------ nothing has changed


class Snapshot:
    """All that an optimizer can reach, to prove later that nothing has changed.

    Of a tensor: which object, dtype, layout, version, and the bits of all its memory, around a view too; of a DTensor
    those of its local shard. Of anything else: type and value. Also the counts that no attribute shows. `but` names
    what may differ: "grads", "groups", "versions".
    """

    def __init__(self, opt: torch.optim.Optimizer, *but: str) -> None:
        self.opt, self.but = opt, but
        self.params = params_of(opt)
        self.values = [clone_exact(p) if self._is_plain(p) else None for p in self.params]
        self.counts = counts_of(opt)
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
            if value is not None:
                assert_same(param, value, "a parameter")  # says where; the rest is compared below
        for storage, dtype, kept in self._memory.values():
            if not same_bits(memory_of(storage, dtype), kept):
                found = ((what, self._storages_of(value)) for what, (value, _) in self._found.items())
                raise AssertionError(f"the memory of {[what for what, owned in found if storage._cdata in owned]}")
        assert counts_of(self.opt) == self.counts, "the counts of steps"

    @property
    def has_moved(self) -> list[bool]:
        """Of each parameter."""
        return [not torch.equal(param, value) for param, value in zip(self.params, self.values, strict=True)]

    @staticmethod
    def _is_plain(param: Tensor) -> bool:
        if param.is_meta or param.layout != torch.strided or hasattr(param, "__tensor_flatten__"):
            return False
        last = param.storage_offset()
        last += sum((n - 1) * stride for n, stride in zip(param.shape, param.stride(), strict=True))
        return param.numel() == 0 or (last + 1) * param.itemsize <= param.untyped_storage().nbytes()

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


@contextlib.contextmanager
def refused(opt: torch.optim.Optimizer, error: Any, match: str, *but: str) -> Iterator[None]:
    """What is done inside raises this, and nothing has changed."""
    before = Snapshot(opt, *but)
    with pytest.raises(error, match=match):
        yield
    before.assert_unchanged()


# ------------------------------------------------------------------------------------------------------- processes


def run_program(*command: Any, env: dict[str, str] | None = None, without: Iterable[str] = (), **options: Any) -> Any:
    """A command with this process's environment and `env`, without some of it; its output as text."""
    environment = {key: value for key, value in os.environ.items() if key not in set(without)} | (env or {})
    options = {"capture_output": True, "text": True, "timeout": 600, **options}
    return subprocess.run([*map(str, command)], env=environment, **options)


def run_python(code: str, *arguments: Any, **options: Any) -> Any:
    return run_program(sys.executable, "-W", "ignore", "-c", code, *arguments, **options)


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


# ------------------------------------------------------------------------- what tests know of the product's insides


def counts_of(opt: Any) -> tuple[int, int] | None:
    """(updates of the averages, steps that count for random numbers) of an optimizer of ours."""
    return (int(opt._ema_count), opt._plan.rounding_step) if isinstance(opt, FusedMomentum) else None


def miscount(opt: FusedMomentum) -> None:
    """As a step that is not there would."""
    opt._ema_count.add()


def is_clipping(opt: FusedMomentum) -> bool:
    """A clip coefficient, or what unscale_() has found, waits for the next step."""
    return opt._grad_factor.is_active


def norm_in_double(opt: FusedMomentum, norm_type: float = 2.0) -> float | None:
    """The gradients' norm before it is rounded to their dtype; None where torch's own functions compute it."""
    found = opt._grad_factor._norms.compute(opt.param_groups, norm_type)
    return None if found is None else found[0]


def forbid_torchs_path(kind: type[FusedMomentum] = FusedMomentum) -> None:
    """In a process of its own: from now on a step that leaves tensors to torch's operators fails."""

    def by_torch(*_: Any) -> None:
        raise AssertionError("these tensors take torch's path")

    kind._check_torch_step = by_torch

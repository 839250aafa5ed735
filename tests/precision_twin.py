"""FusedMomentum with low-precision states, and beside it what the oracle says that every tensor must hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from helpers import assert_same, clone_exact
from precision_oracle import options_of, oracle_convert, oracle_step
from torch import Tensor

from momentum_ext import _C, FusedMomentum

BF16, FP16, FP32, FP8, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8
HALVES = (BF16, FP16)
MOMENTUM_DTYPES = (None, FP32, BF16, FP16, INT8, FP8)
STATE = ("momentum_buffer", "momentum_scale", "param_remainder", "master_param")

# Around every edge: Philox's 8 elements, vectors, blocks of 256, chunks.
SIZES = (0, 1, 7, 8, 9, 31, 255, 256, 257, 511, 512, 513, 2049)
LARGE = 70_001

HYPERS = (
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    {"momentum": 0.8, "dampening": 0.3, "maximize": True},
    {"momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True, "formulation": "classical"},
    {"momentum": 0.7, "nesterov": True, "formulation": "ema"},
)


def dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


MODES = [
    {"dtype": dtype, "momentum_dtype": momentum, "master_weights": master, "stochastic_rounding": stochastic}
    for dtype, momentum, master, stochastic in itertools.product(
        (FP32, *HALVES), MOMENTUM_DTYPES, (False, True), (False, True)
    )
]
# One of each kind of parameter and of buffer, for tests that multiply the modes with something else.
FEW = [
    {"dtype": FP32, "momentum_dtype": BF16, "stochastic_rounding": True},
    {"dtype": FP32, "momentum_dtype": INT8},
    {"dtype": BF16, "momentum_dtype": None, "stochastic_rounding": True},
    {"dtype": BF16, "momentum_dtype": FP32},
    {"dtype": BF16, "momentum_dtype": BF16, "master_weights": True},
    {"dtype": BF16, "momentum_dtype": INT8, "master_weights": True, "stochastic_rounding": True},
    {"dtype": FP16, "momentum_dtype": FP16, "stochastic_rounding": True},
    {"dtype": FP16, "momentum_dtype": FP8, "master_weights": True},
    {"dtype": FP16, "momentum_dtype": FP8, "stochastic_rounding": True},
]


def mode_name(mode: dict[str, Any]) -> str:
    parts = [dtype_name(mode["dtype"]), dtype_name(mode["momentum_dtype"])]
    parts += [short for key, short in (("master_weights", "master"), ("stochastic_rounding", "sr")) if mode.get(key)]
    return "-".join(parts)


def state_names(param: Tensor, group: dict[str, Any]) -> set[str]:
    """What a parameter's state has once it has had a step."""
    names = {"momentum_buffer"} if group["momentum"] else set()
    if names and group.get("momentum_dtype") in (INT8, FP8):
        names.add("momentum_scale")
    if group.get("master_weights") and param.dtype in HALVES:
        names.add("param_remainder" if param.dtype is BF16 else "master_param")
    return names


class Entry:
    """What one parameter must hold."""

    def __init__(self, param: Tensor) -> None:
        self.param = clone_exact(param)
        self.state: dict[str, Tensor] = {}
        self.edited = False
        """The options were edited since its last step: its state is converted in the next one."""


class Twin:
    """One optimizer and the oracle's copy of all its tensors, which each step compares to the bit."""

    def __init__(self, params: Sequence[Tensor], seed: int = 0, **options: Any) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.params = [torch.nn.Parameter(clone_exact(p)) for p in params]
        for param in self.params:
            param.grad_dtype = None
        self.opt = FusedMomentum(self.params, **{"lr": 0.1, **options})
        self.entries = [Entry(p) for p in params]
        self.taken = 0

    def random_like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Non-zero values of several sizes, contiguous."""
        values = torch.randn(tensor.shape, generator=self.generator)
        values = values * torch.rand(tensor.shape, generator=self.generator).mul(8).exp2() / 16
        return torch.where(values == 0, torch.ones_like(values), values).to(dtype or tensor.dtype)

    def new_grads(self, dtype: torch.dtype | None = None) -> None:
        for param in self.params:
            param.grad = self.random_like(param, dtype)

    def edit(self, **options: Any) -> None:
        """Edits the groups; the next step converts the state of the tensors it updates."""
        entries = iter(self.entries)
        for group in self.opt.param_groups:
            before = {key: group.get(key) or None for key in ("momentum_dtype", "master_weights")}
            group.update(options)
            converts = any((group.get(key) or None) != value for key, value in before.items())
            for _ in group["params"]:
                next(entries).edited |= converts

    def step(self, times: int = 1, dtype: torch.dtype | None = None) -> None:
        for _ in range(times):
            self.new_grads(dtype)
            self.step_as_is()

    def step_as_is(self) -> None:
        """A step with the gradients that are there, and a comparison."""
        positions = [(group, param) for group in self.opt.param_groups for param in group["params"]]
        fma = _C.isa() != "baseline"
        for index, ((group, param), entry) in enumerate(zip(positions, self.entries, strict=True)):
            if param.grad is None:
                continue
            options = options_of(group, step=self.taken, tensor=index, fma=fma)
            if entry.edited:
                entry.state, entry.edited = oracle_convert(entry.state, entry.param, options), False
            entry.param, entry.state = oracle_step(entry.param, param.grad, entry.state, options)
        grads = [None if param.grad is None else clone_exact(param.grad) for param in self.params]
        self.opt.step()
        self.taken += 1
        self.check()
        for param, grad in zip(self.params, grads, strict=True):
            if grad is not None:
                assert_same(param.grad, grad, "gradient")

    def check(self) -> None:
        positions = [(group, param) for group in self.opt.param_groups for param in group["params"]]
        for index, ((group, param), entry) in enumerate(zip(positions, self.entries, strict=True)):
            assert_same(param, entry.param, f"params[{index}]")
            if not entry.state or entry.edited:
                continue
            state = self.opt.state[param]
            found = {name for name in STATE if name in state}
            assert found == state_names(param, group), f"state of params[{index}]: {sorted(found)}"
            for name in found:
                what = f"{name} of params[{index}], step {self.taken}"
                if param.numel():
                    assert state[name].stride() == entry.state[name].stride(), what
                assert_bits(state[name], entry.state[name], what)


def assert_bits(found: Tensor, expected: Tensor, what: str) -> None:
    """fp8 by its bytes, of which none may be a NaN; else as assert_same."""
    if found.dtype is FP8 and expected.dtype is FP8:
        found, expected = found.view(torch.uint8), expected.view(torch.uint8)
    assert_same(found, expected, what)

"""FusedMomentum with low-precision states, and beside it what the oracle says that every tensor must hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from harness import assert_same, params_of
from precision_oracle import Options, as_live, as_saved, options_of, oracle_convert, oracle_step, parts_of_value
from torch import Tensor
from values import BF16, FP8, FP16, FP32, HALVES, INT4, INT8, clone_exact, dtype_name, through_pickle

from momentum_ext import _C, FusedMomentum

MOMENTUM_DTYPES = (None, FP32, BF16, FP16, INT8, FP8, INT4)
STATE = ("momentum_buffer", "momentum_scale", "param_remainder", "master_param")

# Around every edge: Philox's 8 elements, vectors, blocks of 32, tiles of 256, chunks.
SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 65, 255, 256, 257, 511, 512, 513, 2049)
LARGE = 70_001

HYPERS = (
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    {"momentum": 0.8, "dampening": 0.3, "maximize": True},
    {"momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True, "formulation": "classical"},
    {"momentum": 0.7, "nesterov": True, "formulation": "ema"},
)


MODES = [
    {"dtype": dtype, "momentum_dtype": momentum, "master_weights": master, "stochastic_rounding": stochastic}
    for dtype, momentum, master, stochastic in itertools.product(
        (FP32, *HALVES), MOMENTUM_DTYPES, (False, True), (False, True)
    )
]
MODES += [
    {"dtype": BF16, "momentum_dtype": momentum, "master_weights": 24, "stochastic_rounding": stochastic}
    for momentum, stochastic in itertools.product(MOMENTUM_DTYPES, (None, False, True))
]
# One of each kind of parameter and of buffer, for tests that multiply the modes with something else.
FEW = [
    {"dtype": FP32, "momentum_dtype": BF16, "stochastic_rounding": True},
    {"dtype": FP32, "momentum_dtype": INT8},
    {"dtype": FP32, "momentum_dtype": INT4, "stochastic_rounding": True},
    {"dtype": BF16, "momentum_dtype": None, "stochastic_rounding": True},
    {"dtype": BF16, "momentum_dtype": FP32},
    {"dtype": BF16, "momentum_dtype": BF16, "master_weights": True},
    {"dtype": BF16, "momentum_dtype": INT8, "master_weights": True, "stochastic_rounding": True},
    {"dtype": BF16, "momentum_dtype": INT8, "master_weights": 24},
    {"dtype": BF16, "momentum_dtype": INT4, "master_weights": 24},
    {"dtype": BF16, "momentum_dtype": BF16, "master_weights": 24, "stochastic_rounding": True},
    {"dtype": FP16, "momentum_dtype": FP16, "stochastic_rounding": True},
    {"dtype": FP16, "momentum_dtype": FP8, "master_weights": True},
    {"dtype": FP16, "momentum_dtype": FP8, "stochastic_rounding": True},
]


def mode_name(mode: dict[str, Any]) -> str:
    parts = [dtype_name(mode["dtype"]), dtype_name(mode["momentum_dtype"])]
    parts += {24: ["master24"], True: ["master"]}.get(mode.get("master_weights"), [])
    parts += ["sr"] if mode.get("stochastic_rounding") else []
    if mode.get("master_weights") == 24 and mode.get("stochastic_rounding") is False:
        parts += ["nearest"]
    return "-".join(parts)


def plain_pickle_takes_fp8() -> bool:
    """torch 2.13's does not, whoever pickles: an fp8 tensor comes back from torch.save alone."""
    try:
        through_pickle(torch.zeros(1).to(FP8))
    except AttributeError:
        return False
    return True


def options_of_mode(mode: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mode.items() if key != "dtype"}


class Entry:
    """What one parameter must hold."""

    def __init__(self, param: Tensor) -> None:
        self.param = clone_exact(param)
        self.state: dict[str, Tensor] = {}


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
        self.formulations = [group.get("formulation", "torch") for group in self.opt.param_groups]
        """In which the groups' buffers are written."""

    def random_like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Non-zero values of several sizes, contiguous."""
        values = torch.randn(tensor.shape, generator=self.generator)
        values = values * torch.rand(tensor.shape, generator=self.generator).mul(8).exp2() / 16
        return torch.where(values == 0, torch.ones_like(values), values).to(dtype or tensor.dtype)

    def new_grads(self, dtype: torch.dtype | None = None) -> None:
        for param in self.params:
            param.grad = self.random_like(param, dtype)

    def edit(self, **options: Any) -> None:
        for group in self.opt.param_groups:
            group.update(options)

    def positions(self) -> Iterator[tuple[int, Tensor, Entry, Options]]:
        """(group, parameter, entry, options) of each parameter."""
        pairs = [(g, param) for g, group in enumerate(self.opt.param_groups) for param in group["params"]]
        for index, ((g, param), entry) in enumerate(zip(pairs, self.entries, strict=True)):
            group, fma = self.opt.param_groups[g], _C.isa() != "baseline"
            yield g, param, entry, options_of(group, step=self.taken, tensor=index, fma=fma)

    def converted(self) -> list[dict[str, Tensor]]:
        """What the next step starts from."""
        return [
            oracle_convert(entry.state, entry.param, options, self.formulations[g])
            for g, _, entry, options in self.positions()
        ]

    def step(self, times: int = 1, dtype: torch.dtype | None = None) -> None:
        for _ in range(times):
            self.new_grads(dtype)
            self.step_as_is()

    def step_as_is(self) -> None:
        """A step with the gradients that are there, and a comparison."""
        for (g, param, entry, options), state in zip(self.positions(), self.converted(), strict=True):
            if param.grad is not None:
                entry.param, entry.state = oracle_step(entry.param, param.grad, state, options)
            elif options.momentum != 0 and options.formulation != self.formulations[g]:
                entry.state = state  # all buffers of a group are in one formulation
        grads = [None if param.grad is None else clone_exact(param.grad) for param in self.params]
        self.opt.step()
        self._note_formulations()
        self.taken += any(group["lr"] != 0 for group in self.opt.param_groups)
        self.check()
        for param, grad in zip(self.params, grads, strict=True):
            if grad is not None:
                assert_same(param.grad, grad, "gradient")

    def _note_formulations(self) -> None:
        for g, group in enumerate(self.opt.param_groups):
            if group["momentum"] != 0:
                self.formulations[g] = group.get("formulation", "torch")

    def load(self, state_dict: dict[str, Any], opt: FusedMomentum | None = None) -> None:
        """Its own state dict comes back, to this optimizer or to `opt`, which has the same options."""
        for entry, state in zip(self.entries, self.converted(), strict=True):
            entry.state = as_saved(state, entry.param)
        self._note_formulations()
        opt = opt or self.opt
        opt.load_state_dict(state_dict)
        self.move_to(opt)

    def move_to(self, opt: FusedMomentum) -> None:
        """Goes on with a copy of the optimizer."""
        self.opt = opt
        self.params = params_of(opt)
        for param in self.params:
            param.grad_dtype = None
        self.check()

    def check(self) -> None:
        """What is held is what the last step has left, whatever was edited since."""
        for index, (_, param, entry, _) in enumerate(self.positions()):
            assert_same(param, entry.param, f"params[{index}]")
            assert_state(self.opt.state.get(param, {}), entry.state, f"params[{index}], step {self.taken}")

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """It has what the next step starts from, in dtypes that travel."""
        found = state_dict["state"]
        for index, wanted in enumerate(self.converted()):
            entry = found.get(index, {})
            assert not {each.dtype for value in entry.values() for each in parts_of_value(value)} & {torch.int16, FP8}
            param = self.entries[index].param
            assert_state(as_live(entry, param), as_saved(wanted, param), f"state_dict()'s {index}")


def assert_state(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    assert {name for name in STATE if name in found} == set(wanted), f"state of {what}: {sorted(found)}"
    for name, value in wanted.items():
        if value.numel():  # the stride of a dimension of one element says nothing
            strides = [
                [s for s, size in zip(each.stride(), value.shape, strict=True) if size > 1]
                for each in (found[name], value)
            ]
            assert strides[0] == strides[1], f"{name} of {what}"
        assert_same(found[name], value, f"{name} of {what}")


def twin_of(mode: dict[str, Any], sizes: Sequence[int] = SIZES, **hyper: Any) -> Twin:
    return Twin([torch.randn(size).to(mode["dtype"]) for size in sizes], **options_of_mode(mode), **hyper)


def optimizer_of(*params: Tensor, steps: int = 0, **options: Any) -> FusedMomentum:
    """After steps with random gradients; the next gradients are there."""
    opt = FusedMomentum(params, **{"lr": 0.1, "momentum": 0.9, **options})
    give_grads(opt)
    for _ in range(steps):
        opt.step()
        give_grads(opt)
    return opt


def give_grads(opt: FusedMomentum) -> None:
    for param in params_of(opt):
        param.grad = torch.randn(param.shape).to(param.dtype)

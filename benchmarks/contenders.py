"""The contenders: each builds an optimizer on tensors of its own and hands back its step, warmed up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from memory_limit import Traffic
from timing import Step
from torch import Tensor
from workloads import Group, Workload

WARMUP_STEPS = 3
"""Steps before the clock: the first creates the state, the others settle allocators, plans and threads."""

MOST_TENSORS_TO_COMPILE = 200
"""Longer lists are not compiled. CPU seconds that it took with torch 2.13.0: 39 for 200 tensors, 118 for 465 tensors in
465 groups; 1,000 tensors had not finished after 165 s of wall time."""


@dataclass(frozen=True)
class Rule:
    """Whose step is timed: ours by its name in momentum_ext, and torch's."""

    ours: str
    torch: type[torch.optim.Optimizer]
    updated: int
    """Arrays of the parameters' size that a step reads and writes: the parameter and its states."""
    has_fused: bool = True


RULES: dict[str, Rule] = {
    "momentum": Rule("FusedMomentum", torch.optim.SGD, updated=2),
    "adamw": Rule("FusedAdamW", torch.optim.AdamW, updated=3),
    "nadam": Rule("FusedNAdam", torch.optim.NAdam, updated=3, has_fused=False),
}


@dataclass(frozen=True)
class Settings:
    """What all contenders share."""

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    threads: int = 1
    device: str = "cpu"
    rule: Rule = RULES["momentum"]

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the rule's optimizers; Adam's betas and eps are torch's defaults."""
        return self.sgd if self.rule.torch is torch.optim.SGD else {"lr": self.lr, "weight_decay": self.weight_decay}

    @property
    def sgd(self) -> dict[str, Any]:
        """The keyword arguments of torch.optim.SGD."""
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay, "nesterov": self.nesterov}


@dataclass(frozen=True)
class Pass:
    """What is timed: here one optimizer step. A pipeline around the step is another Pass."""

    name: str
    updated: int
    """Arrays of the parameters' size that are read and written: parameter, momentum buffer."""
    norm: bool = False
    """Whether gradients are read once more before, for their norm."""

    def traffic(self, itemsize: int) -> Traffic:
        """The arrays that it goes over."""
        return Traffic((itemsize,) * self.updated, (itemsize,), self.norm)


STEP = Pass("step", updated=2)


def step_of(rule: Rule) -> Pass:
    """The pass of a rule's step."""
    return Pass("step", rule.updated)


class Model:
    """Parameters with gradients, in parameter groups, filled from a seed; no gradient is zero."""

    def __init__(self, groups: list[tuple[list[torch.nn.Parameter], float]]) -> None:
        self._groups = groups

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups for an optimizer's constructor; new dicts each time: it adds its defaults to them."""
        return [{"params": list(params), "lr": lr} for params, lr in self._groups]

    @classmethod
    def random(
        cls,
        workload: Workload,
        settings: Settings,
        param_dtype: torch.dtype | None = None,
        grad_dtype: torch.dtype | None = None,
    ) -> Model:
        """The workload's shapes with values uniform in [-1, 1) and gradients uniform in [1, 2) / 100.

        They are drawn in the workload's dtype, and then cast to those that are given. Parameters are contiguous,
        gradients laid out as the workload says.
        """
        kind = {"device": settings.device, "dtype": getattr(torch, workload.dtype)}
        generator = torch.Generator(settings.device).manual_seed(0)
        groups: list[tuple[list[torch.nn.Parameter], float]] = []
        for group in workload.groups:
            params = []
            for shape in group.shapes:
                values = torch.empty(shape, **kind).uniform_(-1, 1, generator=generator)
                param = torch.nn.Parameter(values.to(param_dtype or values.dtype))
                grad = torch.empty(shape, **kind).uniform_(0.01, 0.02, generator=generator)
                param.grad = laid_out(grad.to(grad_dtype or grad.dtype), workload.grad_layout)
                params.append(param)
            groups.append((params, settings.lr * group.lr_factor))
        return cls(groups)

    def copy(self) -> Model:
        """The same values in memory of its own."""
        return Model([([_copy(param) for param in params], lr) for params, lr in self._groups])

    @property
    def params(self) -> list[Tensor]:
        """All parameters, in order."""
        return [param for params, _ in self._groups for param in params]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The values in another layout, where the tensor has the dimensions for it."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.dim() == 2:
        return tensor.t().contiguous().t()
    return tensor


def _copy(param: torch.nn.Parameter) -> torch.nn.Parameter:
    assert param.grad is not None
    copy = torch.nn.Parameter(param.detach().clone())
    copy.grad = param.grad.clone()
    return copy


class NotRun(Exception):
    """A contender that is left out on purpose or fails; the message is the reason shown in its row."""


@dataclass(frozen=True)
class Contender:
    """One way to take the step.

    `key` names it in options and in JSON, `label` in tables and pictures; `build` makes the step, after warm-up.
    """

    key: str
    label: str
    build: Callable[[Model, Settings], Step]
    moves_the_pass: bool = True
    """Whether it goes over the bytes that the pass counts: states of other dtypes are other bytes."""


def warm(step: Step) -> Step:
    """The step, after a few that are not timed."""
    for _ in range(WARMUP_STEPS):
        step()
    return step


def ours(model: Model, settings: Settings) -> Step:
    """The rule's optimizer of momentum_ext."""
    import momentum_ext  # imported late, so that --help works where nothing is built

    return warm(getattr(momentum_ext, settings.rule.ours)(model.groups, **settings.arguments).step)


def torch_step(**path: Any) -> Callable[[Model, Settings], Step]:
    """The rule's optimizer of torch.optim by the given path (foreach, fused)."""

    def build(model: Model, settings: Settings) -> Step:
        known = {key: value for key, value in path.items() if key != "fused" or settings.rule.has_fused}
        return warm(settings.rule.torch(model.groups, **settings.arguments, **known).step)

    return build


def flash_sgd(model: Model, settings: Settings) -> Step:
    """FlashOptim's SGD, with momentum of 8 bits and parameters of 24. Raises NotRun."""
    if settings.device != "cuda":
        raise NotRun("not run: it has no 8-bit momentum on the CPU")
    try:
        from flashoptim import FlashSGD  # type: ignore[import-not-found]  # where one has it
    except ImportError as error:
        raise NotRun("not run: pip install flashoptim") from error
    return warm(FlashSGD(model.groups, **settings.sgd, master_weight_bits=24).step)


def compiled(model: Model, settings: Settings) -> Step:
    """torch.compile around the step of torch's optimizer, as torch's documentation shows it. Raises NotRun."""
    tensors = len(model.params)
    if tensors > MOST_TENSORS_TO_COMPILE:
        raise NotRun(
            f"not run: compiling a step of {tensors:,} tensors takes minutes (limit {MOST_TENSORS_TO_COMPILE})"
        )
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    optimizer = settings.rule.torch(model.groups, **settings.arguments)
    optimizer.step()  # the state exists before tracing, so that one graph serves every later step
    step = torch.compile(lambda: optimizer.step())
    torch._logging.set_logs(all=logging.ERROR)  # type: ignore[attr-defined]
    try:
        warm(step)
    except Exception as error:  # whatever breaks in the compiler belongs in this row, not in the way of the others
        raise NotRun(f"failed: {type(error).__name__}: {first_line(error)}") from error
    if not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        raise NotRun("failed: torch.compile fell back to eager")
    return step


CONTENDERS: tuple[Contender, ...] = (
    Contender("ours", "ours", ours),
    Contender("default", "torch default", torch_step()),
    Contender("fused", "torch fused", torch_step(fused=True)),
    Contender("for-loop", "torch for-loop", torch_step(foreach=False, fused=False)),
    Contender("foreach", "torch foreach", torch_step(foreach=True)),
    Contender("compiled", "torch compiled", compiled),
)

KEYS: tuple[str, ...] = tuple(contender.key for contender in CONTENDERS)


def fault_of_fused(workload: Workload, settings: Settings) -> str | None:
    """What torch's fused step does wrong with such dtypes and layouts, tried on small tensors; None where nothing."""
    small = replace(workload, groups=(Group(((8, 4, 4, 4), (32, 16))),))
    settings = replace(settings, lr=1.0)
    model = Model.random(small, settings)
    expected = model.copy()
    try:
        warm(torch_step(fused=True)(model, settings))
    except RuntimeError as error:
        return f"torch refuses: {first_line(error)}"
    warm(torch_step(foreach=False, fused=False)(expected, settings))
    difference = largest_difference(model.params, expected.params)
    return "its results are not those of torch's for-loop" if difference > 0.03 else None


def first_line(error: Exception) -> str:
    """An error's message, its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason_of(error: Exception) -> str:
    """Why something has no figures, as its row shows it."""
    if isinstance(error, NotRun):
        return str(error)
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "t allocate memory" in str(error)
    return ("not run: out of memory: " if out_of_memory else f"failed: {type(error).__name__}: ") + first_line(error)


def largest_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest absolute difference between two lists of tensors; 0.0 where every bit is the same."""
    largest = 0.0
    for one, other in zip(first, second, strict=True):
        as_int = {2: torch.int16, 4: torch.int32}[one.element_size()]
        if not torch.equal(one.detach().view(as_int), other.detach().view(as_int)):
            largest = max(largest, float((one.detach().double() - other.detach().double()).abs().max()))
    return largest

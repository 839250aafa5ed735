"""The table of the adaptive rules, and their oracles: torch's for-loops with correctly rounded square roots.

torch's own square root is MKL's on x86, which is an ulp off in some values, by the processor (pytorch#31250). numpy's
is the processor's instruction, which is correctly rounded everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from harness import Pair
from torch import Tensor

from momentum_ext import FusedAdam, FusedAdamW, FusedNAdam


@contextlib.contextmanager
def exact_roots() -> Iterator[None]:
    def sqrt(self: Tensor) -> Tensor:
        if type(self.detach()) is not Tensor:  # of a DTensor: torch's own
            return torch.sqrt(self)
        return torch.from_numpy(numpy.asarray(numpy.sqrt(self.detach().numpy())))

    with mock.patch.object(torch.Tensor, "sqrt", sqrt):
        yield


@dataclass(frozen=True)
class Rule:
    name: str
    kind: Any
    torch_kind: Any
    options: tuple[dict[str, Any], ...] = field(default=())
    states: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def loop(self, params: Any, **hyper: Any) -> torch.optim.Optimizer:
        """torch's for-loop; in 16 bits and mixed dtypes on widened copies, rounded once for each stored value."""
        fused = {} if self.name == "nadam" else {"fused": False}
        hyper.pop("fused", None)
        kind = type(f"{self.torch_kind.__name__}Loop", (_Loop, self.torch_kind), {})
        return kind(params, **{**hyper, "foreach": False, **fused})

    def pair(self, params: Any, **options: Any) -> AdaptivePair:
        kind = type(f"{self.kind.__name__}Pair", (AdaptivePair,), {"kind": self.kind})
        return kind(params, self.loop, **options)


class AdaptivePair(Pair):
    """As Pair, of an adaptive rule."""


class _Loop(torch.optim.Optimizer):
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        with exact_roots(), torch.no_grad():
            if all(self._is_exact(param) for group in self.param_groups for param in group["params"]):
                super().step()
            else:
                self._step_widened()
        return loss

    def _tensors(self, param: Tensor) -> list[Tensor]:
        state = [each for key, each in self.state.get(param, {}).items() if each.dim() or key.startswith("exp_avg")]
        return [param, *([] if param.grad is None else [param.grad]), *state]

    def _is_exact(self, param: Tensor) -> bool:
        dtypes = {each.dtype for each in self._tensors(param)}
        return len(dtypes) == 1 and not dtypes & {torch.bfloat16, torch.float16}

    def _step_widened(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                is_double = any(each.dtype == torch.float64 for each in self._tensors(param))
                opmath = torch.float64 if is_double else torch.float32
                wide = param.detach().to(opmath).requires_grad_()
                wide.grad = param.grad.to(opmath)
                inner = type(self).__mro__[2]([wide], foreach=False)
                inner.param_groups = [{**group, "params": [wide]}]
                state = self.state[param]
                if state:
                    inner.state[wide] = {k: v.to(opmath) if k.startswith("exp") else v for k, v in state.items()}
                inner.step()
                param.copy_(wide)
                for key, new in inner.state[wide].items():
                    if key in ("step", "mu_product"):
                        state[key] = new
                    elif key in state:
                        state[key].copy_(new)
                    else:
                        state[key] = torch.empty_like(param, memory_format=torch.preserve_format).copy_(new)


_SHARED = ({}, {"weight_decay": 0.1}, {"betas": (0.3, 0.99), "eps": 1e-3}, {"betas": (0.0, 0.5)}, {"maximize": True})
_AMSGRAD = ({"amsgrad": True}, {"amsgrad": True, "weight_decay": 0.1, "maximize": True, "betas": (0.5, 0.9)})
RULES = [
    Rule(
        "adam",
        FusedAdam,
        torch.optim.Adam,
        (*_SHARED, *_AMSGRAD, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ),
    Rule("adamw", FusedAdamW, torch.optim.AdamW, (*_SHARED, *_AMSGRAD)),
    Rule(
        "nadam",
        FusedNAdam,
        torch.optim.NAdam,
        (*_SHARED, {"momentum_decay": 0.3}, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ),
]
EACH_RULE = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
EACH_OPTION = pytest.mark.parametrize(
    ("rule", "options"),
    [pytest.param(rule, options, id=f"{rule.name}-{options}") for rule in RULES for options in rule.options],
)
